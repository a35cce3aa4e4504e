"""Architectures against timm's arguments, and every name against the file that its users mean."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import timm
import timm.models

from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.nets.arch import Arch
from flaxnets.zoo.records import Config, config_from_json, to_json

NAMES = [
    'res2net50_14w_8s',
    'res2net50_26w_4s',
    'res2net50_26w_6s',
    'res2net50_26w_8s',
    'res2net50_48w_2s',
    'res2net50d',
    'res2net101_26w_4s',
    'res2net101d',
    'res2next50',
    'resnest14d',
    'resnest26d',
    'resnest50_fast_1s1x64d',
    'resnest50_fast_1s2x40d',
    'resnest50_fast_2s1x64d',
    'resnest50_fast_2s2x40d',
    'resnest50_fast_4s1x64d',
    'resnest50d',
    'resnest50d_1s4x24d',
    'resnest50d_4s2x40d',
    'resnest101e',
    'resnest200e',
    'resnest269e',
    'resnext50_32x4d',
    'resnext50d_32x4d',
    'resnext101_32x4d',
    'resnext101_32x8d',
    'resnext101_32x16d',
    'resnext101_32x32d',
    'resnext101_32x48d',
    'resnext101_64x4d',
    'resnext152_32x4d',
    'seresnext50_32x4d',
    'seresnext101_32x4d',
    'seresnext101_64x4d',
]
IN_TIMM = [name for name in NAMES if timm.is_model(name)]
ROWS = {row.name: row for row in zoo.WEIGHTS}


def test_the_architectures_are_those_of_the_table() -> None:
    assert sorted(zoo.ARCHS) == sorted(NAMES)
    assert len(IN_TIMM) == 27


@pytest.mark.parametrize('name', IN_TIMM)
def test_arguments_are_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, create in (
        (timm.models.resnet, '_create_resnet'),
        (timm.models.res2net, '_create_res2net'),
        (timm.models.resnest, '_create_resnest'),
    ):
        monkeypatch.setattr(module, create, lambda variant, pretrained=False, **kwargs: kwargs)
    theirs: Any = timm.models.model_entrypoint(name)()
    block: Any = theirs.get('block_args', {})
    assert dataclasses.asdict(zoo.ARCHS[name]) == {
        'block': {'Bottleneck': 'resnext', 'Bottle2neck': 'res2net', 'ResNestBottleneck': 'resnest'}[
            theirs['block'].__name__
        ],
        'layers': tuple(theirs['layers']),
        'cardinality': theirs.get('cardinality', 1),
        'base_width': theirs.get('base_width', 64),
        'scale': block.get('scale', 1),
        'radix': block.get('radix', 1),
        'deep_stem': theirs.get('stem_type', '') == 'deep',
        'stem_width': theirs.get('stem_width', 64),
        'avg_down': theirs.get('avg_down', False),
        'avd_first': block.get('avd_first', False),
        'se': block.get('attn_layer') == 'se',
        'planes': 64,
    }


def fast(radix: int, cardinality: int, base_width: int) -> Arch:
    return Arch('resnest', (3, 4, 6, 3), cardinality, base_width, 1, radix, True, 32, True, True)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('resnext101_32x48d', Arch('resnext', (3, 4, 23, 3), 32, 48)),
        ('resnext152_32x4d', Arch('resnext', (3, 8, 36, 3), 32, 4)),
        ('resnest50_fast_1s1x64d', fast(1, 1, 64)),
        ('resnest50_fast_2s1x64d', fast(2, 1, 64)),
        ('resnest50_fast_4s1x64d', fast(4, 1, 64)),
        ('resnest50_fast_1s2x40d', fast(1, 2, 40)),
        ('resnest50_fast_2s2x40d', fast(2, 2, 40)),
    ],
)
def test_arguments_of_those_that_timm_lacks(name: str, expected: Arch) -> None:
    assert zoo.ARCHS[name] == expected


# Names

ALIASES = {
    # timm before 0.9
    'gluon_resnext50_32x4d': 'gluon_resnext50_32x4d-e6a097c1.pth',
    'gluon_resnext101_32x4d': 'gluon_resnext101_32x4d-b253c8c4.pth',
    'gluon_resnext101_64x4d': 'gluon_resnext101_64x4d-f9a8e184.pth',
    'gluon_seresnext50_32x4d': 'gluon_seresnext50_32x4d-90cf2d6e.pth',
    'gluon_seresnext101_32x4d': 'gluon_seresnext101_32x4d-cf52900d.pth',
    'gluon_seresnext101_64x4d': 'gluon_seresnext101_64x4d-f9926f93.pth',
    'tv_resnext50_32x4d': 'resnext50_32x4d-7cdf4587.pth',
    'tv_resnext101_32x8d': 'resnext101_32x8d-8ba56ff5.pth',
    'tv_resnext101_64x4d': 'resnext101_64x4d-173b62eb.pth',
    'ig_resnext101_32x8d': 'ig_resnext101_32x8-c38310e5.pth',
    'ig_resnext101_32x16d': 'ig_resnext101_32x16-c6f796b0.pth',
    'ig_resnext101_32x32d': 'ig_resnext101_32x32-e4b90b00.pth',
    'ig_resnext101_32x48d': 'ig_resnext101_32x48-3e41cc8a.pth',
    'ssl_resnext50_32x4d': 'semi_supervised_resnext50_32x4-ddb3e555.pth',
    'ssl_resnext101_32x4d': 'semi_supervised_resnext101_32x4-dc43570a.pth',
    'ssl_resnext101_32x8d': 'semi_supervised_resnext101_32x8-2cfe2f8b.pth',
    'ssl_resnext101_32x16d': 'semi_supervised_resnext101_32x16-15fffa57.pth',
    'swsl_resnext50_32x4d': 'semi_weakly_supervised_resnext50_32x4-72679e44.pth',
    'swsl_resnext101_32x4d': 'semi_weakly_supervised_resnext101_32x4-3f87e46b.pth',
    'swsl_resnext101_32x8d': 'semi_weakly_supervised_resnext101_32x8-b4712904.pth',
    'swsl_resnext101_32x16d': 'semi_weakly_supervised_resnext101_32x16-f3559a9c.pth',
    # Facebook's own names
    'resnext101_32x16d_wsl': 'ig_resnext101_32x16-c6f796b0.pth',
    'resnext50_32x4d_ssl': 'semi_supervised_resnext50_32x4-ddb3e555.pth',
    'resnext101_32x4d_swsl': 'semi_weakly_supervised_resnext101_32x4-3f87e46b.pth',
    # torchvision
    'ResNeXt50_32X4D_Weights.IMAGENET1K_V2': 'resnext50_32x4d-1a0047aa.pth',
    'ResNeXt101_32X8D_Weights.IMAGENET1K_V1': 'resnext101_32x8d-8ba56ff5.pth',
    # mmpretrain
    'res2net50-w14-s8_3rdparty_8xb32_in1k': 'res2net50-w14-s8_3rdparty_8xb32_in1k_20210927-bc967bf1.pth',
    'res2net50-w14-s8': 'res2net50-w14-s8_3rdparty_8xb32_in1k_20210927-bc967bf1.pth',
    'res2net50-w26-s8_3rdparty_8xb32_in1k': 'res2net50-w26-s8_3rdparty_8xb32_in1k_20210927-f547a94b.pth',
    'res2net50-w26-s8': 'res2net50-w26-s8_3rdparty_8xb32_in1k_20210927-f547a94b.pth',
    'res2net101-w26-s4_3rdparty_8xb32_in1k': 'res2net101-w26-s4_3rdparty_8xb32_in1k_20210927-870b6c36.pth',
    'res2net101-w26-s4': 'res2net101-w26-s4_3rdparty_8xb32_in1k_20210927-870b6c36.pth',
    'resnext50-32x4d_8xb32_in1k': 'resnext50_32x4d_b32x8_imagenet_20210429-56066e27.pth',
    'resnext50-32x4d': 'resnext50_32x4d_b32x8_imagenet_20210429-56066e27.pth',
    'resnext101-32x4d_8xb32_in1k': 'resnext101_32x4d_b32x8_imagenet_20210506-e0fa3dd5.pth',
    'resnext101-32x4d': 'resnext101_32x4d_b32x8_imagenet_20210506-e0fa3dd5.pth',
    'resnext101-32x8d_8xb32_in1k': 'resnext101_32x8d_b32x8_imagenet_20210506-23a247d5.pth',
    'resnext101-32x8d': 'resnext101_32x8d_b32x8_imagenet_20210506-23a247d5.pth',
    'resnext152-32x4d_8xb32_in1k': 'resnext152_32x4d_b32x8_imagenet_20210524-927787be.pth',
    'resnext152-32x4d': 'resnext152_32x4d_b32x8_imagenet_20210524-927787be.pth',
    # the Res2Net authors
    'res2net50': 'res2net50_26w_4s-06e79181.pth',
    'res2next50_4s': 'res2next50_4s-6ef7e7bf.pth',
    'res2net50_v1b': 'res2net50_v1b_26w_4s-3cf99910.pth',
    'res2net50_v1b_26w_4s': 'res2net50_v1b_26w_4s-3cf99910.pth',
    'res2net101_v1b': 'res2net101_v1b_26w_4s-0812c246.pth',
    'res2net101_v1b_26w_4s': 'res2net101_v1b_26w_4s-0812c246.pth',
    # the ResNeSt authors and GluonCV
    'resnest14': 'gluon_resnest14-9c8fe254.pth',
    'resnest26': 'gluon_resnest26-50eb607c.pth',
    'resnest50': 'resnest50-528c19ca.pth',
    'resnest101': 'resnest101-22405ba7.pth',
    'resnest200': 'resnest200-75117900.pth',
    'resnest269': 'resnest269-0cc87c48.pth',
    'resnest50_fast_4s2x40d': 'resnest50_fast_4s2x40d-41d14ed0.pth',
    'resnest50_fast_1s4x24d': 'resnest50_fast_1s4x24d-d4a4f76f.pth',
    # other spellings of a full name
    'resnest50.in1k': 'resnest50-528c19ca.pth',
    'resnest50.mm_in1k': 'resnest50_imagenet_converted-1ebf0afe.pth',
    'timm/resnest101e.in1k': 'resnest101-22405ba7.pth',
    'hf-hub:timm/resnest101e.in1k': 'resnest101-22405ba7.pth',
    'hf_hub:timm/resnext50_32x4d.a3_in1k': 'resnext50_32x4d_a3_0-3e450271.pth',
    ' ResNeSt50D ': 'resnest50-528c19ca.pth',
    'Gluon_ResNeXt50_32x4d': 'gluon_resnext50_32x4d-e6a097c1.pth',
}


@pytest.mark.parametrize(('name', 'file'), ALIASES.items())
def test_name_means_exactly_this_file(name: str, file: str) -> None:
    arch, row = zoo.resolve(name)
    assert row is not None
    assert row.arch == arch
    assert [url.rpartition('/')[2] for url in row.urls[:1]] == [file]
    assert zoo.find_file(file) is row


def test_every_alias_resolves() -> None:
    for row in zoo.WEIGHTS:
        for alias in (row.name, *row.aliases):
            assert zoo.resolve(alias) == (row.arch, row)
    for alias, arch in zoo.ARCH_ALIASES.items():
        assert zoo.resolve(alias) == zoo.resolve(arch)


def test_old_names_are_timms_but_for_its_wrong_sizes() -> None:
    # timm maps these three to the 32x8d file.
    wrong = {'ig_resnext101_32x16d', 'ig_resnext101_32x32d', 'ig_resnext101_32x48d'}
    old = {
        old: new
        for old, new in timm.models._registry._deprecated_models.items()
        if new and new.partition('.')[0] in zoo.ARCHS
    }
    assert len(old) > 15
    for name, new in old.items():
        _, row = zoo.resolve(name)
        assert row is not None
        assert (row.name == new) == (name not in wrong)


def test_an_architecture_without_weights_has_a_name_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, 'WEIGHTS', ())
    assert zoo.resolve('resnest50') == ('resnest50d', None)
    assert zoo.config('resnest50') == Config('resnest50d', zoo.ARCHS['resnest50d'])
    with pytest.raises(FlaxnetsError, match="tagged 'in1k'; its tags are none"):
        zoo.resolve('resnest50.in1k')


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('resnest51', ['resnest50']),
        ('resnext50_32x4', ['resnext50_32x4d']),
        ('gluon_resnext51_32x4d', ['gluon_resnext50_32x4d']),
        ('resnest50_d.in1k', ['resnest50d']),
        ('hf-hub:someone/resnest50d_', ['resnest50d']),
        ('res2net50-w26', ['res2net50-w26-s8']),
        ('ResNeXt50_32X4D_Weights.IMAGENET1K_V3', ['ResNeXt50_32X4D_Weights.IMAGENET1K_V1']),
    ],
)
def test_unknown_name_gets_the_nearest(name: str, near: list[str]) -> None:
    with pytest.raises(FlaxnetsError) as error:
        zoo.resolve(name)
    message = str(error.value)
    assert repr(name) in message
    hint = message.partition('did you mean ')[2].partition('?')[0].split(' or ')
    assert len(hint) <= 3
    assert set(near) <= set(hint)


@pytest.mark.parametrize('name', ['', 'vgg', '.in1k', 'hf-hub:'])
def test_unknown_name_unlike_any(name: str) -> None:
    with pytest.raises(FlaxnetsError, match=r'unknown net .*no name here is similar'):
        zoo.resolve(name)


@pytest.mark.parametrize('name', [None, 50, ['resnest50d']])
def test_a_name_that_is_no_string_is_refused(name: Any) -> None:
    with pytest.raises(FlaxnetsError, match='named by a string'):
        zoo.resolve(name)


@pytest.mark.parametrize('name', ['resnext101_32x8d.gluon_in1k', 'resnext101_32x8d.', 'resnext101_32x8d.tv'])
def test_unknown_tag_lists_the_tags(name: str) -> None:
    with pytest.raises(FlaxnetsError) as error:
        zoo.resolve(name)
    expected = [*timm.list_models('resnext101_32x8d.*', pretrained=True), 'resnext101_32x8d.mm_in1k']
    listed = str(error.value).partition('its tags are ')[2].split(', ')
    assert sorted(listed) == sorted(n.partition('.')[2] for n in expected)


def test_a_tag_after_a_name_of_one_file_is_refused() -> None:
    with pytest.raises(FlaxnetsError, match=r"already means resnext50_32x4d\.gluon_in1k; .* 'tv_in1k'"):
        zoo.resolve('gluon_resnext50_32x4d.tv_in1k')


def test_list_models_in_natural_order() -> None:
    assert zoo.list_models() == NAMES
    assert zoo.list_models('resnext50*') == ['resnext50_32x4d', 'resnext50d_32x4d']
    assert zoo.list_models('*32X16d') == ['resnext101_32x16d']
    assert zoo.list_models('vgg*') == []


def test_list_models_with_weights() -> None:
    everything = zoo.list_models(weights=True)
    assert sorted(everything) == sorted(ROWS)
    assert zoo.list_models('resnest50d', weights=True) == ['resnest50d.in1k', 'resnest50d.mm_in1k']
    assert zoo.list_models('*.a?_in1k', weights=True) == [f'resnext50_32x4d.a{i}_in1k' for i in (1, 2, 3)]
    firsts = {name.partition('.')[0]: name for name in reversed(everything)}
    assert firsts == {arch: f'{arch}.{row.tag}' for arch in NAMES if (row := zoo.resolve(arch)[1])}


def test_find_file_knows_published_names_only() -> None:
    row = zoo.find_file('resnest50-528c19ca.pth')
    assert row is not None
    assert row.name == 'resnest50d.in1k'
    assert zoo.find_file('resnest50-528c19cb.pth') is None
    assert zoo.find_file('') is None


@pytest.mark.parametrize('name', sorted(ROWS))
def test_config_survives_json(name: str) -> None:
    config = zoo.config(name)
    assert config.arch is zoo.ARCHS[config.name]
    assert config.weights == ROWS[name]
    assert config.preprocess == ROWS[name].preprocess
    assert (config.num_classes, config.in_chans, config.classes) == (1000, 3, None)
    text = json.dumps(to_json(config))
    assert config_from_json(json.loads(text)) == config

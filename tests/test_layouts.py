"""Names of every publisher: files that timm and torch really write, and OpenMMLab's layouts by hand."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import timm.models
import torch
import torchvision
from states import BLOCKS, SMALL, as_shapes, shapes, small, small_net
from timm.models.resnet import ResNet
from timm.models.senet import SENet, SEResNeXtBottleneck
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from convert.identify import identify
from convert.layouts import Canonical, caveat, from_canonical, to_canonical
from convert.pth import read_pth
from flaxnets import zoo
from flaxnets.errors import CheckpointError, FlaxnetsError

Saved = dict[str, Any]


def assert_is(found: Canonical, state: Mapping[str, np.ndarray]) -> None:
    """The same names, and behind each the very same array: not a byte can have changed."""
    assert set(found.state) == set(state)
    assert all(found.state[name] is tensor for name, tensor in state.items())


def prefixed(state: Mapping[str, np.ndarray], prefix: str) -> Saved:
    return {prefix + name: tensor for name, tensor in state.items()}


def added(state: Mapping[str, np.ndarray], number: int) -> Saved:
    """Other numbers in as many new arrays."""
    return {name: np.asarray(tensor + number) for name, tensor in state.items()}


def renamed(state: Mapping[str, np.ndarray], *rules: tuple[str, str]) -> Saved:
    def name(old: str) -> str:
        for pattern, new in rules:
            old, done = re.subn(pattern, new, old)
            if done:
                break
        return old

    return {name(old): tensor for old, tensor in state.items()}


# What timm calls conv1.0, conv1.1, conv1.3, conv1.4, conv1.6, bn1 where the stem is deep.
STEM = ['conv1.0', 'conv1.1', 'conv1.3', 'conv1.4', 'conv1.6', 'bn1']
MMPRETRAIN_STEM = ['stem.0.conv', 'stem.0.bn', 'stem.1.conv', 'stem.1.bn', 'stem.2.conv', 'stem.2.bn']
MMDETECTION_STEM = ['stem.0', 'stem.1', 'stem.3', 'stem.4', 'stem.6', 'stem.7']


def as_mmpretrain(kind: str, state: Mapping[str, np.ndarray]) -> Saved:
    rules = [(r'^fc\.', 'head.fc.')]
    if SMALL[kind].deep_stem:
        rules += [
            (f'^{re.escape(a)}\\.', f'backbone.{b}.') for a, b in zip(STEM, MMPRETRAIN_STEM, strict=True)
        ]
    if kind in ('resnextd', 'resnest'):
        rules += [
            (rf'^layer1\.0\.downsample\.{i}\.', f'backbone.layer1.0.downsample.{i - 1}.') for i in (1, 2)
        ]
    rules += [(r'^(layer\d\.\d)\.se\.fc([12])\.', r'backbone.\1.se_layer.conv\2.conv.'), ('^', 'backbone.')]
    return renamed(state, *rules)


def as_mmdetection(kind: str, state: Mapping[str, np.ndarray]) -> Saved:
    rules = []
    if SMALL[kind].deep_stem:
        rules = [(f'^{re.escape(a)}\\.', f'{b}.') for a, b in zip(STEM, MMDETECTION_STEM, strict=True)]
    return {name: t for name, t in renamed(state, *rules).items() if not name.startswith('fc.')}


# Bare and prefixed.


@pytest.mark.parametrize('kind', SMALL)
def test_canonical_names_stay(kind: str) -> None:
    found = to_canonical(small(kind))
    assert_is(found, small(kind))
    assert list(found.state) == list(small(kind))
    assert (found.layout, found.notes, found.classes, found.named) == ('canonical', (), None, None)


PREFIXES = [
    ('module.', ["stripped 'module.' from N names"]),
    ('_orig_mod.', ["stripped '_orig_mod.' from N names"]),
    ('module._orig_mod.', ["stripped 'module._orig_mod.' from N names"]),
    ('_orig_mod.module.', ["stripped '_orig_mod.module.' from N names"]),
    ('model.', ["stripped 'model.' from N names"]),
    ('model._orig_mod.', ["stripped '_orig_mod.' from N names", "stripped 'model.' from N names"]),
    ('module.encoder.', ["stripped 'module.' from N names", "stripped 'encoder.' from N names"]),
    ('net.module.0.', ["stripped 'net.module.0.' from N names"]),
]


@pytest.mark.parametrize(('prefix', 'notes'), PREFIXES)
def test_prefixes_are_stripped(prefix: str, notes: list[str]) -> None:
    state = small('res2net')
    found = to_canonical(prefixed(state, prefix))
    assert_is(found, state)
    assert found.layout == 'canonical'
    assert found.notes == tuple(note.replace('N', str(len(state))) for note in notes)


def test_blocks_compiled_on_their_own() -> None:
    state = small('resnext')
    found = to_canonical(renamed(state, (r'^(layer\d)\.', r'\1._orig_mod.')))
    assert_is(found, state)
    assert len(found.notes) == 1 and "'_orig_mod.'" in found.notes[0]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # torch.compile's own
def test_compiled_and_parallel_nets_of_torch() -> None:
    net, compiled = small_net('resnext'), cast(Any, torch.compile)
    for wrapped in (
        torch.nn.DataParallel(net),
        compiled(net),
        compiled(torch.nn.DataParallel(net)),
    ):
        saved = {name: tensor.numpy() for name, tensor in wrapped.state_dict().items()}
        assert next(iter(saved)).startswith(('module.', '_orig_mod.'))
        assert list(to_canonical(saved).state) == list(net.state_dict())


@pytest.mark.parametrize('classifier', ['fc', 'head.fc'])
def test_a_classifier_beside_the_backbone(classifier: str) -> None:
    state = small('resnest')
    saved = renamed(state, (r'^fc\.', f'{classifier}.'), ('^', 'encoder.'))
    found = to_canonical({**saved, 'criterion.weight': np.ones(5), 'metric.total': np.ones(())})
    assert_is(found, state)
    assert found.layout == 'canonical'
    assert f'took {classifier}.weight and {classifier}.bias as the classifier' in found.notes
    assert 'left out 2 tensors beside the net: criterion, metric' in found.notes


def test_a_classifier_of_another_kind_is_left_out_and_said() -> None:
    state = {name: t for name, t in small('resnext').items() if not name.startswith('fc.')}
    heads = {'head.fc.weight': np.ones((5, 8, 1, 1)), 'head.layers.0.weight': np.ones((5, 8))}
    found = to_canonical({**prefixed(state, 'backbone.'), **heads})
    assert_is(found, state)
    assert found.notes[-2:] == (
        'left out 2 tensors beside the net: head (2)',
        'it has no classifier (fc.weight)',
    )


@pytest.mark.parametrize('dtype', ['float16', 'float64', ml_dtypes.bfloat16, 'int8'])
def test_dtypes_and_strides_pass(dtype: Any) -> None:
    state = {name: np.asfortranarray(t.astype(dtype)) for name, t in small('seresnext').items()}
    for tensor in state.values():
        tensor.flags.writeable = False
    assert_is(to_canonical({'state_dict': prefixed(state, 'module.')}), state)
    assert_is(to_canonical(as_mmpretrain('seresnext', state)), state)


def test_files_without_counters() -> None:
    state = {name: t for name, t in small('resnext').items() if not name.endswith('num_batches_tracked')}
    assert_is(to_canonical(state), state)
    assert_is(to_canonical(as_mmpretrain('resnext', state)), state)


# Training files.


@pytest.fixture(scope='module')
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm's own saver writes, with averaged weights that differ from the trained ones."""
    folder = tmp_path_factory.mktemp('timm')
    net = small_net('resnext')
    average = ModelEmaV3(torch.nn.DataParallel(net), decay=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model='resnext50_32x4d', lr=0.1, mean=None)
    saver = CheckpointSaver(
        torch.nn.DataParallel(net),
        optimizer,
        args=args,
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        unwrap_fn=lambda wrapped: getattr(wrapped, 'module', wrapped),
    )
    saver.save_checkpoint(3, metric=71.5)
    return folder / 'checkpoint-3.pth.tar'


@pytest.mark.parametrize('ema', [True, False])
def test_timms_training_file(timm_file: Path, ema: bool) -> None:
    expected = timm.models.load_state_dict(str(timm_file), use_ema=ema)
    found = to_canonical(read_pth(timm_file), ema=ema)
    assert list(found.state) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found.state[name], tensor.numpy(), name)
    taken, other = ('state_dict_ema', 'state_dict') if ema else ('state_dict', 'state_dict_ema')
    flag = '--no-ema' if ema else 'the default'
    assert found.notes[0] == f'took {taken} (its other choice: {other}; {flag} takes that)'
    assert 'optimizer' in found.notes[1] and 'args' in found.notes[1]
    assert found.named == 'resnext50_32x4d'


def test_averaged_and_trained_weights_do_differ(timm_file: Path) -> None:
    saved = read_pth(timm_file)
    average, trained = (to_canonical(saved, ema=ema).state['fc.weight'] for ema in (True, False))
    assert np.abs(average - trained).min() > 0.1


ORDER = [
    (['state_dict_ema', 'model_ema', 'state_dict', 'model'], True, 'state_dict_ema'),
    (['model', 'state_dict', 'model_ema'], True, 'model_ema'),
    (['model', 'state_dict', 'ema_state_dict'], True, 'ema_state_dict'),
    (['model', 'state_dict'], True, 'state_dict'),
    (['model', 'state_dict', 'state_dict_ema'], False, 'state_dict'),
    (['model', 'model_ema'], False, 'model'),
    (['model', 'optimizer'], True, 'model'),
    (['net', 'epoch'], True, 'net'),
    (['net', 'epoch'], False, 'net'),
]


@pytest.mark.parametrize(('keys', 'ema', 'taken'), ORDER)
def test_which_state_dict_is_taken(keys: list[str], ema: bool, taken: str) -> None:
    others: Saved = {'optimizer': {'state': {0: {'momentum': np.ones(3)}}, 'param_groups': [{}]}, 'epoch': 3}
    saved: Saved = {key: others.get(key) or added(small('resnext'), 1) for key in keys}
    found = to_canonical(saved, ema=ema)
    assert_is(found, saved[taken])
    assert found.notes[0].startswith(f'took {taken}')
    assert all(any(key in note for note in found.notes) for key in keys if key in others)


def test_an_empty_average_is_passed_over() -> None:
    state = small('resnext')
    empty: list[Any] = [None, {}, False]
    for nothing in empty:
        assert_is(to_canonical({'state_dict_ema': nothing, 'model_ema': nothing, 'model': state}), state)


def test_no_ema_where_there_is_nothing_else() -> None:
    with pytest.raises(CheckpointError, match=r'averaged weights only \(state_dict_ema\).*--no-ema'):
        to_canonical({'state_dict_ema': small('resnext'), 'epoch': 1}, ema=False)


def test_torchvisions_average() -> None:
    net = small_net('resnext')
    average = {name: t.numpy() for name, t in AveragedModel(net).state_dict().items()}
    assert 'n_averaged' in average
    found = to_canonical({'model': small('resnext'), 'model_ema': average, 'epoch': 1})
    assert list(found.state) == list(net.state_dict())
    assert any('n_averaged' in note for note in found.notes)


@pytest.mark.parametrize('zipped', [True, False])
def test_the_res2net_authors_training_file(tmp_path: Path, zipped: bool) -> None:
    net = small_net('res2net')
    saved = {
        'epoch': 90,
        'arch': 'res2net50',
        'state_dict': torch.nn.DataParallel(net).state_dict(),
        'best_prec1': torch.tensor(77.9),
        'optimizer': torch.optim.SGD(net.parameters(), 0.1).state_dict(),
    }
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    found = to_canonical(read_pth(path))
    assert list(found.state) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(found.state[name], tensor.numpy(), name)
    assert found.named == 'res2net50'
    assert found.notes == (
        'took state_dict',
        'left out what stands beside state_dict: epoch, arch, best_prec1, optimizer',
        f"stripped 'module.' from {len(net.state_dict())} names",
    )


# OpenMMLab.


@pytest.mark.parametrize('kind', SMALL)
def test_mmpretrain(kind: str) -> None:
    state = small(kind)
    mm = as_mmpretrain(kind, state)
    found = to_canonical({'meta': {'mmcls_version': '0.15.0'}, 'state_dict': mm})
    assert_is(found, state)
    assert found.layout == 'mmpretrain'
    assert f"renamed {len(state)} names from mmpretrain's" in found.notes
    assert_is(to_canonical(prefixed(mm, 'module.')), state)


@pytest.mark.parametrize('kind', SMALL)
def test_mmpretrains_backbone_alone(kind: str) -> None:
    mm = as_mmpretrain(kind, small(kind))
    bare = {name.removeprefix('backbone.'): t for name, t in mm.items() if name.startswith('backbone.')}
    found = to_canonical(bare)
    assert_is(found, {name: t for name, t in small(kind).items() if not name.startswith('fc.')})
    assert found.layout == ('canonical' if kind in ('resnext', 'res2net') else 'mmpretrain')


@pytest.mark.parametrize('kind', ['resnext', 'res2netd', 'resnest'])
def test_mmdetection(kind: str) -> None:
    state = {name: t for name, t in small(kind).items() if not name.startswith('fc.')}
    mm = as_mmdetection(kind, state)
    found = to_canonical(mm)
    assert_is(found, state)
    assert found.layout == ('mmdetection' if SMALL[kind].deep_stem else 'canonical')
    assert 'it has no classifier (fc.weight)' in found.notes

    extras = ['neck.fpn_convs.0.conv.weight', 'rpn_head.rpn_cls.bias', 'rpn_head.rpn_reg.bias']
    detector = {**prefixed(mm, 'backbone.'), **{name: np.ones(3) for name in extras}}
    found = to_canonical({'meta': {'CLASSES': ['cat', 'dog']}, 'state_dict': detector})
    assert_is(found, state)
    assert (found.layout, found.classes) == ('mmdetection', None)
    assert 'left out 3 tensors beside the net: neck, rpn_head (2)' in found.notes


def mmengine_file(**more: Any) -> Saved:
    """mmengine exchanges the two when saving: the averaged weights are in state_dict."""
    average, trained = (added(small('resnest'), i) for i in (0, 1))
    return {
        'meta': {'epoch': 100, 'dataset_meta': {'classes': ('a', 'b', 'c', 'd', 'e')}, **more},
        'state_dict': as_mmpretrain('resnest', average),
        'message_hub': {'log_scalars': {}},
        'optimizer': {'state': {}, 'param_groups': []},
        'ema_state_dict': {
            'steps': np.array(1000),
            **prefixed(as_mmpretrain('resnest', trained), 'module.'),
        },
    }


@pytest.mark.parametrize('ema', [True, False])
def test_mmengines_average(ema: bool) -> None:
    found = to_canonical(mmengine_file(), ema=ema)
    np.testing.assert_array_equal(found.state['fc.weight'], small('resnest')['fc.weight'] + (0 if ema else 1))
    assert set(found.state) == set(small('resnest'))
    assert found.classes == ('a', 'b', 'c', 'd', 'e')
    assert found.layout == 'mmpretrain'
    assert f'mmengine puts the {"averaged" if ema else "trained"} weights' in found.notes[0]
    assert ema or 'left out 1 tensor beside the net: steps' in found.notes


@pytest.mark.parametrize('ema', [True, False])
def test_mmcvs_average(ema: bool) -> None:
    mm = as_mmpretrain('resnext', small('resnext'))
    state = small('resnext')
    twins = {name: state[name] + 1 for name in state if name.endswith(('weight', 'bias'))}
    mm_twins = {'ema_' + n.replace('.', '_'): t for n, t in as_mmpretrain('resnext', twins).items()}
    found = to_canonical({'meta': {}, 'state_dict': {**mm, **mm_twins}}, ema=ema)
    assert_is(found, state if ema else {**state, **twins})
    word = 'averaged' if ema else 'trained'
    assert any(f'{word} of two values' in note and f'{len(twins)} parameters' in note for note in found.notes)


CLASSES = [
    ({'dataset_meta': {'classes': ('a', 'b', 'c', 'd', 'e')}}, True),
    ({'dataset_meta': {'CLASSES': ['a', 'b', 'c', 'd', 'e']}}, True),
    ({'CLASSES': ['a', 'b', 'c', 'd', 'e']}, True),
    ({'dataset_meta': None, 'CLASSES': ('a', 'b', 'c', 'd', 'e')}, True),
    ({'CLASSES': ('a', 'b', 'c', 'd')}, False),
    ({'CLASSES': 'abcde'}, False),
    ({'CLASSES': [1, 2, 3, 4, 5]}, False),
    ({'CLASSES': {'a', 'b', 'c', 'd', 'e'}}, False),
]


@pytest.mark.parametrize(('meta', 'good'), CLASSES)
def test_class_names(meta: Saved, good: bool) -> None:
    found = to_canonical({'meta': meta, 'state_dict': as_mmpretrain('resnext', small('resnext'))})
    assert found.classes == (('a', 'b', 'c', 'd', 'e') if good else None)
    assert good is not any('left out the file' in note for note in found.notes)


GEOMETRY = [
    ("backbone=dict(type='ResNeXt', depth=50, style='caffe')", "style='caffe'"),
    ('{"backbone": {"style": "caffe"}}', "style='caffe'"),
    ("dict(type='ResNeSt', avg_down_stride=False)", 'avg_down_stride=False'),
    ("backbone=dict(type='ResNeXt', depth=50, style='pytorch', avg_down_stride=True)", None),
]


@pytest.mark.parametrize('key', ['cfg', 'config'])
@pytest.mark.parametrize(('config', 'option'), GEOMETRY)
def test_a_configuration_of_another_net_is_refused(key: str, config: str, option: str | None) -> None:
    saved = {'meta': {key: config}, 'state_dict': as_mmpretrain('resnext', small('resnext'))}
    if option is None:
        to_canonical(saved)
    else:
        with pytest.raises(CheckpointError, match=f'{option}.*none of the nets here'):
            to_canonical(saved)


# Cadene.


@pytest.fixture(scope='module')
def cadene() -> Any:
    torch.manual_seed(0)
    theirs = SENet(SEResNeXtBottleneck, (1, 1, 1, 1), groups=32, reduction=16, num_classes=5).eval()
    ours = ResNet(
        BLOCKS['resnext'],
        (1, 1, 1, 1),
        num_classes=5,
        cardinality=32,
        base_width=4,
        block_args=dict(attn_layer='se'),
    ).eval()
    return SimpleNamespace(
        theirs=theirs, ours=ours, state={n: t.numpy() for n, t in theirs.state_dict().items()}
    )


def test_cadenes_nets_are_refused_for_their_pool(cadene: Any) -> None:
    for saved in (cadene.state, {'state_dict': prefixed(cadene.state, 'module.')}):
        with pytest.raises(CheckpointError, match=r"Cadene's.*ceil_mode=True.*other numbers"):
            to_canonical(saved)


def test_cadenes_names(cadene: Any) -> None:
    found = to_canonical(cadene.state, cadene_pool=True)
    assert found.layout == 'cadene'
    assert any('ceil_mode' in note for note in found.notes)
    cadene.ours.load_state_dict({n: torch.from_numpy(t) for n, t in found.state.items()})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = cadene.theirs(images)
        # The reason for the refusal: nothing but the pool differs, and it does.
        assert (cadene.ours(images) - expected).abs().max() > 1e-3 * expected.abs().max()
        cadene.ours.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
        torch.testing.assert_close(cadene.ours(images), expected)


def test_cadenes_names_of_the_zoo() -> None:
    with torch.device('meta'):
        state = as_shapes(timm.create_model('legacy_seresnext50_32x4d').state_dict())
    assert identify(to_canonical(state, cadene_pool=True).state) == 'seresnext50_32x4d'
    with torch.device('meta'):
        state = as_shapes(timm.create_model('legacy_senet154').state_dict())
    with pytest.raises(CheckpointError, match='none of these nets'):
        identify(to_canonical(state, cadene_pool=True).state)


# Refusals.


def refused(change: Callable[[Saved], Any]) -> Any:
    return change(dict(small('resnext')))


HOSTILE: list[tuple[str, Callable[[Saved], Any], str]] = [
    ('a tensor', lambda s: s['fc.weight'], 'holds a ndarray, not a state dict'),
    ('a list', lambda s: [s], 'holds a list, not a state dict'),
    ('None', lambda s: None, 'holds a NoneType'),
    ('an empty dict', lambda s: {}, 'holds no state dict.*nothing'),
    (
        'empty state dict',
        lambda s: {'state_dict': {}, 'epoch': 3},
        r'state_dict \(dict of 0\), epoch \(int\)',
    ),
    ('no tensors', lambda s: {'epoch': 1, 'arch': 'x'}, r'no state dict.*epoch \(int\), arch \(str\)'),
    ('nested too deep', lambda s: {'state_dict': {'model': s}}, r'no state dict.*state_dict \(dict of 1\)'),
    ('unknown two', lambda s: {'student': s, 'teacher': s}, 'no telling.*student .* tensors.*, teacher'),
    ('bare and nested', lambda s: {**s, 'copy': s}, 'no telling which state dict'),
    ('bare and state_dict', lambda s: {**s, 'state_dict': s}, 'no telling which state dict'),
    ('number among tensors', lambda s: {**s, 'epoch': 3}, r'other things than named tensors: epoch \(int\)'),
    ('list for a tensor', lambda s: {'model': {**s, 'fc.bias': [1.0]}}, r'model holds .*fc.bias \(list\)'),
    ('None for a tensor', lambda s: {'model': {**s, 'fc.bias': None}}, r'fc.bias \(NoneType\)'),
    ('scalar for a tensor', lambda s: {'model': {**s, 'fc.bias': np.float32(1)}}, r'fc.bias \(float32\)'),
    ('numbers for names', lambda s: {**s, 7: np.ones(1)}, r'other things.*7 \(tensor\)'),
    ('bytes for names', lambda s: {'model': {**s, b'a': np.ones(1)}}, r"b'a' \(tensor\)"),
    (
        'two of one',
        lambda s: {**s, 'module.fc.bias': s['fc.bias']},
        'both fc.bias: fc.bias and module.fc.bias',
    ),
    (
        'two of one after a prefix',
        lambda s: {**prefixed(s, 'net.'), 'conv1.weight': s['conv1.weight']},
        'both conv1.weight: net.conv1.weight and conv1.weight',
    ),
    (
        'two classifiers',
        lambda s: {**prefixed(s, 'backbone.'), 'head.fc.bias': s['fc.bias']},
        'both fc.bias: backbone.fc.bias and head.fc.bias',
    ),
    (
        'two stems',
        lambda s: {**s, 'stem.2.bn.bias': np.ones(64), 'stem.0.conv.weight': np.ones(3)},
        'both bn1.bias: (bn1.bias and stem.2.bn.bias|stem.2.bn.bias and bn1.bias)',
    ),
    (
        'two nets',
        lambda s: {**prefixed(s, 'encoder_q.'), **prefixed(s, 'encoder_k.')},
        'holds 2 nets, under encoder_q., encoder_k.',
    ),
]


@pytest.mark.parametrize(('change', 'message'), [case[1:] for case in HOSTILE], ids=[c[0] for c in HOSTILE])
def test_refused(change: Callable[[Saved], Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        to_canonical(refused(change))
    assert len(str(caught.value)) < 1000


def test_what_no_rule_explains_stays_for_the_net_to_refuse() -> None:
    extra = {'conv9.weight': np.ones(3), 'aux.fc.weight': np.ones(3)}
    assert_is(to_canonical({**small('resnext'), **extra}), {**small('resnext'), **extra})


def test_junk_ends_in_our_error_or_leaves_each_tensor_alone() -> None:
    rng = random.Random(0)
    words = [
        'module',
        '_orig_mod',
        'backbone',
        'head',
        'fc',
        'stem',
        '0',
        '7',
        'layer1',
        'conv1',
        'weight',
        '',
    ]
    words += [
        'steps',
        'state_dict',
        'model',
        'ema_state_dict',
        'se_module',
        'meta',
        '\x1b[2J',
        'layer1.0.conv1.weight',
    ]
    tensors = [np.full((2,) * n, n, np.float32) for n in range(5)]

    def junk(depth: int) -> Any:
        if depth and rng.random() < 0.4:
            keys: list[Any] = [
                '.'.join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 6))
            ]
            return {rng.choice([key, key, key, 3]): junk(depth - 1) for key in keys}
        return rng.choice([*tensors, *tensors, *tensors, *tensors, None, 'layer1', 3.0, [tensors[0]]])

    accepted = 0
    for _ in range(5000):
        saved = {word: junk(3) for word in rng.sample(words, rng.randint(1, 6))}
        try:
            found = to_canonical(saved, ema=rng.random() < 0.5, cadene_pool=rng.random() < 0.5)
        except CheckpointError as error:
            assert str(error).isprintable()
        else:
            accepted += 1
            assert all(note.isprintable() for note in found.notes)
            assert all(any(tensor is one for one in tensors) for tensor in found.state.values())
    assert accepted > 100


# The way back.

# First digits of SHA-256 over the sorted lines "name shape" of what mmpretrain 1.2.0 itself builds, its
# ResNeXt, SEResNeXt, Res2Net or ResNeSt as backbone with a LinearClsHead.
MMPRETRAIN = {
    'res2net50_26w_4s': '9bba5d6a8e0502ce',
    'res2net50_48w_2s': 'e06b2cae13152b23',
    'res2net50_14w_8s': '16a00fa13e6054c3',
    'res2net50_26w_6s': 'aa47f3b2f804535a',
    'res2net50_26w_8s': '091f1188e4ff32ec',
    'res2net101_26w_4s': '5c7c12ee0f2908b7',
    'res2net50d': '090035ad661b2058',
    'res2net101d': '5d77d60d73cc615d',
    'resnext50_32x4d': 'f17c0978fedf54ac',
    'resnext50d_32x4d': '9a63735973799507',
    'resnext101_32x4d': '38489f2bfbab006e',
    'resnext101_32x8d': '224a6dd83dc1aa73',
    'resnext101_64x4d': '78200b7f610a669d',
    'resnext101_32x16d': 'd469b9192eef0c73',
    'resnext101_32x32d': '56ed80660f2feacc',
    'resnext101_32x48d': 'd25c260edd008673',
    'resnext152_32x4d': '1e3ea5f962c9dd84',
    'seresnext50_32x4d': '94c390d15fc7bac0',
    'seresnext101_32x4d': 'ea76c1a807235ec4',
    'seresnext101_64x4d': 'd9de36f0a9396c6d',
    'resnest50d': 'fc162037f3cbdb4e',
    'resnest101e': '4aa962924aef630d',
    'resnest200e': '9a0300bce9f102d3',
    'resnest269e': 'efd453c1092014fd',
    'resnest50d_4s2x40d': '5cf6d9087d4b51a1',
    'resnest50d_1s4x24d': 'c968ae43e5945fa5',
    'resnest50_fast_1s1x64d': '6b316ca692e788c4',
    'resnest50_fast_2s1x64d': 'fc162037f3cbdb4e',
    'resnest50_fast_4s1x64d': '321cec5f7dd7ed68',
    'resnest50_fast_1s2x40d': 'b16201275922aa0e',
    'resnest50_fast_2s2x40d': 'c27611bf73a37a9b',
}


def test_mmpretrain_has_nets_of_all_but_these() -> None:
    assert set(zoo.ARCHS) - set(MMPRETRAIN) == {'res2next50', 'resnest14d', 'resnest26d'}


@pytest.mark.parametrize('name', MMPRETRAIN)
def test_mmpretrains_own_names(name: str) -> None:
    tensors = from_canonical(shapes(name), 'mmpretrain', zoo.ARCHS[name])
    lines = sorted(f'{key} {tensor.shape}' for key, tensor in tensors.items())
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == MMPRETRAIN[name]


@pytest.mark.parametrize('kind', SMALL)
def test_from_canonical_to_mmpretrain(kind: str) -> None:
    found = from_canonical(small(kind), 'mmpretrain', SMALL[kind])
    expected = as_mmpretrain(kind, small(kind))
    assert set(found) == set(expected)
    assert all(found[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize('name', zoo.ARCHS)
@pytest.mark.parametrize('layout', ['timm', 'mmpretrain'])
def test_there_and_back(name: str, layout: str) -> None:
    state = shapes(name)
    there = from_canonical(state, layout, zoo.ARCHS[name])
    back = to_canonical(there)
    assert_is(back, state)
    assert back.layout == {'timm': 'canonical'}.get(layout, layout)


IN_TORCHVISION = ['resnext50_32x4d', 'resnext101_32x8d', 'resnext101_64x4d']


@pytest.mark.parametrize('name', IN_TORCHVISION)
def test_torchvision_has_the_same_names(name: str) -> None:
    with torch.device('meta'):
        expected = getattr(torchvision.models, name)().state_dict()
    found = from_canonical(shapes(name), 'torchvision', zoo.ARCHS[name])
    assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    assert_is(to_canonical(found), shapes(name))


@pytest.mark.parametrize('name', [name for name in zoo.ARCHS if not re.match(r'resnext\d+_', name)])
def test_torchvision_has_no_other_nets(name: str) -> None:
    with pytest.raises(FlaxnetsError, match='torchvision has plain ResNeXts only'):
        from_canonical(shapes(name), 'torchvision', zoo.ARCHS[name])


def test_unknown_layout() -> None:
    with pytest.raises(FlaxnetsError, match="'keras' is not one of timm, torchvision, mmpretrain"):
        from_canonical(small('resnext'), 'keras', SMALL['resnext'])


def test_caveats() -> None:
    warned = {name for name, arch in zoo.ARCHS.items() if caveat('mmpretrain', arch)}
    fast = {name for name in zoo.ARCHS if name.startswith('resnest50_fast')}
    assert warned == {*fast, 'resnest50d_4s2x40d', 'resnest50d_1s4x24d', 'res2next50'}
    assert not any(caveat(layout, arch) for layout in ('timm', 'torchvision') for arch in zoo.ARCHS.values())

"""What the dataclasses of config.py refuse, and the JSON that they cannot be made from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.arch import Arch
from flaxnets.zoo.records import Accuracy, Config, Weights, config_from_json, to_json

ARCH = Arch('resnest', (3, 4, 6, 3), radix=2, deep_stem=True, stem_width=32, avg_down=True)
WEIGHTS = Weights(
    'resnest50d',
    'mine',
    urls=('https://example.org/a.pth',),
    sha256='0123abcd',
    test_preprocess=Preprocess(256, 0.95, 'center_first', 'bicubic', (0.5, 0.5, 0.5), (0.1, 0.2, 0.3)),
    accuracy=(Accuracy(81.0, None, 224, 'me'), Accuracy(81.5, 95.5, 256, 'me')),
    aliases=('a', 'b'),
)
CONFIG = Config('resnest50d', ARCH, Preprocess(320), 2, 4, WEIGHTS, ('cat', 'dog'))


@pytest.mark.parametrize('value', [ARCH, Preprocess(), WEIGHTS, WEIGHTS.accuracy[0], CONFIG])
def test_frozen(value: Any) -> None:
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, getattr(value, field))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'block': 'resnet'}, "block='resnet' is not one of resnext, res2net, resnest"),
        ({'layers': (3, 4, 6)}, r'layers=\(3, 4, 6\) must be four'),
        ({'layers': (3, 4, 6, 0)}, r'layers=\(3, 4, 6, 0\) must be four'),
        ({'cardinality': 0}, 'cardinality=0 must be at least 1'),
        ({'base_width': -4}, 'base_width=-4 must be at least 1'),
        ({'planes': 8, 'base_width': 4}, 'planes=8 times base_width=4 must be at least 64'),
        ({'stem_width': 0}, 'stem_width=0 must be at least 1'),
        ({'scale': 4}, "scale=4 only means something with block='res2net'"),
        ({'block': 'res2net'}, "radix=2 only means something with block='resnest'"),
        ({'block': 'resnext', 'radix': 1, 'avd_first': True}, 'avd_first=True only means something'),
        ({'se': True}, 'se=True is only built'),
        ({'block': 'resnext', 'se': True, 'planes': 2}, 'planes=2 must be at least 4 with se=True'),
        ({'se': True, 'scale': 0}, 'scale=0 must be at least 1.*se=True is only built'),
    ],
)
def test_arch_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlaxnetsError, match=message):
        dataclasses.replace(ARCH, **changes)


def test_stem_channels() -> None:
    # The stems of ResNet (64) and of ResNet-D: 32, 32, 64 channels, or 64, 64, 128.
    assert Arch('resnext', (3, 4, 6, 3)).stem_channels == 64
    assert ARCH.stem_channels == 64
    assert dataclasses.replace(ARCH, stem_width=64).stem_channels == 128


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'size': 0}, 'size=0'),
        ({'size': (24, 0)}, 'size='),
        ({'size': (24, 48, 3)}, 'size='),
        ({'size': 24.5}, 'size='),
        ({'crop_pct': 0.0}, r'crop_pct=0\.0'),
        ({'mean': (123.675, 116.28, 103.53)}, r'mean=\(123.675.*from 0 to 255.*divide mean and std by 255'),
        ({'std': (58.4,)}, r'std=\(58.4,\) is of values from 0 to 255'),
        ({'crop_pct': float('nan')}, 'crop_pct=nan'),
        ({'crop_pct': '0.9'}, 'crop_pct='),
        ({'crop_mode': 'five'}, "crop_mode='five' is not one of center, squash, border, center_first"),
        ({'interpolation': 'random'}, "interpolation='random' is not one of bilinear, bicubic, lanczos"),
        ({'channel_order': 'gbr'}, "channel_order='gbr'"),
        ({'mean': ()}, r'mean=\(\)'),
        ({'mean': 0.5}, 'mean='),
        ({'mean': (0.5, float('inf'), 0.5)}, 'mean='),
        ({'mean': (0.5, 10**400, 0.5)}, 'mean='),  # no float holds it
        ({'std': (0.2, 0.2, 0.0)}, 'std=.*positive'),
    ],
)
def test_preprocess_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlaxnetsError, match=message):
        Preprocess(**changes)


def test_sizes() -> None:
    square, flat = Preprocess((96, 96)), Preprocess((24, 48))
    assert square == Preprocess(96) and square.size == square.height == square.width == 96
    assert (flat.size, flat.height, flat.width) == ((24, 48), 24, 48)


def test_changes_given_as_text() -> None:
    found = Preprocess(unsupported=('ten crops',)).changed(
        [
            'size=24,48',
            'crop_pct=7/8',
            'mean=0.5',
            'std=1/2,1/2,0.25',
            'crop_mode=squash',
            'channel_order=bgr',
        ]
    )
    assert found == Preprocess((24, 48), 0.875, 'squash', 'bilinear', (0.5,), (0.5, 0.5, 0.25), 'bgr')
    for change, message in (
        ('sise=3', 'sise'),
        ('mean', 'numbers'),
        ('size=a', 'numbers'),
        ('std=1/0', 'numbers'),
        ('size=0', 'size=0'),
        ('unsupported=x', 'unsupported'),
        ('interpolation=random', 'random'),
    ):
        with pytest.raises(FlaxnetsError, match=message):
            Preprocess().changed([change])


def test_values_of_channels() -> None:
    grey = Preprocess(mean=(0.5,), std=(0.25,))
    assert grey.channel_values(4) == ((0.5,) * 4, (0.25,) * 4)
    four = Preprocess(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0,))
    assert four.channel_values(4) == ((0.1, 0.2, 0.3, 0.4), (1.0,) * 4)
    assert Preprocess().channel_values(1)[0] == pytest.approx((sum(Preprocess().mean) / 3,))
    with pytest.raises(FlaxnetsError, match='3 values .* 4 channels'):
        Preprocess().channel_values(4)


@pytest.mark.parametrize(
    ('value', 'changes', 'message'),
    [
        (CONFIG, {'num_classes': 'seven'}, "num_classes='seven'"),
        (CONFIG, {'num_classes': 3}, '2 classes for num_classes=3'),
        (CONFIG, {'classes': ['cat', 'dog']}, 'classes='),
        (CONFIG, {'in_chans': 0}, 'in_chans=0'),
        (CONFIG, {'arch': None}, 'arch=None'),
        (CONFIG, {'name': 5}, 'name=5'),
        (CONFIG, {'folded': 1}, 'folded=1'),
        (WEIGHTS, {'sha256': 'xyz'}, "sha256='xyz'"),
        (WEIGHTS, {'urls': 'https://a'}, 'urls='),
        (WEIGHTS, {'tag': None}, 'tag=None'),
        (WEIGHTS.accuracy[0], {'top1': 101.0}, 'top1=101'),
        (WEIGHTS.accuracy[0], {'size': 0}, 'size=0'),
    ],
)
def test_records_refuse(value: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlaxnetsError, match=message):
        dataclasses.replace(value, **changes)


def test_full_name_of_weights() -> None:
    assert WEIGHTS.name == 'resnest50d.mine'


OTHER_IMAGES = Preprocess((24, 48), 1.1, 'squash', 'lanczos', (0.5,), (0.5,), 'bgr', ('five crops',))


@pytest.mark.parametrize('config', [CONFIG, Config('mine', ARCH), Config('mine', ARCH, OTHER_IMAGES)])
def test_json_round_trip(config: Config) -> None:
    again = config_from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        (('colour',), 1, 'colour'),
        (('arch', 'colour'), 1, 'colour'),
        (('arch', 'block'), 'vgg', "block='vgg'"),
        (('arch',), None, 'not a configuration of flaxnets'),
        (('preprocess', 'size'), -1, 'size=-1'),
        (('weights', 'colour'), 1, 'colour'),
        (('weights', 'accuracy'), [{'top1': 1.0}], 'top5'),
    ],
)
def test_json_with_a_wrong_field_is_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    data = to_json(CONFIG)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FlaxnetsError, match=message):
        config_from_json(data)


@pytest.mark.parametrize('field', ['name', 'arch', 'preprocess'])
def test_json_without_a_needed_field_is_refused(field: str) -> None:
    data = to_json(CONFIG)
    del data[field]
    with pytest.raises(FlaxnetsError, match=field):
        config_from_json(data)


@pytest.mark.parametrize('data', [[], None, 'resnest50d', 3])
def test_json_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(FlaxnetsError, match='not a configuration of flaxnets'):
        config_from_json(data)

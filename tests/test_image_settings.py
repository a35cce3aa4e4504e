"""What files say of their images, against timm's own reading of it and pixels worked by hand."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from sklearn.datasets import load_sample_images  # type: ignore[import-untyped]
from timm.data import resolve_data_config
from torchvision import transforms

from convert.conversion import _usual
from convert.names.image_settings import for_channels, image_settings, timm_settings
from convert.names.image_values import ImageSettings, share_of
from flaxnets import zoo
from flaxnets.api import transform
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((300, 214))
NAMES = (
    'resnext50_32x4d.tv_in1k',
    'resnext50_32x4d.tv2_in1k',
    'resnext50_32x4d',
    'resnest50d',
    'resnest200e',
)


def prepared(beside: dict[Any, Any], name: str = 'resnest50d') -> Preprocess:
    """As the conversion of a file of that net finds it."""
    said = image_settings(beside)
    return for_channels(said.applied_to(_usual(name, None, said.weights).preprocess), 3)


def test_options_of_timm_mean_what_timm_takes_them_for() -> None:
    draw = random.Random(0)
    options: dict[str, tuple[Any, ...]] = {
        'img_size': (None, None, 96, 320),
        'input_size': (None, None, None, [3, 24, 48], (3, 160, 160)),
        'crop_pct': (None, None, 0.9, 1.0, 1.1, 0.0),
        'crop_mode': (None, None, 'squash', 'border', 'center'),
        'interpolation': ('', None, 'lanczos', 'bilinear', 'box', 'nearest', 'hamming', 'bicubic'),
        'mean': (None, None, [0.5, 0.5, 0.5], [0.5], (0.1, 0.2, 0.3)),
        'std': (None, None, [0.5, 0.5, 0.5], [0.25], (0.1, 0.2, 0.3)),
    }
    for _ in range(300):
        name = draw.choice(NAMES)
        args = argparse.Namespace(model=name, **{key: draw.choice(values) for key, values in options.items()})
        want = resolve_data_config(vars(args), pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        got = prepared({'arch': name, 'args': vars(args)}, name.partition('.')[0])
        found = {
            'input_size': (3, got.height, got.width),
            'interpolation': got.interpolation,
            'mean': got.channel_values(3)[0],
            'std': got.channel_values(3)[1],
            'crop_pct': got.crop_pct,
            'crop_mode': got.crop_mode,
        }
        assert found == {**want, 'input_size': tuple(want['input_size'])}, vars(args)
        assert not got.unsupported


def test_what_cannot_be_prepared_is_listed_and_refused() -> None:
    args = {'interpolation': 'random', 'crop_mode': 'five', 'mean': [0.1, math.nan, 0.2], 'img_size': -1}
    found = prepared({'args': args})
    named = {problem.partition('=')[0] for problem in found.unsupported}
    assert named == set(args)
    with pytest.raises(FlaxnetsError, match='random'):
        transform(found)


@pytest.mark.parametrize(
    ('mean', 'channels', 'expected'),
    [
        ((0.5,), 4, (0.5,) * 4),
        ((0.5, 0.5, 0.5), 4, (0.5,) * 4),
        ((0.1, 0.2, 0.3, 0.4), 4, (0.1, 0.2, 0.3, 0.4)),
        ((0.1, 0.2, 0.3), 4, None),
    ],
)
def test_values_for_other_numbers_of_channels(mean: Any, channels: int, expected: Any) -> None:
    found = for_channels(Preprocess(mean=mean, std=(1.0,)), channels)
    if expected is None:
        assert '4 channels' in found.unsupported[0]
    else:
        assert found.channel_values(channels)[0] == expected and not found.unsupported


def test_values_from_0_to_255_become_those_from_0_to_1() -> None:
    said = timm_settings({'mean': (123.675, 116.28, 103.53), 'std': [58.395, 57.12, 57.375]})
    np.testing.assert_allclose(said.fields['mean'], Preprocess().mean, atol=1e-12)
    np.testing.assert_allclose(said.fields['std'], Preprocess().std, atol=1e-12)
    assert '255' in said.notes[0]


def test_every_size_that_torchvision_resizes_to_is_met() -> None:
    for resize in range(1, 500):
        for crop in range(1, resize + 1):
            assert math.floor(crop / share_of(crop, resize)) == resize


@pytest.mark.parametrize(
    ('args', 'resize', 'crop', 'interpolation'),
    [
        (
            {'val_resize_size': 232, 'val_crop_size': 224, 'interpolation': 'bilinear', 'backend': 'PIL'},
            232,
            224,
            'bilinear',
        ),
        ({'val_resize_size': 180, 'val_crop_size': 200, 'interpolation': 'bicubic'}, 180, 200, 'bicubic'),
        ({'cache_dataset': False, 'test_only': False, 'model': 'resnext50_32x4d'}, 256, 224, 'bilinear'),
    ],
)
def test_torchvisions_reference_training(args: Any, resize: int, crop: int, interpolation: str) -> None:
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])
    found = transform(prepared({'model': {}, 'args': args}, 'resnext50_32x4d'))
    np.testing.assert_array_equal(found.pixels(PHOTO), np.asarray(theirs(PHOTO)))


def test_notes_of_torchvision() -> None:
    assert not image_settings({'args': {'val_crop_size': 224, 'backend': 'pil'}}).approximations
    assert 'tensor' in image_settings({'args': {'val_crop_size': 224, 'backend': 'tensor'}}).approximations[0]


@pytest.mark.parametrize('key', ['hyper_parameters', 'hparams', 'opt', 'config'])
def test_options_by_other_names(key: str) -> None:
    assert prepared({key: {'img_size': 96, 'mean': 0.5, 'std': [0.25]}}).mean == (0.5,)
    assert not image_settings({'mean': 0.83, 'state_dict': {}}).fields  # of accuracies, perhaps


def test_options_are_found_wherever_they_are() -> None:
    own = {'mean': [0.5] * 3, 'std': [0.25] * 3}
    other: dict[str, Any] = {'lr': 0.1, 'mean': None, 'interpolation': ''}
    hydra = {'data': {'root': '/x'}, 'test_dataloader': {'batch_size': 2}}
    for saved in (
        {'config': hydra, 'args': own},
        {'args': other, 'config': own},
        {'args': other, **own},
        {'hparams': {}, 'opt': other, 'options': own, 'config': other},
    ):
        assert image_settings(saved).fields == {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
    tagged = {'args': {'model': 'resnext50_32x4d.tv_in1k'}, 'config': own}
    assert image_settings(tagged).weights == 'resnext50_32x4d.tv_in1k'


BICUBIC = Preprocess(interpolation='bicubic')


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (
            {'eval_crop_ratio': 1.0, 'data_set': 'IMNET', 'input_size': 192},
            replace(BICUBIC, size=192, crop_pct=1.0),
        ),
        (
            {'data_set': 'IMNET', 'input_size': 384},
            replace(BICUBIC, size=384),
        ),  # DeiT, before it had the option
        ({'data_set': 'CIFAR', 'input_size': 32}, replace(BICUBIC, size=32, crop_pct=1.0)),
        ({'nb_classes': 5, 'input_size': 224}, BICUBIC),  # MAE
        ({'nb_classes': 5, 'input_size': 288}, replace(BICUBIC, size=288, crop_pct=1.0)),
        ({'input_size': 224, 'crop_pct': None, 'imagenet_default_mean_and_std': True}, BICUBIC),  # ConvNeXt
        (
            {'input_size': 224, 'crop_pct': 0.9, 'imagenet_default_mean_and_std': True},
            replace(BICUBIC, crop_pct=0.9),
        ),
        (
            {'input_size': 384, 'crop_pct': 0.9, 'imagenet_default_mean_and_std': True},
            replace(BICUBIC, size=384, crop_pct=1.0, crop_mode='squash'),
        ),
        (
            {
                'input_size': 384,
                'crop_pct': None,
                'imagenet_default_mean_and_std': False,
                'rel_pos_bias': True,
            },
            replace(BICUBIC, size=384, crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3),  # BEiT
        ),
    ],
)
def test_deit_and_what_was_made_from_it(args: dict[str, Any], expected: Preprocess) -> None:
    assert prepared({'model': {}, 'args': {'data_path': '/data', **args}}) == expected


def test_an_input_of_one_number() -> None:
    assert timm_settings({'input_size': 224}) == ImageSettings({'size': (224, 224)})
    assert timm_settings({'input_size': [224]}).unsupported


def test_pytorchs_imagenet_example() -> None:
    saved = {'arch': 'resnext50_32x4d', 'best_acc1': 1.0, 'optimizer': {}, 'state_dict': {}}
    assert prepared(saved, 'resnext50_32x4d') == Preprocess()
    for name in ('arch', 'optimizer'):  # somebody's training on other images
        assert not image_settings({key: value for key, value in saved.items() if key != name}).fields


# mmpretrain 1.x, mmcls 0.x, and what `lazy` configurations look like, as their libraries write them.
MM_1 = """
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], num_classes=1000, std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(backbone=dict(depth=50, type='ResNeXt'), type='ImageClassifier')
test_dataloader = dict(
    batch_size=32,
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(backend='pillow', edge='short', scale=256, type='ResizeEdge'),
        dict(crop_size=224, type='CenterCrop'),
        dict(type='PackInputs'),
    ], type='ImageNet'))
"""
MM_0 = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=False)
crop = 224
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', size=(256, -1), backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=crop),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='ImageToTensor', keys=['img']),
    dict(type='Collect', keys=['img'])
]
"""
MM_LAZY = """
from mmpretrain.datasets import ResizeEdge
model = dict(data_preprocessor=dict(bgr_to_rgb=False))
test_pipeline = [dict(type=LoadImageFromFile), dict(scale=(200, 120), type=mmcv.transforms.Resize,
    interpolation='lanczos', backend='pillow'), dict(type='mmpretrain.datasets.PackInputs')]
"""


def resized(short: int, crop: int, resample: Image.Resampling) -> np.ndarray:
    height, width = short, int(PHOTO.width * short / PHOTO.height)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return np.asarray(
        PHOTO.resize((width, height), resample).crop((left, top, left + crop, top + crop)), float
    )


@pytest.mark.parametrize('where', ['cfg', 'config'])
def test_openmmlabs_configurations(where: str) -> None:
    def found(text: str) -> np.ndarray:
        return transform(prepared({'meta': {where: text}}))(PHOTO)

    pixels = resized(256, 224, Image.Resampling.BILINEAR)
    expected = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(found(MM_1), expected, atol=1e-5)
    pixels = resized(256, 224, Image.Resampling.BICUBIC)[..., ::-1]
    expected = (pixels - [103.53, 116.28, 123.675]) / [57.375, 57.12, 58.395]
    np.testing.assert_allclose(found(MM_0), expected, atol=1e-5)
    pixels = np.asarray(PHOTO.resize((200, 120), Image.Resampling.LANCZOS), float)[..., ::-1]
    np.testing.assert_allclose(found(MM_LAZY), pixels, atol=1e-3)


@pytest.mark.parametrize(
    ('flags', 'order'),
    [
        ('', 'bgr'),
        ('to_rgb=True', 'rgb'),
        ('bgr_to_rgb=True', 'rgb'),
        ('rgb_to_bgr=True', 'rgb'),  # what it exchanges is BGR, as it was loaded
        ('bgr_to_rgb=False, rgb_to_bgr=True', 'rgb'),
        ('bgr_to_rgb=False, rgb_to_bgr=False', 'bgr'),
    ],
)
def test_channels_of_openmmlab(flags: str, order: str) -> None:
    text = f'data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], {flags})'
    assert image_settings({'meta': {'cfg': text}}).fields['channel_order'] == order


def test_what_openmmlab_does_otherwise_is_said() -> None:
    def found(text: str) -> Any:
        return image_settings({'meta': {'cfg': text}})

    opencv = found(MM_1.replace("backend='pillow', ", ''))
    assert 'OpenCV' in opencv.approximations[0] and opencv.fields['size'] == 224 and not opencv.unsupported
    assert not found(MM_1).notes
    ten = found(MM_1.replace('CenterCrop', 'TenCrop'))
    assert 'TenCrop' in ten.unsupported[0] and 'size' not in ten.fields
    small = found(MM_1.replace('scale=256', 'scale=200'))
    assert '200' in small.unsupported[0]
    unknown = found(MM_0.replace('[103.53, 116.28, 123.675]', 'load()'))
    assert unknown.unsupported and 'mean' not in unknown.fields
    detector = found(
        "test_pipeline = [dict(type='MultiScaleFlipAug', transforms=[dict(type='Normalize', "
        'mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)])]'
    )
    assert detector.fields['channel_order'] == 'bgr'
    assert detector.fields['std'] == pytest.approx((1 / 255,) * 3)
    assert 'no fixed size' in detector.notes[0] and not detector.unsupported


def test_odd_content_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    texts = (
        '',
        'model = dict(',
        "__import__('os').system('echo called')",
        '(' * 10_000,
        'x = dict(**x)',
        'data = ' + '-' * 2500 + '1',
        'img_norm_cfg = dict(mean=0x' + 'f' * 9000 + ', std=1)',
        'img_norm_cfg = dict(mean=0, std=1e-323)',
        'é\0',
    )
    leaves = (
        None,
        1,
        -1,
        0.5,
        math.nan,
        10**9000,
        1e300,
        1e-323,
        True,
        b'x',
        *texts,
        np.zeros((2, 2)),
        np.float32(3),
        object(),
    )
    names = [
        'args',
        'meta',
        'cfg',
        'config',
        'mean',
        'std',
        'input_size',
        'img_size',
        'crop_pct',
        'model',
        'arch',
        'interpolation',
        'crop_mode',
        'val_crop_size',
        'val_resize_size',
        'backend',
        'test_pipeline',
        'type',
        'pipeline',
        'data',
        'test',
        'scale',
        'size',
        'crop_size',
        'img_norm_cfg',
        'transforms',
        'data_preprocessor',
        'to_rgb',
        'edge',
        'keep_ratio',
        'eval_crop_ratio',
        'data_path',
        'nb_classes',
        'rgb_to_bgr',
    ]

    def anything(depth: int) -> Any:
        kind = draw.randrange(4) if depth else 0
        if kind == 1:
            return [anything(depth - 1) for _ in range(draw.randrange(4))]
        if kind >= 2:
            keys = draw.choices([*names, None, 1, (1, 2)], k=8)
            steps = draw.choice(('Resize', 'ResizeEdge', 'CenterCrop', 'Normalize', 'Load'))
            return {key: anything(depth - 1) for key in keys} | {'type': steps}
        return draw.choice(leaves)

    for _ in range(1000):
        said = image_settings({name: anything(3) for name in draw.choices(names, k=6)})
        for_channels(said.applied_to(zoo.config('resnest50d').preprocess), 3)
    for text in texts:
        image_settings({'meta': {'cfg': text}}).applied_to(Preprocess())
    assert 'called' not in capsys.readouterr().out

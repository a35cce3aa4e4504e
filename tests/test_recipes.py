"""The recipes against their published commands, logs and timm's evaluation."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm.models

from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from train import recipes
from train.settings import Settings, validate

# From the commands: GPUs, images of a GPU, learning rate in all, epochs, size of the images.
COMMANDS = {
    'res2net50_26w_4s': (4, 64, 0.1, 100, 224),
    'res2net50_48w_2s': (4, 64, 0.1, 100, 224),
    'res2net50_14w_8s': (4, 64, 0.1, 100, 224),
    'res2net50_26w_6s': (4, 64, 0.1, 100, 224),
    'res2net50_26w_8s': (4, 64, 0.1, 100, 224),
    'res2net101_26w_4s': (4, 64, 0.1, 100, 224),
    'res2next50': (4, 64, 0.1, 100, 224),
    'resnext50_32x4d': (8, 128, 0.4, 200, 224),
    'resnext101_32x4d': (8, 128, 0.4, 200, 224),
    'resnext101_64x4d': (8, 128, 0.4, 200, 224),
    'seresnext50_32x4d': (8, 128, 0.4, 200, 224),
    'seresnext101_32x4d': (8, 128, 0.4, 200, 224),
    'seresnext101_64x4d': (8, 128, 0.4, 200, 224),
    'resnest14d': (8, 128, 8 * 0.05, 270, 224),
    'resnest26d': (8, 128, 8 * 0.05, 270, 224),
    'resnest50d': (64, 128, 64 * 0.05, 270, 224),
    'resnest101e': (64, 64, 64 * 0.025, 270, 224),
    'resnest200e': (64, 32, 64 * 0.0125, 270, 256),
    'resnest269e': (64, 32, 64 * 0.0125, 270, 320),
    'resnest50d-torch': (4 * 8, 64, 4 * 8 * 0.025, 270, 224),
    'resnest101e-torch': (4 * 8, 64, 4 * 8 * 0.025, 270, 224),
    'resnest200e-torch': (8 * 8, 32, 8 * 8 * 0.0125, 270, 256),
    'resnest269e-torch': (8 * 8, 32, 8 * 8 * 0.0125, 270, 320),
}
NOT_RELEASED = {'res2net50d', 'res2net101d'}
PUBLISHED = [name for name in recipes.RECIPES if name not in recipes.OURS]
DOCS = Path(__file__).parents[1] / 'docs'


def net_of(name: str) -> str:
    """The net of a recipe, by the recipe's name."""
    return next((name.removesuffix(end) for end in recipes.ENDINGS if name.endswith(end)), name)


def test_every_recipe_is_checked_here_and_named_by_its_net() -> None:
    assert set(recipes.RECIPES) == set(COMMANDS) | NOT_RELEASED | set(recipes.OURS)
    for settings in recipes.RECIPES.values():
        validate(settings)
    for name in PUBLISHED:
        assert net_of(name) == recipes.RECIPES[name].model
        assert net_of(name) in zoo.ARCHS


def test_the_table_of_the_documentation() -> None:
    table = (DOCS / 'recipes.md').read_text('utf-8').partition('\n| recipe |')[2].partition('\n\n')[0]
    rows = [line.split(' | ') for line in table.splitlines()[2:]]
    sources = {name: row[-1] for row in rows for name in re.findall(r'`([^`]+)`', row[0])}
    assert set(sources) == set(recipes.RECIPES)
    assert {name for name, source in sources.items() if source.startswith('ours')} == set(recipes.OURS)
    assert {name for name, source in sources.items() if 'not released' in source} == NOT_RELEASED
    readme = (DOCS.parent / 'README.md').read_text('utf-8')
    assert all(f'`{name}`' in readme for name in (*recipes.OURS, *NOT_RELEASED))


@pytest.mark.parametrize('name', COMMANDS)
def test_the_numbers_of_the_command(name: str) -> None:
    gpus, images, lr, epochs, size = COMMANDS[name]
    s = recipes.get(name)
    assert (s.batch_size, s.bn_images, s.epochs, s.image_size) == (gpus * images, images, epochs, size)
    assert s.lr == pytest.approx(lr, rel=1e-12)
    assert s.mix_images == (images if s.mixup else 0)
    assert (s.momentum, s.weight_decay, s.label_smoothing) == (0.9, 1e-4, 0.1)
    assert (s.ema_decay, s.erasing, s.hue, s.cutmix, s.clip_norm, s.drop_path_rate) == (0,) * 6
    assert (s.flip, s.dtype, s.mix_off_epochs) == (0.5, 'float32', 0)


FAMILIES: dict[str, dict[str, Any]] = {
    'res2net': dict(
        nesterov=False, schedule='step', step_epochs=30, step_rate=0.1, warmup_epochs=0, decay='all', mixup=0,
        jitter=0, lighting=0, policy='', crop='random_resized', zero_init_last=False, drop_block_rate=0,
        interpolation='bilinear', crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), conv_init='fan_out',
    ),
    'resnext': dict(
        nesterov=True, schedule='cosine', warmup_epochs=5, decay='kernels', mixup=0.2, jitter=0.4,
        lighting=0.1, policy='', crop='random_resized', zero_init_last=False, conv_init='prelu',
        drop_block_rate=0, interpolation='bilinear', crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3),
    ),
    'resnest': dict(
        nesterov=True, schedule='cosine', warmup_epochs=5, decay='kernels', mixup=0.2, jitter=0.4,
        lighting=0.1, policy='resnest_autoaugment', zero_init_last=True, conv_init='fan_in',
    ),
    'torch': dict(
        nesterov=False, schedule='cosine', warmup_epochs=5, decay='encoding', mixup=0.2, jitter=0.4,
        lighting=0.1, policy='resnest_randaugment', policy_ops=2, policy_magnitude=12, drop_block_rate=0,
        drop_rate=0, crop='resnest', crop_area=(0.1, 1.0), interpolation='bilinear', conv_init='fan_out',
        zero_init_last=False,
    ),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    'resnest14d': dict(drop_block_rate=0, drop_rate=0, crop='random_resized'),
    'resnest26d': dict(drop_block_rate=0.1, drop_rate=0, crop='random_resized'),
    'resnest50d': dict(drop_block_rate=0.1, drop_rate=0, crop='random_resized'),
    'resnest101e': dict(drop_block_rate=0.1, drop_rate=0, crop='random_resized'),
    'resnest200e': dict(drop_block_rate=0.1, drop_rate=0.2, crop='random_resized', interpolation='bilinear'),
    'resnest269e': dict(
        drop_block_rate=0.1, drop_rate=0.2, crop='resnest', crop_area=(0.1, 1.0), interpolation='bicubic'
    ),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_what_its_family_does(name: str) -> None:
    family = 'torch' if name.endswith('-torch') else name.removeprefix('se')[:7].replace('res2nex', 'res2net')
    values = dataclasses.asdict(recipes.get(name))
    for field, value in {**FAMILIES[family], **OWN.get(name, {})}.items():
        assert values[field] == value, field


def test_res2net_v1b_is_what_little_is_known() -> None:
    s = recipes.get('res2net50_v1b')
    assert (s.model, s.epochs, s.step_epochs, s.cutmix, s.mixup) == ('res2net50d', 300, 75, 1.0, 0.0)


@pytest.mark.parametrize('name', PUBLISHED)
def test_it_evaluates_as_timm_evaluates_its_weights(name: str) -> None:
    model = net_of(name)
    tag = 'gluon_in1k' if 'resnext' in model or model in ('resnest14d', 'resnest26d') else 'in1k'
    reference = timm.models.get_pretrained_cfg(f'{model}.{tag}')
    s = recipes.get(name)
    assert s.eval_size == reference.input_size[-1]
    assert s.eval_crop_pct == reference.crop_pct
    assert s.eval_interpolation == reference.interpolation
    assert s.eval_crop_mode == 'center'


def test_digits_is_for_the_tiny_net_on_grey_images() -> None:
    s = recipes.get('digits')
    assert s.model in zoo.TINY_ARCHS
    assert (s.data, s.in_chans, s.image_size, s.eval_size, s.flip) == ('digits', 1, 32, 32, 0)


def test_finetune_starts_from_the_weights_of_its_model() -> None:
    s = recipes.get('finetune')
    assert s.weights == s.model
    assert s.layer_decay < 1
    assert s.lr < 0.1


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('ResNeSt50', 'resnest50d'),
        ('resnest269', 'resnest269e'),
        ('resnest200-torch', 'resnest200e-torch'),
        ('res2net50', 'res2net50_26w_4s'),
        ('res2next50_4s', 'res2next50'),
        ('gluon_resnext101_64x4d', 'resnext101_64x4d'),
        ('resnext50_32x4d.gluon_in1k', 'resnext50_32x4d'),
        ('hf-hub:timm/resnest101e.in1k', 'resnest101e'),
    ],
)
def test_other_names_of_the_net(name: str, expected: str) -> None:
    assert recipes.get(name) is recipes.RECIPES[expected]


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('resnest51d', 'did you mean resnest50d or'),
        ('digit', 'did you mean digits'),
        ('fine-tune', 'did you mean finetune'),
        ('zzz', 'they are digits, finetune, '),
        ('resnext50_32x4d.a1_in1k', 'resnext50_32x4d is the recipe of other weights of this net'),
        (
            'resnext101_32x8d',
            'how resnext101_32x8d was trained is not among them; near it is resnext101_32x4d',
        ),
        ('resnest50_fast_2s1x64d', 'how resnest50_fast_2s1x64d was trained is not among them'),
        ('resnest14d-torch', 'how resnest14d was trained is not among them'),
    ],
)
def test_unknown_recipes(name: str, hint: str) -> None:
    with pytest.raises(FlaxnetsError) as caught:
        recipes.get(name)
    assert f'no recipe {name!r}: ' in str(caught.value)
    assert hint in str(caught.value)


def test_recipes_are_settings() -> None:
    assert all(isinstance(settings, Settings) for settings in recipes.RECIPES.values())

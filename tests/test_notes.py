"""What a run says before it begins: what it takes from its weights, and which of its fields do nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import random_variables

import flaxnets
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.store import weights
from flaxnets.zoo.records import Config
from train import recipes
from train.job import make_job, make_model
from train.notes import without_effect
from train.settings import Settings, apply, complete, continued, preprocess
from train.tools.description import describe

FINETUNE = recipes.get('finetune')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('data') / 'data.npz'
    images, labels = np.zeros((64, 8, 8, 3), np.uint8), np.arange(64) % 4
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return f'data=arrays:{path}'


@pytest.mark.parametrize('model', ['resnest50d', 'resnest101e', 'resnest269e', 'res2net50d'])
def test_a_recipe_with_another_model_takes_over_its_images(model: str, data: str) -> None:
    job = make_job(apply(FINETUNE, [f'model={model}', data]))
    expected = zoo.config(model).preprocess
    assert job.config.preprocess == expected and job.settings.image_size == expected.size
    assert f'as weights={model} expect: image_size={expected.size}' in job.remarks[0].message
    text = ' '.join(describe(dataclasses.replace(job.settings, num_classes=4), 64, 1).split())
    assert f'eval_size {expected.size} ' in text


def test_what_is_given_stays_and_the_difference_is_said(data: str) -> None:
    job = make_job(apply(FINETUNE, ['model=resnest101e', 'image_size=128', 'eval_crop_pct=1', data]))
    assert (job.settings.image_size, job.preprocess.size, job.preprocess.crop_pct) == (128, 256, 1)
    other = next(r.message for r in job.remarks if 'other than' in r.message)
    assert 'image_size=128 and not 256' in other and 'eval_crop_pct=1.0 and not 0.875' in other
    # A published recipe says how it was run, whatever it starts from.
    recipe = apply(recipes.get('resnest50d'), ['weights=resnest101e', 'batch_size=64', 'bn_images=0', data])
    job = make_job(dataclasses.replace(recipe, mix_images=0, epochs=9))
    assert (job.settings.image_size, job.settings.eval_size) == (224, 224)
    assert any('eval_size=224 and not 256' in r.message for r in job.remarks)


def test_weights_that_expect_other_images_than_imagenets(data: str, tmp_path: Path) -> None:
    expected = Preprocess((24, 40), 1.1, 'border', 'lanczos', (0.5,), (0.25,), 'bgr')
    net = flaxnets.create('resnext_tiny', 4)
    config = Config('resnext_tiny', zoo.TINY_ARCHS['resnext_tiny'], expected, num_classes=4)
    path = weights.save(tmp_path / 'net', random_variables(net), config)
    settings = apply(FINETUNE, [f'weights={path}', data])
    assert settings.model == 'resnext_tiny'
    job = make_job(settings)
    assert job.config.preprocess == job.preprocess == expected and job.settings.image_size == (24, 40)
    # A run that goes on asks the weights no more, and compares with how it began.
    gone = dataclasses.replace(settings, weights='gone')
    assert make_job(gone, job.settings).settings == dataclasses.replace(job.settings, weights='gone')
    assert continued(settings, job.settings).mean == (0.5,)


def test_without_weights_the_defaults_are_those_of_always() -> None:
    s = complete(Settings('resnest101e'))
    assert (s.image_size, preprocess(s)) == (224, Preprocess())
    assert complete(s) == s


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(crop='resize', crop_area=(0.5, 1.0)), 'crop_area=0.5,1'),
        (dict(crop_padding=4), 'crop_padding=4'),
        (dict(policy='autoaugment', policy_magnitude=3), 'policy_magnitude=3'),
        (dict(in_chans=1, lighting=0.1, hue=0.2), 'hue=0.2, lighting=0.1'),
        (dict(mix_images=4), 'mix_images=4'),
        (dict(step_epochs=7), 'step_epochs=7'),
        (dict(weight_decay=0.0, decay='all'), 'decay=all'),
        (dict(weights='x', conv_init='fan_in'), 'conv_init=fan_in'),
        (dict(weights='x', freeze_bn=True, bn_images=8), 'bn_images=8'),
        (dict(schedule='step', epochs=20), 'step_epochs=30'),
        (dict(mixup=0.2, mix_off_epochs=100), 'mix_off_epochs=100'),
        (dict(save_steps=5000), 'save_steps=5000'),
        (dict(max_steps=30, warmup_epochs=5), 'step 30'),
    ],
)
def test_a_field_that_does_nothing_is_named(changes: dict[str, Any], words: str) -> None:
    settings = Settings('resnest50d', **changes)
    total = settings.max_steps or 10 * settings.epochs
    (note,) = without_effect(settings, 10, total)
    assert words in note.message


def test_images_that_are_mixed_are_those_of_a_device() -> None:
    settings = Settings('resnest50d', mixup=0.2, mix_images=128, batch_size=256)
    assert not list(without_effect(settings, 10, 1000, 2))
    (note,) = without_effect(settings, 10, 1000, 4)
    assert 'a device has 64 images' in note.message
    with pytest.raises(FlaxnetsError, match='mixup=0.2,.* each of 256 devices one'):
        make_model(dataclasses.replace(settings, mix_images=0), 256)


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_no_recipe_has_such_a_field(name: str) -> None:
    settings = recipes.get(name)
    assert not list(without_effect(settings, 100, 100 * settings.epochs))

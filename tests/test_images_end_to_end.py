"""How weights expect their images, from any file to the device, to training and back into files.

The oracle is Pillow and NumPy by way of `flaxnets.transform`, which other tests hold against timm's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from nets import random_variables
from PIL import Image

import flaxnets
from convert.__main__ import main
from convert.arithmetic import as_dtype, averaged, with_images, without_head
from convert.conversion import open_checkpoint
from convert.names.tree import to_state
from convert.writing import write
from flaxnets import zoo
from flaxnets.__main__ import main as flaxnets_command
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.store import arrays, runs, weights
from flaxnets.zoo.records import Config
from train import recipes
from train.evaluation import report as evaluation_job
from train.evaluation.metrics import Evaluation
from train.job import make_job
from train.loop import train
from train.notes import about_images
from train.settings import from_json

NET = 'resnext_tiny'
IMAGES = Preprocess((24, 40), 1.1, 'squash', 'lanczos', (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), 'bgr')
CLASSES = ('ant', 'bee', 'wasp')
CONFIG = Config(NET, zoo.NETS[NET], IMAGES, num_classes=3, classes=CLASSES)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of weights whose images are as unlike ImageNet's as they can be."""
    model = flaxnets.create(NET, 3)
    return weights.save(tmp_path_factory.mktemp('net') / 'net', random_variables(model), CONFIG)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {'classes': np.array(CLASSES)}
    for part, count in (('train', 16), ('test', 11)):
        made[f'x_{part}'] = rng.integers(0, 256, (count, 31, 50, 3), dtype=np.uint8)
        made[f'y_{part}'] = np.arange(count) % 3
    path = tmp_path_factory.mktemp('data') / 'data.npz'
    np.savez(path, **made)
    return f'arrays:{path}'


def test_evaluation_is_a_loop_over_the_transform(folder: Path, data: str) -> None:
    options = argparse.Namespace(
        model=[str(folder)], data=data, split='', batch=2, workers=2, feed='threads', dtype='float32',
        quiet=True, out=None, images=None,
        real_labels=None, classes=None, class_order=None, among='all', crops=1, flip=False,
    )  # fmt: skip
    model, variables = flaxnets.load(folder)
    apply = jax.jit(model.apply)
    with np.load(data.removeprefix('arrays:')) as found:
        images, labels = found['x_test'], found['y_test']
    batch = flaxnets.transform(folder).batch(images)
    assert batch.shape == (11, 24, 40, 3)
    check(evaluation_job.run(options).result, apply(variables, batch), labels)
    options.images = ['mean=0.1', 'crop_mode=border', 'channel_order=rgb']
    other = Preprocess((24, 40), 1.1, 'border', 'lanczos', (0.1,), (0.5, 0.6, 0.7))
    report = evaluation_job.run(options)
    assert report.as_json()['preprocess']['mean'] == (0.1,) and report.as_json()['images'] == 11
    check(report.result, apply(variables, flaxnets.transform(other).batch(images)), labels)


def check(result: Evaluation, logits: Any, labels: np.ndarray) -> None:
    logits = np.asarray(logits, np.float64)
    np.testing.assert_array_equal(result.predictions, logits.argmax(1))
    own = logits[np.arange(11), labels] - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(result.losses, -own, atol=1e-4)


def test_fine_tuning_keeps_what_the_weights_expect(folder: Path, data: str, tmp_path: Path) -> None:
    start = tmp_path / 'start'
    shutil.copytree(folder, start)
    settings = dataclasses.replace(
        recipes.get('finetune'), model=NET, weights=str(start), data=data, epochs=1, batch_size=16,
        warmup_epochs=0, crop='resize', keep_best=0,
    )  # fmt: skip
    assert make_job(settings).preprocess == IMAGES
    train(settings, str(tmp_path / 'run'), quiet=True)
    shutil.rmtree(start)  # a run that goes on does not need what it started from
    meta = arrays.read_manifest(runs.find(tmp_path / 'run')).facts['meta']
    earlier = from_json(meta['settings'])
    assert make_job(settings, earlier).preprocess == IMAGES
    assert make_job(dataclasses.replace(settings, eval_size=64), earlier).preprocess.size == 64
    for source in ('run', 'run/weights'):
        assert flaxnets.config(tmp_path / source).preprocess == IMAGES
        assert flaxnets.transform(tmp_path / source).preprocess == IMAGES
    assert open_checkpoint(tmp_path / 'run').config.preprocess == IMAGES


@pytest.mark.parametrize('name', ['net.pth', 'net.safetensors'])
def test_files_that_we_write_keep_it(name: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    write(open_checkpoint(folder), path)
    found = flaxnets.config(path)
    assert (found.preprocess, found.classes, found.name) == (IMAGES, CLASSES, NET)
    np.testing.assert_array_equal(
        flaxnets.transform(path)(np.full((9, 9, 3), 7, np.uint8)),
        flaxnets.transform(folder)(np.full((9, 9, 3), 7, np.uint8)),
    )
    again = open_checkpoint(path)
    for made in (averaged([again, again]), without_head(again), as_dtype(again, 'float16')):
        write(made, tmp_path / f'made-{name}', overwrite=True)
        assert flaxnets.config(tmp_path / f'made-{name}').preprocess == IMAGES
    certificate = json.loads((tmp_path / f'{name}.json').read_text())
    (tmp_path / f'{name}.json').write_text(json.dumps({**certificate, 'sha256': '0' * 64}))
    assert flaxnets.config(path, model=NET).preprocess != IMAGES  # the certificate of another file
    (tmp_path / f'{name}.json').write_text('[')
    assert flaxnets.config(path, model=NET).classes is None


def test_whatever_load_opens_has_a_config_and_a_transform(folder: Path, tmp_path: Path) -> None:
    model, variables = flaxnets.load(folder)
    state = {name: torch.from_numpy(np.array(t)) for name, t in to_state(variables, model).items()}
    args = argparse.Namespace(model=NET, input_size=[3, 24, 40], mean=[0.5], std=[0.25], interpolation='box')
    torch.save({'arch': NET, 'args': args, 'state_dict': state}, tmp_path / 'x.pth')
    hub = tmp_path / 'hub'
    hub.mkdir()
    torch.save(state, hub / 'pytorch_model.bin')
    described = {'input_size': [3, 24, 40], 'mean': [0.5] * 3, 'std': [0.25] * 3, 'interpolation': 'box'}
    hub_config = {'architecture': NET, 'num_classes': 3, 'pretrained_cfg': described}
    (hub / 'config.json').write_text(json.dumps(hub_config))
    photo = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    inputs = [flaxnets.transform(path)(photo) for path in (tmp_path / 'x.pth', hub)]
    assert inputs[0].shape == (24, 40, 3)
    assert flaxnets.config(hub).preprocess.interpolation == 'box'
    with pytest.raises(FlaxnetsError, match='res2net_tiny'):
        flaxnets.config(tmp_path / 'x.pth', model='res2net_tiny')
    with pytest.raises(FlaxnetsError, match='resnest_tiny'):
        flaxnets.config(folder, model='resnest_tiny')


def test_a_folder_of_a_nets_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'resnest50d').mkdir()
    assert flaxnets.config('resnest50d') == zoo.config('resnest50d')
    assert flaxnets.transform('resnest50d').preprocess == zoo.config('resnest50d').preprocess


def test_weights_whose_images_cannot_be_prepared_convert_and_are_refused_where_an_image_is(
    folder: Path, tmp_path: Path
) -> None:
    model, variables = flaxnets.load(folder)
    state = {name: torch.from_numpy(np.array(t)) for name, t in to_state(variables, model).items()}
    torch.save({'arch': NET, 'args': {'interpolation': 'random'}, 'state_dict': state}, tmp_path / 'x.pth')
    checkpoint = open_checkpoint(tmp_path / 'x.pth')
    assert any('cannot be prepared' in note for note in checkpoint.source.notes)
    write(checkpoint, tmp_path / 'out')
    assert 'random' in flaxnets.config(tmp_path / 'out').preprocess.unsupported[0]
    flaxnets.load(tmp_path / 'out')
    with pytest.raises(FlaxnetsError, match='random'):
        flaxnets.transform(tmp_path / 'out')
    told = with_images(checkpoint, ['size=24'])
    with pytest.raises(FlaxnetsError, match='2 values for images of 3 channels'):
        with_images(checkpoint, ['mean=0.5,0.5'])
    assert not told.config.preprocess.unsupported
    assert any('random' in note and 'as told' in note for note in told.source.notes)  # overruled, and said


def test_what_images_get_only_nearly_is_said_by_every_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ('prediction', 'features'):
        monkeypatch.setattr(f'flaxnets.inference.{module}.mapped', lambda *_, **__: iter(()))
    model, variables = flaxnets.load(folder)
    state = {name: torch.from_numpy(np.array(t)) for name, t in to_state(variables, model).items()}
    steps = "[dict(type='Resize', size=(32, -1)), dict(type='CenterCrop', crop_size=32)]"
    meta = {'cfg': f'data = dict(test=dict(pipeline={steps}))', 'CLASSES': CLASSES}
    torch.save({'meta': meta, 'state_dict': state}, tmp_path / 'x.pth')
    assert main([str(tmp_path / 'x.pth'), '--model', NET, '--out', str(tmp_path / 'net')]) == 0
    assert 'OpenCV' in capsys.readouterr().out
    net, image = str(tmp_path / 'net'), str(tmp_path / 'a.png')
    Image.new('RGB', (40, 40)).save(image)
    for command in (
        ['info', net],
        ['predict', image, '--model', net],
        ['embed', image, '--model', net, '--out', str(tmp_path / 'features.npy')],
    ):
        flaxnets_command(command)
        printed = capsys.readouterr()
        assert 'OpenCV' in printed.out + printed.err, command
    settings = dataclasses.replace(recipes.RECIPES['finetune'], weights=net, model=NET)
    assert 'OpenCV' in str(flaxnets.config(net).preprocess)  # which an evaluation prints
    told = [note.message for note in about_images(settings, settings, flaxnets.config(net).preprocess)]
    assert any('OpenCV' in message for message in told)
    assert not flaxnets.config(net).preprocess.changed(['interpolation=box']).approximations


def test_the_user_may_know_better(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ['--images', 'size=24,48', 'std=0.25', 'interpolation=box']
    assert main([str(folder), '--out', str(tmp_path / 'out'), *asked]) == 0
    expected = dataclasses.replace(IMAGES, size=(24, 48), std=(0.25,), interpolation='box')
    assert flaxnets.config(tmp_path / 'out').preprocess == expected
    assert 'as asked for' in capsys.readouterr().out
    assert main([str(folder), '--out', str(tmp_path / 'other'), '--images', 'sise=24']) == 1
    assert "'sise'" in capsys.readouterr().err

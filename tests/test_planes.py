"""Images of any number of channels, from arrays to a net that was trained on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from nets import random_variables
from PIL import Image
from short_nets import short_nets

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import CROP_MODES, Preprocess
from flaxnets.images.transforms import Transform
from flaxnets.store import weights
from flaxnets.zoo import TINY_ARCHS
from flaxnets.zoo.records import Config
from train import recipes, train
from train.__main__ import main
from train.data.augment import train_transform
from train.data.planes import check_channels, decoded, plane_pixels
from train.data.sources import open_source
from train.job import initial_state, make_job
from train.run.log import read
from train.settings import CROPS, Settings, validate

PICTURE = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
PLANES = [Image.fromarray(np.ascontiguousarray(PICTURE[..., i])) for i in (0, 1, 2, 0)]


@pytest.mark.parametrize('crop', CROPS)
@pytest.mark.parametrize('size', [24, (16, 40)])
def test_each_channel_is_cropped_as_pillow_crops_colours(crop: str, size: int | tuple[int, int]) -> None:
    settings = Settings('resnext_tiny', image_size=size, crop=crop, crop_padding=3, in_chans=4)
    four = decoded(PICTURE[..., [0, 1, 2, 0]], 4, 'x')
    for seed in range(5):
        found = train_transform(settings)(four, np.random.default_rng(seed))
        colours = dataclasses.replace(settings, in_chans=3)
        expected = train_transform(colours)(Image.fromarray(PICTURE), np.random.default_rng(seed))
        assert expected.shape == ((24, 24, 3) if size == 24 else (16, 40, 3))
        np.testing.assert_array_equal(found, expected[..., [0, 1, 2, 0]])


@pytest.mark.parametrize('mode', CROP_MODES)
def test_and_prepared_for_evaluation_as_colours_are(mode: str) -> None:
    mean = (0.1, 0.5, 0.9)
    p = Preprocess(size=(24, 32), crop_pct=1.1, crop_mode=mode, interpolation='bicubic', mean=mean)
    expected = Transform(p).pixels(PICTURE)
    four = dataclasses.replace(p, mean=(*mean, mean[0]), std=(1.0,))
    found = plane_pixels(four, 4)(decoded(PICTURE[..., [0, 1, 2, 0]], 4, 'x'))
    np.testing.assert_array_equal(found, expected[..., [0, 1, 2, 0]])


def write_bands(path: Path, channels: int, size: int = 32) -> str:
    """Images of two classes that differ in their last channel alone."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 32), ('test', 20)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 200, (count, size, size, channels), dtype=np.uint8)
        images[..., -1] = 30 + 190 * labels[:, None, None]
        arrays |= {f'x_{part}': images, f'y_{part}': labels}
    np.savez(path, **arrays)
    return f'arrays:{path}'


@pytest.mark.usefixtures('compiled_once')
@short_nets()
def test_five_channels_are_trained_on_published_evaluated_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_bands(tmp_path / 'bands.npz', 5)
    net = flaxnets.create('resnext_tiny', 7)
    kernel = random_variables(net)
    config = Config('resnext_tiny', TINY_ARCHS['resnext_tiny'], Preprocess(size=32, crop_pct=1), 7)
    start = weights.save(tmp_path / 'start', kernel, config)
    settings = Settings(
        'resnext_tiny',
        weights=str(start),
        in_chans=5,
        data=data,
        batch_size=8,
        epochs=4,
        eval_epochs=9,
        lr=0.05,
    )
    job = make_job(settings)
    loaded = flaxnets.load(start, num_classes=2, in_chans=5)[1]['params']['conv1']
    jax.tree.map(np.testing.assert_array_equal, initial_state(job).params['conv1'], loaded)
    mean, std = (np.tile(v, 2)[:5] for v in (Preprocess().mean, Preprocess().std))
    np.testing.assert_allclose(job.preprocess.channel_values(5), [mean, std])

    assert train(dataclasses.replace(settings, max_steps=8), str(tmp_path / 'run'), quiet=True).weights
    outcome = train(settings, str(tmp_path / 'run'), quiet=True)
    assert outcome.evaluation is not None and outcome.evaluation.images == 20
    found = flaxnets.config(tmp_path / 'run' / 'weights')
    assert found.in_chans == 5 and found.preprocess == job.preprocess
    messages = [r['message'] for r in read(str(tmp_path / 'run')) if r['kind'] == 'note']
    assert any('image_size=32' in m and 'mean=0.485,0.456,0.406,0.485,0.456' in m for m in messages)

    assert main(['eval', '--model', f'{tmp_path}/run/weights', '--data', data, '--json', '--quiet']) == 0
    assert json.loads(capsys.readouterr().out)['top1'] == outcome.evaluation.top1


@pytest.mark.parametrize('split', ['train', 'train[:80%]'])
@pytest.mark.parametrize('channels', [2, 4, 6])
def test_images_of_other_channels_than_the_net_are_refused(channels: int, split: str, tmp_path: Path) -> None:
    data = write_bands(tmp_path / 'bands.npz', channels, size=8)
    base = Settings('resnext_tiny', data=data, train_split=split, batch_size=8)
    make_job(dataclasses.replace(base, in_chans=channels))
    with pytest.raises(FlaxnetsError, match=f'in_chans=5, .* have {channels} channels'):
        make_job(dataclasses.replace(base, in_chans=5))
    if channels == 4:
        assert any('in_chans=4 takes all' in remark.message for remark in make_job(base).remarks)
    else:
        with pytest.raises(FlaxnetsError, match=f'in_chans=3, .* have {channels} channels'):
            make_job(base)


def test_and_where_labels_are_counted_among_other_classes(tmp_path: Path) -> None:
    source = open_source(write_bands(tmp_path / 'bands.npz', 2, size=8), '', True).among(('1', '0'))
    assert check_channels(source, 2) is None
    for in_chans in (3, 5):
        with pytest.raises(FlaxnetsError, match=f'in_chans={in_chans}, .* have 2 channels'):
            check_channels(source, in_chans)


def test_files_have_no_four_channels(tmp_path: Path) -> None:
    for part in ('train', 'val'):
        (tmp_path / part / 'a').mkdir(parents=True)
        Image.new('RGBA', (8, 8)).save(tmp_path / part / 'a' / '0.png')
    with pytest.raises(FlaxnetsError, match='in_chans=4.*arrays:'):
        make_job(Settings('resnext_tiny', data=f'folder:{tmp_path}', in_chans=4, batch_size=1))


def test_what_is_made_for_colours_is_refused() -> None:
    with pytest.raises(FlaxnetsError) as caught:
        validate(dataclasses.replace(recipes.get('resnest50d'), in_chans=4, hue=0.1, mean=(0.5, 0.5)))
    for field in ('policy', 'jitter', 'hue', 'lighting', 'mean'):
        assert f'{field}=' in str(caught.value)
    validate(Settings('resnest50d', in_chans=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5,)))

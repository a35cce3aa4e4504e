"""Directories of weights: what is written comes back, damage is found, nets of other heads are fitted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from nets import random_variables
from timm.models import adapt_input_conv

import flaxnets
from flaxnets import zoo
from flaxnets.errors import CheckpointError
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo.records import Config

ARCH = Arch('resnest', (1, 1, 1, 1), 1, 32, radix=2, deep_stem=True, stem_width=8, avg_down=True, planes=16)
CONFIG = Config('resnest14d', ARCH, num_classes=10)


@pytest.fixture(scope='module')
def variables() -> dict[str, Any]:
    return random_variables(build(ARCH, 10))


@pytest.fixture
def directory(tmp_path: Path, variables: dict[str, Any]) -> Path:
    return weights.save(tmp_path / 'net', variables, CONFIG)


def equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def test_round_trip(directory: Path, variables: dict[str, Any]) -> None:
    source = weights.Source('x.pth', '0' * 64, 'canonical', ('a note',), {'bn1': 3})
    config = replace(CONFIG, weights=zoo.resolve('resnest14d')[1], classes=tuple('abcdefghij'))
    weights.save(directory, variables, config, source, overwrite=True)
    assert weights.read_config(directory) == config
    assert weights.read_source(directory) == source
    assert equal(weights.read_variables(directory), variables)
    assert sorted(p.name for p in directory.parent.iterdir()) == ['net']


def test_dtypes_are_kept(tmp_path: Path) -> None:
    tree = {
        'params': {'a': {'kernel': np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)}},
        'batch_stats': {'a': {'mean': np.array([1, 2], np.float16), 'var': np.array([1.5], np.float64)}},
    }
    weights.save(tmp_path / 'net', tree, CONFIG)
    assert equal(weights.read_variables(tmp_path / 'net'), tree)


def test_nothing_is_overwritten_unasked(directory: Path, variables: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r'net exists.*overwrite=True'):
        weights.save(directory, variables, CONFIG)
    other = directory.parent / 'holiday-photos'
    other.mkdir()
    with pytest.raises(CheckpointError, match='not a directory of weights, so it is not overwritten'):
        weights.save(other, variables, CONFIG, overwrite=True)


def test_a_failed_write_leaves_nothing_new(
    directory: Path, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(weights, 'write_json', fail)
    with pytest.raises(CheckpointError, match='No space left'):
        weights.save(directory, {'params': {}, 'batch_stats': {}}, CONFIG, overwrite=True)
    assert [p.name for p in directory.parent.iterdir()] == ['net']
    assert equal(weights.read_variables(directory), variables)


def test_every_flipped_bit_in_the_arrays_is_found(directory: Path, variables: dict[str, Any]) -> None:
    files = [p for p in directory.rglob('*') if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(0)
    sizes = np.array([p.stat().st_size for p in files])
    silent = []
    for _ in range(60):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        clean = path.read_bytes()
        damaged = bytearray(clean)
        where = int(rng.integers(len(clean)))
        damaged[where] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            weights.read_config(directory)
            if not equal(weights.read_variables(directory), variables):
                silent.append(f'{path.name}[{where}]')
        except CheckpointError:
            pass
        path.write_bytes(clean)
    assert not silent


@pytest.mark.parametrize('name', ['config.json', 'certificate.json', 'variables.safetensors'])
def test_missing_files_are_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=str(directory)):
        weights.read_config(directory)
        weights.read_variables(directory)


def test_a_directory_of_a_later_format_is_refused(directory: Path) -> None:
    path = directory / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format_version': 2}))
    with pytest.raises(CheckpointError, match='format version 2.*update flaxnets'):
        flaxnets.load(directory)


def test_load_gives_the_net_and_its_variables(directory: Path, variables: dict[str, Any]) -> None:
    model, loaded = flaxnets.load(directory)
    assert model == build(ARCH, 10)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert equal(loaded, variables)
    assert flaxnets.config(directory) == CONFIG


def test_load_options_reach_the_net(directory: Path) -> None:
    model, loaded = flaxnets.load(directory, drop_rate=0.2, param_dtype='bfloat16', dtype='bfloat16')
    assert model.drop_rate == 0.2
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded['params'])} == {'bfloat16'}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded['batch_stats'])} == {'float32'}


def test_another_number_of_classes_starts_a_new_classifier(
    directory: Path, variables: dict[str, Any]
) -> None:
    model, loaded = flaxnets.load(directory, num_classes=3, seed=1)
    assert loaded['params']['fc']['kernel'].shape == (512, 3)
    assert 0 < abs(loaded['params']['fc']['kernel']).max() <= 512**-0.5
    assert 0 < abs(loaded['params']['fc']['bias']).max() <= 512**-0.5
    assert not equal(
        loaded['params']['fc'], flaxnets.load(directory, num_classes=3, seed=2)[1]['params']['fc']
    )
    for name in set(variables['params']) - {'fc'}:
        assert equal(loaded['params'][name], variables['params'][name]), name
    assert model.num_classes == 3
    assert 'fc' not in flaxnets.load(directory, num_classes=0)[1]['params']


def test_a_new_classifier_is_new_in_all_its_parts(directory: Path, variables: dict[str, Any]) -> None:
    _, loaded = flaxnets.load(directory, global_pool='catavgmax')  # twice as many features, as many classes
    assert loaded['params']['fc']['kernel'].shape[0] == 2 * variables['params']['fc']['kernel'].shape[0]
    assert not np.array_equal(loaded['params']['fc']['bias'], variables['params']['fc']['bias'])


@pytest.mark.parametrize('counters', [{'bn1': 'many'}, ['bn1'], {'bn1': 1.5}])
def test_a_certificate_of_something_else(directory: Path, counters: Any) -> None:
    path = directory / 'certificate.json'
    certificate = json.loads(path.read_text())
    certificate['source']['num_batches_tracked'] = counters
    path.write_text(json.dumps(certificate))
    with pytest.raises(CheckpointError, match='not a certificate'):
        weights.read_source(directory)
    (directory / 'config.json').write_text('[' * 100_000)
    with pytest.raises(CheckpointError, match='cannot be read'):
        weights.read_config(directory)


@pytest.mark.parametrize('in_chans', [1, 2, 3, 4, 6])
def test_other_input_channels_follow_timms_rule(
    directory: Path, variables: dict[str, Any], in_chans: int
) -> None:
    _, loaded = flaxnets.load(directory, in_chans=in_chans)
    kernel = variables['params']['conv1']['0']['kernel']
    expected = adapt_input_conv(in_chans, torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    found = loaded['params']['conv1']['0']['kernel']
    np.testing.assert_allclose(found, expected.numpy().transpose(2, 3, 1, 0), rtol=1e-6)


def test_weights_for_one_channel_are_not_adapted(tmp_path: Path) -> None:
    grey = random_variables(build(ARCH, 10, in_chans=1))
    directory = weights.save(tmp_path / 'grey', grey, replace(CONFIG, in_chans=1))
    assert equal(flaxnets.load(directory)[1], grey)
    with pytest.raises(CheckpointError, match='images of 1 channels.*in_chans=3'):
        flaxnets.load(directory, in_chans=3)


def test_features_only_takes_what_it_needs(directory: Path, variables: dict[str, Any]) -> None:
    model, loaded = flaxnets.load(directory, features_only=True, out_indices=(0, 2))
    assert set(loaded['params']) == {'conv1', 'bn1', 'layer1', 'layer2'}
    maps = jax.jit(model.apply)(loaded, np.zeros((1, 64, 64, 3), np.float32))
    assert [m.shape for m in maps] == [(1, 32, 32, 16), (1, 8, 8, 128)]


def test_sources_that_are_not_there() -> None:
    with pytest.raises(CheckpointError, match='no/such/thing: no such file or directory'):
        flaxnets.load('no/such/thing')
    with pytest.raises(CheckpointError, match='is no directory of weights'):
        flaxnets.load('.')

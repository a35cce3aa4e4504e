"""From `.pth` to a directory of weights and back, as functions and as commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from nets import randomise, timm_net

import flaxnets
from convert.__main__ import main
from convert.checkpoint import Checkpoint
from convert.conversion import open_checkpoint
from convert.writing import write
from flaxnets import zoo
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.store import weights

State = dict[str, torch.Tensor]

NET = 'resnest_tiny'
# One net of each block kind; one with a gate. All names of the zoo go back in test_layouts_back.py.
KINDS = ['resnext_tiny', 'res2net_tiny', 'resnest_tiny', 'seresnext50_32x4d']


def random_state(name: str, **kwargs: Any) -> State:
    """The state dict of timm's net, with step counters that differ from layer to layer."""
    state = randomise(timm_net(name, **kwargs)).state_dict()
    counters = [key for key in state if key.endswith('num_batches_tracked')]
    for i, key in enumerate(counters):
        state[key] = torch.tensor(1000 + i)
    return state


@pytest.fixture(scope='module')
def state() -> State:
    return random_state(NET)


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    path = tmp_path / 'net.pth'
    torch.save(state, path)
    return path


def convert(source: Path, out: Path, model: str | None = None) -> Checkpoint:
    checkpoint = open_checkpoint(source, model)
    write(checkpoint, out)
    return checkpoint


def same(a: State, b: State) -> None:
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def leaves_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('name', KINDS)
def test_there_and_back_is_bit_identical_and_loads_in_timm(name: str, tmp_path: Path) -> None:
    original = random_state(name)
    torch.save(original, tmp_path / 'net.pth')
    convert(tmp_path / 'net.pth', tmp_path / 'net', name)
    convert(tmp_path / 'net', tmp_path / 'back.pth')
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    same(original, back)
    timm_net(name).load_state_dict(back, strict=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_they_were(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    torch.save(cast, tmp_path / 'net.pth')
    convert(tmp_path / 'net.pth', tmp_path / 'net', NET)
    convert(tmp_path / 'net', tmp_path / 'back.pth')
    same(cast, torch.load(tmp_path / 'back.pth'))
    _, loaded = flaxnets.load(tmp_path / 'net')
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {'float32'}


def test_both_formats_give_the_same_tree(file: Path, state: State) -> None:
    legacy = file.with_name('legacy.pth')
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    assert file.read_bytes()[:2] == b'PK' and legacy.read_bytes()[:2] != b'PK'
    leaves_equal(open_checkpoint(file, NET).variables, open_checkpoint(legacy, NET).variables)


def test_a_file_without_counters_goes_back_without(state: State, tmp_path: Path) -> None:
    bare = {key: t for key, t in state.items() if not key.endswith('num_batches_tracked')}
    torch.save(bare, tmp_path / 'net.pth')
    convert(tmp_path / 'net.pth', tmp_path / 'net', NET)
    convert(tmp_path / 'net', tmp_path / 'back.pth')
    same(bare, torch.load(tmp_path / 'back.pth'))


def test_load_takes_a_file_as_it_takes_a_directory(file: Path) -> None:
    convert(file, file.with_name('net'), NET)
    from_directory, from_file = flaxnets.load(file.with_name('net')), flaxnets.load(file, model=NET)
    assert from_directory[0] == from_file[0]
    leaves_equal(from_directory[1], from_file[1])
    with pytest.raises(FlaxnetsError, match='weights of resnest_tiny, not of resnest26d'):
        flaxnets.load(file.with_name('net'), model='resnest26d')


def test_classes_and_channels_are_read_from_the_tensors(tmp_path: Path) -> None:
    torch.save(random_state(NET, num_classes=7, in_chans=1), tmp_path / 'net.pth')
    config = convert(tmp_path / 'net.pth', tmp_path / 'net', NET).config
    assert (config.num_classes, config.in_chans, config.weights) == (7, 1, None)
    model, _ = flaxnets.load(tmp_path / 'net')
    assert (model.num_classes, model.in_chans) == (7, 1)


def test_a_published_file_is_known_by_its_hash(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    row = zoo.WEIGHTS[0].__class__(
        NET, 'mine', sha256=digest[:8], preprocess=zoo.config('resnest200e').preprocess
    )
    monkeypatch.setattr(zoo, 'WEIGHTS', (row,))
    config = open_checkpoint(file).config
    assert config.weights == row
    assert config.preprocess.size == 320


def test_a_published_name_with_another_hash_is_refused(file: Path) -> None:
    path = file.rename(file.with_name('gluon_resnest14-9c8fe254.pth'))
    with pytest.raises(CheckpointError, match='SHA-256 starts with.*not 9c8fe254'):
        open_checkpoint(path)


# --- files that do not fit


def broken(state: State, **changes: torch.Tensor | None) -> State:
    """The state with some tensors replaced, added, or (None) taken out."""
    out = {key: t for key, t in state.items() if changes.get(key, t) is not None}
    return {**out, **{key: t for key, t in changes.items() if t is not None}}


FC = 'fc.weight'
NAN = torch.full((16,), torch.nan)
MISFITS = {
    'missing': (dict([('layer2.0.conv2.bn0.weight', None)]), ['1 missing', 'layer2.0.conv2.bn0.weight']),
    'two missing': (dict([('bn1.bias', None), ('fc.weight', None)]), ['2 missing', 'bn1.bias', 'fc.weight']),
    'extra': (dict([('layer5.0.conv1.weight', torch.ones(1))]), ['layer5.0.conv1.weight', 'not in the net']),
    'stray counter': (dict([('fc.num_batches_tracked', torch.tensor(1))]), ['fc.num_batches_tracked']),
    'shape': (dict([('bn1.weight', torch.ones(33))]), ['bn1.weight', '(33,)', '(32,)']),
    'transposed': (dict([(FC, torch.ones(512, 1000))]), ['fc.weight', 'fc.bias', '(1000,)', '(512,)']),
    'infinite': (dict([('conv1.1.bias', NAN)]), ['conv1.1.bias', '16 of 16', 'NaN']),
    'integers': (dict([('bn1.bias', torch.ones(32, dtype=torch.int32))]), ['bn1.bias', 'int32']),
    'all at once': (
        {'bn1.bias': None, 'extra': torch.ones(1), 'conv1.1.bias': NAN, 'bn1.weight': torch.ones(3)},
        ['bn1.bias', 'extra', 'conv1.1.bias', 'bn1.weight', '1 missing', '2 in both but unfit'],
    ),
}


@pytest.mark.parametrize('kind', MISFITS)
def test_misfits_are_all_named_and_nothing_is_written(
    kind: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = MISFITS[kind]
    torch.save(broken(state, **changes), tmp_path / 'net.pth')
    assert main([str(tmp_path / 'net.pth'), '--model', NET, '--out', str(tmp_path / 'net')]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f'error: {tmp_path / "net.pth"} as {NET}: ')
    for word in words:
        assert word in output.err
    assert [p.name for p in tmp_path.iterdir()] == ['net.pth']


def test_a_wrong_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    torch.save(random_state('resnest14d', num_classes=2), tmp_path / 'net.pth')
    with pytest.raises(CheckpointError, match='not resnest26d: .*1 block.*resnest14d'):
        open_checkpoint(tmp_path / 'net.pth', 'resnest26d')


COMMANDS = {
    'no such file': (['nowhere.pth', '--model', NET], 'nowhere.pth'),
    'unknown net': (['net.pth', '--model', 'resnest15d'], 'resnest14d'),
    'not a checkpoint': (['page.pth', '--model', NET], 'web page'),
    'truncated': (['cut.pth', '--model', NET], 'cut.pth'),
    'an empty folder': (['net'], 'no directory of weights'),
}


@pytest.mark.parametrize('kind', COMMANDS)
def test_wrong_commands(
    kind: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = file.parent
    monkeypatch.chdir(folder)
    Path('page.pth').write_text('<!doctype html><html>Not found</html>')
    Path('cut.pth').write_bytes(file.read_bytes()[:100_000])
    Path('net').mkdir()
    before = sorted(folder.rglob('*'))
    arguments, words = COMMANDS[kind]
    assert main([*arguments, '--out', 'out']) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and words in error and 'Traceback' not in error
    assert sorted(folder.rglob('*')) == before


def test_the_command_as_typed(file: Path) -> None:
    """In a process of its own: output, errors and exit codes. All else that it does is tried by `main`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, '-m', 'convert', str(file), '--model', NET, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)

    directory = str(file.with_name('net'))
    first = run('--out', directory)
    assert (first.returncode, first.stderr) == (0, '')
    assert directory in first.stdout and NET in first.stdout
    again = run('--out', directory)
    assert again.returncode == 1 and 'exists' in again.stderr
    assert main([str(file), '--model', NET, '--out', directory, '--force']) == 0


def test_the_directory_says_where_it_came_from(file: Path) -> None:
    convert(file, file.with_name('net'), NET)
    source = weights.read_source(file.with_name('net'))
    assert weights.read_config(file.with_name('net')).name == NET
    assert (source.file, source.sha256) == ('net.pth', hashlib.sha256(file.read_bytes()).hexdigest())
    certificate = json.loads((file.with_name('net') / 'certificate.json').read_text())
    assert set(certificate['versions']) == {'flaxnets', 'jax', 'flax'}

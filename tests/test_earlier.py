"""Runs and directories of weights of earlier versions, kept in `fixtures/` as these versions wrote them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

import flaxnets
from flaxnets.errors import CheckpointError
from flaxnets.store import arrays, weights
from flaxnets.zoo.architectures import NETS
from train.job import abstract_state, make_job
from train.loop import restore
from train.run import log
from train.run.checkpoints import Checkpoints
from train.settings import Settings, from_json

FIXTURES = Path(__file__).parent / 'fixtures'
VERSIONS = sorted(path.name.partition('.')[0] for path in FIXTURES.glob('*.tar.xz'))
each_version = pytest.mark.parametrize('version', VERSIONS)


@pytest.fixture
def run(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workdir of a run of five steps."""
    with tarfile.open(FIXTURES / f'{version}.tar.xz') as file:
        file.extractall(tmp_path, filter='data')
    config = json.loads((tmp_path / 'weights' / 'config.json').read_text())['config']
    layers = tuple(config['arch'].pop('layers'))
    monkeypatch.setitem(NETS, 'micro', flaxnets.Arch(layers=layers, **config['arch']))
    return tmp_path


def sha256(array: Any) -> str:
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def written_digests(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: entry['sha256'] for name, entry in entries.items()}


def settings_of(run: Path) -> Settings:
    return from_json(arrays.read_manifest(run / 'checkpoints' / '5').facts['meta']['settings'])


def test_there_are_some() -> None:
    assert len(VERSIONS) >= 4


@each_version
def test_directories_of_weights_open(run: Path) -> None:
    _, variables = flaxnets.load(run / 'weights')
    found = {name: sha256(leaf) for name, leaf in traverse_util.flatten_dict(variables, sep='/').items()}
    certificate = json.loads((run / 'weights' / 'certificate.json').read_text())
    assert found == written_digests(certificate['arrays']) and len(found) == 97
    config = flaxnets.config(run / 'weights')
    assert (config.num_classes, config.classes, config.preprocess.size) == (10, tuple('0123456789'), 16)
    assert weights.read_source(run / 'weights').notes[0] == 'trained by flaxnets for 5 steps on digits'


@each_version
def test_checkpoints_are_restored(run: Path) -> None:
    with Checkpoints(str(run / 'checkpoints'), 1, 0) as checkpoints:
        job = make_job(settings_of(run), settings_of(run))
        start = restore(job, checkpoints)
    assert (start.step, start.evaluated, start.damaged) == (5, True, ())
    assert jax.tree.structure(start.state) == jax.tree.structure(abstract_state(job))
    found = {name: sha256(leaf) for name, leaf in arrays.named(start.state).items()}
    written = written_digests(arrays.read_manifest(run / 'checkpoints' / '5').arrays)
    count = written.pop('opt_state/2/count', None)  # optax's, of the first versions
    assert found == written and count in (None, found['step'])
    assert [line['step'] for line in log.read(str(run)) if line['kind'] == 'eval'] == [5]
    _, averaged = flaxnets.load(run)
    jax.tree.map(np.testing.assert_array_equal, averaged, start.state.variables)


@pytest.mark.parametrize('version', ['cceca13'])
def test_damage_to_the_oldest_weights_is_found(run: Path) -> None:
    path = run / 'weights' / 'certificate.json'
    certificate = json.loads(path.read_text())
    certificate['arrays']['params/fc/bias']['sha256'] = '0' * 64
    path.write_text(json.dumps(certificate))
    with pytest.raises(CheckpointError, match='params/fc/bias'):
        flaxnets.load(run / 'weights')
    path.rename(path.with_name('arrays.json'))
    with pytest.raises(CheckpointError, match='convert the weights again'):
        flaxnets.load(run / 'weights')

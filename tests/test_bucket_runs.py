"""Runs whose data and workdir are in a bucket: killed, gone on with, and what is made of their weights."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from bucket import Bucket
from nets import random_variables
from PIL import Image
from runs import finish, start
from short_nets import short_nets

import convert.__main__ as converting
import flaxnets
import train.__main__ as training
from convert.formats.pth import read_pth
from convert.names.tree import to_variables
from flaxnets.store import weights
from train.data.sources import open_source
from train.run.log import read

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
DATA = 'tar:gs://bucket/data/{split}-*.tar'
TRAINING = ('--data', DATA, 'train_split=train')
SHARDS = {'train': (3, 96), 'val': (1, 40)}  # how many, images of each

pytestmark = pytest.mark.fault


@pytest.fixture(scope='module')
def bucket() -> Iterator[Bucket]:
    """With a part of the digits as WebDataset's shards."""
    made = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STORAGE_EMULATOR_HOST', made.host)
        for split, (shards, images) in SHARDS.items():
            source = open_source('digits', '', split == 'train')
            for shard in range(shards):
                records = [source[index] for index in range(shard * images, (shard + 1) * images)]
                made.put(f'data/{split}-{shard}.tar', tar(records))
        yield made
    made.close()


def tar(records: Sequence[Any]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as archive:
        for number, record in enumerate(records):
            picture = io.BytesIO()
            Image.fromarray(record.image).save(picture, 'png')
            for suffix, content in (('png', picture.getvalue()), ('cls', str(record.label).encode())):
                member = tarfile.TarInfo(f'{number:05}.{suffix}')
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled programs: they are what takes the time of these tests."""
    return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def undisturbed(bucket: Bucket, cache: Path) -> str:
    finish(start('gs://bucket/undisturbed', *TRAINING, 'save_steps=6', compiled=cache))
    return 'gs://bucket/undisturbed'


def certified(bucket: Bucket, run: str) -> Any:
    return json.loads(bucket.read(f'{run}/weights/certificate.json'))['arrays']


def evaluations(workdir: str) -> list[tuple[int, float, float]]:
    """What a run's log says of its evaluations."""
    return [(r['step'], r['loss'], r['top1']) for r in read(workdir) if r['kind'] == 'eval']


def rates(workdir: str) -> dict[int, float]:
    """The learning rates of a run's log, each step of which is in it once and in its place."""
    found = [(r['step'], r['learning_rate']) for r in read(workdir) if r['kind'] == 'train']
    assert found == sorted(set(found))
    return dict(found)


def test_killed_at_random_requests(bucket: Bucket, undisturbed: str, cache: Path) -> None:
    """In the middle of what a run asks of the store: its data, its checkpoints, its log, its weights."""
    rng, wanted, trial = random.Random(1), 6 if FULL else 2, 0
    kills: list[str] = []
    while len(kills) < wanted:
        run = f'killed{trial}'
        while len(kills) < wanted and f'{run}/weights/config.json' not in bucket.names():
            kills += kill_once(bucket, f'gs://bucket/{run}', cache, rng, uploads=len(kills) % 2 == 0)
        finish(start(f'gs://bucket/{run}', *TRAINING, 'save_steps=1', compiled=cache))
        assert certified(bucket, run) == certified(bucket, 'undisturbed'), kills
        assert evaluations(f'gs://bucket/{run}') == evaluations(undisturbed), kills
        logged = rates(f'gs://bucket/{run}')  # a run that goes on has no line for its first step
        assert logged.items() <= rates(undisturbed).items() and max(logged) == max(rates(undisturbed))
        steps = {name.split('/')[2] for name in bucket.names(f'{run}/checkpoints/')}
        assert all(step.isdecimal() for step in steps) and len(steps) >= 2, 'what the kills left is gone'
        assert f'{run}/.lock' not in bucket.names()
        trial += 1
    print(*kills, sep='\n')


def kill_once(bucket: Bucket, workdir: str, cache: Path, rng: random.Random, uploads: bool) -> list[str]:
    """Starts a run and kills it at a random request; which, or none if it came to its end before."""
    left = rng.randrange(10, 150) if uploads else rng.randrange(5, 300)
    killed: list[str] = []
    process = start(workdir, *TRAINING, 'save_steps=1', compiled=cache)  # so that much of it is saving

    def fault(method: str, path: str) -> int | None:
        nonlocal left
        left -= path.startswith('/upload') if uploads else 1
        if left > 0:
            return None
        if not killed:
            killed.append(f'{workdir}: {method} {path}')
            process.kill()
        return 0  # the connection is gone with the process

    bucket.fault = fault
    process.communicate(timeout=600)
    bucket.fault = lambda method, path: None
    return killed


@short_nets()
def test_weights_in_a_bucket(
    bucket: Bucket, undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name.split('/')[1] for name in bucket.names('undisturbed/')}
    assert names == {'checkpoints', 'confusion.png', 'curves.png', 'log.jsonl', 'weights'}
    local = tmp_path / 'weights'
    local.mkdir()
    for name in bucket.names('undisturbed/weights/'):
        (local / name.rpartition('/')[2]).write_bytes(bucket.read(name))
    source = f'{undisturbed}/weights'
    net, found = flaxnets.load(source)
    expected_net, expected = flaxnets.load(local)
    assert net == expected_net
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    asked = len(bucket.requests)
    assert flaxnets.config(source) == flaxnets.config(local) == flaxnets.config(undisturbed)
    assert not any('variables' in request for request in bucket.requests[asked:])
    assert flaxnets.transform(source)(Image.new('L', (8, 8))).shape == (16, 16, 1)
    for place in (undisturbed, source):
        out = tmp_path / f'{place[-4:]}.pth'
        assert converting.main([place, '--out', str(out)]) == 0
        state = read_pth(out)
        jax.tree.map(np.testing.assert_array_equal, to_variables(state, net), expected)
        said = capsys.readouterr().out
        assert said.startswith(f'{place}: resnext_tiny, ') and 'gs:/b' not in said
    arguments = ['--model', source, '--data', DATA, '--out', 'gs://bucket/results', '--json', '--quiet']
    assert training.main(['eval', *arguments]) == 0
    evaluation = [record for record in read(undisturbed) if record['kind'] == 'eval'][-1]
    report = json.loads(capsys.readouterr().out)
    assert (report['images'], report['top1']) == (40, evaluation['top1'])
    found = {name.removeprefix('results/') for name in bucket.names('results/')}
    pictures = {f'{name}.png' for name in ('confusion', 'mistakes', 'reliability', 'by_confidence')}
    assert found == {'result.json', 'per_class.csv', 'mistakes.csv', *pictures}


def test_conversions_in_a_bucket(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = random_variables(flaxnets.create('resnext_tiny', 10))
    directory, file, again = (f'gs://bucket/out/{name}' for name in ('net', 'net.pth', 'again'))
    weights.save(directory, expected, replace(flaxnets.config('resnext_tiny'), num_classes=10))
    for source, out in ((directory, file), (file, again)):
        assert converting.main([source, '--model', 'resnext_tiny', '--out', out]) == 0
    jax.tree.map(np.testing.assert_array_equal, flaxnets.load(again)[1], expected)
    assert not Path('gs:').exists()
    capsys.readouterr()
    assert converting.main([directory, '--out', again]) == 1
    assert converting.main(['gs://bucket/nothing', '--out', str(tmp_path / 'x')]) == 1
    said = capsys.readouterr().err
    assert f'{again} exists' in said and 'gs://bucket/nothing: no such file or directory' in said


def test_data_that_is_out_of_reach(bucket: Bucket, cache: Path) -> None:
    """No image counts as a bad one for it: the run ends, and goes on when the store is back."""
    bucket.fault = lambda method, path: 403 if path.startswith('/download') and 'train-1' in path else None
    process = start('gs://bucket/unreachable', *TRAINING, 'epochs=1', compiled=cache)
    said = finish(process, 1)
    bucket.fault = lambda method, path: None
    lines = [line for line in said.splitlines() if line.startswith('error: ')]
    assert lines and 'gs://bucket/data/train-1.tar: ' in lines[-1] and 'no permission' in lines[-1], said
    assert 'Traceback' not in said

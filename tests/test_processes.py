"""Several processes, and other numbers of devices: the same steps, the same samples, the same stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import STOPPED, TESTS, digests, finish, start, wait_for_training

from flaxnets.store import weights

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'

pytestmark = pytest.mark.fault


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port: int = listener.getsockname()[1]
        return port


def start_two(workdir: Path, *fields: str, **options: Any) -> list[subprocess.Popen[str]]:
    where = ('--coordinator', f'localhost:{free_port()}', '--processes', '2')
    return [start(workdir, *where, '--process', str(i), *fields, devices=2, **options) for i in range(2)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs lie beside each other, to share what was compiled."""
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def reference(folder: Path) -> Path:
    """A run of two processes that nobody disturbed."""
    workdir = folder / 'reference'
    for process in start_two(workdir, 'max_steps=16'):
        finish(process)
    return workdir


def test_two_processes_stop_at_one_step_and_go_on(folder: Path, reference: Path) -> None:
    for trial in range(5 if FULL else 1):
        workdir = folder / f'two{trial}'
        processes = start_two(workdir, 'max_steps=16')
        wait_for_training(processes[0], workdir, after=trial)
        processes[trial % 2].send_signal(signal.SIGTERM)
        said = [finish(process, STOPPED) for process in processes]
        assert 'preemption: stopped after step' in said[0]
        for process in start_two(workdir, 'max_steps=16'):
            finish(process)
        assert digests(workdir) == digests(reference)


# In float32, as runs are, a ReLU whose input is within rounding of 0 opens on one number of devices only.
EXACT = """
import dataclasses, sys
import jax
jax.config.update('jax_enable_x64', True)
from short_nets import short_nets
from train.__main__ import main
from train.fields import fields_of
from train.settings import Settings
known = fields_of(Settings)
known['dtype'] = dataclasses.replace(known['dtype'], allowed=('float64',))
with short_nets():
    sys.exit(main(sys.argv[1:]))
"""


def test_other_processes_and_devices_take_the_steps_of_one_device(folder: Path) -> None:
    """From 2 processes with 4 devices to 1 process, and to 1 device: the same batches, the same steps."""
    # Dropout would draw by device, and BatchNorm take each device's statistics. From a rate of 0 the first
    # step would change nothing.
    alike = ('dtype=float64', 'bn_images=0', 'drop_rate=0', 'lr=0.01', 'warmup_epochs=0')
    alike += ('epochs=1', 'log_steps=1')
    moved, straight = folder / 'moved', folder / 'straight'
    for process in start_two(moved, 'max_steps=3', *alike, program=('-c', EXACT)):
        finish(process)
    finish(start(moved, 'max_steps=6', *alike, program=('-c', EXACT), devices=4))
    finish(start(moved, *alike, program=('-c', EXACT)))
    finish(start(straight, *alike, program=('-c', EXACT)))
    before, after = logged(straight), logged(moved)
    assert after.keys() == {2, 3, 5, 6, 8, 9, 10, 11}  # the first line of each call is of two steps
    for step in (2, 3, 6, 9, 10, 11):
        record = after[step]
        assert {name: record[name] for name in ('loss', 'top1', 'grad_norm')} == pytest.approx(
            {name: before[step][name] for name in ('loss', 'top1', 'grad_norm')}, rel=1e-6
        )
    one, other = (weights.read_variables(workdir / 'weights') for workdir in (straight, moved))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), one, other)


@pytest.mark.parametrize(
    'other, message',
    [
        (('lr=0.5',), 'process 1 has other settings or data than process 0'),
        (('--data', 'folder:/nowhere'), 'process 1 of the job failed; see its message'),
    ],
)
def test_processes_that_do_not_agree_end_together(folder: Path, other: tuple[str, ...], message: str) -> None:
    where = ('--coordinator', f'localhost:{free_port()}', '--processes', '2')
    began = time.monotonic()
    processes = [
        start(folder / 'differ', *where, '--process', str(i), *(other if i else ()), devices=2)
        for i in range(2)
    ]
    said = [finish(process, 1) for process in processes]
    assert message in said[0] and 'Traceback' not in ''.join(said)
    assert time.monotonic() - began < 60  # an ordinary exit would wait five minutes for the other


# The disk of the second process fails after a step. An ordinary job waits for a silent process for 100 s.
FAILS = """
import functools, sys
import jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
from flaxnets.errors import FlaxnetsError
from short_nets import short_nets
from train.run.meter import Meter
from train.__main__ import main
take = Meter.wait_for
def wait_for(meter, batches):
    if meter.steps == 1 and jax.process_index() == 1:
        raise FlaxnetsError('the disk of this host is gone')
    return take(meter, batches)
Meter.wait_for = wait_for
with short_nets():
    sys.exit(main(sys.argv[1:]))
"""


def test_an_error_of_one_process_ends_the_job(folder: Path) -> None:
    began = time.monotonic()
    alone, broken = start_two(folder / 'gone', program=('-c', FAILS))
    assert 'error: the disk of this host is gone' in finish(broken, 1)
    alone.communicate(timeout=200)
    assert alone.returncode not in (0, STOPPED) and time.monotonic() - began < 200


EVALUATIONS = """
import json, sys
import jax
if len(sys.argv) > 1:
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
import flaxnets
from train import parallel
from train.data.augment import eval_transform
from train.data.batches import eval_batches
from train.evaluation.metrics import Evaluator
from train.data.sources import ArraySource
from short_nets import short_nets
from train.step.state import initial_variables

BATCH = 4
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (3 * BATCH + 1, 32, 32, 3), dtype=np.uint8)
labels = rng.integers(0, 3, len(images))
model = flaxnets.create('resnext_tiny', 3)
with short_nets():
    variables = parallel.replicate(jax.tree.map(np.asarray, initial_variables(model, 0)))
evaluator = Evaluator(model, flaxnets.config('resnext_tiny').preprocess)
transform = eval_transform(flaxnets.config('resnext_tiny').preprocess, 3)
found = []
with short_nets():
    for count in range(1, len(images) + 1):
        source = ArraySource('x', images[:count], labels[:count], ('a', 'b', 'c'))
        where = dict(host=jax.process_index(), hosts=jax.process_count())
        result = evaluator(variables, eval_batches(source, transform, batch_size=BATCH, **where))
        found.append(
            [result.labels.tolist(), result.predictions.tolist(), result.ranks.tolist(), result.loss]
        )
print('found', json.dumps(found), flush=True)
"""


def test_every_number_of_images_on_any_devices_and_processes() -> None:
    def begin(devices: int, *arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(TESTS)}
        command = [sys.executable, '-c', EVALUATIONS, *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(process: subprocess.Popen[str]) -> Any:
        (line,) = [line for line in finish(process).splitlines() if line.startswith('found ')]
        return json.loads(line.removeprefix('found '))

    alone = end(begin(1))
    assert [len(labels) for labels, *_ in alone] == list(range(1, 14))  # 3 batches of 4 and one image
    where = f'localhost:{free_port()}'
    for devices, processes in ((4, [()]), (2, [(where, '0'), (where, '1')])):
        for found in [end(process) for process in [begin(devices, *arguments) for arguments in processes]]:
            for (*exact, loss), (*expected, its) in zip(found, alone, strict=True):
                assert exact == expected and loss == pytest.approx(its, rel=1e-5)


def logged(workdir: Path) -> dict[int, dict[str, float]]:
    """The lines of the log that tell of training, by step."""
    records = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
    return {r['step']: r for r in records if r['kind'] == 'train'}


def test_two_processes_evaluate_every_image_once(reference: Path) -> None:
    def evaluate(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        weights = str(reference / 'weights')
        command = [sys.executable, '-m', 'short_nets', 'eval', '--model', weights, '--data', 'digits']
        env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': str(TESTS)}
        command += ['--json', *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(said: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(said[said.index('{\n') : said.index('\n}') + 2])
        return found

    alone = result(finish(evaluate('--batch', '50')))
    assert alone['images'] == 360
    where = ('--batch', '7', '--coordinator', f'localhost:{free_port()}', '--processes', '2')
    both = [evaluate(*where, '--process', str(i), devices=2) for i in range(2)]
    for said in [finish(process) for process in both]:
        found = result(said)
        assert {key: found[key] for key in ('images', 'top1', 'top5')} == {
            key: alone[key] for key in ('images', 'top1', 'top5')
        }
        assert found['loss'] == pytest.approx(alone['loss'], rel=1e-5)

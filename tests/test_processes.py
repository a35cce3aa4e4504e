"""Several processes, and other numbers of devices: the same steps, the same samples, the same stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import STOPPED, digests, finish, run, start, wait_for_training

from flaxnets import weights

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'

pytestmark = pytest.mark.fault


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port: int = listener.getsockname()[1]
        return port


def start_two(workdir: Path, *fields: str) -> list[subprocess.Popen[str]]:
    where = ('--coordinator', f'localhost:{free_port()}', '--processes', '2')
    return [start(workdir, *where, '--process', str(i), *fields, devices=2) for i in range(2)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs lie beside each other, to share what was compiled."""
    return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def reference(folder: Path) -> Path:
    """A run of two processes that nobody disturbed."""
    workdir = folder / 'reference'
    for process in start_two(workdir):
        finish(process)
    return workdir


def test_two_processes_stop_at_one_step_and_go_on(folder: Path, reference: Path) -> None:
    for trial in range(5 if FULL else 1):
        workdir = folder / f'two{trial}'
        processes = start_two(workdir)
        wait_for_training(processes[0], workdir, after=5 * trial)
        processes[trial % 2].send_signal(signal.SIGTERM)
        said = [finish(process, STOPPED) for process in processes]
        assert 'preemption: stopped after step' in said[0]
        for process in start_two(workdir):
            finish(process)
        assert digests(workdir) == digests(reference)


def test_other_devices_and_processes_train_on_the_same_batches(folder: Path) -> None:
    """From 4 devices to 2 to 1, from 2 processes to 1: sums differ in their rounding, samples do not."""
    # Parameters that stay leave the losses to the samples alone; drop path would draw by device.
    alike = ('bn_images=8', 'drop_path_rate=0', 'lr=1e-12', 'epochs=1')
    workdir = folder / 'moved'
    for devices, last in ((4, 15), (2, 30), (1, 0)):
        run(workdir, f'max_steps={last}', *alike, devices=devices)
    straight = folder / 'straight'
    run(straight, *alike)
    assert near(workdir, straight)

    workdir = folder / 'merged'
    for process in start_two(workdir, 'max_steps=20', *alike):
        finish(process)
    run(workdir, *alike)
    assert near(workdir, straight)


def test_two_processes_take_the_steps_of_one_device(folder: Path) -> None:
    alike = ('bn_images=0', 'drop_path_rate=0', 'lr=0.01', 'warmup_epochs=0', 'max_steps=3', 'log_steps=1')
    alone, together = folder / 'one-device', folder / 'four-devices'
    run(alone, *alike)
    for process in start_two(together, *alike):
        finish(process)
    before, after = (logged(workdir) for workdir in (alone, together))
    assert before.keys() == after.keys() == {2, 3}  # the first is for compiling
    for step, record in after.items():
        assert {name: record[name] for name in ('loss', 'top1', 'grad_norm')} == pytest.approx(
            {name: before[step][name] for name in ('loss', 'top1', 'grad_norm')}, rel=1e-5
        )
    one, four = (weights.read_variables(workdir / 'weights') for workdir in (alone, together))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), one, four)


def logged(workdir: Path) -> dict[int, dict[str, float]]:
    """The lines of the log that tell of training, by step."""
    records = [json.loads(line) for line in (workdir / 'log.jsonl').read_text().splitlines()]
    return {r['step']: r for r in records if r['kind'] == 'train'}


def near(first: Path, second: Path) -> bool:
    """Whether two runs had the same losses at all steps that both have logged."""
    a, b = logged(first), logged(second)
    common = sorted(set(a) & set(b))
    assert len(common) >= 8
    return all(a[step]['loss'] == pytest.approx(b[step]['loss'], rel=1e-4) for step in common)


def test_two_processes_evaluate_every_image_once(reference: Path) -> None:
    def evaluate(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        weights = str(reference / 'weights')
        command = [sys.executable, '-m', 'train', 'eval', '--model', weights, '--data', 'digits', '--json']
        env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)}
        command += arguments
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

"""Runs that are killed, stopped or moved to other devices, and go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import digests, finish, run, start, steps_logged

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
STOPPED = 75

pytestmark = pytest.mark.fault


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; the others lie beside it, to share what was compiled."""
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    run(workdir, 'save_steps=4')
    return workdir


def wait_for_training(process: subprocess.Popen[str], workdir: Path, after: int) -> None:
    """Until the log has a step past `after`, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and steps_logged(workdir) <= after and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_at_random_moments(undisturbed: Path) -> None:
    workdir = undisturbed.parent / 'killed'
    kills, wanted = 0, 30 if FULL else 2
    rng = random.Random(0)
    while kills < wanted:
        process = start(workdir, 'save_steps=1')  # so that many kills fall into a save
        wait_for_training(process, workdir, after=steps_logged(workdir) if kills % 2 else 0)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if (workdir / 'weights').exists():
            break  # it was faster than the last kills
    run(workdir, 'save_steps=1')
    assert kills >= 2
    assert digests(workdir) == digests(undisturbed)
    left = [path.name for path in (workdir / 'checkpoints').iterdir() if not path.name.isdecimal()]
    assert not left, 'what the kills left is cleaned up'


@pytest.mark.parametrize('trial', range(10 if FULL else 1))
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(undisturbed: Path, number: signal.Signals, trial: int) -> None:
    workdir = undisturbed.parent / f'{number.name}{trial}'
    process = start(workdir, 'save_minutes=0')
    wait_for_training(process, workdir, after=5 * trial)
    asked = time.monotonic()
    process.send_signal(number)
    said = finish(process, STOPPED)
    assert time.monotonic() - asked < 20
    assert f'{number.name}: stopped after step' in said
    assert not (workdir / 'weights').exists()
    assert 'going on after step' in run(workdir)
    assert digests(workdir) == digests(undisturbed)


def test_a_second_run_is_kept_out(undisturbed: Path) -> None:
    workdir = undisturbed.parent / 'locked'
    process = start(workdir)
    wait_for_training(process, workdir, after=0)
    said = run(workdir, code=1)
    assert f'in use by process {process.pid}' in said
    finish(process)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        port: int = listener.getsockname()[1]
        return port


def start_two(workdir: Path, *fields: str) -> list[subprocess.Popen[str]]:
    where = ('--coordinator', f'localhost:{free_port()}', '--processes', '2')
    return [start(workdir, *where, '--process', str(i), *fields, devices=2) for i in range(2)]


def test_two_processes_stop_at_one_step_and_go_on(undisturbed: Path) -> None:
    reference = undisturbed.parent / 'two-undisturbed'
    for process in start_two(reference):
        finish(process)
    for trial in range(5 if FULL else 1):
        workdir = undisturbed.parent / f'two{trial}'
        processes = start_two(workdir)
        wait_for_training(processes[0], workdir, after=5 * trial)
        processes[trial % 2].send_signal(signal.SIGTERM)
        said = [finish(process, STOPPED) for process in processes]
        assert 'preemption: stopped after step' in said[0]
        for process in start_two(workdir):
            finish(process)
        assert digests(workdir) == digests(reference)


def test_other_devices_and_processes_train_on_the_same_batches(undisturbed: Path) -> None:
    """From 4 devices to 2 to 1, from 2 processes to 1: sums differ in their rounding, samples do not."""
    # Parameters that stay leave the losses to the samples alone; drop path would draw by device.
    alike = ('bn_images=8', 'drop_path_rate=0', 'lr=1e-12', 'epochs=1')
    workdir = undisturbed.parent / 'moved'
    for devices, last in ((4, 15), (2, 30), (1, 0)):
        run(workdir, f'max_steps={last}', *alike, devices=devices)
    straight = undisturbed.parent / 'straight'
    run(straight, *alike)
    assert near(workdir, straight)

    workdir = undisturbed.parent / 'merged'
    for process in start_two(workdir, 'max_steps=20', *alike):
        finish(process)
    run(workdir, *alike)
    assert near(workdir, straight)


def near(first: Path, second: Path) -> bool:
    """Whether two runs had the same losses at all steps that both have logged."""

    def losses(workdir: Path) -> dict[int, float]:
        lines = (workdir / 'log.jsonl').read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r['step']: r['loss'] for r in records if r['kind'] == 'train'}

    a, b = losses(first), losses(second)
    common = sorted(set(a) & set(b))
    assert len(common) >= 8
    return all(a[step] == pytest.approx(b[step], rel=1e-4) for step in common)


def test_two_processes_evaluate_every_image_once(undisturbed: Path) -> None:
    def evaluate(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
        weights = str(undisturbed / 'weights')
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

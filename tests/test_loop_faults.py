"""Runs that are killed or stopped, and go on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from runs import (
    STOPPED,
    digests,
    finish,
    resumes,
    run,
    start,
    steps_logged,
    wait_for_training,
    wait_until,
)

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'

pytestmark = pytest.mark.fault


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; the others lie beside it, to share what was compiled."""
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    run(workdir, 'save_steps=4')
    return workdir


def test_killed_at_random_moments(undisturbed: Path) -> None:
    rng, wanted, trial = random.Random(0), 30 if FULL else 2, 0
    while wanted > 0:
        workdir = undisturbed.parent / f'killed{trial}'
        wanted -= kill_often(workdir, wanted, rng)
        run(workdir, 'save_steps=1')
        assert digests(workdir) == digests(undisturbed)
        left = [path.name for path in (workdir / 'checkpoints').iterdir() if not path.name.isdecimal()]
        assert not left, 'what the kills left is cleaned up'
        trial += 1


def kill_often(workdir: Path, wanted: int, rng: random.Random) -> int:
    """Starts a run and kills it, again and again, until it is done; how often it was killed."""
    kills = 0
    while kills < wanted and not (workdir / 'weights').exists():
        begun, steps = resumes(workdir), steps_logged(workdir)
        process = start(workdir, 'save_steps=1')  # so that many kills fall into a save
        if kills % 2 or not begun:
            wait_for_training(process, workdir, after=steps)
        else:  # while it restores, compiles and takes its first steps
            wait_until(process, lambda begun=begun: resumes(workdir) > begun)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    return kills


@pytest.mark.parametrize('trial', range(10 if FULL else 1))
def test_asked_to_stop_once_and_again(undisturbed: Path, trial: int) -> None:
    workdir = undisturbed.parent / f'stopped{trial}'
    for number in (signal.SIGTERM, signal.SIGINT):
        before = steps_logged(workdir)
        process = start(workdir, 'save_minutes=0', 'log_steps=1')
        wait_for_training(process, workdir, after=before + trial % 4)
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
    process.send_signal(signal.SIGSTOP)  # it would be done before the second one has started
    try:
        said = run(workdir, code=1)
        assert f'in use by process {process.pid}' in said
    finally:
        process.kill()
        process.communicate()

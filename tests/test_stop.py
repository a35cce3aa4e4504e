"""Stopping when the system asks: signals to real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.run.stop import Stop

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
ROOT = Path(__file__).parent.parent
LOOP = """
import sys, time
from train.run.stop import Stop
import jax
if len(sys.argv) > 1:
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices('start')
with Stop() as stop:
    step = 0
    while not stop.requested():
        step += 1
        if step == 5:
            print('ready', flush=True)
        time.sleep(0.01 + 0.01 * len(sys.argv[1:2]) * (sys.argv[1:2] == ['1']))
print('stopped', step, stop.reason, stop.requested(), flush=True)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', LOOP, *map(str, arguments)]
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '2'}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while (line := process.stdout.readline()) != 'ready\n':
        assert line, process.communicate()


def end(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith('stopped')]
    return line.split()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_one_process_stops_after_its_step(number: signal.Signals) -> None:
    process = start()
    until_ready(process)
    asked = time.monotonic()
    process.send_signal(number)
    _, step, reason, still = end(process)
    assert int(step) >= 5 and reason == number.name and still == 'True'
    assert time.monotonic() - asked < 30


def test_signals_in_this_process() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert not stop.requested() and stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and stop.reason == 'SIGTERM'
        os.kill(os.getpid(), signal.SIGINT)  # the first ctrl-C
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), Stop():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.fault
@pytest.mark.parametrize('trial', range(10 if FULL else 2))
def test_two_processes_stop_after_the_same_step(trial: int) -> None:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    processes = [start(number, address) for number in range(2)]
    for process in processes:
        until_ready(process)
    time.sleep(0.05 * trial)
    asked = time.monotonic()
    processes[trial % 2].terminate()
    try:
        results = [end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert results[0] == results[1] and int(results[0][1]) >= 5
    assert results[0][2:] == ['preemption', 'True']
    assert time.monotonic() - asked < 20

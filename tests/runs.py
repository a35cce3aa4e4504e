"""Training runs as their users start them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STOPPED = 75  # exit code
TESTS = Path(__file__).parent

# Small enough for a second of training, with everything in it that a resumed run could get wrong.
FIELDS = (
    'model=resnext_tiny',
    'image_size=16',
    'eval_size=16',
    'train_split=test',  # 360 images: 11 steps an epoch
    'batch_size=32',
    'epochs=2',
    'log_steps=2',
    'mixup=0.2',
    'mix_images=8',
    'flip=0.5',
    'ema_decay=0.9',
    'drop_rate=0.1',
)


def start(
    workdir: Path | str,
    *arguments: str,
    devices: int = 1,
    fields: Sequence[str] = FIELDS,
    program: Sequence[str] = ('-m', 'short_nets'),
    compiled: Path | None = None,
) -> subprocess.Popen[str]:
    """A run on the digits, under way.

    Args:
      program: `python -m train`, or one that takes its arguments.
      compiled: folder of compiled programs; by default they are kept beside the run.
    """
    env = {
        **os.environ,
        'JAX_NUM_CPU_DEVICES': str(devices),
        'PYTHONPATH': os.pathsep.join(
            [str(TESTS / 'no_torch'), str(TESTS), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
        ),
        # One compilation serves all: they are what takes the time of these tests.
        'JAX_COMPILATION_CACHE_DIR': str(compiled or Path(workdir).parent / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    command = [sys.executable, *program, '--workdir', str(workdir), *fields, *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said, once it has ended with that exit code."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f'exit code {process.returncode}: {out}{err}'
    return out + err


def run(workdir: Path, *arguments: str, code: int = 0, devices: int = 1) -> str:
    return finish(start(workdir, *arguments, devices=devices), code)


def digests(workdir: Path) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of every array of the run's trained weights."""
    certificate = json.loads((workdir / 'weights' / 'certificate.json').read_text())
    arrays: dict[str, Any] = certificate['arrays']
    return arrays


def records(workdir: Path) -> list[dict[str, Any]]:
    """What the run's log has so far."""
    try:
        lines = (workdir / 'log.jsonl').read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith('}')]


def steps_logged(workdir: Path) -> int:
    """The last step in the run's log; 0 if there is none yet."""
    return max((record.get('step', 0) for record in records(workdir) if record['kind'] == 'train'), default=0)


def resumes(workdir: Path) -> int:
    """How often the run has gone on."""
    return sum(record['kind'] == 'resume' for record in records(workdir))


def wait_for_training(process: subprocess.Popen[str], workdir: Path, after: int) -> None:
    """Until the log has a step past `after`, or the process has ended."""
    wait_until(process, lambda: steps_logged(workdir) > after)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until it holds, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.02)

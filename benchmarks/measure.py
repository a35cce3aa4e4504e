"""One process of `benchmarks/nets.py`: contestants take turns at one job, or one is watched for memory.

    python -m benchmarks.measure SPEC OUT

SPEC is JSON (see `main`); each finding is a line of JSON added to the file OUT as soon as it is known, so
that a process which is stopped leaves what it had found.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.contestants import Contestant, Job, NotHere, Weights, make

PAUSE = 0.03  # between turns, so that one framework's waiting threads leave the cores to the next
SLOW = 10.0  # a call that takes longer is made once


class Findings:
    """The file that findings are added to."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def add(self, **finding: Any) -> None:
        with self.path.open('a') as file:
            file.write(json.dumps(finding) + '\n')


def main(spec: dict[str, Any], findings: Findings) -> None:
    """`spec`: net, what, batch, size, threads, contestants, kind ('time' or 'memory'), rounds, seconds."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec['threads']])
    job = Job(spec['net'], spec['what'], spec['batch'], spec['size'], spec['threads'])
    if spec['kind'] == 'memory':
        watch_memory(job, spec['contestants'][0], findings)
    else:
        take_turns(job, spec, findings)


def watch_memory(job: Job, name: str, findings: Findings) -> None:
    """Peaks of one contestant: of all that happens, and of running alone, once all is built.

    Between the two, memory that is free but not given back is given back, and the peak begins anew.
    """
    framework = 'torch' if name.startswith('timm') else 'jax'
    __import__(framework)
    weights = Weights(job, with_torch=framework == 'torch')
    imported = machine.memory_mb('VmRSS')
    contestant = make(name, job, weights)
    contestant.run()
    whole = machine.memory_mb('VmHWM')
    ctypes.CDLL(None).malloc_trim(0)
    again = machine.reset_peak()
    for _ in range(2):
        contestant.run()
    running = machine.memory_mb('VmHWM') if again else None
    findings.add(contestant=name, imported_mb=imported, peak_mb=whole, running_mb=running, **contestant.facts)


def take_turns(job: Job, spec: dict[str, Any], findings: Findings) -> None:
    names = spec['contestants']
    weights = Weights(job, with_torch=any(not name.startswith(('flaxnets', 'plain')) for name in names))
    ready: dict[str, Contestant] = {}
    answers: dict[str, Any] = {}
    for name in names:
        try:
            ready[name] = make(name, job, weights)
            facts, answers[name] = warm_up(ready[name])
        except NotHere as reason:
            findings.add(contestant=name, left_out=str(reason))
            continue
        except Exception as error:
            ready.pop(name, None)
            findings.add(contestant=name, left_out=f'failed: {type(error).__name__}')
            print(f'{name}: {error}', file=sys.stderr)
            continue
        differs = agreement(answers, name)
        findings.add(contestant=name, warm=True, differs=differs, **facts)
        if facts['second_s'] > SLOW or too_slow(name, facts['second_s'], spec):
            findings.add(contestant=name, rounds=[[facts['second_s']]], once=True)
            del ready[name]
    rounds: dict[str, list[list[float]]] = {name: [] for name in ready}
    for i in range(spec['rounds']):
        order = list(ready)
        order = order[i % len(order) :] + order[: i % len(order)] if order else []
        for name in order:
            time.sleep(PAUSE)
            rounds[name].append(turn(ready[name].run, spec['seconds']))
        for name in order:
            findings.add(contestant=name, round=i, seconds=rounds[name][-1])


def warm_up(contestant: Contestant) -> tuple[dict[str, Any], Any]:
    """Two calls: the first may compile (torch) or touch memory for the first time."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        answer = contestant.run()
        times.append(round(time.perf_counter() - start, 5))
        if times[0] > 3 * SLOW and 'compile_s' in contestant.facts:
            times.append(times[0])  # compiled before, and not worth waiting for again
            break
    return {'first_s': times[0], 'second_s': times[-1], **contestant.facts}, answer


def too_slow(name: str, seconds: float, spec: dict[str, Any]) -> bool:
    """Whether a bfloat16 contestant is too slow to time, as on processors without bfloat16 of their own."""
    return name.endswith('bfloat16') and seconds > 3 * spec['seconds'] + 1


def agreement(answers: dict[str, Any], name: str) -> float:
    """The greatest difference from the first contestant's answer, as a share of its largest number.

    The loss of a step is that of the second one, which saw an update.
    """
    first, other = (as_numbers(answers[n]) for n in (next(iter(answers)), name))
    return round(float(np.abs(first - other).max() / np.abs(first).max()), 7)


def as_numbers(answer: Any) -> np.ndarray[Any, Any]:
    if hasattr(answer, 'detach'):
        answer = answer.detach().float()
    return np.asarray(answer, np.float64)


def turn(run: Callable[[], Any], seconds: float) -> list[float]:
    """Calls for a number of seconds, at least once, and returns the time of each call.

    One more call comes first and does not count: while others ran, the system may have taken back the
    memory that was free, which a loop of steps alone would have kept.
    """
    run()
    times: list[float] = []
    while sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(round(time.perf_counter() - start, 5))
    return times


if __name__ == '__main__':
    main(json.loads(sys.argv[1]), Findings(sys.argv[2]))

"""Compares the speed of whole nets on CPUs, forward and training step, with timm and serving engines.

    python -m benchmarks.nets [--short] [--nets NET ...] [--only forward step memory ...] [--rounds 7]

Every measurement is a process of its own, in which the contestants take turns on the same cores, so that a
busy machine slows all of them; ratios are of neighbours in one process. Peak memory is measured in
processes that import one framework alone. Findings are kept as they come, under --out: `cpu.jsonl`, then
`cpu.json`, the table `cpu.md` and the picture `cpu.png`; `--resume` goes on where a run was stopped.
NOTES.md beside this file says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from flaxnets.cores import cores
from flaxnets.onednn import ask_for_onednn, asked_for_onednn

ROOT = Path(__file__).parent.parent
# In order of importance. The largest pictures go in at batch 2: what counts is the ratio.
NETS: dict[str, tuple[int, int]] = {  # pixels, images
    'resnext50_32x4d': (224, 8),
    'resnest50d': (224, 8),
    'res2net50_14w_8s': (224, 8),
    'resnext101_32x4d': (224, 8),
    'res2net50_26w_8s': (224, 8),
    'resnest14d': (224, 8),
    'res2next50': (224, 8),
    'resnest26d': (224, 8),
    'resnest50d_1s4x24d': (224, 8),
    'resnest50d_4s2x40d': (224, 8),
    'res2net101_26w_4s': (224, 8),
    'resnext101_64x4d': (224, 8),
    'resnest101e': (256, 2),
    'resnest200e': (320, 2),
    'resnest269e': (416, 2),
}
# One of each kind of block, of each stem, and of split attention with one split and with several.
SHORT = ('resnext50_32x4d', 'res2net50_14w_8s', 'res2next50', 'resnest14d', 'resnest50d_1s4x24d')
SHORT_MINUTES = 9.5
PARTS = ('forward', 'step', 'memory', 'forward1', 'compiled', 'bfloat16', 'serving', 'plain')

EAGER = ['flaxnets', 'timm contiguous', 'timm channels_last']
CONTESTANTS = {
    'eager': EAGER,
    'compiled': ['flaxnets', 'timm channels_last', 'timm compiled'],
    'bfloat16': ['flaxnets', 'flaxnets bfloat16', 'timm bfloat16'],
    'serving': ['flaxnets', 'flaxnets folded', 'onnxruntime', 'openvino'],
    'plain': ['flaxnets', 'plain Flax'],
}


@dataclass(frozen=True)
class Measurement:
    """One process to start: a job, and its contestants."""

    part: str
    net: str
    what: str
    batch: int
    group: str  # of CONTESTANTS, or the one whose memory is measured
    kind: str = 'time'

    @property
    def key(self) -> str:
        return f'{self.net}|{self.what}|{self.batch}|{self.kind}|{self.group}'


def main() -> None:
    options = parse()
    os.environ['JAX_PLATFORMS'] = 'cpu'
    ask_for_onednn()  # as the package's commands do; each measurement inherits it
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f'error: --out: {error}')
    log = out / 'cpu.jsonl'
    if not options.resume:
        log.unlink(missing_ok=True)
    done = {line['key'] for line in report.lines(log) if 'findings' in line}
    start = time.monotonic()
    header = {'machine': machine.description(), 'threads': options.threads, 'short': options.short}
    report.append(log, {'started': time.strftime('%Y-%m-%d'), **header})
    with tempfile.TemporaryDirectory() as cache:
        try:
            for measurement in plan(options):
                left = 60 * options.minutes - (time.monotonic() - start)
                if measurement.key in done:
                    continue
                if left < 20:
                    report.append(log, {'key': measurement.key, 'left_out': 'no time left'})
                    continue
                print(f'{time.monotonic() - start:6.0f} s  {measurement.key}', flush=True)
                report.append(log, measure(measurement, options, min(left, options.limit), cache))
                report.tables(log)
        except KeyboardInterrupt:
            print('stopped; what was found is kept', file=sys.stderr)
    report.tables(log)
    report.picture(log)
    print(f'\n{(out / "cpu.md").read_text()}\nwritten under {options.out}')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--short', action='store_true', help=f'five nets in under {SHORT_MINUTES} minutes')
    parser.add_argument('--nets', nargs='+', default=[], metavar='NET')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=[], metavar='PART', help=', '.join(PARTS))
    parser.add_argument('--rounds', type=int, default=0, help='7, short: 5')
    parser.add_argument('--seconds', type=float, default=0.4, help='that a turn takes at least')
    parser.add_argument('--batch', type=int, default=0, help='in place of the 8 or 2 of each net')
    parser.add_argument('--size', type=int, default=0, help="of the images, in place of each net's")
    parser.add_argument('--threads', type=int, default=cores())
    parser.add_argument('--minutes', type=float, default=0, help='after which nothing more is begun')
    parser.add_argument('--limit', type=float, default=900, help='seconds of one process')
    parser.add_argument('--out', default='build/bench')
    parser.add_argument('--resume', action='store_true', help='leaves out what --out has already')
    options = parser.parse_args()
    options.rounds = options.rounds or (5 if options.short else 7)
    options.minutes = options.minutes or (SHORT_MINUTES if options.short else 1e6)
    unknown = set(options.nets) - set(NETS)
    if unknown and not options.size:
        parser.error(f'{", ".join(sorted(unknown))}: give --size with nets other than {", ".join(NETS)}')
    return options


def plan(options: argparse.Namespace) -> list[Measurement]:
    """The processes in order of importance, so that a run that ends early has the most important ones."""
    nets = options.nets or (SHORT if options.short else NETS)
    found = []
    for part in PARTS:
        if options.only and part not in options.only:
            continue
        for net in nets:
            batch = options.batch or NETS.get(net, (0, 8))[1]
            found += measurements(part, net, batch, options.short)
    return found


def measurements(part: str, net: str, batch: int, short: bool) -> list[Measurement]:
    jobs = [('forward', batch), ('step', batch)]
    if part in ('forward', 'step'):
        # Memory first: it is there that flaxnets compiles anew, and its seconds are counted.
        memory = Measurement(part, net, part, batch, 'flaxnets', 'memory')
        return [memory, Measurement(part, net, part, batch, 'eager')]
    if part == 'memory':
        modes = ['timm channels_last'] if short else ['timm channels_last', 'timm contiguous']
        return [Measurement(part, net, what, n, mode, 'memory') for what, n in jobs for mode in modes]
    if part == 'forward1':
        return [Measurement(part, net, 'forward', 1, 'eager')]
    if part == 'serving':
        jobs = [('forward', batch), ('forward', 1)]
    elif not short:
        jobs.insert(1, ('forward', 1))
    elif part == 'compiled':
        jobs = jobs[:1]
    return [Measurement(part, net, what, n, part) for what, n in jobs]


def measure(
    measurement: Measurement, options: argparse.Namespace, limit: float, cache: str
) -> dict[str, Any]:
    """A process's findings. `cache` keeps what this run has compiled, and nothing from earlier runs."""
    size = options.size or NETS[measurement.net][0]
    timed = measurement.kind == 'time'
    spec = {
        **{key: getattr(measurement, key) for key in ('net', 'what', 'batch', 'kind')},
        'size': size,
        'threads': options.threads,
        'rounds': options.rounds,
        'seconds': options.seconds,
        'contestants': CONTESTANTS[measurement.group] if timed else [measurement.group],
    }
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')])),
        # Programs with oneDNN's convolutions cannot be kept.
        'JAX_COMPILATION_CACHE_DIR': '' if asked_for_onednn() else f'{cache}/jax',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
        'TORCHINDUCTOR_CACHE_DIR': f'{cache}/torch-{measurement.key.replace("|", "-")}',
        'OMP_NUM_THREADS': str(options.threads),
        'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',  # for all of them, as `python -m train` sets it
    }
    findings = Path(cache) / 'findings.jsonl'
    findings.unlink(missing_ok=True)
    ended, start = 'well', time.monotonic()
    busy, own = machine.busy_seconds(), machine.childrens_seconds()
    command = [sys.executable, '-m', 'benchmarks.measure', json.dumps(spec), str(findings)]
    with (Path(options.out) / 'errors.log').open('a') as errors:
        try:
            subprocess.run(command, env=environment, timeout=limit, check=True, stderr=errors, cwd=ROOT)
        except subprocess.TimeoutExpired:
            ended = f'stopped after {limit:.0f} s'
        except subprocess.CalledProcessError as error:
            ended = f'exit code {error.returncode}'
    others = machine.busy_seconds() - busy - (machine.childrens_seconds() - own)
    return {
        'key': measurement.key,
        'part': measurement.part,
        **spec,
        'group': measurement.group,
        'others_cores': round(others / (time.monotonic() - start), 2),
        'ended': ended,
        'findings': list(report.lines(findings)),
    }


if __name__ == '__main__':
    main()

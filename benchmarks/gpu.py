"""Measures parity and speed on one GPU, in under eight minutes and without a network.

    python -m benchmarks.gpu [--minutes 7.5] [--out build/bench]
    JAX_PLATFORMS=cpu python -m benchmarks.gpu --toy      # the same, tiny, on any machine

1. The card's own limits: products and bytes a second.
2. flaxnets beside timm (channels_last, contiguous, compiled; all under autocast), forward and step, with the
   share of the roofline and what the time is spent on: five nets now, the others when all else is done.
3. Parity of every kind of block with timm's, float32 and bfloat16, logits and gradients.
4. Convolutions by themselves, in every form and beside torch.
5. What flags and other forms of the convolutions would change, each in a process with flags of its own.
6. `kernels.py`, one kernel for BatchNorm, ReLU, 1x1 convolution and statistics, beside XLA's programs.

Processes compile side by side (`--together`) and have the card to themselves, one after the other, when they
are timed. Findings are in `gpu.json` and `gpu.md` under --out, as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from flaxnets.cores import cores

ROOT = Path(__file__).parent.parent
NETS = {  # in order of importance: pixels, images
    'resnext50_32x4d': (224, 128),
    'resnest50d': (224, 128),
    'res2net50_14w_8s': (224, 128),
    'resnext101_32x4d': (224, 128),
    'resnest101e': (256, 64),
    'res2net50_26w_8s': (224, 128),
    'res2next50': (224, 128),
    'resnest14d': (224, 128),
    'resnext101_64x4d': (224, 128),
    'res2net101_26w_4s': (224, 128),
    'resnest50d_4s2x40d': (224, 128),
    'resnest50d_1s4x24d': (224, 128),
    'resnest26d': (224, 128),
    'resnest200e': (320, 32),
    'resnest269e': (416, 16),
}
FIRST = 5  # nets that are measured before the variants
SLOT = 120  # seconds that a process may have the card
KINDS = [
    'resnext50_32x4d',
    'seresnext50_32x4d',
    'res2net50_14w_8s',
    'res2next50',
    'resnest50d',
    'resnest50d_1s4x24d',
    'resnest50d_4s2x40d',
]
MODES = ('channels_last', 'contiguous', 'compiled')
NCHW, TRIAL = '--xla_gpu_force_conv_nchw=true', '--xla_gpu_experimental_enable'
X50, S50, R50 = 'resnext50_32x4d', 'resnest50d', 'res2net50_14w_8s'
# Label, flags, form of the convolutions (`benchmarks/forms.py`), nets; in order of importance.
VARIANTS: list[tuple[str, str, str, list[str]]] = [
    ('as it is, once more', '', '', [X50]),  # how far two equal processes differ
    ('plain Flax', '', 'plain', [X50, S50, R50]),
    ('channels first', NCHW, '', [S50, X50, R50]),
    ('groups packed to 16', '', 'packed16', [X50]),
    ('groups packed to 64', '', 'packed64', [X50]),
    ('graphs with parallel branches', '--xla_gpu_command_buffer_scheduling_mode=CONCURRENT', '', [R50, S50]),
    ('1x1 as products', '', 'products', [X50, S50]),
    ('convolution fusion', f'{TRIAL}_conv_fusion=true', '', [X50, S50]),
    ('fusions of equal shapes', f'{TRIAL}_same_shape_multi_output_fusion=true', '', [X50]),
    ('fusion autotuner', f'{TRIAL}_fusion_autotuner=true', '', [X50]),
    ('latency-hiding scheduler', '--xla_gpu_enable_latency_hiding_scheduler=true', '', [X50]),
    ('autotune level 0', '--xla_gpu_autotune_level=0', '', [X50]),
    ('deterministic', '--xla_gpu_deterministic_ops=true', '', [X50]),
]
TOY = ('resnest_tiny', 'resnext_tiny')
PARTS = ('parity', 'layers', 'kernels', 'nets', 'variants')


@dataclass
class Task:
    """A process to start: its task and its flags."""

    spec: dict[str, Any]
    label: str
    flags: str = ''
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    ended: str = 'well'


def main() -> None:
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    header = {'machine': machine.description(), 'device': device(), 'toy': options.toy}
    result: dict[str, Any] = {'started': time.strftime('%Y-%m-%d'), **header, 'tasks': []}
    with tempfile.TemporaryDirectory() as folder:
        todo, number = tasks(options), 0
        while todo and left(options, start) > 0:
            wave, todo = todo[: options.together], todo[options.together :]
            numbers = [str(number + i) for i in range(len(wave))]
            number += len(wave)
            for task, findings in run(wave, numbers, Path(folder), left(options, start), options.toy):
                result['tasks'].append(
                    {'label': task.label, 'flags': task.flags, **task.spec, 'ended': task.ended}
                    | {'findings': findings}
                )
            result['seconds'] = round(time.monotonic() - start)
            result['no_time_left'] = [f'{t.label} {t.spec.get("net", "")}'.strip() for t in todo]
            write(result, out)
            print(f'{result["seconds"]} s: {number} processes done, {len(todo)} to come', flush=True)
    print((out / 'gpu.md').read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--toy', action='store_true', help='tiny nets, a few images: shows that it runs')
    parser.add_argument('--minutes', type=float, default=7.5, help='after which all is stopped')
    parser.add_argument('--together', type=int, default=0, help='processes that compile side by side')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--only', nargs='+', choices=PARTS, default=[])
    parser.add_argument('--nets', nargs='+', default=[], choices=[*NETS, *TOY], metavar='NET')
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--keep', default='', help="folder for the nets' programs and traces")
    parser.add_argument('--out', default='build/bench')
    options = parser.parse_args()
    if options.keep:
        options.keep = str(Path(options.keep).absolute())
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    options.together = options.together or min(6, max(2, int(cores() / 2.5)))
    return options


def left(options: argparse.Namespace, start: float) -> float:
    return 60 * options.minutes - (time.monotonic() - start)


def device() -> str:
    """The accelerator as JAX names it; asked in a process of its own, which gives it back."""
    code = 'import jax; print(jax.devices()[0].device_kind)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    return found.stdout.strip() or 'none'


def tasks(options: argparse.Namespace) -> list[Task]:
    """The processes in order of importance, since the run ends when its time is up."""
    toy = options.toy
    common = {
        'dtype': options.dtype,
        'rounds': 2 if toy else options.rounds,
        'seconds': 0.02 if toy else 0.25,
        'jobs': ['forward', 'step'],
        'backend': 'aot_eager' if toy else 'inductor',
    }

    def net(name: str, timm: tuple[str, ...], form: str = '') -> dict[str, Any]:
        size, batch = (32, 2) if toy else NETS[name]
        return {
            'kind': 'net',
            'net': name,
            'size': size,
            'batch': batch,
            'timm': timm,
            'form': form,
            'keep': options.keep,
            **common,
        }

    kinds = ['resnest50d', 'res2next50'] if toy else KINDS
    parity = {'kind': 'parity', 'batch': 2 if toy else 4, 'size': 32 if toy else 96}
    limits = {'kind': 'limits', 'side': 128 if toy else 8192, 'length': 2**16 if toy else 2**29}
    alone = {'toy': toy, 'batch': 2 if toy else 128, **common}
    layers = {**alone, 'kind': 'layers', 'rounds': 3, 'seconds': common['seconds'] / 5}
    names = options.nets or (list(TOY) if toy else list(NETS))
    first = 1 if toy else FIRST
    compare = [Task(net(name, MODES), 'net') for name in names]
    changed = VARIANTS[:3] if toy else VARIANTS
    variants = [
        Task(net(n, (), form), label, flags)
        for label, flags, form, nets in changed
        for n in (TOY[:1] if toy else nets)
    ]
    groups = {
        'limits': [Task(limits, 'limits')],
        'nets': compare[:first],
        'parity': [Task({**parity, 'nets': kinds[i::3]}, 'parity') for i in range(min(3, len(kinds)))],
        'layers': [Task(layers, 'layers')],
        'variants': variants,
        'kernels': [Task({**alone, 'kind': 'kernels'}, 'kernels')],
    }
    wanted = set(options.only or groups)
    if wanted & {'nets', 'kernels'}:
        wanted.add('limits')
    chosen = [task for key, group in groups.items() if key in wanted for task in group]
    return chosen + (compare[first:] if 'nets' in wanted else [])


def run(
    wave: list[Task], numbers: list[str], folder: Path, seconds: float, toy: bool
) -> Iterator[tuple[Task, list[dict[str, Any]]]]:
    """Starts the processes, gives the card to one at a time, and collects their findings."""
    deadline = time.monotonic() + seconds
    for task, number in zip(wave, numbers, strict=True):
        task.process = begin(task, number, folder, toy)
    try:
        pairs = list(zip(wave, numbers, strict=True))
        while time.monotonic() < deadline - 20 and not all(_settled(t, n, folder) for t, n in pairs):
            time.sleep(0.05)
        for task, number in pairs:
            if not _settled(task, number, folder):
                stop(task)  # it would compile on while others are timed
        for task, number in pairs:
            if (folder / f'{number}.ready').exists():
                (folder / f'{number}.go').touch()
                finish(task, min(deadline, time.monotonic() + SLOT))  # one that hangs holds up no others
        for task in wave:
            if task.ended == 'well':
                finish(task, deadline)
    finally:
        for task in wave:
            if task.process is not None and task.process.poll() is None:
                task.process.kill()
                task.process.wait()
    for task, number in zip(wave, numbers, strict=True):
        errors = (folder / f'{number}.err').read_text(errors='replace')
        if 'Unknown flag' in errors:
            task.ended = 'this jaxlib does not know the flag'
        elif task.ended != 'well':
            print(f'{task.label} {task.spec.get("net", "")}: {task.ended}\n{errors[-800:]}', file=sys.stderr)
        yield task, list(report.lines(folder / f'{number}.jsonl'))


def begin(task: Task, number: str, folder: Path, toy: bool) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH', '')])),
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {task.flags}'.strip(),
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # torch and the other processes need the card's memory
        'TORCHINDUCTOR_CACHE_DIR': str(folder / f'inductor{number}'),
        'TF_CPP_MIN_LOG_LEVEL': '2',
    }
    if toy:
        environment['OMP_NUM_THREADS'] = '1'  # tiny maps, and a machine that may be busy
    command = [sys.executable, '-m', 'benchmarks.gpu_task', json.dumps(task.spec), str(folder), number]
    with (folder / f'{number}.err').open('wb') as errors:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=errors, stdout=errors)


def _settled(task: Task, number: str, folder: Path) -> bool:
    assert task.process is not None
    return (folder / f'{number}.ready').exists() or task.process.poll() is not None


def finish(task: Task, deadline: float) -> None:
    assert task.process is not None
    try:
        code = task.process.wait(max(0.1, deadline - time.monotonic()))
        task.ended = 'well' if code == 0 else f'exit code {code}'
    except subprocess.TimeoutExpired:
        stop(task)


def stop(task: Task) -> None:
    assert task.process is not None
    task.process.kill()
    task.process.wait()
    task.ended = f'stopped: no time left, or {SLOT} s on the card'


# The report.


def write(result: dict[str, Any], out: Path) -> None:
    (out / 'gpu.json').write_text(json.dumps(result, indent=1) + '\n')
    versions = ', '.join(f'{k} {v}' for k, v in result['machine']['versions'].items())
    toy = ' **A toy run: its figures mean nothing.**' if result['toy'] else ''
    limits: dict[str, Any] = next(
        (f for t in result['tasks'] if t['label'] == 'limits' for f in t['findings']), {}
    )
    out_lines = [f'{result["device"]}; {versions}; {result["started"]}; {result["seconds"]} s.{toy}', '']
    if limits:
        out_lines.append(
            f'Reached by a product of matrices in bfloat16: {limits["flops"] / 1e12:.0f} TFLOP/s; by a copy: '
            f'{limits["bytes"] / 1e12:.2f} TB/s.'
        )
    out_lines += parity_table(result['tasks'])
    base: dict[tuple[str, str], float] = {}
    out_lines += net_table(result['tasks'], limits, base)
    out_lines += profile_table(result['tasks'])
    out_lines += layer_table(result['tasks'])
    out_lines += kernel_table(result['tasks'], limits)
    out_lines += variant_table(result['tasks'], base)
    if result['no_time_left']:
        out_lines += ['', f'No time was left for: {", ".join(result["no_time_left"])}.']
    (out / 'gpu.md').write_text('\n'.join(out_lines) + '\n')


def parity_table(tasks: list[dict[str, Any]]) -> list[str]:
    rows = [f for t in tasks if t['kind'] == 'parity' for f in t['findings']]
    if not rows:
        return []
    heads = ['blocks of', 'dtype', 'logits', 'gradients', 'timm logits', 'timm gradients', 'equal']
    keys = ('net', 'dtype', 'logits', 'gradients', 'timm_logits', 'timm_gradients')
    out = ['', '### Parity', '', 'Relative distance from torch in float32 on the processor.', '']
    out += _rows(heads, ([*(f.get(k, '') for k in keys), f.get('failed', f['equal'])] for f in rows))
    ended = [f'{t["label"]}: {t["ended"]}' for t in tasks if t['kind'] == 'parity' and t['ended'] != 'well']
    return [*out, *(['', *ended] if ended else [])]


def net_table(
    tasks: list[dict[str, Any]], limits: dict[str, Any], base: dict[tuple[str, str], float]
) -> list[str]:
    ratios: dict[str, list[float]] = {'forward': [], 'step': []}
    rows: list[list[Any]] = []
    for task in (t for t in tasks if t['label'] == 'net'):
        for what in task['jobs']:
            found = merged(task, what)
            ours = found.get('flaxnets', {})
            theirs = {n: one['ms'] for n, one in found.items() if n != 'flaxnets' and 'ms' in one}
            cells = [task['net'], what, task['batch'], _cell(ours, task), roofline(ours, limits)]
            cells += [_cell(found.get(f'timm {mode}', {}), task) for mode in MODES]
            ratio = ''
            if 'ms' in ours:
                base[task['net'], what] = ours['ms']
                if theirs:
                    ratios[what].append(min(theirs.values()) / ours['ms'])
                    ratio = f'{ratios[what][-1]:.2f}'
            seconds = f'{ours["compile_s"]:.0f} s' if 'compile_s' in ours else ''
            rows.append([*cells, ratio, seconds, '' if task['ended'] == 'well' else task['ended']])
    if not rows:
        return []
    heads = ['net', 'job', 'batch', 'flaxnets', 'of the roofline', *MODES, 'best timm / flaxnets']
    out = ['', '### Nets', '', 'Images a second, and milliseconds.', '']
    out += _rows([*heads, 'compile', ''], rows)
    for what, values in ratios.items():
        if values:
            mean = report.geometric_mean(values)
            out += ['', f'{what}: geometric mean {mean:.2f}, worst {min(values):.2f}, of {len(values)} nets.']
    return out


def variant_table(tasks: list[dict[str, Any]], base: dict[tuple[str, str], float]) -> list[str]:
    rows: list[list[Any]] = []
    for task in (t for t in tasks if t['kind'] == 'net' and t['label'] != 'net'):
        cells: list[Any] = [task['label'], task['net']]
        for what in task['jobs']:
            one = merged(task, what).get('flaxnets', {})
            before = base.get((task['net'], what))
            ratio = f' ({one["ms"] / before:.2f} of it as it is)' if 'ms' in one and before else ''
            cells.append(_cell(one, task) + ratio)
        rows.append([*cells, '' if task['ended'] == 'well' else task['ended']])
    if not rows:
        return []
    note = 'Time over that of the same net as it is: below 1, the variant is the faster.'
    return ['', '### Variants', '', note, '', *_rows(['variant', 'net', 'forward', 'step', ''], rows)]


def profile_table(tasks: list[dict[str, Any]]) -> list[str]:
    rows: list[list[Any]] = []
    for task in (t for t in tasks if t['kind'] == 'net' and t['label'] == 'net'):
        for what in task['jobs']:
            spent: dict[str, float] = merged(task, what).get('flaxnets', {}).get('operations', {})
            if spent:
                cells = [f'{name} {ms:.2f}' for name, ms in list(spent.items())[:10]]
                rows.append([task['net'], what, f'{sum(spent.values()):.1f}', ', '.join(cells)])
    if not rows:
        return []
    note = "Milliseconds of the card by XLA's names of operations, the ten longest."
    return ['', '### What the time is spent on', '', note, '', *_rows(['net', 'job', 'all', ''], rows)]


def layer_table(tasks: list[dict[str, Any]]) -> list[str]:
    rows: list[list[Any]] = []
    for task in (t for t in tasks if t['kind'] == 'layers'):
        for what in dict.fromkeys(finding['what'] for finding in task['findings']):
            found = merged(task, what)
            times = sorted((one['ms'], name) for name, one in found.items() if 'ms' in one)
            rows.append([what, ', '.join(f'{name} {ms:.3f}' for ms, name in times)])
    if not rows:
        return []
    note = 'Milliseconds of each form, the fastest first; `torch` has two layouts.'
    return ['', '### Convolutions', '', note, '', *_rows(['convolution', 'forms'], rows)]


def kernel_table(tasks: list[dict[str, Any]], limits: dict[str, Any]) -> list[str]:
    rows: list[list[Any]] = []
    ended: list[str] = []
    for task in (t for t in tasks if t['kind'] == 'kernels'):
        ended += [task['ended']] if task['ended'] != 'well' else []
        for what in dict.fromkeys(finding['what'] for finding in task['findings']):
            found = merged(task, what)
            xla = [one['ms'] for name, one in found.items() if name.startswith('XLA') and 'ms' in one]
            for name, one in found.items():
                time = f'{one["ms"]:.3f}' if 'ms' in one else _in_a_cell(one.get('left_out', ''))
                ratio = f'{min(xla) / one["ms"]:.2f}' if xla and 'ms' in one else ''
                rows.append([what, name, time, ratio, roofline(one, limits), one.get('differs', '')])
    if not rows and not ended:
        return []
    note = (
        'BatchNorm, ReLU, 1x1 convolution and the sums of its result. Of the roofline: what the products, '
        'or the two maps once, would take at least.'
    )
    heads = ['map', 'program', 'ms', "XLA's best over it", 'of the roofline', 'relative difference']
    return ['', '### One kernel', '', note, '', *_rows(heads, rows), *(['', *ended] if ended else [])]


def merged(task: dict[str, Any], what: str) -> dict[str, dict[str, Any]]:
    """All that was found of each contestant at one job."""
    found: dict[str, dict[str, Any]] = {}
    for finding in task['findings']:
        if finding.get('what') == what:
            found.setdefault(finding['contestant'], {}).update(finding)
    return found


def roofline(one: dict[str, Any], limits: dict[str, Any]) -> str:
    """The shortest time that the card's limits allow, as a share of the time taken, and which limit it is."""
    if not limits or 'ms' not in one:
        return ''
    products, moved = 1e12 * one['gflop'] / limits['flops'], 1e12 * one['gbyte'] / limits['bytes']
    share = max(products, moved) / one['ms']
    return f'{share:.0%} ({"products" if products > moved else "bytes"})'


def _cell(one: dict[str, Any], task: dict[str, Any]) -> str:
    if 'ms' not in one:
        return _in_a_cell(one.get('left_out', ''))
    return f'{1e3 * task["batch"] / one["ms"]:.0f}/s, {one["ms"]:.1f} ms'


def _in_a_cell(text: str) -> str:
    return re.sub(r'[|\n]', ' ', text)


def _rows(heads: list[str], rows: Any) -> list[str]:
    lines = [heads, ['---'] * len(heads), *rows]
    return ['| ' + ' | '.join(map(str, line)) + ' |' for line in lines]


if __name__ == '__main__':
    main()

"""Makes JSON, a table and a picture from the findings of `benchmarks/nets.py`.

    python -m benchmarks.report build/bench/cpu.jsonl

makes them again from a file of findings.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = 'flaxnets'
UNCOMPILED = ('timm contiguous', 'timm channels_last')
BEST = (*UNCOMPILED, 'timm compiled')
COLUMNS = (*BEST, 'flaxnets bfloat16', 'timm bfloat16', 'flaxnets folded', 'onnxruntime', 'openvino')
PLAIN = 'plain Flax'
BUSY = 0.15  # cores that others may use: more, and torch's threads wait for each other
TITLES = {
    'timm contiguous': 'contiguous',
    'timm channels_last': 'channels_last',
    'timm compiled': 'compiled',
    'flaxnets bfloat16': 'ours bfloat16',
    'timm bfloat16': 'timm bfloat16',
    'flaxnets folded': 'ours folded',
}
# From the issue of speed: what the ratio is of, and the mean that it must reach; no net below 0.85 of it.
BARS = {
    'forward': ('forward', BEST, 1.0),
    'forward1': ('forward, batch 1', BEST, 1.0),
    'step': ('training step', ('timm channels_last',), 1.0),
}
COLOURS = {
    'timm contiguous': 'tab:orange',
    'timm channels_last': 'tab:red',
    'timm compiled': 'tab:purple',
    PLAIN: 'tab:gray',
    'onnxruntime': 'tab:green',
    'openvino': 'tab:olive',
}


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a file of JSON, but for those that a stopped process has left incomplete."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a file of JSON, apart from a last one that a stopped process has left incomplete."""
    torn = path.exists() and not path.read_bytes().endswith(b'\n')
    with path.open('a') as file:
        file.write('\n' * torn + json.dumps(line) + '\n')


def summary(log: Path) -> dict[str, Any]:
    """Medians, quartiles and ratios of all measurements, by net and job."""
    result: dict[str, Any] = {'nets': {}, 'not_measured': {}}
    for line in lines(log):
        if 'machine' in line:
            result.update(line)
        elif 'left_out' in line:
            result['not_measured'][line['key']] = line['left_out']
        else:
            _take(result, line)
    result['not_measured'] = {k: v for k, v in result['not_measured'].items() if v}
    result['bars'] = {job: bar for job in BARS if (bar := _bar(result['nets'], job))}
    return result


def _take(result: dict[str, Any], line: dict[str, Any]) -> None:
    job = 'forward1' if line['what'] == 'forward' and line['batch'] == 1 else line['what']
    net = result['nets'].setdefault(line['net'], {'size': line['size']})
    entry = net.setdefault(job, {'batch': line['batch'], 'contestants': {}})
    result['not_measured'][line['key']] = '' if line['ended'] == 'well' else line['ended']
    found: dict[str, dict[str, Any]] = {}
    for finding in line['findings']:
        one = found.setdefault(finding['contestant'], {'rounds': []})
        if 'round' in finding:
            one['rounds'].append(finding['seconds'])
        else:
            one.update({k: v for k, v in finding.items() if k not in ('contestant', 'warm')})
    if line['kind'] == 'memory':
        entry.setdefault('memory', {}).update(
            {name: {k: v for k, v in one.items() if k != 'rounds'} for name, one in found.items()}
        )
        return
    entry.setdefault('others_cores', {})[line['group']] = line['others_cores']
    ours = found.get(OURS, {}).get('rounds', [])
    for name, one in found.items():
        rounds = one.pop('rounds')
        if rounds:
            one.update(_times(rounds), **_ratio(rounds, ours))
        if 'ms' in entry['contestants'].get(name, {}):
            continue  # ours stands in every group to be divided by; the first group's figures are kept
        entry['contestants'][name] = one


def _times(rounds: list[list[float]]) -> dict[str, Any]:
    """Milliseconds of a call: the median of the rounds' medians, and their quartiles."""
    medians = [1e3 * statistics.median(calls) for calls in rounds]
    low, middle, high = quartiles(medians)
    return {'ms': middle, 'quartiles_ms': [low, high], 'rounds_ms': [round(m, 2) for m in medians]}


def _ratio(rounds: list[list[float]], ours: list[list[float]]) -> dict[str, Any]:
    """Time over that of flaxnets in the same round: above 1, flaxnets is the faster."""
    if not ours:
        return {}
    if len(rounds) != len(ours):
        ratios = [statistics.median(map(statistics.median, rounds)) / statistics.median(r) for r in ours]
    else:
        ratios = [statistics.median(r) / statistics.median(o) for r, o in zip(rounds, ours, strict=True)]
    low, middle, high = quartiles(ratios)
    return {'ratio': middle, 'ratio_quartiles': [low, high]}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = (
        statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
    )
    return round(low, 3), round(middle, 3), round(high, 3)


def best_ratio(entry: dict[str, Any], names: Iterable[str]) -> float | None:
    """timm's quickest mode over flaxnets; None where none of them was timed."""
    ratios = [entry['contestants'].get(name, {}).get('ratio') for name in names]
    return min((r for r in ratios if r), default=None)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _bar(nets: dict[str, Any], job: str) -> dict[str, Any] | None:
    _, names, bar = BARS[job]
    ratios = {net: r for net, jobs in nets.items() if job in jobs and (r := best_ratio(jobs[job], names))}
    if not ratios:
        return None
    worst = min(ratios, key=lambda net: ratios[net])
    return {
        'against': list(names),
        'mean': round(geometric_mean(ratios.values()), 3),
        'worst': [worst, ratios[worst]],
        'nets': len(ratios),
        'reached': geometric_mean(ratios.values()) >= bar and ratios[worst] >= 0.85 * bar,
    }


def tables(log: Path) -> None:
    """Writes `.json` and `.md` beside the findings."""
    found = summary(log)
    log.with_suffix('.json').write_text(json.dumps(found, indent=1) + '\n')
    machine = found.get('machine', {})
    versions = ', '.join(f'{k} {v}' for k, v in machine.get('versions', {}).items())
    flags = machine.get('xla_flags', '')
    out = [
        f'{machine.get("cpu")} ({machine.get("vector")}), {found.get("threads")} threads; {versions}; '
        f'{found.get("started")}{"; XLA_FLAGS=" + flags if flags else ""}.',
        '',
        'Times are medians of interleaved rounds; a ratio is the time of another over that of flaxnets: '
        'above 1, flaxnets is the faster. The JSON file has quartiles and all rounds.',
    ]
    busy = [
        f'{net} {job} ({cores:.1f})'
        for net, jobs in found['nets'].items()
        for job in BARS
        for cores in jobs.get(job, {}).get('others_cores', {}).values()
        if cores > BUSY
    ]
    if busy:
        out += ['', f'**Not to be relied on**: other processes kept cores busy during {", ".join(busy)}.']
    for job, (title, _, _) in BARS.items():
        out += _job_table(found['nets'], job, title)
        if bar := found['bars'].get(job):
            out += ['', _bar_line(bar)]
    out += _memory_table(found['nets'])
    if found['not_measured']:
        out += ['', 'Not measured: ' + '; '.join(f'{k}: {v}' for k, v in found['not_measured'].items()) + '.']
    log.with_suffix('.md').write_text('\n'.join(out) + '\n')


def _bar_line(bar: dict[str, Any]) -> str:
    return (
        f'Against the best of {", ".join(bar["against"])}: geometric mean of {bar["nets"]} nets '
        f'**{bar["mean"]:.2f}**, worst {bar["worst"][1]:.2f} ({bar["worst"][0]}).'
    )


def _job_table(nets: dict[str, Any], job: str, title: str) -> list[str]:
    rows = {net: jobs[job] for net, jobs in nets.items() if jobs.get(job, {}).get('contestants')}
    if not rows:
        return []
    columns = [c for c in (*COLUMNS, PLAIN) if any(c in entry['contestants'] for entry in rows.values())]
    heads = ['net', 'px', 'batch', 'flaxnets', *(TITLES.get(c, c) for c in columns)]
    out = ['', f'### {title.capitalize()}', '', _row(heads), _row(['---'] * len(heads))]
    for net, entry in rows.items():
        ours = entry['contestants'].get(OURS, {})
        cells = [net, nets[net]['size'], entry['batch'], _milliseconds(ours)]
        out.append(_row([*cells, *(_cell(entry['contestants'].get(c)) for c in columns)]))
    return out


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ''
    if 'ms' not in one:
        return one.get('left_out', '-')
    ratio = f' ({one["ratio"]:.2f})' if 'ratio' in one else ''
    return _milliseconds(one) + ratio + (' once' if one.get('once') else '')


def _milliseconds(one: dict[str, Any]) -> str:
    return f'{one["ms"]:.0f} ms' if 'ms' in one else one.get('left_out', '-')


def _memory_table(nets: dict[str, Any]) -> list[str]:
    """Compile seconds and peak megabytes, from processes of one framework."""
    heads = ['net', 'job', 'flaxnets: trace + compile', 'timm: compile', 'flaxnets: peak', 'with compiling']
    out = ['', '### Compile time and peak memory', '', _row([*heads, 'timm: peak']), _row(['---'] * 7)]
    for net, jobs in nets.items():
        for job, (title, _, _) in BARS.items():
            entry = jobs.get(job, {})
            ours = entry.get('memory', {}).get(OURS) or entry.get('contestants', {}).get(OURS, {})
            theirs = [
                m['running_mb'] for n, m in entry.get('memory', {}).items() if n != OURS and m['running_mb']
            ]
            compiled = entry.get('contestants', {}).get('timm compiled', {})
            if not entry:
                continue
            seconds = f'{ours["trace_s"]:.0f} + {ours["compile_s"]:.0f} s' if 'compile_s' in ours else ''
            first = f'{compiled["first_s"] - compiled["second_s"]:.0f} s' if 'first_s' in compiled else ''
            peaks = [f'{ours[k]:.0f} MB' if ours.get(k) else '' for k in ('running_mb', 'peak_mb')]
            timm = f'{min(theirs):.0f} MB' if theirs else ''
            out.append(_row([net, title, seconds, first, *peaks, timm]))
    return out


def _row(cells: Iterable[Any]) -> str:
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def picture(log: Path) -> None:
    """Writes `.png`: for each net and job, how long the others take beside flaxnets."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    nets = summary(log)['nets']
    jobs = [job for job in BARS if any(_ratios(entry, job) for entry in nets.values())]
    if not jobs:
        return
    names = list(nets)[::-1]
    height = 1.6 + 0.32 * len(names)
    figure, axes = pyplot.subplots(
        1, len(jobs), figsize=(4.2 * len(jobs), height), sharey=True, squeeze=False
    )
    for axis, job in zip(axes[0], jobs, strict=True):
        for y, net in enumerate(names):
            for who, ratio in _ratios(nets[net], job).items():
                axis.plot(ratio, y, 'o', color=COLOURS[who], label=who, alpha=0.85)
        axis.axvline(1, color='black', linewidth=1)
        axis.set_xscale('log')
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
        axis.xaxis.set_minor_formatter(NullFormatter())
        low, high = axis.get_xlim()
        near, wide = (0.5, 0.7, 1, 1.5, 2, 3, 5), (0.5, 1, 2, 5, 10, 20, 50, 100)
        closest = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4)
        ticks = closest if high < 2 * low else near if high < 12 * low else wide
        axis.set_xticks([t for t in ticks if low <= t <= high])
        axis.set_title(BARS[job][0])
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(-0.6, len(names) - 0.4)
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='lower center', ncols=len(handles), frameon=False)
    figure.supxlabel(
        'time over that of flaxnets: right of 1, flaxnets is the faster', y=0.5 / height, fontsize=10
    )
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1))
    figure.savefig(log.with_suffix('.png'), dpi=110)
    pyplot.close(figure)


def _ratios(jobs: dict[str, Any], job: str) -> dict[str, float]:
    contestants = jobs.get(job, {}).get('contestants', {})
    return {who: contestants[who]['ratio'] for who in COLOURS if contestants.get(who, {}).get('ratio')}


if __name__ == '__main__':
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f'{sys.argv[1:]}: give the file that benchmarks.nets wrote, such as build/bench/cpu.jsonl')
    path = Path(sys.argv[1])
    tables(path)
    picture(path)

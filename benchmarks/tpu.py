"""Compares the package's convolutions with Flax's on TPUs, by the compiler's estimates and without a TPU.

    python -m benchmarks.tpu [--nets NET ...] [--slice v5e-16] [--only forward step] [--out build/bench]

Each net is compiled twice, as flaxnets has it and with Flax's own convolutions and pools: a forward of
bfloat16 images on one device, and the training step of `python -m train --plan`. Compared are XLA's estimated
cycles, bytes to and from memory, memory, and the largest copy. Findings are kept as they come in `tpu.jsonl`;
a second call leaves out what is there. `tpu.md` is the table. A step takes two to fifteen minutes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import flaxnets
from benchmarks import report
from benchmarks.forms import form
from benchmarks.gpu import NETS
from flaxnets.errors import FlaxnetsError
from flaxnets.nets.resnet import abstract_variables
from flaxnets.words import count
from train.settings import Settings
from train.tools.planning import Program, compiled, lower, slice_devices, topology_name

FORMS = ('', 'plain')  # of benchmarks/forms.py
BAR = 0.85  # of plain Flax, in cycles and bytes of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--nets', nargs='+', default=list(NETS), choices=NETS, metavar='NET')
    parser.add_argument('--slice', default='v5e-16', help="as of python -m train's --plan")
    parser.add_argument('--only', nargs='+', choices=('forward', 'step'), default=['forward', 'step'])
    parser.add_argument('--out', default='build/bench')
    options = parser.parse_args()
    out = Path(options.out)
    try:
        topology = topology_name(options.slice)
        devices = slice_devices(topology)
        out.mkdir(parents=True, exist_ok=True)
    except (FlaxnetsError, OSError) as error:
        parser.error(str(error))

    def measured(name: str, what: str) -> dict[str, Any]:
        return finding(compiled(lowered(name, what, devices)))

    compare(options.nets, options.only, out / 'tpu.jsonl', {'slice': topology}, measured, table)


def compare(
    nets: list[str],
    jobs: list[str],
    log: Path,
    where: dict[str, str],
    measured: Callable[[str, str], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Measures each net and job in both forms, but for those in `log`; prints and keeps the table of all.

    Args:
      log: the findings, a line of JSON for each; the table is beside it as `.md`.
      where: what else names a line.
      measured: the findings of a net and a job, traced within it.
      table: of all findings.
    """
    done = {key(line) for line in report.lines(log)}
    for name, what, kind in itertools.product(nets, jobs, FORMS):
        line: dict[str, Any] = {'net': name, **where, 'what': what, 'form': kind or 'flaxnets'}
        if key(line) in done:
            continue
        print(' '.join(line.values()), file=sys.stderr, flush=True)
        start = time.monotonic()
        with form(kind):
            line |= measured(name, what)
        line['compiled_s'] = round(time.monotonic() - start)
        report.append(log, line)
        log.with_suffix('.md').write_text(table(list(report.lines(log))))
    print(table(list(report.lines(log))))


def key(line: dict[str, Any]) -> tuple[str, ...]:
    return line['net'], line.get('slice', ''), line['what'], line['form']


def lowered(name: str, what: str, devices: list[Any]) -> Any:
    """A net's forward on the first of the devices, or its training step on all of them."""
    size, local = NETS[name]
    if what == 'step':
        settings = Settings(
            model=name,
            image_size=size,
            batch_size=local * len(devices),
            num_classes=1000,
            dtype='bfloat16',
        )
        return lower(settings, devices, epoch_steps=1000)
    net = flaxnets.create(name, dtype=jnp.bfloat16)
    where = SingleDeviceSharding(devices[0])
    images = jax.ShapeDtypeStruct((local, size, size, 3), jnp.bfloat16, sharding=where)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract_variables(net)
    )
    # A new function each time: nothing that was traced before is used again.
    return jax.jit(lambda variables, images: net.apply(variables, images)).lower(shapes, images)


def finding(program: Program) -> dict[str, Any]:
    """What is kept of a program; one that takes too much memory has no figures."""
    if program.memory is None:
        figures = dict.fromkeys(('cycles', 'moved', 'memory', 'copied'))
        return {**figures, 'refusal': program.refusal, 'largest_copy': ''}
    size, shape = program.copies[0] if program.copies else (0, '')
    return dict(
        cycles=program.cycles,
        moved=program.moved,
        memory=program.memory,
        refusal='',
        copied=sum(size for size, _ in program.copies),
        largest_copy=f'{shape} {size / 1e6:.0f} MB' if size else '',
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Ours beside plain Flax, a row for each net and slice, and the geometric means."""
    found = {key(line): line for line in lines}
    rows = []
    for what in ('forward', 'step'):
        for name, topology in dict.fromkeys((line['net'], line['slice']) for line in lines):
            ours = found.get((name, topology, what, 'flaxnets'))
            plain = found.get((name, topology, what, 'plain'))
            if ours and plain:
                rows.append((what, name, topology, ours, plain))
    text = [
        '| | net | slice | M cycles, ours / plain | ratio | GB moved | ratio | GiB of memory | ratio '
        '| GB copied | largest copy of ours |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for what, name, topology, ours, plain in rows:
        cells = [what, f'`{name}`', topology]
        for field, unit, digits in (('cycles', 1e6, 1), ('moved', 1e9, 1), ('memory', 2**30, 2)):
            cells += [_pair(ours[field], plain[field], unit, digits), _ratio(ours[field], plain[field])]
        cells += [_pair(ours['copied'], plain['copied'], 1e9, 2), ours['largest_copy']]
        text.append(f'| {" | ".join(cells)} |')
    for what, topology in dict.fromkeys((what, topology) for what, _, topology, _, _ in rows):
        both = [
            (o, p) for w, _, t, o, p in rows if (w, t) == (what, topology) and o['memory'] and p['memory']
        ]
        for field in ('cycles', 'moved') if both else ():
            ratios = [ours[field] / plain[field] for ours, plain in both]
            bar = f'; the goal is {BAR}, none above 1' if what == 'step' else ''
            text.append(
                f'\n{what} on {topology}, {field}: {report.geometric_mean(ratios):.2f} of plain Flax in '
                f'{count(len(both), "row")} (geometric mean; the worst {max(ratios):.2f}{bar})'
            )
    return '\n'.join(text) + '\n'


def _pair(ours: float | None, plain: float | None, unit: float, digits: int) -> str:
    return ' / '.join('too much' if x is None else f'{x / unit:.{digits}f}' for x in (ours, plain))


def _ratio(ours: float | None, plain: float | None) -> str:
    return f'{ours / plain:.2f}' if ours and plain else ''


if __name__ == '__main__':
    main()

"""The zoo's page: a table of all published weights, and their accuracy against what they cost, drawn."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxnets.nets.resnet import build, costs
from flaxnets.zoo import NETS, list_models, resolve
from flaxnets.zoo.records import Accuracy, Weights

PLACE = '<!-- the table of the zoo is put here when the site is built -->'
PLOT = 'zoo.png'
KEPT = Path(__file__).parent.parent.parent / 'build' / 'costs.json'  # counting all nets takes 40 seconds
FAMILIES = {
    'Res2Net': ('res2net', 'res2next'),
    'SE-ResNeXt': ('seresnext',),
    'ResNeXt': ('resnext',),
    'ResNeSt': ('resnest',),
}


@dataclass(frozen=True)
class Row:
    """Published weights, and what their net costs at the size of their images."""

    weights: Weights
    parameters: int
    macs: int

    @property
    def family(self) -> str:
        return next(name for name, starts in FAMILIES.items() if self.weights.arch.startswith(starts))

    @property
    def more_data(self) -> bool:
        """Whether more images than ImageNet's were learnt from: Facebook's (semi-)weakly supervised nets."""
        return self.weights.tag.startswith(('fb_ssl', 'fb_swsl', 'fb_wsl'))

    @property
    def top1(self) -> float:
        assert self.accuracy is not None
        return self.accuracy.top1

    @property
    def accuracy(self) -> Accuracy | None:
        return self.weights.accuracy[0] if self.weights.accuracy else None


@functools.cache
def rows() -> tuple[Row, ...]:
    """All published weights; what has been counted before is taken from the build folder."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    found = []
    for name in list_models(weights=True):
        arch, weights = resolve(name)
        assert weights is not None
        size = weights.preprocess.size
        key = f'{NETS[arch]} {size}'
        if key not in kept:
            parts = costs(build(NETS[arch]), size).values()
            kept[key] = sum(part.parameters for part in parts), sum(part.macs for part in parts)
        found.append(Row(weights, *kept[key]))
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept))
    return tuple(found)


def table() -> str:
    """The table as HTML, which `sort.js` sorts by a click on a heading."""
    heads = ('weights', 'top-1, %', 'top-5, %', 'pixels', 'parameters, M', 'MACs, G', 'licence')
    lines = [f'<tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>']
    for row in rows():
        best = row.accuracy
        numbers = (
            f'{best.top1:.2f}' if best else '',
            f'{best.top5:.2f}' if best and best.top5 is not None else '',
            'x'.join(map(str, sorted({row.weights.preprocess.height, row.weights.preprocess.width}))),
            f'{row.parameters / 1e6:.1f}',
            f'{row.macs / 1e9:.1f}',
        )
        values = (f'<code>{row.weights.name}</code>', *numbers, row.weights.licence)
        lines.append(f'<tr>{"".join(f"<td>{value}</td>" for value in values)}</tr>')
    head, body = lines[0], '\n'.join(lines[1:])
    return f'<table class="sortable">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def files() -> dict[str, str | bytes]:
    """The plot, as a file of the site."""
    return {PLOT: plot()}


def plot() -> bytes:
    """Top-1 over multiply-accumulates as a PNG; names at what no cheaper weights beat."""
    from flaxnets.inference.pictures import figure

    drawn = figure(10, 6.5)
    axes = drawn.add_subplot()
    for i, family in enumerate(FAMILIES):
        axes.scatter([], [], color=f'C{i}', label=family)
    axes.scatter([], [], facecolors='none', edgecolors='black', label='more images than ImageNet has')
    colours = {family: f'C{i}' for i, family in enumerate(FAMILIES)}
    for more_data in (False, True):
        own = [row for row in rows() if row.accuracy and row.more_data == more_data]
        own.sort(key=lambda row: (row.macs, -row.top1))
        axes.scatter(
            *_places(own),
            s=[12 + row.parameters / 2e6 for row in own],
            facecolors='none' if more_data else [(colours[row.family], 0.6) for row in own],
            edgecolors=[colours[row.family] for row in own],
        )
        best = [row for i, row in enumerate(own) if all(row.top1 > other.top1 for other in own[:i])]
        axes.plot(*_places(best), color='grey', linewidth=0.8, zorder=0, linestyle=':' if more_data else '-')
        named = 0.0
        for row in best:
            if row.top1 > named + 0.3:  # else the names of two would lie upon each other
                _label(axes, row)
                named = row.top1
    axes.set_xscale('log', base=2)
    ticks = (2, 4, 8, 16, 32, 64, 128)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0.85, 220)
    axes.set_xlabel('multiply-accumulates for an image, thousand millions')
    axes.set_ylabel("top-1 on ImageNet's validation images, %")
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    content = io.BytesIO()
    drawn.savefig(content, format='png', dpi=150)
    return content.getvalue()


def _places(found: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.macs / 1e9 for row in found], [row.top1 for row in found]


def _label(axes: Any, row: Row) -> None:
    axes.annotate(
        row.weights.name,
        (row.macs / 1e9, row.top1),
        xytext=(-7, 5),
        textcoords='offset points',
        ha='right',
        fontsize=7,
    )

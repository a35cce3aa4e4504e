"""Draws a diagram of a net: its stages, its block, and the cost of each part (`flaxnets info --plot`)."""

from __future__ import annotations

import math
from typing import Any

from ..nets.arch import Arch
from ..nets.blocks import EXPANSION
from ..nets.resnet import Cost, costs, stage_geometry
from ..zoo.records import Config
from .pictures import DPI, check_picture, figure

COLOURS = {'stem': '#8da0cb', 'stage': '#66c2a5', 'head': '#fc8d62', 'block': '#e5f0ea', 'plain': '#eeeeee'}


def draw_net(config: Config, path: str) -> None:
    """Draws a net to a PNG, with shapes and costs for images of the size that its weights expect.

    Args:
      config: describes the net.
      path: the PNG to write.

    Raises:
      FlaxnetsError: another suffix than `.png`, no such folder, or matplotlib is not installed.
    """
    from ..nets.resnet import build

    check_picture(path)
    net = build(config.arch, config.num_classes, config.in_chans, folded=config.folded)
    rows = _parts(config, costs(net, (config.preprocess.height, config.preprocess.width)))
    made = figure(10.5, 7.2)
    above, middle, below = made.subplots(3, 1, height_ratios=(2.5, 1.7, 2.6))
    for axes in (above, middle, below):
        axes.axis('off')
    made.suptitle(f'{config.name}: {_in_words(config.arch)}', fontsize=13)
    _draw_chain(above, config, rows)
    _draw_block(middle, config.arch)
    _draw_table(below, rows)
    made.savefig(path, dpi=DPI)


Row = tuple[str, str, Cost]  # name, what it is made of, cost


def _parts(config: Config, found: dict[str, Cost]) -> list[Row]:
    arch = config.arch
    convolutions = 'three 3x3' if arch.deep_stem else '7x7'
    stem = [found[name] for name in ('conv1', 'bn1') if name in found]
    cost = Cost(stem[0].output, sum(c.parameters for c in stem), sum(c.macs for c in stem))
    rows: list[Row] = [('stem', f'{convolutions}, then max pool', cost)]
    for i, blocks in enumerate(arch.layers, 1):
        rows.append((f'layer{i}', f'{blocks} block{"s" * (blocks > 1)}', found[f'layer{i}']))
    if 'fc' in found:
        rows.append(('fc', 'average pool, classifier', found['fc']))
    return rows


def _in_words(arch: Arch) -> str:
    kinds = {'resnext': 'ResNeXt', 'res2net': 'Res2Net', 'resnest': 'ResNeSt'}
    parts = [
        f'{kinds[arch.block]} {"-".join(map(str, arch.layers))}',
        f'{arch.cardinality} x {arch.base_width}d',
    ]
    if arch.scale > 1:
        parts.append(f'scale {arch.scale}')
    if arch.block == 'resnest':
        parts.append(f'radix {arch.radix}')
    return ', '.join(parts + ['SE'] * arch.se)


def _shape(shape: tuple[int, ...]) -> str:
    return ' x '.join(map(str, shape))


def _draw_chain(axes: Any, config: Config, rows: list[Row]) -> None:
    """Draws input, stem, stages and classifier as boxes with arrows; a box is higher for a larger map."""
    p = config.preprocess
    boxes: list[tuple[str, tuple[int, ...], str]] = [('input', (p.height, p.width, config.in_chans), 'plain')]
    kinds = {'stem': 'stem', 'fc': 'head'}
    boxes += [(name, cost.output, kinds.get(name, 'stage')) for name, _, cost in rows]
    largest = math.log2(max(p.height, 2)) + 1
    axes.set(xlim=(0, len(boxes)), ylim=(-0.36, 1.12))
    for i, (name, shape, kind) in enumerate(boxes):
        height = (math.log2(shape[0]) + 1 if len(shape) == 3 else 1) / largest
        low = (1 - height) / 2
        _box(axes, i + 0.2, low, 0.6, height, COLOURS[kind])
        axes.text(i + 0.5, 0.5, name, ha='center', va='center', fontsize=10, fontweight='bold')
        axes.text(i + 0.5, -0.07, _shape(shape), ha='center', va='top', fontsize=9)
        strides = (1, *stage_geometry(32)[0])
        if kind == 'stage':
            blocks = f'x {config.arch.layers[i - 2]}'
            axes.text(i + 0.5, low + height + 0.03, blocks, ha='center', va='bottom', fontsize=9)
            axes.text(
                i + 0.5, -0.24, f'stride {strides[i - 1]}', ha='center', va='top', fontsize=8, color='grey'
            )
        if kind == 'stem':
            axes.text(i + 0.5, -0.24, 'stride 2, pool 2', ha='center', va='top', fontsize=8, color='grey')
        if i:
            _arrow(axes, (i - 0.18, 0.5), (i + 0.19, 0.5))


def _draw_block(axes: Any, arch: Arch) -> None:
    """Draws the block of the first stage from left to right, with its shortcut above."""
    steps = _steps(arch)
    axes.set(xlim=(0, len(steps) + 1.6), ylim=(0, 1.25))
    axes.text(
        0.05,
        1.12,
        'its block, as in layer1; each next stage has twice as many channels',
        fontsize=9,
    )
    for i, (head, words) in enumerate(steps):
        _box(axes, i + 0.65, 0.12, 0.78, 0.56, COLOURS['block'])
        axes.text(i + 1.04, 0.5, head, ha='center', va='center', fontsize=9, fontweight='bold')
        axes.text(i + 1.04, 0.27, words, ha='center', va='center', fontsize=8)
        _arrow(axes, (i + 0.43, 0.4), (i + 0.64, 0.4))
    end = len(steps) + 0.72
    axes.text(0.38, 0.4, 'x', ha='right', va='center', fontsize=11)
    _arrow(axes, (end - 0.29, 0.4), (end - 0.02, 0.4))
    axes.text(end + 0.05, 0.4, '+', ha='center', va='center', fontsize=13)
    axes.text(end + 0.16, 0.4, 'ReLU', ha='left', va='center', fontsize=9)
    axes.plot([0.5, 0.5, end + 0.05], [0.4, 0.86, 0.86], color='black', linewidth=0.9)
    _arrow(axes, (end + 0.05, 0.86), (end + 0.05, 0.5))
    pool = 'average pool and 1x1' if arch.avg_down else '1x1'
    words = f'shortcut: as it is, but {pool} in the first block of a stage'
    axes.text((end + 0.5) / 2, 0.89, words, ha='center', va='bottom', fontsize=8, color='grey')


def _steps(arch: Arch) -> list[tuple[str, str]]:
    """The steps of a block, in order: (name, details)."""
    p = arch.planes
    width = int(p * arch.base_width / 64) * arch.cardinality
    out = EXPANSION * p
    first, last = f'{out} to {width}', f'{width} to {out}'
    if arch.block == 'res2net':
        first, last = f'{out} to {width * arch.scale}', f'{width * arch.scale} to {out}'
        each = f'{arch.scale - 1} of {width} channels' + (
            f',\n{arch.cardinality} groups' * (arch.cardinality > 1)
        )
        return [
            ('1x1', first),
            ('split', f'in {arch.scale} parts'),
            ('3x3 each', f'{each}\none after the other'),
            ('join', 'one part as it is'),
            ('1x1', last),
        ]
    if arch.block == 'resnest':
        groups = arch.radix * arch.cardinality
        pool = 'before' if arch.avd_first else 'after'
        return [
            ('1x1', first),
            (f'3x3, radix {arch.radix}', f'{width} to {width * arch.radix}\nin {groups} groups'),
            ('split attention', 'weighs the splits\nby channel'),
            ('average pool', f'{pool} it, where\na stage shrinks'),
            ('1x1', last),
        ]
    steps = [('1x1', first), ('3x3', f'{width} channels\nin {arch.cardinality} groups'), ('1x1', last)]
    return steps + [('SE', f'weighs {out} channels')] * arch.se


def _draw_table(axes: Any, rows: list[Row]) -> None:
    parameters = sum(cost.parameters for _, _, cost in rows)
    macs = sum(cost.macs for _, _, cost in rows)
    cells = [
        [
            name,
            made,
            _shape(cost.output),
            *(_counted(cost.parameters, parameters)),
            *(_counted(cost.macs, macs)),
        ]
        for name, made, cost in rows
    ]
    cells.append(['all', '', '', *_counted(parameters, parameters), *_counted(macs, macs)])
    heads = ['part', 'made of', 'output', 'parameters', 'share', 'MACs of an image', 'share']
    widths = [0.09, 0.22, 0.16, 0.15, 0.08, 0.19, 0.08]
    table = axes.table(cells, colLabels=heads, colWidths=widths, loc='center', cellLoc='right')
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.35)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor('lightgrey')
        if column < 2:
            cell.set_text_props(ha='left')
        if row == 0 or row == len(cells):
            cell.set_text_props(fontweight='bold')


def _counted(count: int, of: int) -> tuple[str, str]:
    return f'{count:,}', f'{count / max(1, of):.1%}'


def _box(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor='black', linewidth=0.8))


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate('', end, start, arrowprops=dict(arrowstyle='->', linewidth=0.9))

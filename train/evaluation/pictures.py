"""Pictures of a run: its curves, who is taken for whom, a few images with their answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NAMED = 40  # classes up to which a confusion matrix names them all
COUNTED = 20  # ... and writes the numbers into its cells
WORST = 15  # pairs of classes that are listed beside it


def curves(records: Sequence[dict[str, Any]], path: str) -> None:
    """Loss, accuracy and learning rate over the epochs, as `train.run.log.read` gives them, to a PNG."""
    train = [record for record in records if record['kind'] == 'train']
    evaluations = [record for record in records if record['kind'] == 'eval']
    # An evaluation knows its step; the training records tell how many of them make an epoch.
    scale = next((r['epoch'] / r['step'] for r in train if r.get('epoch') and r['step']), 1.0)
    figure = Figure(figsize=(11, 3.6), layout='constrained')
    loss, accuracy, rate = figure.subplots(1, 3)
    _plot(loss, train, 'loss', 'training', scale)
    _plot(loss, evaluations, 'loss', 'evaluation', scale)
    loss.set(title='Loss', ylabel='cross entropy')
    _plot(accuracy, train, 'top1', 'training', scale)
    _plot(accuracy, evaluations, 'top1', 'evaluation', scale)
    accuracy.set(title='Top-1 accuracy', ylabel='%')
    _plot(rate, train, 'learning_rate', 'learning rate', scale)
    rate.set(title='Learning rate', ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel('epoch')
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        if axes.lines:
            axes.legend()
    _save(figure, path)


def _plot(axes: Any, records: Sequence[dict[str, Any]], field: str, label: str, scale: float) -> None:
    points = [(r['step'] * scale, r[field]) for r in records if r.get(field) is not None]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=label, marker='.' if len(points) < 40 else None, linewidth=1.4)


def confusion(matrix: npt.NDArray[np.integer[Any]], classes: Sequence[str], path: str) -> None:
    """A confusion matrix, [true, predicted] counts of images, and the worst confusions in words, to a PNG."""
    count = len(matrix)
    size = min(10.0, max(4.5, 0.45 * count))
    figure = Figure(figsize=(size + 4.2, size), layout='constrained')
    axes, side = figure.subplots(1, 2, width_ratios=(size, 3.2))
    totals = matrix.sum(1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    smooth = 'nearest' if count <= 200 else None
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation=smooth)
    figure.colorbar(image, ax=axes, shrink=0.8, label='share of the true class')
    axes.set(xlabel='predicted class', ylabel='true class')
    correct = int(matrix.diagonal().sum())
    axes.set_title(f'{correct} of {int(matrix.sum())} images right')
    if count <= NAMED:
        names = [_short(name, 18) for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    if count <= COUNTED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            dark = shares[row, column] > 0.5
            axes.text(
                column,
                row,
                str(matrix[row, column]),
                ha='center',
                va='center',
                fontsize=9,
                color='white' if dark else 'black',
            )
    side.axis('off')
    words = _worst(matrix, classes)
    side.text(0, 1, words, va='top', fontsize=9, family='monospace', transform=side.transAxes)
    _save(figure, path)


def _worst(matrix: npt.NDArray[np.integer[Any]], classes: Sequence[str]) -> str:
    off = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-off, axis=None, kind='stable')[:WORST]
    pairs = [(int(off.flat[i]), *divmod(int(i), len(matrix))) for i in order if off.flat[i]]
    if not pairs:
        return 'no image is taken for\nanother class'
    lines = [f'{n:4}  {_short(classes[t], 14)} for {_short(classes[p], 14)}' for n, t, p in pairs]
    return '\n'.join(['most often confused:', '', *(line.replace(' for ', ' as ') for line in lines)])


def image_grid(
    images: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[str],
    path: str,
    right: Sequence[bool] | None = None,
    columns: int = 8,
) -> None:
    """Small images, [H, W] or [H, W, 3], with a caption each, green where `right` says so, to a PNG."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows), layout='constrained')
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.axis('off')
    for i, (axes, image, caption) in enumerate(zip(grid, images, captions, strict=False)):
        axes.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        colour = 'black' if right is None else 'darkgreen' if right[i] else 'firebrick'
        axes.set_title(caption, fontsize=10, color=colour)
    _save(figure, path)


def _short(name: str, length: int) -> str:
    first = str(name).partition(',')[0]
    return first if len(first) <= length else first[: length - 3] + '...'


def _save(figure: Figure, path: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)

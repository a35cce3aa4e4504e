"""Draws pictures of a run and of an evaluation: curves, confusion matrix, reliability, mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flaxnets.words import short

NAMED = 40  # classes up to which a confusion matrix names them all
COUNTED = 20  # ... and writes the numbers into its cells
WORST = 15  # pairs of classes that are listed beside it


def curves(records: Sequence[dict[str, Any]], path: str) -> None:
    """Draws loss, accuracy and learning rate over the epochs to a PNG, from `train.run.log.read`."""
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


def confusion(matrix: Int[np.ndarray, 'classes classes'], classes: Sequence[str], path: str) -> None:
    """Draws a confusion matrix, [true, predicted] counts of images, and lists the worst pairs, to a PNG."""
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
        names = [short(name, 18) for name in classes]
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


def _worst(matrix: Int[np.ndarray, 'classes classes'], classes: Sequence[str]) -> str:
    off = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-off, axis=None, kind='stable')[:WORST]
    pairs = [(int(off.flat[i]), *divmod(int(i), len(matrix))) for i in order if off.flat[i]]
    if not pairs:
        return 'no image is taken for\nanother class'
    lines = [f'{n:4}  {short(classes[t], 14)} for {short(classes[p], 14)}' for n, t, p in pairs]
    return '\n'.join(['most often confused:', '', *(line.replace(' for ', ' as ') for line in lines)])


def reliability(
    counts: Int[np.ndarray, ' bins'],
    confidence: Float[np.ndarray, ' bins'],
    accuracy: Float[np.ndarray, ' bins'],
    error: float,
    path: str,
) -> None:
    """Draws a reliability diagram, accuracy over confidence, to a PNG.

    Args:
      counts, confidence, accuracy: of equal intervals of confidence, as `Evaluation.reliability` gives them.
      error: the expected calibration error, in percent.
      path: the file to write.
    """
    bins = len(counts)
    edges, width = np.arange(bins) / bins, 1 / bins
    there = np.asarray(counts) > 0
    figure = Figure(figsize=(9, 4.3), layout='constrained')
    left, right = figure.subplots(1, 2)
    bars = dict(width=width, align='edge', edgecolor='white')
    left.bar(edges[there], accuracy[there], color='steelblue', label='accuracy', **bars)
    gap = confidence[there] - accuracy[there]
    hatched: dict[str, Any] = dict(fill=False, hatch='///', linewidth=0.8)
    left.bar(
        *(edges[there], gap, width),
        **(dict(bottom=accuracy[there], align='edge', edgecolor='firebrick', label='gap') | hatched),
    )
    left.plot([0, 1], [0, 1], color='black', linewidth=0.8, linestyle='--')
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel='confidence', ylabel='share that is right')
    left.set_title(f'Reliability: ECE {error:.2f} %')
    left.legend(loc='upper left')
    shares = 100 * np.asarray(counts) / max(1, int(np.sum(counts)))
    right.bar(edges, shares, color='grey', **bars)
    right.set(xlim=(0, 1), xlabel='confidence', ylabel='% of the images', title='How confident it is')
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    _save(figure, path)


def by_confidence(confidences: Float[np.ndarray, ' n'], right: Bool[np.ndarray, ' n'], path: str) -> None:
    """Draws to a PNG the accuracy on the images that the net is surest of, over the share that they are.

    Args:
      confidences: of the images, 0 to 1.
      right: whether the net was right.
      path: the file to write.
    """
    order = np.argsort(-confidences, kind='stable')
    kept = np.arange(1, len(order) + 1)
    accuracy = 100 * np.cumsum(right[order]) / kept
    figure = Figure(figsize=(6.2, 4.3), layout='constrained')
    axes = figure.subplots()
    axes.plot(100 * kept / len(kept), accuracy, color='steelblue', linewidth=1.6, label='accuracy')
    lines = []
    for share in (50, 80, 90, 100):
        place = max(1, round(len(kept) * share / 100)) - 1
        axes.plot(share, accuracy[place], 'o', color='steelblue', markersize=4, clip_on=False)
        sure = confidences[order][place]
        lines.append(f'{share:3} % of them: {accuracy[place]:6.2f} % right, confidence from {sure:.2f}')
    low = float(accuracy[len(kept) // 20 :].min())
    room = max(1.0, 100 - low)
    axes.set(xlim=(0, 100), ylim=(max(0, low - 0.8 * room), 100 + 0.03 * room))
    axes.text(0.03, 0.04, '\n'.join(lines), transform=axes.transAxes, fontsize=8, family='monospace')
    axes.set(xlabel='% of the images, the surest first', ylabel='% of them right')
    axes.set_title('Accuracy by confidence')
    axes.grid(alpha=0.3)
    _save(figure, path)


def mistake_sheet(
    images: Sequence[npt.NDArray[np.uint8]],
    captions: Sequence[tuple[str, str]],
    wrong: int,
    total: int,
    path: str,
    columns: int,
) -> None:
    """Draws images to a PNG, the true class above each and the predicted one below.

    Args:
      images: [H, W] or [H, W, 3] each, the worst first.
      captions: for each the lines above and below.
      wrong, total: numbers of wrong images and of all images.
      path: the file to write.
      columns: how many images stand side by side.
    """
    columns = min(columns, max(3, len(images)))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.95 * columns, 2.45 * rows + 0.4), layout='constrained')
    first = '' if wrong == len(images) else f'; the {len(images)} worst'
    words = f'{wrong:,} of {total:,} images are wrong{first} (green: what it is)'
    figure.suptitle(words, fontsize=11)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if i < len(images):
            axes.imshow(images[i], cmap='gray', vmin=0, vmax=255)
            axes.set_title(captions[i][0], fontsize=9, color='darkgreen', pad=3)
            axes.set_xlabel(captions[i][1], fontsize=8, color='firebrick', labelpad=3)
    _save(figure, path)


def _save(figure: Figure, path: str) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)

"""The images that a net gets wrong, the largest loss first: a table of all, and a picture of the first."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flaxnets.words import short
from flaxnets.zoo.records import Config

from ..data.augment import eval_transform
from ..data.planes import decoded
from ..data.sources import Source
from . import pictures
from .metrics import Evaluation

SHOWN = 24  # images in the picture
COLUMNS = 6


def write_mistakes(
    source: Source, config: Config, names: Sequence[str], result: Evaluation, out: Path
) -> None:
    """Writes mistakes.csv and, if there are any mistakes, mistakes.png.

    Args:
      source: the data, in the order of the result.
      config: the configuration of the weights, for how images are prepared.
      names: the names of the outputs.
      result: the evaluation.
      out: folder to write to.
    """
    assert result.confidences is not None, 'an evaluation of a net has them'
    wrong = np.flatnonzero(result.ranks != 0)
    # Largest loss first: there the net was surest of another class. Losses that are not finite come before.
    losses = np.nan_to_num(result.losses[wrong].astype(np.float64), nan=np.inf, posinf=np.inf)
    wrong = wrong[np.argsort(-losses, kind='stable')]
    with (out / 'mistakes.csv').open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        table = csv.writer(file)
        table.writerow(['image', 'class', 'taken for', 'confidence', 'loss'])
        for i in wrong.tolist():
            taken = names[result.predictions[i]] if result.predictions[i] >= 0 else 'not finite'
            confidence, loss = f'{result.confidences[i]:.4f}', f'{result.losses[i]:.4f}'
            table.writerow([source.record_name(i), names[result.labels[i]], taken, confidence, loss])
    if not len(wrong):
        return
    transform = eval_transform(config.preprocess, config.in_chans)
    images, captions = [], []
    for i in wrong[:SHOWN].tolist():
        record = source[i]
        seen = transform(decoded(record.image, config.in_chans, record.name))
        images.append(seen if config.in_chans == 3 else seen[..., 0])
        captions.append(_caption(names, result, i, os.path.basename(record.name)))
    pictures.mistake_sheet(images, captions, len(wrong), result.images, str(out / 'mistakes.png'), COLUMNS)


def _caption(names: Sequence[str], result: Evaluation, i: int, file: str) -> tuple[str, str]:
    """Above the picture what it is, below what it was taken for."""
    assert result.confidences is not None
    taken = names[result.predictions[i]] if result.predictions[i] >= 0 else 'not finite'
    below = f'taken for {short(taken, 17)}, {result.confidences[i]:.0%}'
    return f'{short(names[result.labels[i]], 24)}', f'{below}\n{short(file, 26)}'

"""Pictures: there, of the size they should have, and of what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.evaluation.pictures import (
    by_confidence,
    confusion,
    curves,
    mistake_sheet,
    reliability,
)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def records(count: int, loss: float = 2.0) -> list[dict[str, Any]]:
    train = [
        {
            'kind': 'train',
            'step': 10 * i,
            'epoch': i / 2,
            'loss': loss / i,
            'top1': i,
            'learning_rate': 0.1 / i,
        }
        for i in range(1, count + 1)
    ]
    return [*train, {'kind': 'saved', 'step': 5}, {'kind': 'eval', 'step': 10, 'loss': None, 'top1': 3.0}]


@pytest.mark.parametrize('count', [0, 1, 3000])
def test_curves_of_any_length(tmp_path: Path, count: int) -> None:
    curves(records(count), str(tmp_path / 'a.png'))
    assert pixels(tmp_path / 'a.png').shape == (396, 1210, 3)


def test_curves_show_their_numbers(tmp_path: Path) -> None:
    curves(records(20), str(tmp_path / 'a.png'))
    curves(records(20, loss=9.0), str(tmp_path / 'b.png'))
    a, b = pixels(tmp_path / 'a.png'), pixels(tmp_path / 'b.png')
    third = a.shape[1] // 3
    assert (a[:, :third] != b[:, :third]).any()  # the loss
    curves(records(20), str(tmp_path / 'b.png'))
    np.testing.assert_array_equal(a, pixels(tmp_path / 'b.png'))


@pytest.mark.parametrize('count', [2, 10, 30, 1000])
def test_confusion_of_any_number_of_classes(tmp_path: Path, count: int) -> None:
    matrix = np.random.default_rng(0).integers(0, 3, (count, count)) + 20 * np.eye(count, dtype=int)
    names = [f'class number {i}, a long name' for i in range(count)]
    confusion(matrix, names, str(tmp_path / 'a.png'))
    confusion(np.diag(matrix.diagonal()), names, str(tmp_path / 'b.png'))
    assert (pixels(tmp_path / 'a.png') != pixels(tmp_path / 'b.png')).any()


@pytest.mark.parametrize('count', [1, 30])
def test_mistakes_of_any_number(count: int, tmp_path: Path) -> None:
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(count)]
    captions = [(f'cat {i}', 'taken for dog') for i in range(count)]
    mistake_sheet(images, captions, 1000, 5000, str(tmp_path / 'a.png'), 6)
    assert pixels(tmp_path / 'a.png').shape[0] > 250 * -(-count // 6)


def test_confidence_is_drawn_of_any_number_of_images(tmp_path: Path) -> None:
    for count in (1, 500):
        counts = np.zeros(15, int)
        counts[-1] = count
        reliability(counts, counts / count * 0.95, counts / count * 0.5, 45.0, str(tmp_path / 'a.png'))
        by_confidence(np.linspace(0.1, 1, count), np.arange(count) % 2 == 0, str(tmp_path / 'b.png'))
        assert pixels(tmp_path / 'a.png').std() > 0 and pixels(tmp_path / 'b.png').std() > 0

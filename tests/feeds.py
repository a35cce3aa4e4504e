"""Images and transforms for tests of batches, in a module that worker processes can import."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from train.data.sources import ArraySource, Record

N = 23


def numbers(count: int = N) -> ArraySource:
    """Images whose every pixel is their number."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 4, 4))
    return ArraySource('numbers', images, np.arange(count), [str(i) for i in range(count)])


def plain(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return np.array(image)[..., None]


def noisy(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (4, 4, 1), dtype=np.uint8)


def whole(image: Image.Image) -> np.ndarray:
    return np.array(image)[..., None]


class Broken:
    """Numbers, of which some cannot be read."""

    name, classes, num_classes, fingerprint = 'broken', ('a',), 1, ''
    notes: tuple[str, ...] = ()
    channels = None

    def __init__(self, bad: set[int], count: int = N) -> None:
        self.bad, self.count = bad, count
        self.labels = np.arange(count, dtype=np.int32)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Record:
        file = io.BytesIO()
        Image.new('L', (4, 4), index % 256).save(file, 'png')
        whole = file.getvalue()
        return Record(whole[:40] if index in self.bad else whole, index, f'image {index}')

    def record_name(self, index: int) -> str:
        return f'image {index}'

    def among(self, classes: Any) -> Broken:
        return self

    def empty_classes(self) -> tuple[str, ...]:
        return ()


class Failing(ArraySource):
    """Numbers; image 7 does something else."""

    def __init__(self, does: Callable[[], None]) -> None:
        made = numbers()
        super().__init__('failing', made.images, made.labels, made.classes)
        self.does = does

    def __getitem__(self, index: int, /) -> Record:
        if index == 7:
            self.does()
        return super().__getitem__(index)


def divide() -> None:
    raise ZeroDivisionError('seven')


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def light(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Zeros where JAX has not been imported."""
    import sys

    return np.full((4, 4, 1), sys.modules.get('jax') is not None, np.uint8)


def small(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return np.array(image.resize((4, 4)))


def big(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((224, 224, 3), np.uint8)

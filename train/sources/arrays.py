"""Images in memory: the bundled digits, and arrays of an .npz file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError

from . import store
from .base import SPLITS, Labelled, Record, Source


class ArraySource(Labelled):
    """Images in memory.

    Args:
      name: for messages.
      images: uint8 [N, H, W] or [N, H, W, C].
      labels: [N], numbers of classes.
      classes: their names.
    """

    def __init__(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer[Any]],
        classes: Sequence[str],
    ) -> None:
        super().__init__(name, classes, labels)
        self.images = images

    def __getitem__(self, index: int, /) -> Record:
        return Record(self.images[index], int(self.labels[index]), self.record_name(index))

    def _identity(self) -> Iterable[bytes]:
        yield self.images.tobytes()


def open_digits(splits: tuple[str, ...]) -> Source:
    """scikit-learn's digits with a test set of 36 a class: UCI, E. Alpaydin and C. Kaynak, CC BY 4.0."""
    with np.load(Path(__file__).parent / 'digits.npz') as stored:
        pixels, labels, test = stored['pixels'], stored['labels'], stored['test']
    if splits[0] not in (*SPLITS[True], *SPLITS[False]):
        raise FlaxnetsError(f'digits has the parts train and test, not {splits[0]!r}')
    chosen = np.isin(np.arange(len(labels)), test) == (splits[0] in SPLITS[False])
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource('digits', grey, labels[chosen], tuple('0123456789'))


def open_arrays(path: str, splits: tuple[str, ...]) -> Source:
    try:
        with store.opened(path) as file, np.load(file, allow_pickle=False) as stored:
            keys = [split for split in splits if f'x_{split}' in stored]
            if not keys:
                raise FlaxnetsError(
                    f'{path}: no x_{splits[0]} in it; it has {", ".join(stored.files)}. Images and labels '
                    'are looked for as x_train, y_train, x_test, y_test (or x_val, y_val)'
                )
            images, labels = stored[f'x_{keys[0]}'], stored[f'y_{keys[0]}']
            names = stored['classes'].tolist() if 'classes' in stored else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        if isinstance(error, FlaxnetsError):
            raise
        raise FlaxnetsError(f'{path}: cannot be read as an .npz file of arrays: {error}') from error
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[-1 if images.ndim == 4 else 0] == 0
    ):
        raise FlaxnetsError(f'{path}: images must be uint8 [N, H, W] or [N, H, W, C], not {_shape(images)}')
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or not len(labels):
        raise FlaxnetsError(
            f'{path}: labels must be whole numbers [{len(images)}], one an image, not {_shape(labels)}'
        )
    count = len(names) if names is not None else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= count:
        raise FlaxnetsError(f'{path}: labels lie in {labels.min()}..{labels.max()}, for {count} classes')
    return ArraySource(os.path.basename(path), images, labels, names or tuple(map(str, range(count))))


def _shape(array: npt.NDArray[Any]) -> str:
    return f'{array.dtype.name}{list(array.shape)}'

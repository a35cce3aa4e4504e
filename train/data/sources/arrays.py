"""Images in memory: the bundled digits, and arrays of an .npz file."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError

from . import store
from .base import SPLITS, USUAL_SPLITS, Labelled, Record
from .parts import Part


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

    @property
    def channels(self) -> int:
        return 1 if self.images.ndim == 3 else self.images.shape[-1]

    def __getitem__(self, index: int, /) -> Record:
        return Record(self.images[index], int(self.labels[index]), self.record_name(index))

    def _identity(self) -> Iterable[bytes]:
        yield self.images.tobytes()


def open_digits(part: Part) -> Labelled:
    """Opens scikit-learn's digits, 8 x 8 grey pixels; 36 of each class are for tests.

    Source: UCI, E. Alpaydin and C. Kaynak, CC BY 4.0.

    Raises:
      FlaxnetsError: there is no such part.
    """
    with np.load(Path(__file__).parent / 'digits.npz') as stored:
        pixels, labels, test = stored['pixels'], stored['labels'], stored['test']
    name = part.names[0]
    if name not in USUAL_SPLITS:
        raise FlaxnetsError(f'digits has the parts train and test, not {name!r}')
    chosen = np.isin(np.arange(len(labels)), test) == (name in SPLITS[False])
    if part.shares_the_whole:
        raise FlaxnetsError('digits has the parts train and test: name the one to take percents of')
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource('digits', grey, labels[chosen], tuple('0123456789'))


def open_arrays(path: str, part: Part) -> Labelled:
    """Opens an .npz file with arrays x_train and y_train, or train_images and train_labels.

    Raises:
      FlaxnetsError: the file cannot be read, lacks the part, or has arrays of other types or shapes.
    """
    try:
        with store.opened(path) as file, np.load(file, allow_pickle=False) as stored:
            keys = _keys(path, stored.files, part)
            images, labels = (stored[key] for key in keys)
            names = list(map(str, stored['classes'].tolist())) if 'classes' in stored else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FlaxnetsError):
            raise
        why = getattr(error, 'strerror', None) or error
        raise FlaxnetsError(f'{path}: cannot be read as an .npz file of arrays: {why}') from error
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[-1 if images.ndim == 4 else 0] == 0
    ):
        raise FlaxnetsError(f'{path}: images must be uint8 [N, H, W] or [N, H, W, C], not {_shape(images)}')
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels  # Keras's and MedMNIST's
    if flat.shape != images.shape[:1] or flat.dtype.kind not in 'iu' or not len(flat):
        raise FlaxnetsError(
            f'{path}: labels must be whole numbers [{len(images)}], one an image, not {_shape(labels)}'
        )
    count = len(names) if names is not None else int(flat.max()) + 1
    if flat.min() < 0 or flat.max() >= count:
        unlabelled = '; below 0 there are no classes, but images without a label' if flat.min() < 0 else ''
        raise FlaxnetsError(
            f'{path}: {keys[1]} lies in {flat.min()}..{flat.max()}, for {count} classes{unlabelled}'
        )
    return ArraySource(os.path.basename(path), images, flat, names or tuple(map(str, range(count))))


def _keys(path: str, there: Sequence[str], part: Part) -> tuple[str, str]:
    """What images and labels of a part are called in a file: 'x', 'y' where it has no parts."""
    names = () if part.shares_the_whole else part.names
    for split in names:
        for keys in ((f'x_{split}', f'y_{split}'), (f'{split}_images', f'{split}_labels')):
            if keys[0] in there:
                return keys
    if part.may_be_the_whole and 'x' in there:
        return 'x', 'y'
    raise FlaxnetsError(
        f'{path}: no x_{part.names[0]} in it; it has {", ".join(there)}. Images and labels are looked for as '
        "x_train, y_train, x_test, y_test (or x_val, y_val); to take percents, name a part: 'train[:80%]'"
    )


def _shape(array: npt.NDArray[Any]) -> str:
    return f'{array.dtype.name}{list(array.shape)}'

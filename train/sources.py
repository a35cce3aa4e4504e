"""Where images come from: each source is a list of records, read one by one, in any order, in any thread."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError, ImageError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm')
# Names that the two parts go by, the usual one first.
SPLITS = {True: ('train', 'training'), False: ('val', 'validation', 'valid', 'test')}
KINDS = 'digits, folder:PATH, tar:PATTERN, arrays:FILE.npz or tfds:NAME'


@dataclass(frozen=True)
class Record:
    """One image as it is stored, and its class.

    Attributes:
      image: an encoded file, or pixels: uint8 [H, W] or [H, W, C].
      label: number of its class.
      name: for messages.
    """

    image: bytes | npt.NDArray[np.uint8]
    label: int
    name: str


class Source(Protocol):
    """A part of a data set.

    Attributes:
      name: for messages.
      classes: their names, in the order of the labels.
      fingerprint: another one means other images, another order or other labels; pixels are not read for it.
    """

    name: str
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def record_name(self, index: int) -> str:
        """The name of a record, without reading its image."""
        ...


def open_source(spec: str, split: str, training: bool) -> Source:
    """The images that a description stands for.

    - `digits`: 1797 handwritten digits of 8 x 8 pixels, bundled.
    - `folder:PATH`: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg; classes in the order of their names.
    - `tar:PATTERN`: shards of CLASS/NAME.jpg, or of KEY.jpg with KEY.cls; {split} stands for the part.
    - `arrays:FILE.npz`: x_train, y_train, x_test, y_test.
    - `tfds:NAME`: a prepared data set in array_record files; TensorFlow is not needed.

    Args:
      spec: one of these.
      split: name of the part; '' takes the usual one.
      training: which part is the usual one.

    Raises:
      FlaxnetsError: no such images, or not of that form.
    """
    from train.tar_source import open_tar
    from train.tfds_source import open_tfds

    kind, _, rest = spec.partition(':')
    openers: dict[str, Callable[[str, tuple[str, ...]], Source]] = {
        'folder': _open_folder,
        'tar': open_tar,
        'arrays': _open_arrays,
        'tfds': open_tfds,
    }
    splits = (split,) if split else SPLITS[training]
    if spec == 'digits':
        return _open_digits(splits)
    if kind not in openers or not rest:
        raise FlaxnetsError(f'data={spec!r} is not understood: it can be {KINDS}')
    return openers[kind](os.path.expanduser(rest), splits)


class Labelled:
    """What sources share: labels as an array, names and sizes as text."""

    def __init__(self, name: str, classes: Sequence[str], labels: npt.NDArray[np.integer[Any]]) -> None:
        self.name, self.classes = name, tuple(classes)
        self.labels = labels.astype(np.int32)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def record_name(self, index: int) -> str:
        return f'{self.name} image {index}'

    def _identity(self) -> Iterable[bytes]:
        """What, beside classes and labels, tells these images from others."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(self.labels.tobytes())
        for part in self._identity():
            digest.update(part + b'\n')
        return digest.hexdigest()[:16]


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


def _open_digits(splits: tuple[str, ...]) -> Source:
    """scikit-learn's digits with a test set of 36 a class: UCI, E. Alpaydin and C. Kaynak, CC BY 4.0."""
    with np.load(Path(__file__).parent / 'digits.npz') as stored:
        pixels, labels, test = stored['pixels'], stored['labels'], stored['test']
    if splits[0] not in (*SPLITS[True], *SPLITS[False]):
        raise FlaxnetsError(f'digits has the parts train and test, not {splits[0]!r}')
    chosen = np.isin(np.arange(len(labels)), test) == (splits[0] in SPLITS[False])
    grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource('digits', grey, labels[chosen], tuple('0123456789'))


def _open_arrays(path: str, splits: tuple[str, ...]) -> Source:
    try:
        with np.load(path, allow_pickle=False) as stored:
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


class FolderSource(Labelled):
    """A folder of each class; classes in the order of their names, images in that of theirs."""

    def __init__(self, folder: str, classes: Sequence[str], files: Sequence[tuple[str, int, int]]) -> None:
        """`files`: name below the folder, size in bytes, label."""
        super().__init__(folder, classes, np.array([label for _, _, label in files]))
        self._folder = folder
        self._files = [name for name, _, _ in files]
        self._sizes = [size for _, size, _ in files]

    def __getitem__(self, index: int, /) -> Record:
        name = self.record_name(index)
        try:
            with open(name, 'rb') as file:
                return Record(file.read(), int(self.labels[index]), name)
        except OSError as error:
            raise ImageError(f'{name}: cannot be read: {error.strerror}') from error

    def record_name(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])

    def _identity(self) -> Iterable[bytes]:
        for name, size in zip(self._files, self._sizes, strict=True):
            yield f'{name} {size}'.encode()


def _open_folder(path: str, splits: tuple[str, ...]) -> Source:
    if not os.path.isdir(path):
        raise FlaxnetsError(f'{path}: no such folder; expected is {path}/{splits[0]}/CLASS/image.jpg')
    found = next((s for s in splits if os.path.isdir(os.path.join(path, s))), None)
    if found is None:
        there = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        holds = (
            f'it holds {", ".join(there[:5])}{", ..." * (len(there) > 5)}' if there else 'it has no folders'
        )
        raise FlaxnetsError(
            f'{path}: no folder {" or ".join(splits)} in it ({holds}); expected is '
            f'{os.path.join(path, splits[0])}/CLASS/image.jpg'
        )
    root = os.path.join(path, found)
    real = os.path.realpath(path)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = [file for label, name in enumerate(classes) for file in _images_of(root, real, name, label)]
    counts = np.bincount([label for _, _, label in files], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not files or empty:
        what = f'no images in {", ".join(empty[:5])}' if empty else 'it holds no folder of a class'
        raise FlaxnetsError(f'{root}: {what}; images end in {", ".join(IMAGE_SUFFIXES)}')
    return FolderSource(root, classes, files)


def _images_of(root: str, real: str, name: str, label: int) -> list[tuple[str, int, int]]:
    """The images of a class, those of its own folders too; nothing outside of `real`."""
    found = []
    pending = [name]
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(root, below)) as entries:
            here = list(entries)
        for entry in here:
            inner = os.path.join(below, entry.name)
            if entry.is_symlink() and not os.path.realpath(entry.path).startswith(real + os.sep):
                raise FlaxnetsError(f'{entry.path}: a link that leaves the data; copy what it points to')
            if entry.is_dir():
                pending.append(inner)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((inner, entry.stat().st_size, label))
    return sorted(found)

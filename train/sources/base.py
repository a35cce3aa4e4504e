"""What sources are: each is a list of records, read one by one, in any order, in any thread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm')
# Names that the two parts go by, the usual one first.
SPLITS = {True: ('train', 'training'), False: ('val', 'validation', 'valid', 'test')}


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

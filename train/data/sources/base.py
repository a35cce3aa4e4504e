"""What a source is: a list of records that can be read one by one, in any order, in any thread.

`Source` is what the rest of training relies on; `Labelled` is what a new source derives from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError
from flaxnets.zoo.classes import ClassesError, match_names

from .entries import some

# What the training part (True) and the evaluation part (False) may be called, the usual name first. The names
# of Hugging Face's image folders are among them.
SPLITS = {
    True: ('train', 'training'),
    False: ('val', 'validation', 'valid', 'dev', 'test', 'testing', 'eval', 'evaluation'),
}
USUAL_SPLITS = (*SPLITS[True], *SPLITS[False])


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
      classes: names of the classes, in the order of the labels.
      notes: how it was read, for the user: what was left out, how classes were found.
      labels: [N], numbers of `classes`; [0] where only the records tell them.
      channels: of the images, where records hold pixels; None where they hold encoded files.
      fingerprint: differs where the images, their order or their labels differ. No image file is read for it.
    """

    name: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    labels: npt.NDArray[np.int32]

    @property
    def num_classes(self) -> int: ...

    @property
    def channels(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def record_name(self, index: int) -> str:
        """The name of a record, without reading its image."""
        ...

    def among(self, classes: Sequence[str]) -> Source:
        """The same images, their labels counted among `classes`.

        These may be more, in another order, or written otherwise: `flaxnets.zoo.classes` has the rule.

        Raises:
          FlaxnetsError: an image is of none of them.
        """
        ...

    def empty_classes(self) -> tuple[str, ...]:
        """Classes without any image, as far as that is known without reading records."""
        ...


class Labelled:
    """What sources share: their labels as an array, and what follows from them.

    A subclass must define:
      __getitem__: the record of an index in 0..N-1. Threads and worker processes call it in any order. It
        raises `ImageError` for one image that cannot be read: training counts that and goes on.
      _identity: what the fingerprint is made of.

    and may define:
      record_name: where records have names of their own.
      channels: where records hold pixels instead of encoded files.
      __len__, among, empty_classes: where the labels are not known beforehand (`labels` [0], as in tfds.py).

    It is pickled to reach worker processes, which do not import JAX. So it keeps paths, names and arrays, and
    no open files. Files are listed and read by the functions of `store.py`, so that buckets work too.

    Args:
      name: for messages.
      classes: names of the classes, in the order of the labels.
      labels: [N], numbers of `classes`.
      notes: how it was read, for the user.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: npt.NDArray[np.integer[Any]],
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.classes, self.notes = name, tuple(classes), tuple(notes)
        self.labels = labels.astype(np.int32)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int | None:
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Record:
        raise NotImplementedError

    def record_name(self, index: int) -> str:
        return f'{self.name} image {index}'

    def among(self, classes: Sequence[str]) -> Labelled:
        if self.classes == tuple(classes):
            return self
        there = np.unique(self.labels).tolist()
        named = tuple(self.classes[i] for i in there)
        try:
            found, rule = match_names(named, tuple(classes))
        except ClassesError as error:
            strange = [name for name in named if name not in classes]
            raise FlaxnetsError(
                f'{self.name} has images of {some(strange)}, which is none of the {len(classes)} classes of '
                f'training ({some(list(classes))})'
            ) from error
        numbers = np.full(self.num_classes, -1)
        numbers[there] = found
        exact = all(classes[place] == name for place, name in zip(found, named, strict=True))
        notes = () if exact else (f'the classes of {self.name} are matched with those of training {rule}',)
        return View(self.name, self, np.arange(len(self)), numbers[self.labels], classes, notes)

    def empty_classes(self) -> tuple[str, ...]:
        counts = np.bincount(self.labels, minlength=self.num_classes)
        return tuple(name for name, count in zip(self.classes, counts, strict=True) if not count)

    def _identity(self) -> Iterable[bytes]:
        """What tells these images from others, beside classes and labels, which the fingerprint has already.

        Of files their names and sizes, which listing them gives: no file is read. Of images in memory their
        pixels. A run that is resumed compares it: the same images must give the same bytes on every machine.
        """
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(self.labels.tobytes())
        for part in self._identity():
            digest.update(part + b'\n')
        return digest.hexdigest()[:16]


class View(Labelled):
    """Some images of a source, perhaps with other labels.

    Args:
      name: for messages.
      source: where the images are.
      places: [N], the positions of the images in `source`.
      labels: [N], numbers of `classes`.
      classes: names of the classes.
      notes: further notes, after those of the source.
    """

    def __init__(
        self,
        name: str,
        source: Labelled,
        places: npt.NDArray[np.integer[Any]],
        labels: npt.NDArray[np.integer[Any]],
        classes: Sequence[str],
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(name, classes, labels, (*source.notes, *notes))
        self._source, self._places = source, places

    @property
    def channels(self) -> int | None:
        return self._source.channels

    def __getitem__(self, index: int, /) -> Record:
        return replace(self._source[int(self._places[index])], label=int(self.labels[index]))

    def record_name(self, index: int) -> str:
        return self._source.record_name(int(self._places[index]))

    def _identity(self) -> Iterable[bytes]:
        yield self._source.fingerprint.encode()
        yield self._places.astype(np.int64).tobytes()

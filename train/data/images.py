"""Makes the images of batches; each depends on its batch and row alone, whichever worker makes it.

These objects travel to worker processes: nothing here needs JAX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError, ImageError

from .jpeg import decoded_late
from .planes import PILLOWS, decoded
from .sources import Record, Source

TrainTransform = Callable[[Any, np.random.Generator], npt.NDArray[np.uint8]]
EvalTransform = Callable[[Any], npt.NDArray[np.uint8]]
TRIES = 100  # images that are tried to find one that can be read

Fields = dict[str, Any]  # what a batch has of one image, by name: arrays and NumPy scalars


class TooManyBadImagesError(FlaxnetsError):
    """More of the images than a run accepts cannot be read."""


class Images(Protocol):
    """Makes images one by one, in any order, in any thread or process."""

    def __call__(self, batch: int, row: int, bad: Callable[[str], None]) -> Fields:
        """The image at a row of this host's part of a batch.

        Args:
          batch: its number, from the beginning of the run.
          row: its place in this host's part.
          bad: called with what is wrong with each image that cannot be read; another takes its place.
        """
        ...

    def example(self) -> Fields:
        """Fields of the shapes and types that all images have."""
        ...

    def prepare(self) -> None:
        """Does work whose result all processes forked from this one share."""
        ...


@dataclass(frozen=True)
class Share:
    """This host's part of each batch: the host-th contiguous one.

    Attributes:
      batch_size: images of a batch, on all hosts together.
      host, hosts: this host's number, and how many there are.
    """

    batch_size: int
    host: int
    hosts: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise FlaxnetsError(f'batch_size={self.batch_size} must be 1 or more')
        if self.batch_size % self.hosts:
            raise FlaxnetsError(f'batch_size={self.batch_size} cannot be shared by {self.hosts} hosts')

    @property
    def rows(self) -> int:
        """Images of this host's part."""
        return self.batch_size // self.hosts

    def position(self, batch: int, row: int) -> int:
        """The position in the whole run of a row of this host's part."""
        return batch * self.batch_size + self.host * self.rows + row


@dataclass(frozen=True)
class TrainImages:
    """Images of training: position p of a run is image p mod N of epoch p div N, in the seed's order.

    Attributes:
      source, transform, seed, in_chans, scaled: as in `train.data.batches.train_batches`.
      share: this host's part of each batch.
    """

    source: Source
    transform: TrainTransform
    seed: int
    in_chans: int
    share: Share
    scaled: bool = False

    @cached_property
    def order(self) -> Any:
        """The image at every position of the run."""
        import grain

        return grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()

    def __call__(self, batch: int, row: int, bad: Callable[[str], None]) -> Fields:
        position = self.share.position(batch, row)
        index = int(self.order[position])
        for _ in range(len(self.source)):
            try:
                return self._made(self.source[index], position)
            except ImageError as error:
                bad(str(error))
                index = (index + 1) % len(self.source)
        raise TooManyBadImagesError(f'{self.source.name}: none of its images can be read')

    def _made(self, record: Record, position: int) -> Fields:
        decode = decoded_late if self.scaled else decoded
        image = decode(record.image, self.in_chans, record.name)
        # Philox: any position's numbers, without those before it.
        pixels = self.transform(image, np.random.Generator(np.random.Philox(key=[self.seed, position])))
        return {'image': pixels, 'label': np.int32(record.label)}

    def example(self) -> Fields:
        return _first(self.source, self.in_chans, lambda record: self._made(record, 0))

    def prepare(self) -> None:
        _ = self.order


@dataclass(frozen=True)
class EvalImages:
    """Images of an evaluation: each once, in the source's order; the last batch is filled with some again.

    Attributes:
      source, transform, in_chans: as in `train.data.batches.eval_batches`.
      share: this host's part of each batch.
    """

    source: Source
    transform: EvalTransform
    in_chans: int
    share: Share

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.source) // self.share.batch_size)

    def __call__(self, batch: int, row: int, bad: Callable[[str], None]) -> Fields:
        position, count = self.share.position(batch, row), len(self.source)
        return self._made(self.source[min(position, count - 1)], position < count)

    def _made(self, record: Record, counts: bool) -> Fields:
        pixels = self.transform(decoded(record.image, self.in_chans, record.name))
        return {'image': pixels, 'label': np.int32(record.label), 'mask': np.bool_(counts)}

    def example(self) -> Fields:
        return _first(self.source, self.in_chans, lambda record: self._made(record, True))

    def prepare(self) -> None:
        pass


def _first(source: Source, in_chans: int, make: Callable[[Record], Fields]) -> Fields:
    """What `make` makes of the first image that can be read, or of a black one."""
    for index in range(min(TRIES, len(source))):
        with contextlib.suppress(ImageError):
            return make(source[index])
    shape = (256, 256, 3 if in_chans in PILLOWS else in_chans)
    return make(Record(np.zeros(shape, np.uint8), 0, 'a black image'))

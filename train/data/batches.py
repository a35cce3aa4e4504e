"""Batches for the devices: which image comes when is a pure function of seed and position.

Position p of a run, counted over all hosts, is image p mod N of epoch p div N, whose order and whose
augmentation depend on the seed and p alone. So a batch is the same whatever hosts and threads make it, and
a run goes on where it stopped by counting. Nothing is left out: a batch may begin in one epoch and end in the
next. Grain's `MapDataset` shuffles, and its threads work ahead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError, ImageError

from .planes import decoded
from .sources import Record, Source

Batch = dict[str, npt.NDArray[Any]]
TrainTransform = Callable[[Any, np.random.Generator], npt.NDArray[np.uint8]]
EvalTransform = Callable[[Any], npt.NDArray[np.uint8]]

BATCHES_AHEAD = 2
# The share of bad images is taken of so many at least, so that one early one does not end a run.
IMAGES_BEFORE_JUDGING = 10_000
ENDLESS = 1 << 62


class TooManyBadImagesError(FlaxnetsError):
    """More of the images than a run accepts cannot be read."""


class TrainBatches(Iterator[Batch]):
    """What `train_batches` returns: an iterator to be closed.

    Attributes:
      bad: how many images of the batches so far could not be read; others took their places.
    """

    def __init__(self, batches: Any, loader: _Loader, step: int) -> None:
        self._batches, self._loader, self._step = batches, loader, step
        self.bad = 0
        self._news: list[str] = []

    def __next__(self) -> Batch:
        batch: Batch = next(self._batches)
        self._step += 1
        # Threads work ahead: what they found in later batches is of a later moment, and is found again if
        # the run ends here and goes on.
        found = self._loader.take_bad(self._step)
        self.bad += len(found)
        self._news += found
        return batch

    def new_bad(self) -> list[str]:
        """What is wrong with the bad images since the last call."""
        news, self._news = self._news, []
        return news

    def images_per_second(self) -> float | None:
        """How many images this host's threads could make, from the time that they have taken so far."""
        return self._loader.images_per_second()

    def close(self) -> None:
        """Ends the threads."""
        self._batches.close()


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    in_chans: int = 3,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
    max_bad: float = 0.001,
    bad: int = 0,
) -> TrainBatches:
    """This host's part of each training batch, without end.

    An image that cannot be read is counted, and the next one of the source takes its place.

    Args:
      source: the images.
      transform: decodes nothing; from a picture and random numbers to uint8 [S, S, C].
      batch_size: of all hosts together.
      seed: of order and augmentation.
      start_step: the batch to begin with.
      in_chans: of the images that `transform` takes: Pillow's for 3 and 1, else `train.data.planes.Planes`.
      host, hosts: this one of so many; it takes the host-th contiguous part of a batch.
      threads: that decode and augment; 0 takes one for each core.
      max_bad: share of bad images at which it ends with `TooManyBadImagesError`.
      bad: images of this host found bad before `start_step`, for that share.

    Returns:
      An iterator of {'image': uint8 [N, S, S, C], 'label': int32 [N]}, N = batch_size / hosts.

    Raises:
      FlaxnetsError: the batch cannot be shared by the hosts.
    """
    _check(batch_size, hosts, threads)
    local = batch_size // hosts
    loader = _Loader(source, transform, seed, in_chans, max_bad, threads or os.cpu_count() or 1)
    loader.goes_on(start_step * local, bad)

    def load(place: int) -> dict[str, Any]:
        """The image at a place of this host's own sequence."""
        batch, row = divmod(place, local)
        return loader.load(batch * batch_size + host * local + row, batch)

    ahead = grain.ReadOptions(loader.threads, max(2 * loader.threads, BATCHES_AHEAD * local))
    places = grain.MapDataset.range(start_step * local, ENDLESS).map(load)
    return TrainBatches(iter(places.to_iter_dataset(ahead).batch(local)), loader, start_step)


def _check(batch_size: int, hosts: int, threads: int) -> None:
    if batch_size < 1 or threads < 0:
        raise FlaxnetsError(f'{batch_size=} must be 1 or more, and {threads=} 0 or more')
    if batch_size % hosts:
        raise FlaxnetsError(f'batch_size={batch_size} cannot be shared by {hosts} hosts')


class _Loader:
    """Loads the image at a position of the run, in any thread."""

    def __init__(
        self,
        source: Source,
        transform: TrainTransform,
        seed: int,
        in_chans: int,
        max_bad: float,
        threads: int,
    ) -> None:
        self.threads = threads
        self._source, self._transform, self._seed = source, transform, seed
        self._in_chans, self._max_bad = in_chans, max_bad
        self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self._lock = threading.Lock()
        self._found: list[tuple[int, str]] = []  # batch and what is wrong, as the threads come by it
        self._seen, self._seen_before, self._seconds = 0, 0, 0.0
        self._bad = 0

    def goes_on(self, seen: int, bad: int) -> None:
        """Counts on from so many images, and bad ones beside them."""
        self._seen_before, self._bad = seen, bad

    def load(self, position: int, batch: int) -> dict[str, Any]:
        """The image at a position, for a batch of that number."""
        start = time.perf_counter()
        index = int(self._order[position])
        for _ in range(len(self._source)):
            try:
                record = self._source[index]
                image = decoded(record.image, self._in_chans, record.name)
                # Philox: any position's numbers, without those before it.
                pixels = self._transform(
                    image, np.random.Generator(np.random.Philox(key=[self._seed, position]))
                )
            except ImageError as error:
                self._note(batch, str(error))
                index = (index + 1) % len(self._source)
                continue
            with self._lock:
                self._seen += 1
                self._seconds += time.perf_counter() - start
            return {'image': pixels, 'label': np.int32(record.label)}
        raise TooManyBadImagesError(f'{self._source.name}: none of its images can be read')

    def _note(self, batch: int, problem: str) -> None:
        with self._lock:
            self._found.append((batch, problem))
            self._bad += 1
            bad, seen = self._bad, self._seen_before + self._seen
            if bad > self._max_bad * max(seen, IMAGES_BEFORE_JUDGING):
                raise TooManyBadImagesError(
                    f'{bad} of {seen + bad} images cannot be read, a share above '
                    f'max_bad_images={self._max_bad:g}. Replace them, or raise it. The last one: {problem}'
                )

    def take_bad(self, batch: int) -> list[str]:
        """What is wrong with images of the batches before this one, once."""
        with self._lock:
            if not self._found:
                return []
            taken = [pair for pair in self._found if pair[0] < batch]
            self._found = [pair for pair in self._found if pair[0] >= batch]
        return [problem for _, problem in sorted(taken, key=lambda pair: pair[0])]

    def images_per_second(self) -> float | None:
        with self._lock:
            return self.threads * self._seen / self._seconds if self._seconds else None


def eval_batches(
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    in_chans: int = 3,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
) -> Generator[Batch]:
    """This host's part of each batch of an evaluation: every image exactly once, in the source's order.

    Args:
      source: the images.
      transform: from a picture to uint8 [S, S, C].
      batch_size: of all hosts together; the last batch is filled up with images that do not count.
      in_chans, host, hosts, threads: as of `train_batches`.

    Returns:
      An iterator of {'image', 'label', 'mask': bool [N]}, as long on every host.

    Raises:
      ImageError: (while iterating) an image cannot be read: none is ever left out.
      FlaxnetsError: the batch cannot be shared by the hosts.
    """
    _check(batch_size, hosts, threads)
    local = batch_size // hosts
    count = len(source)
    batches = -(-count // batch_size)

    def load(place: int) -> dict[str, Any]:
        batch, row = divmod(place, local)
        position = batch * batch_size + host * local + row
        record: Record = source[min(position, count - 1)]
        pixels = transform(decoded(record.image, in_chans, record.name))
        return {'image': pixels, 'label': np.int32(record.label), 'mask': np.bool_(position < count)}

    threads = threads or os.cpu_count() or 1
    ahead = grain.ReadOptions(threads, max(2 * threads, local))
    places = grain.MapDataset.range(batches * local).map(load)
    iterator = iter(places.to_iter_dataset(ahead).batch(local))
    try:
        yield from iterator
    finally:
        iterator.close()

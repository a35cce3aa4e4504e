"""Makes batches for the devices; which image comes when depends on the seed and the position alone.

Position p of a run, counted over all hosts, is image p mod N of epoch p div N, whose order and whose
augmentation depend on the seed and p alone. So a batch is the same whatever hosts, threads and processes make
it, and a run goes on where it stopped by counting. Nothing is left out: a batch may begin in one epoch and
end in the next. Grain's `MapDataset` shuffles, and its threads work ahead; `train.data.pool` has processes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import grain

from flaxnets.cores import cores
from flaxnets.errors import FlaxnetsError

from .images import (
    EvalImages,
    EvalTransform,
    Fields,
    Images,
    Share,
    TooManyBadImagesError,
    TrainImages,
    TrainTransform,
)
from .pool import Pool
from .sources import Source
from .worker import Batch

__all__ = ['Batch', 'TooManyBadImagesError', 'TrainBatches', 'eval_batches', 'train_batches', 'workers_for']

BATCHES_AHEAD = 2
# The share of bad images is taken of at least so many, so that an early one does not end a run.
IMAGES_BEFORE_JUDGING = 10_000
ENDLESS = 1 << 62
# Threads share one interpreter, which is a limit where there are many; processes take half a second to start.
MOST_THREADS = 4
FEWEST_IMAGES = 5_000


def workers_for(feed: str, workers: int, images: int) -> dict[str, int]:
    """How many threads or processes make batches, as arguments of `train_batches` and `eval_batches`.

    Args:
      feed: 'threads', 'processes', or 'auto', which takes processes where more than four would work, and
        not for a few images alone.
      workers: how many; 0 takes one for each core.
      images: how many images there are.

    Returns:
      {'threads': number} or {'processes': number}.
    """
    workers = workers or cores()
    if feed == 'auto':
        many = workers > MOST_THREADS and images >= FEWEST_IMAGES and hasattr(os, 'fork')
        feed = 'processes' if many else 'threads'
    return {feed: workers}


class TrainBatches(Iterator[Batch]):
    """What `train_batches` returns: an iterator to be closed.

    Attributes:
      bad: how many images of the batches so far could not be read; others took their places.
    """

    def __init__(self, batches: Any, tally: _Tally, step: int) -> None:
        self._batches, self._tally, self._step = batches, tally, step
        self.bad = 0
        self._news: list[str] = []

    def __next__(self) -> Batch:
        batch: Batch = next(self._batches)
        self._step += 1
        # Workers are ahead: bad images of later batches do not count yet. A run that ends here and is
        # resumed finds them again.
        found = self._tally.take_bad(self._step)
        self.bad += len(found)
        self._news += found
        return batch

    def new_bad(self) -> list[str]:
        """What is wrong with the bad images since the last call."""
        news, self._news = self._news, []
        return news

    def images_per_second(self) -> float | None:
        """How many images this host's workers could make, from the time that they have taken so far."""
        return self._tally.images_per_second()

    def close(self) -> None:
        """Ends the workers."""
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
    processes: int = 0,
    scaled: bool = False,
    max_bad: float = 0.001,
    bad: int = 0,
) -> TrainBatches:
    """This host's part of each training batch, without end.

    An image that cannot be read is counted, and the next one of the source takes its place.

    Args:
      source: the images.
      transform: a function from a decoded picture and a NumPy generator to uint8 [S, S, C].
      batch_size: images of a batch, on all hosts together.
      seed: of the order and the augmentation.
      start_step: the batch to begin with.
      in_chans: channels of the pictures for `transform`: Pillow's for 3 and 1, else
        `train.data.planes.Planes`.
      host, hosts: this host's number, and how many there are; it takes the host-th contiguous part of each
        batch.
      threads: how many threads decode and augment; 0 takes one for each core.
      processes: how many processes do so in place of threads; 0 for none. Source and
        transform are pickled for them.
      scaled: JPEG files are decoded at the scale that a crop needs (`train.data.jpeg`); `transform` then may
        ask for a part of a picture and its resizing alone.
      max_bad: share of bad images at which it ends with `TooManyBadImagesError`.
      bad: images of this host found bad before `start_step`, for that share.

    Returns:
      An iterator of {'image': uint8 [N, S, S, C], 'label': int32 [N]}, N = batch_size / hosts.

    Raises:
      FlaxnetsError: the batch cannot be shared by the hosts; with processes, what `train.data.pool.Pool`
        raises.
    """
    share = Share(batch_size, host, hosts)
    images = TrainImages(source, transform, seed, in_chans, share, scaled)
    workers = processes or threads or cores()
    tally = _Tally(workers, max_bad, start_step * share.rows, bad)
    steps = range(start_step, ENDLESS // share.rows)
    batches = _made(
        images, share.rows, steps, threads, processes, BATCHES_AHEAD, tally.add_bad, tally.add_made
    )
    return TrainBatches(batches, tally, start_step)


def _nothing(*told: Any) -> None:
    """Ignores what workers report: an evaluation counts neither time nor bad images, which end it."""


def _made(
    images: Images,
    rows: int,
    steps: range,
    threads: int,
    processes: int,
    ahead: int,
    bad: Callable[[int, str], None] = _nothing,
    made: Callable[[int, float], None] = _nothing,
) -> Any:
    """The batches whose numbers are `steps`, an iterator to be closed.

    Worker processes make them or, where there are none of these, Grain's threads, which are `ahead` batches
    ahead. `bad` and `made` are called as `Pool` does.
    """
    if threads < 0 or processes < 0:
        raise FlaxnetsError(f'{threads=} and {processes=} must be 0 or more')
    if processes:
        return Pool(images, rows=rows, steps=steps, processes=processes, bad=bad, made=made)
    threads = threads or cores()

    def load(place: int) -> Fields:
        batch, row = divmod(place, rows)
        start = time.perf_counter()
        image = images(batch, row, partial(bad, batch))
        made(1, time.perf_counter() - start)
        return image

    places = grain.MapDataset.range(steps.start * rows, steps.stop * rows).map(load)
    options = grain.ReadOptions(threads, max(2 * threads, ahead * rows))
    return iter(places.to_iter_dataset(options).batch(rows))


class _Tally:
    """Counts what workers made and found bad; any thread may tell it.

    Args:
      workers: how many there are.
      max_bad: share of bad images that is too large.
      seen, bad: good and bad images of this host before these batches.
    """

    def __init__(self, workers: int, max_bad: float, seen: int, bad: int) -> None:
        self._workers, self._max_bad = workers, max_bad
        self._lock = threading.Lock()
        self._found: list[tuple[int, str]] = []  # batch and what is wrong, as workers come by it
        self._seen, self._seen_before, self._seconds = 0, seen, 0.0
        self._bad = bad

    def add_made(self, images: int, seconds: float) -> None:
        with self._lock:
            self._seen += images
            self._seconds += seconds

    def add_bad(self, batch: int, problem: str) -> None:
        """Notes a bad image met while a batch was made.

        Raises:
          TooManyBadImagesError: there are too many.
        """
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
        """What is wrong with images of the batches before this one; each problem is given once."""
        with self._lock:
            if not self._found:
                return []
            taken = [pair for pair in self._found if pair[0] < batch]
            self._found = [pair for pair in self._found if pair[0] >= batch]
        return [problem for _, problem in sorted(taken, key=lambda pair: pair[0])]

    def images_per_second(self) -> float | None:
        with self._lock:
            return self._workers * self._seen / self._seconds if self._seconds else None


def eval_batches(
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    in_chans: int = 3,
    host: int = 0,
    hosts: int = 1,
    threads: int = 0,
    processes: int = 0,
) -> Generator[Batch]:
    """This host's part of each batch of an evaluation: every image exactly once, in the source's order.

    Args:
      source: the images.
      transform: from a picture to uint8 [S, S, C].
      batch_size: images of a batch, on all hosts together; the last batch is filled up with images that do
        not count (mask False).
      in_chans, host, hosts, threads, processes: as in `train_batches`.

    Returns:
      An iterator of {'image', 'label', 'mask': bool [N]}, of the same length on every host.

    Raises:
      ImageError: (while iterating) an image cannot be read: none is ever left out.
      FlaxnetsError: the batch cannot be shared by the hosts; with processes, what `train.data.pool.Pool`
        raises.
    """
    share = Share(batch_size, host, hosts)
    images = EvalImages(source, transform, in_chans, share)
    with contextlib.closing(
        _made(images, share.rows, range(images.batches), threads, processes, ahead=1)
    ) as batches:
        yield from batches

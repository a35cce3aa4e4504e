"""Applies a function to many image files, in order: threads decode, all devices compute."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Shaped

from ..cores import cores
from ..errors import FlaxnetsError, ImageError
from ..images.listing import ImageFile
from ..images.transforms import Transform

BATCH = 32  # images per device
T = TypeVar('T')
AHEAD = 2  # how many batches are decoded ahead while one is computed


@dataclass(frozen=True)
class Result:
    """The result of a function for one image.

    Attributes:
      file: the image.
      value: the function's row for it; None if the image cannot be read.
      problem: why the image cannot be read; None if it can.
    """

    file: ImageFile
    value: npt.NDArray[Any] | None = None
    problem: str | None = None


def mapped(
    function: Callable[[Any, Float[Array, 'n h w c']], Shaped[Array, 'n ...']],
    variables: Any,
    transform: Transform,
    files: Sequence[ImageFile],
    *,
    batch: int = BATCH,
) -> Iterator[Result]:
    """Applies `function` to every image, in the order of the files. Only a few batches are in memory.

    Args:
      function: takes (variables, images) and returns one row for each image.
      variables: the function's first argument.
      transform: turns a file into the net's input.
      files: the images. If one cannot be read, its `Result` says so and the others are computed.
      batch: images per device. The last batch is filled up with zeros, so that only one program is compiled.

    Raises:
      FlaxnetsError: `batch` is not a positive number.
    """
    if batch < 1:
        raise FlaxnetsError(f'batch={batch!r} must be at least 1')
    if not files:
        return
    devices = jax.local_devices()
    devices = devices[: min(len(devices), len(files))]
    local = min(batch, -(-len(files) // len(devices)))
    mesh = jax.make_mesh((len(devices),), ('batch',), axis_types=(AxisType.Auto,), devices=devices)
    apply = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=(P(), P('batch')), out_specs=P('batch'), check_vma=False)
    )
    rows = NamedSharding(mesh, P('batch'))
    everywhere = jax.device_put(variables, NamedSharding(mesh, P()))
    computed = (
        (part, apply(everywhere, jax.device_put(images, rows)))
        for part, images in _batches(files, transform, local * len(devices))
    )
    for part, values in one_ahead(computed):
        yield from _results(part, values)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Gives each item once the next one is made: devices compute a batch while the next is prepared."""
    left = iter(items)
    for waiting in left:
        for item in left:
            yield waiting
            waiting = item
        yield waiting


_Read = tuple[ImageFile, str | None]


def _results(part: Sequence[_Read], computed: Shaped[Array, 'n ...']) -> Iterator[Result]:
    for (file, problem), row in zip(part, np.asarray(computed), strict=False):  # the last batch is filled up
        yield Result(file, None if problem else row, problem)


def _batches(
    files: Sequence[ImageFile], transform: Transform, size: int
) -> Iterator[tuple[list[_Read], Float32[np.ndarray, 'n h w c']]]:
    """Batches of images, and for each file why it cannot be read (its image is zeros), or None."""
    p = transform.preprocess
    starts = collections.deque(range(0, len(files), size))
    pending: collections.deque[tuple[int, list[Future[Any]]]] = collections.deque()
    with ThreadPoolExecutor(cores(), thread_name_prefix='images') as pool:
        try:
            while starts or pending:
                while starts and len(pending) <= AHEAD:
                    start = starts.popleft()
                    part = files[start : start + size]
                    pending.append((start, [pool.submit(_read, file, transform) for file in part]))
                start, futures = pending.popleft()
                images = np.zeros((size, p.height, p.width, transform.in_chans), np.float32)
                read: list[_Read] = []
                for i, future in enumerate(futures):
                    image = future.result()
                    read.append((files[start + i], image if isinstance(image, str) else None))
                    if not isinstance(image, str):
                        images[i] = image
                yield read, images
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(file: ImageFile, transform: Transform) -> Float32[np.ndarray, 'h w c'] | str:
    """The net's input for a file, or why it cannot be read."""
    try:
        return transform(file.open(transform.in_chans))
    except ImageError as error:
        return str(error)

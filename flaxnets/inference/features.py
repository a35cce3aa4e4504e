"""Features that enter a net's classifier, and nearest neighbours by these (`flaxnets embed`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ..api import load_with_config, transform
from ..errors import FlaxnetsError
from ..images.listing import ImageFile
from ..store.files import check_place, written_whole
from .batches import BATCH, Result, mapped

BLOCK = 1024  # how many queries are compared with all features at a time


class Embedder:
    """Computes, for image files, the features that enter a net's classifier.

    Args:
      source: anything that `flaxnets.load` opens.
      arch: name of the net, where the tensors of a file leave a choice.

    Attributes:
      transform: turns an image into the net's input.
      size: number of features of an image.

    Raises:
      FlaxnetsError: unusable weights.
    """

    def __init__(self, source: str | os.PathLike[str], *, arch: str | None = None) -> None:
        config, self._net, self._variables = load_with_config(source, model=arch)
        self.transform = transform(config)
        self.size = self._net.num_features

    def __call__(self, files: Sequence[ImageFile], *, batch: int = BATCH) -> Iterator[Result]:
        """A `Result` for each image, in the order of the files; its value is float32 [size].

        Args:
          files: the images.
          batch: images per device.
        """
        return mapped(self._features, self._variables, self.transform, files, batch=batch)

    def _features(self, variables: Any, images: Float[Array, 'n h w c']) -> Float[Array, 'n {self.size}']:
        found: Any = self._net.apply(variables, images, method=pooled)
        return found


def pooled(net: Any, images: Float[Array, 'n h w c']) -> Float[Array, 'n features']:
    """The pooled features of images, as a method for `net.apply`."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


def check_features(path: str, names: str) -> None:
    """Checks that `save_features` could write to these files.

    Raises:
      FlaxnetsError: `path` does not end in `.npy`, or `names` not in `.txt` or `.json`; or there is no
        folder for them.
    """
    for file, suffixes in ((path, ('.npy',)), (names, ('.txt', '.json'))):
        if Path(file).suffix.lower() not in suffixes:
            raise FlaxnetsError(f'{file}: must end in {" or ".join(suffixes)}')
        check_place(file)


def save_features(
    results: Iterator[Result],
    path: str,
    names: str,
    size: int,
    on_result: Callable[[Result], object] = lambda result: None,
) -> list[ImageFile]:
    """Writes features as they are computed, then the names of their images. No file is left half-written.

    Args:
      results: the results of an `Embedder`.
      path: `.npy` file to write, float32 [N, size]; images that cannot be read have no row.
      names: file to write with a name for each row: `.txt`, one on each line, or `.json`, a list.
      size: number of features of an image.
      on_result: called with each result.

    Returns:
      The images that have a row, in the order of the rows.

    Raises:
      FlaxnetsError: as in `check_features`; or no image can be read; or a name has a line break and `names`
        is a `.txt` file.
    """
    check_features(path, names)
    files = []
    with written_whole(path) as out:
        _header(out, 0, size)
        for result in results:
            on_result(result)
            if result.value is not None:
                files.append(result.file)
                out.write(np.ascontiguousarray(result.value, np.float32).tobytes())
        out.seek(0)
        _header(out, len(files), size)
        if not files:
            raise FlaxnetsError('none of the images can be read')
        with written_whole(names) as beside:
            beside.write(_names([file.name for file in files], names).encode())
    return files


def _header(out: IO[bytes], rows: int, size: int) -> None:
    """Writes the header of a .npy file.

    NumPy leaves room for a larger number of rows, so that the header can be overwritten at the end.
    """
    fields = {'descr': '<f4', 'fortran_order': False, 'shape': (rows, size)}
    np.lib.format.write_array_header_1_0(out, fields)


def _names(names: Sequence[str], path: str) -> str:
    if Path(path).suffix.lower() == '.json':
        text = json.dumps(names, ensure_ascii=False, indent=0)
    else:
        broken = next((name for name in names if len(name.splitlines()) != 1), None)
        if broken is not None:
            raise FlaxnetsError(f'{broken!r} has a line break: write the names to a .json file')
        text = '\n'.join(names)
    return text + '\n'


def nearest(
    queries: Float[np.ndarray, 'q d'],
    features: Float[np.ndarray, 'n d'],
    k: int,
    *,
    leave_out: Int[np.ndarray, ' q'] | None = None,
) -> tuple[Int[np.ndarray, 'q found'], Float[np.ndarray, 'q found']]:
    """Finds, for each query, the rows of features with the largest cosine similarity.

    Args:
      queries: the features of a query in each row.
      features: the features to search, one in each row.
      k: how many rows to find for each query.
      leave_out: for each query, the row of `features` that is the query itself and is not a neighbour; -1
        if there is none.

    Returns:
      The numbers of the rows, the nearest first (of equal ones, the first row), and their similarities, from
      -1 to 1. Fewer than k if there are not so many rows.

    Raises:
      FlaxnetsError: `k` is not a positive number, or there are no other rows.
    """
    k = min(k, len(features) - (leave_out is not None and bool((leave_out >= 0).any())))
    if k < 1:
        raise FlaxnetsError('neighbours are asked for, but there must be at least one, and one other image')
    unit_queries, unit = _unit(queries), _unit(features)
    rows, values = [], []
    for start in range(0, len(queries), BLOCK):
        similar = unit_queries[start : start + BLOCK] @ unit.T
        if leave_out is not None:
            own = leave_out[start : start + BLOCK]
            there = np.flatnonzero(own >= 0)
            similar[there, own[there]] = -np.inf
        best = np.argsort(-similar, axis=1, kind='stable')[:, :k]
        rows.append(best)
        values.append(np.take_along_axis(similar, best, axis=1))
    return np.concatenate(rows), np.concatenate(values)


def _unit(features: Float[np.ndarray, 'n d']) -> Float32[np.ndarray, 'n d']:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norms, np.finfo(np.float32).tiny), np.float32)

"""Describes an array exactly: by its shape, its dtype and the SHA-256 of its bytes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ..cores import cores

Description = dict[str, Any]  # {'shape': [2048, 1000], 'dtype': 'float32', 'sha256': '9f86...'}


def describe(array: Any) -> Description:
    """An array's description. The digest is of its bytes in C order, little-endian."""
    return _prepare(array)[1]


def describe_all(arrays: Mapping[str, Any]) -> dict[str, Description]:
    """The description of each array, by name."""
    return {name: found for name, (_, found) in zip(arrays, prepared(arrays.values()), strict=True)}


def prepared(arrays: Iterable[Any]) -> Iterator[tuple[np.ndarray, Description]]:
    """Each array in C order and little-endian, and its description.

    Threads copy and hash a few arrays ahead of the caller. Both release Python's global lock, and never more
    than a few copies are in memory.
    """
    threads = min(8, cores())
    waiting: deque[Future[tuple[np.ndarray, Description]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for array in arrays:
            waiting.append(pool.submit(_prepare, array))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _prepare(array: Any) -> tuple[np.ndarray, Description]:
    array = np.asarray(array)
    array = np.asarray(array, array.dtype.newbyteorder('<'), order='C')
    content = array.reshape(-1).view(np.uint8).data if array.size else b''
    digest = hashlib.sha256(content).hexdigest()
    return array, {'shape': list(array.shape), 'dtype': array.dtype.name, 'sha256': digest}

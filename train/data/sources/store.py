"""All access of sources to files, here and in stores: listing, globbing, opening, reading ranges."""

from __future__ import annotations

import glob
import io
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, cast

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.store.remote import StoreError, StorePath, is_remote

# Bytes that are read at a time from a file in a store, and bytes of each of the parallel requests for them: a
# request takes long to begin, and one alone is slower than the network.
BLOCK, PART = 64 << 20, 8 << 20
LISTS = 32  # folders of a store that are listed in parallel


@dataclass(frozen=True)
class Entry:
    """A file or folder in a folder; links are followed.

    Attributes:
      name: its name in the folder.
      kind: 'file', 'folder', 'broken' (a link that leads nowhere) or 'other' (a device, a pipe).
      size: bytes of a file; 0 of others.
    """

    name: str
    kind: str
    size: int = 0


def scan(folder: str) -> list[Entry]:
    """What lies in a folder, in the order of the names.

    Raises:
      FlaxnetsError: the folder cannot be read.
    """
    if is_remote(folder):
        return _scan_store(folder)
    try:
        with os.scandir(folder) as entries:
            return sorted((_entry(entry) for entry in entries), key=lambda entry: entry.name)
    except OSError as error:
        raise FlaxnetsError(f'{folder}: the folder cannot be read: {error.strerror}') from error


def _entry(entry: os.DirEntry[str]) -> Entry:
    try:
        found = entry.stat()
    except OSError:  # nothing is there, it leads to itself, or through a folder that may not be entered
        return Entry(entry.name, 'broken')
    if stat.S_ISDIR(found.st_mode):
        return Entry(entry.name, 'folder')
    if stat.S_ISREG(found.st_mode):
        return Entry(entry.name, 'file', found.st_size)
    return Entry(entry.name, 'other')


def _scan_store(folder: str) -> list[Entry]:
    """As `scan`; begins to list the folders in it too, in parallel, since they are usually next."""
    begun = _ahead.pop(folder, None)
    found = begun.result() if begun else _list_store(folder)
    for entry in found:
        if entry.kind == 'folder':
            _ahead[f'{folder}/{entry.name}'] = _lists().submit(_list_store, f'{folder}/{entry.name}')
    return found


_ahead: dict[str, Future[list[Entry]]] = {}  # listings under way; each is used once, and none after `forget`


def forget() -> None:
    """Drops listings that were not used: a source that is opened later lists its folders anew."""
    _ahead.clear()


@cache
def _lists() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(LISTS, thread_name_prefix='lists')


def _list_store(folder: str) -> list[Entry]:
    kinds = {'file': 'file', 'directory': 'folder'}
    return [
        Entry(name, kinds.get(found['type'], 'other'), found['size'] or 0)
        for name, found in StorePath(folder).entries()
    ]


def is_folder(path: str) -> bool:
    return StorePath(path).is_dir() if is_remote(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    return StorePath(path).is_file() if is_remote(path) else os.path.isfile(path)


def identity(folder: str) -> str:
    """Equal for two paths of one folder."""
    return os.fspath(StorePath(folder)) if is_remote(folder) else os.path.realpath(folder)


def matching(pattern: str) -> list[str]:
    """The paths that match a pattern, in their order."""
    return StorePath(pattern).matching() if is_remote(pattern) else sorted(glob.glob(pattern))


def size(path: str) -> int:
    """Bytes of a file; raises OSError."""
    return StorePath(path).size() if is_remote(path) else os.path.getsize(path)


def opened(path: str) -> BinaryIO:
    """A file to read from any place, to be closed by the caller; raises OSError."""
    if is_remote(path):
        ranges = _Ranges(path)
        return cast(BinaryIO, io.BufferedReader(ranges, max(1, min(BLOCK, ranges.size))))
    return open(path, 'rb')


class _Ranges(io.RawIOBase):
    """A file in a store, read by requests for ranges of bytes."""

    def __init__(self, path: str) -> None:
        self._path = StorePath(path)
        self.size, self._at = self._path.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self.size)
        if end <= self._at:
            return 0
        data = self._path.read_parts(self._at, end, PART)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Bytes of a file, to its end with -1; raises OSError."""
    if is_remote(path):
        return StorePath(path).read_bytes(offset or None, None if length < 0 else offset + length)
    with opened(path) as file:
        file.seek(offset)
        return file.read(length)


def read_image(path: str, name: str, offset: int = 0, length: int = -1) -> bytes:
    """`read` for a record.

    Raises:
      ImageError: it cannot be read, or is shorter than it was; training counts that and goes on.
      StoreError: a store cannot be reached, which is no fault of an image; training ends.
    """
    try:
        data = read(path, offset, length)
    except StoreError:
        raise
    except OSError as error:
        raise ImageError(f'{name}: cannot be read: {error.strerror or error}') from error
    if 0 <= length != len(data):
        raise ImageError(f'{name}: {len(data)} bytes are left of its {length}; {path} has been cut')
    return data

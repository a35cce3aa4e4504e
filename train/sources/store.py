"""The one place where sources touch files: listing, globbing, opening, reading a range of bytes."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass
from typing import BinaryIO

from flaxnets.errors import FlaxnetsError, ImageError


@dataclass(frozen=True)
class Entry:
    """What a folder holds; links are followed.

    Attributes:
      name: in its folder.
      kind: 'file', 'folder', 'broken' (a link that leads nowhere) or 'other' (a device, a pipe).
      size: bytes of a file; 0 of others.
      link: whether it is a link.
    """

    name: str
    kind: str
    size: int = 0
    link: bool = False


def scan(folder: str) -> list[Entry]:
    """What lies in a folder, in the order of the names.

    Raises:
      FlaxnetsError: it cannot be read; it might hold any number of images.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((_entry(entry) for entry in entries), key=lambda entry: entry.name)
    except OSError as error:
        raise FlaxnetsError(f'{folder}: the folder cannot be read: {error.strerror}') from error


def _entry(entry: os.DirEntry[str]) -> Entry:
    link = entry.is_symlink()
    try:
        found = entry.stat()
    except OSError:  # nothing is there, it leads to itself, or through a folder that may not be entered
        return Entry(entry.name, 'broken', link=link)
    if stat.S_ISDIR(found.st_mode):
        return Entry(entry.name, 'folder', link=link)
    if stat.S_ISREG(found.st_mode):
        return Entry(entry.name, 'file', found.st_size, link)
    return Entry(entry.name, 'other', link=link)


def is_folder(path: str) -> bool:
    return os.path.isdir(path)


def is_file(path: str) -> bool:
    return os.path.isfile(path)


def identity(folder: str) -> str:
    """Equal for two paths of one folder."""
    return os.path.realpath(folder)


def matching(pattern: str) -> list[str]:
    """The paths that match a pattern, in their order."""
    return sorted(glob.glob(pattern))


def size(path: str) -> int:
    """Bytes of a file; raises OSError."""
    return os.path.getsize(path)


def opened(path: str) -> BinaryIO:
    """A file to read from any place, to be closed by the caller; raises OSError."""
    return open(path, 'rb')


def read(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Bytes of a file, to its end with -1; raises OSError."""
    with opened(path) as file:
        file.seek(offset)
        return file.read(length)


def read_image(path: str, name: str, offset: int = 0, length: int = -1) -> bytes:
    """`read` for a record.

    Raises:
      ImageError: it cannot be read, or is shorter than it was; training counts that and goes on.
    """
    try:
        data = read(path, offset, length)
    except OSError as error:
        raise ImageError(f'{name}: cannot be read: {error.strerror or error}') from error
    if 0 <= length != len(data):
        raise ImageError(f'{name}: {len(data)} bytes are left of its {length}; {path} has been cut')
    return data

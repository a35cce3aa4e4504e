"""Files as the converter reads and writes them: mapped, not copied; written whole or not at all."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flaxnets.atomic import remove, work_path
from flaxnets.errors import CheckpointError, FlaxnetsError


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """The whole file, mapped read-only.

    Raises:
      CheckpointError: no such file, not a regular one, empty, or not readable.
    """
    where = os.fsdecode(path)
    try:
        mode = os.stat(where).st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                f'{where}: is {"a directory" if stat.S_ISDIR(mode) else "a device or pipe"}, not a file'
            )
        with open(where, 'rb') as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f'{where}: the file is empty: the download or save went wrong')
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, FlaxnetsError):
            raise
        raise CheckpointError(
            f'{where}: cannot be read: {getattr(error, "strerror", None) or error}'
        ) from error


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write in place of `path`, which it becomes once the block has ended and all is on disk.

    Whatever ends the block early, `path` stays as it was and nothing is left beside it.

    Raises:
      FlaxnetsError: the file cannot be written (no such directory, no space left).
    """
    target = Path(path)
    temporary = work_path(target)
    try:
        with temporary.open('xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise FlaxnetsError(f'{target}: cannot be written: {error.strerror or error}') from error
    finally:
        remove(temporary)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Makes a renaming survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Files as this package reads and writes them: mapped, not copied; written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import CheckpointError, FlaxnetsError, shown

# First bytes of files that are mistaken for weights, and what to say about them.
_LOOKALIKES = (
    (b'<', 'it looks like a web page: the download went wrong'),
    (b'version https://git-lfs', 'it is a Git LFS pointer, not the file itself: run `git lfs pull`'),
    (b'\x1f\x8b', 'it is compressed with gzip: decompress it first'),
    (b'\x89HDF', 'it is an HDF5 file (Keras?)'),
    (b'\x93NUMPY', 'it is a NumPy array'),
    (b'{\n "format": "flaxnets StableHLO', 'it is a program for jax.export: export goes one way only'),
    *((bytes((8, version, 0x12)), 'it is an ONNX file, which is not read') for version in range(3, 15)),
)


def lookalike(data: mmap.mmap) -> str:
    """What a file that is not what it was taken for seems to be, in words."""
    head = data[:512].lstrip(b'\xef\xbb\xbf \t\r\n')
    seems = (meaning for start, meaning in _LOOKALIKES if head.startswith(start))
    return next(seems, f'it starts with {shown(data[:16])}')


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


def check_place(path: str | os.PathLike[str]) -> None:
    """Checks, before long work, that a file could stand at `path`.

    Raises:
      FlaxnetsError: there is a folder of that name, or no folder for it.
    """
    if Path(path).is_dir():
        raise FlaxnetsError(f'{path}: is a folder; give the name of a file')
    if not Path(path).parent.is_dir():
        raise FlaxnetsError(f'{path}: there is no folder {Path(path).parent}')


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


@contextlib.contextmanager
def folder_written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill in place of `path`, which it becomes once the block has ended.

    Whatever ends the block early, `path` stays as it was and nothing is left beside it. A folder cannot take
    the name of another: for a moment between two renamings there is none.

    Raises:
      CheckpointError: the folder cannot be written (no space left, no permission).
    """
    target = Path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = work_path(target)
        work.mkdir()
    except OSError as error:
        raise CheckpointError(f'{target}: cannot be written: {error.strerror}') from error
    try:
        yield work
        sync_directory(work)
        _replace(target, work)
        sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(f'{target}: cannot be written: {error.strerror or error}') from error
    finally:
        remove(work)


def _replace(directory: Path, work: Path) -> None:
    old = work.with_suffix('.old')  # all that there is until the new one has its name
    if directory.exists():
        directory.rename(old)
    try:
        work.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise
    remove(old)
    remove_left(directory, '.old')


def sync_directory(directory: Path) -> None:
    """Makes a renaming survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def work_path(target: Path) -> Path:
    """A hidden name beside `target`, in the same file system, that nothing has.

    What killed runs of this machine left for the same target is removed first; a run that lives, here or
    on another host of a shared file system, keeps its own.
    """
    remove_left(target, '.part')
    return target.with_name(f'{_prefix(target)}{os.getpid()}.{secrets.token_hex(4)}.part')


def remove_left(target: Path, suffix: str) -> None:
    """Removes what killed runs of this machine left beside `target` in work paths of this suffix."""
    prefix = _prefix(target)
    for left in target.parent.glob(f'{glob.escape(prefix)}*{suffix}'):
        pid = left.name.removeprefix(prefix).partition('.')[0]
        if pid.isdigit() and not is_running(int(pid)):
            remove(left)


def _prefix(target: Path) -> str:
    return f'.{target.name}.{socket.gethostname()}.'


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True

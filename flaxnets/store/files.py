"""Reads and writes files: they are mapped rather than copied, and written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import hashlib
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

SMALL = 16_000_000  # bytes: a configuration of 20,000 classes with descriptions has two million

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
    """Says, for an error message, what a file that is not of the expected kind seems to be."""
    head = data[:512].lstrip(b'\xef\xbb\xbf \t\r\n')
    seems = (meaning for start, meaning in _LOOKALIKES if head.startswith(start))
    return next(seems, f'it starts with {shown(data[:16])}')


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Maps a whole file into memory, read-only.

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


def read_small(path: str | os.PathLike[str], what: str) -> bytes:
    """The content of a file that is small if it is what it should be, such as a table or a configuration.

    Args:
      path: the file.
      what: what it should be, for the message.

    Raises:
      CheckpointError: the file cannot be read, or has more than `SMALL` bytes.
    """
    where = os.fsdecode(path)
    try:
        with open(path, 'rb') as file:
            content = file.read(SMALL + 1)
    except OSError as error:
        raise CheckpointError(f'{where}: cannot be read: {error.strerror or error}') from error
    if len(content) > SMALL:
        raise CheckpointError(f'{where}: larger than any {what}')
    return content


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
      CheckpointError: the file cannot be read.
    """
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read: {error.strerror or error}') from error


def check_place(path: str | os.PathLike[str]) -> None:
    """Checks, before long work, that a file could be written to `path`.

    Raises:
      FlaxnetsError: `path` is a folder, or its parent folder does not exist.
    """
    if Path(path).is_dir():
        raise FlaxnetsError(f'{path}: is a folder; give the name of a file')
    if not Path(path).parent.is_dir():
        raise FlaxnetsError(f'{path}: there is no folder {Path(path).parent}')


def check_space(folder: Path, needed: int) -> None:
    """Checks, before anything is written, that a folder's disk has so many bytes free.

    Raises:
      OSError: it has not; the message has both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f'{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free')


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A temporary file to write to, which replaces `path` once the block has ended and all is on disk.

    If an error ends the block, `path` stays as it was and the temporary file is removed.

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
    """A temporary folder to fill, which replaces `path` once the block has ended.

    If an error ends the block, `path` stays as it was and the temporary folder is removed. A folder cannot be
    renamed onto another one: for a moment, between two renames, there is none at `path`.

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
    old = work.with_suffix('.old')  # the only complete folder until the new one is renamed
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
    """Makes a rename survive a power cut, on systems that can do so."""
    with contextlib.suppress(OSError):
        fsync(directory)


def fsync(path: str | os.PathLike[str]) -> None:
    """Has the system write a file or a folder to the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def work_path(target: Path) -> Path:
    """A new hidden path beside `target`, in the same file system.

    First removes what killed processes of this machine left there for the same target. Files of processes
    that still run, or that are of another host of a shared file system, stay.
    """
    remove_left(target, '.part')
    return target.with_name(f'{_prefix(target)}{os.getpid()}.{secrets.token_hex(4)}.part')


def remove_left(target: Path, suffix: str) -> None:
    """Removes files of this suffix that killed processes of this machine left beside `target`."""
    prefix = _prefix(target)
    for left in target.parent.glob(f'{glob.escape(prefix)}*{suffix}'):
        pid = left.name.removeprefix(prefix).partition('.')[0]
        if pid.isdigit() and not is_running(int(pid)):
            remove(left)


def _prefix(target: Path) -> str:
    return f'.{target.name}.{socket.gethostname()}.'


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_running(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # not permitted: the process is another user's
    return True

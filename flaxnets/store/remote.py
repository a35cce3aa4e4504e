"""Paths in object stores such as `gs://`, with the few operations that this project needs, through fsspec.

A store keeps objects under names. An object appears, or replaces an older one, only as a whole. There are no
folders, and nothing can be renamed, appended to or locked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import posixpath
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import fsspec

from ..errors import CheckpointError, FlaxnetsError

# The package that each kind of store needs; 'memory' is fsspec's own, for tests.
PACKAGES = {
    'gs': 'gcsfs',
    'gcs': 'gcsfs',
    's3': 's3fs',
    'az': 'adlfs',
    'abfs': 'adlfs',
    'abfss': 'adlfs',
    'memory': 'fsspec',
}
LOGIN = {
    'gcsfs': '`gcloud auth application-default login`, or the role Storage Object User for the account',
    's3fs': '`aws configure`, or the rights of the account',
    'adlfs': 'AZURE_STORAGE_ACCOUNT_NAME and `az login`, or the rights of the account',
}
REQUEST_SECONDS = 120.0  # after so long without an answer a request is repeated
TRANSFERS = 8  # how many files of a folder are copied at a time


class StoreError(FlaxnetsError, OSError):
    """A store cannot be reached, or refuses a request. `strerror` is the reason without the path."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f'{where}: {reason}')
        self.strerror = reason


def names_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store, by how it begins.

    Raises:
      FlaxnetsError: it begins with a store's scheme, but without two slashes and a bucket after that.
    """
    text = os.fspath(path)
    scheme, colon, rest = text.partition(':')
    if not colon or scheme.lower() not in PACKAGES:
        return False
    if scheme not in PACKAGES or not rest.startswith('//') or not rest[2:].partition('/')[0]:
        hint = '; give it as a str: pathlib.Path takes a slash away' if isinstance(path, Path) else ''
        raise FlaxnetsError(f'{text}: a place in a bucket is written {scheme.lower()}://BUCKET/NAME{hint}')
    return True


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store rather than on this machine.

    Raises:
      FlaxnetsError: it is a URL of another kind, or one without a bucket.
    """
    if names_store(path):
        return True
    if '://' in os.fspath(path):
        kinds = ', '.join(f'{kind}://' for kind in PACKAGES if kind != 'memory')
        raise FlaxnetsError(f'{os.fspath(path)}: neither a path of this machine nor one of {kinds}')
    return False


class StorePath:
    """A path in a store, with those methods of `pathlib.Path` that are needed. Any thread may use it.

    Methods raise `FileNotFoundError` if there is no object, and `StoreError` for all other failures.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        scheme, _, rest = os.fspath(url).partition('://')
        self._url = f'{scheme}://{posixpath.normpath(rest).strip("/")}'

    def __fspath__(self) -> str:
        return self._url

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f'StorePath({self._url!r})'

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __lt__(self, other: StorePath) -> bool:
        return self._url < other._url

    def __truediv__(self, name: str | os.PathLike[str]) -> StorePath:
        return StorePath(f'{self._url}/{os.fspath(name)}')

    @property
    def name(self) -> str:
        return posixpath.basename(self._url)

    @property
    def stem(self) -> str:
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> StorePath:
        return StorePath(self._url.rpartition('/')[0])

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:  # fsspec's own `isfile` returns False for any error
            with _plainly(self._url):
                return bool(filesystem(self._url).info(self._url)['type'] == 'file')
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return any(True for _ in self.iterdir())

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> list[StorePath]:
        """The paths directly below this one, in the order of their names."""
        return [self / name for name, _ in self.entries()]

    def entries(self) -> list[tuple[str, dict[str, Any]]]:
        """The names directly below, in order, each with fsspec's entry for it ('type', 'size').

        Raises:
          StoreError: the store fails, or there is no such bucket.
        """
        try:
            with _plainly(self._url):
                found = filesystem(self._url).ls(self._url, detail=True)
        except FileNotFoundError:
            self._check_bucket()
            return []
        own = self._inner()
        named = {entry['name'].strip('/'): entry for entry in found}
        # fsspec lists an object as its own content, and so it does a folder made in a web console.
        return sorted((posixpath.basename(name), entry) for name, entry in named.items() if name != own)

    def glob(self, pattern: str) -> list[StorePath]:
        """The paths directly below whose names match a pattern."""
        return [path for path in self.iterdir() if fnmatchcase(path.name, pattern)]

    def matching(self) -> list[str]:
        """The objects that match this path as a pattern, with * (within a folder), **, ? and [...]."""
        with _plainly(self._url):
            found = filesystem(self._url).glob(self._url, detail=True)
        names = [name.lstrip('/') for name, entry in found.items() if entry['type'] == 'file']
        return sorted(f'{self._url.partition("://")[0]}://{name}' for name in names)

    def size(self) -> int:
        """Size of an object in bytes."""
        with _plainly(self._url):
            return int(filesystem(self._url).info(self._url)['size'])

    def files(self) -> dict[str, int]:
        """The sizes in bytes of all objects below this path, by their names relative to it."""
        try:
            with _plainly(self._url):
                found = filesystem(self._url).find(self._url, detail=True)
        except FileNotFoundError:
            self._check_bucket()
            return {}
        prefix = self._inner() + '/'
        sizes = {name.lstrip('/'): entry['size'] for name, entry in found.items()}
        return {
            name[len(prefix) :]: size
            for name, size in sorted(sizes.items())
            if name.startswith(prefix) and not name.endswith('/')
        }

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """An object, or its bytes from `start` up to `end`, in one request."""
        with _plainly(self._url):
            return bytes(filesystem(self._url).cat_file(self._url, start, end))

    def read_parts(self, start: int, end: int, size: int) -> bytes:
        """The bytes of an object from `start` up to `end`, in parallel requests for `size` bytes each."""
        starts = list(range(start, end, size))
        ends = [min(at + size, end) for at in starts]
        with _plainly(self._url):
            return b''.join(
                filesystem(self._url).cat_ranges([self._url] * len(starts), starts, ends, on_error='raise')
            )

    def write_bytes(self, data: bytes) -> None:
        """Writes an object, or replaces the one of this name, whole or not at all."""
        with self._writing():
            filesystem(self._url).pipe_file(self._url, data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def create(self, data: bytes) -> None:
        """Writes an object that does not exist yet.

        Raises:
          FileExistsError: there is an object of this name.
        """
        with self._writing():
            filesystem(self._url).pipe_file(self._url, data, mode='create')

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _plainly(self._url):
                filesystem(self._url).rm_file(self._url)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_files(self, names: Collection[str]) -> None:
        """Removes objects below this path, by their names relative to it."""
        with _plainly(self._url):
            remove = filesystem(self._url).rm_file
            _side_by_side([partial(remove, f'{self._url}/{name}') for name in names])

    def copy_files(self, names: Collection[str], target: StorePath) -> None:
        """Copies objects below this path to the same names below `target`, within the store."""
        with _plainly(self._url):
            copy = filesystem(self._url).cp_file
            _side_by_side([partial(copy, f'{self._url}/{n}', f'{target._url}/{n}') for n in names])

    def upload(self, source: Path, names: Collection[str]) -> None:
        """Copies files below a folder of this machine to the same names below this path."""
        with self._writing():
            put = filesystem(self._url).put_file
            _side_by_side([partial(put, f'{source}/{name}', f'{self._url}/{name}') for name in names])

    def download(self, target: Path, names: Collection[str]) -> None:
        """Copies objects below this path to the same names below a folder of this machine."""
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        with _plainly(self._url):
            get = filesystem(self._url).get_file
            _side_by_side([partial(get, f'{self._url}/{name}', f'{target}/{name}') for name in names])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns "not found" into an error about the bucket: nothing else can be missing when one writes."""
        try:
            with _plainly(self._url):
                yield
        except FileNotFoundError:
            self._no_bucket()

    def _inner(self) -> str:
        """The name as fsspec gives it: BUCKET/NAME."""
        return str(filesystem(self._url)._strip_protocol(self._url)).strip('/')

    def _check_bucket(self) -> None:
        scheme, _, rest = self._url.partition('://')
        bucket = f'{scheme}://{rest.partition("/")[0]}'
        with _plainly(bucket):
            there = scheme == 'memory' or filesystem(bucket).exists(bucket)
        if not there:
            self._no_bucket()

    def _no_bucket(self) -> NoReturn:
        bucket = self._url.partition('://')[2].partition('/')[0]
        reason = f'there is no bucket {bucket}, or none that this account may see'
        raise StoreError(self._url, reason) from None


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL. It caches no listings, since others write to the store too.

    Raises:
      StoreError: a package is missing, or its settings are incomplete.
    """
    return _filesystem(url.partition('://')[0])


@functools.cache
def _filesystem(scheme: str) -> Any:
    package = PACKAGES[scheme]
    # These packages also log the errors that they raise, with pages of tracebacks.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {'use_listings_cache': False}
    try:
        if package == 'gcsfs':
            # fsspec's default class asks for every bucket's type, by another protocol.
            from gcsfs.core import GCSFileSystem, UnclosableBytesIO

            class Streaming(GCSFileSystem):  # type: ignore[misc]
                async def _call(self, *args: Any, data: Any = None, **kwargs: Any) -> Any:
                    # A stream, since large bytes sent at once would hold up all other requests.
                    stream = UnclosableBytesIO(data) if isinstance(data, (bytes, memoryview)) else data
                    return await super()._call(*args, data=stream, **kwargs)

            return Streaming(**options, requests_timeout=REQUEST_SECONDS)
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        reason = f'needs the package {package}: pip install {package} ({error})'
        raise StoreError(f'{scheme}://', reason) from error
    except Exception as error:  # of each package's own kinds
        raise StoreError(f'{scheme}://', _reason(error, package)) from error


def _side_by_side(calls: Sequence[Callable[[], object]]) -> None:
    """Makes all calls, several at a time, and raises the first error only once all have ended.

    fsspec's own transfers of many files raise an error while other files are still being written. These
    would be written even after the caller has cleaned up.
    """
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix='transfers') as pool:
        running = [pool.submit(call) for call in calls]
    for done in running:
        done.result()


@contextlib.contextmanager
def _plainly(url: str) -> Iterator[None]:
    """Turns a package's errors into a `StoreError` of one line, but not "not found" and "exists"."""
    try:
        yield
    except (FlaxnetsError, FileExistsError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, 'no such object', url) from error
    except Exception as error:
        raise StoreError(url, _reason(error, PACKAGES[url.partition('://')[0]])) from error


def _reason(error: Exception, package: str) -> str:
    text = str(error).strip().partition('\n')[0] or type(error).__name__
    code = getattr(error, 'code', None)
    if isinstance(error, PermissionError) or code in (401, 403) or text.startswith('Forbidden'):
        return f'no permission ({text}); it may need {LOGIN.get(package, "other rights")}'
    if isinstance(error, (ConnectionError, TimeoutError)) or 'Client' in type(error).__name__:
        return f'cannot be reached ({text})'
    return text


def place(path: str | os.PathLike[str]) -> Path | StorePath:
    """A path in a store, or an absolute path of this machine."""
    return StorePath(path) if is_remote(path) else Path(os.path.abspath(path))


def check_free(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks, before long work, that a file may be written to `path`.

    Raises:
      CheckpointError: there is a folder, or a file and `overwrite` is False.
    """
    target = place(path)
    if target.is_dir():
        raise CheckpointError(f'{target} is a directory; choose another file')
    if target.exists() and not overwrite:
        raise CheckpointError(f'{target} exists; choose another file or overwrite it (overwrite=True)')


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder of this machine to write to: `directory` itself, or one that is copied to it at the end.

    If the block raises an error, nothing is copied.

    Raises:
      StoreError: the folder cannot be copied.
    """
    if not is_remote(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob('*') if path.is_file()]
        StorePath(directory).upload(Path(folder), sorted(names))


@contextlib.contextmanager
def staged_as(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path of this machine to write to: `path` itself, or one of the same name that is copied at the end.

    It may become a file or a folder. If the block raises an error, nothing is copied.

    Raises:
      StoreError: it cannot be copied.
    """
    if not is_remote(path):
        yield Path(path)
        return
    there = StorePath(path)
    with staged(there.parent) as folder:
        yield folder / there.name

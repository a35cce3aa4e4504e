"""Object stores such as `gs://`, for the few things that this project asks of them, by way of fsspec.

A store keeps whole objects under names. An object is there when all of it is, and a new one takes the place
of an old one at once; but there are no folders, and nothing can be renamed, appended to or locked.
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

from ..errors import FlaxnetsError

# What each kind of store needs; fsspec has 'memory' itself, for tests.
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
REQUEST_SECONDS = 120.0  # without an answer: then a request is made again
TRANSFERS = 8  # files of a folder that are copied at a time


class StoreError(FlaxnetsError, OSError):
    """A store cannot be reached, or does not do what it is asked; `strerror` is the reason alone."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f'{where}: {reason}')
        self.strerror = reason


def names_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins as one of an object store does.

    Raises:
      FlaxnetsError: it does, but has not two slashes and a bucket behind that.
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
    """Whether a path is in an object store, and not one of this machine.

    Raises:
      FlaxnetsError: it is a URL of another kind, or none that is whole.
    """
    if names_store(path):
        return True
    if '://' in os.fspath(path):
        kinds = ', '.join(f'{kind}://' for kind in PACKAGES if kind != 'memory')
        raise FlaxnetsError(f'{os.fspath(path)}: neither a path of this machine nor one of {kinds}')
    return False


class StorePath:
    """A name in a store, with what of `pathlib.Path` there is use for. Any thread may use it.

    All raise `FileNotFoundError` where there is nothing, and `StoreError` for whatever else goes wrong.
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
        try:  # fsspec's own `isfile` takes whatever goes wrong for "there is none"
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
        """What lies directly below, by name; nothing if there is nothing."""
        return [self / name for name, _ in self.entries()]

    def entries(self) -> list[tuple[str, dict[str, Any]]]:
        """The names directly below, and what fsspec says of each ('type', 'size'), in the order of names.

        Raises:
          StoreError: also if there is no such bucket.
        """
        try:
            with _plainly(self._url):
                found = filesystem(self._url).ls(self._url, detail=True)
        except FileNotFoundError:
            self._check_bucket()
            return []
        own = self._inner()
        named = {entry['name'].strip('/'): entry for entry in found}
        # An object itself is listed as its own content, a folder made in a web console too.
        return sorted((posixpath.basename(name), entry) for name, entry in named.items() if name != own)

    def glob(self, pattern: str) -> list[StorePath]:
        """What lies directly below and fits a pattern."""
        return [path for path in self.iterdir() if fnmatchcase(path.name, pattern)]

    def matching(self) -> list[str]:
        """The objects whose names fit this one as a pattern, with * (within a folder), **, ? and [...]."""
        with _plainly(self._url):
            found = filesystem(self._url).glob(self._url, detail=True)
        names = [name.lstrip('/') for name, entry in found.items() if entry['type'] == 'file']
        return sorted(f'{self._url.partition("://")[0]}://{name}' for name in names)

    def size(self) -> int:
        """Bytes of an object."""
        with _plainly(self._url):
            return int(filesystem(self._url).info(self._url)['size'])

    def files(self) -> dict[str, int]:
        """All objects below, by what their names have beyond this one's, and their sizes in bytes."""
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
        """The bytes of an object from `start` to `end`, in requests for `size` of them, made side by side."""
        starts = list(range(start, end, size))
        ends = [min(at + size, end) for at in starts]
        with _plainly(self._url):
            return b''.join(
                filesystem(self._url).cat_ranges([self._url] * len(starts), starts, ends, on_error='raise')
            )

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """Puts an object in place of what has its name, whole or not at all."""
        with self._writing():
            filesystem(self._url).pipe_file(self._url, data)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def create(self, data: bytes) -> None:
        """Puts an object where there is none.

        Raises:
          FileExistsError: there is one.
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
        """Removes objects below, by what their names have beyond this one's."""
        if names:
            with _plainly(self._url):
                remove = filesystem(self._url).rm_file
                _side_by_side([partial(remove, f'{self._url}/{name}') for name in names])

    def copy_files(self, names: Collection[str], target: StorePath) -> None:
        """Copies objects below this name to below another one, within the store."""
        if names:
            with _plainly(self._url):
                copy = filesystem(self._url).cp_file
                _side_by_side([partial(copy, f'{self._url}/{n}', f'{target._url}/{n}') for n in names])

    def upload(self, source: Path, names: Collection[str]) -> None:
        """Copies files below a folder of this machine to objects below this name."""
        if names:
            with self._writing():
                put = filesystem(self._url).put_file
                _side_by_side([partial(put, f'{source}/{name}', f'{self._url}/{name}') for name in names])

    def download(self, target: Path, names: Collection[str]) -> None:
        """Copies objects below this name to files below a folder of this machine."""
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            with _plainly(self._url):
                get = filesystem(self._url).get_file
                _side_by_side([partial(get, f'{self._url}/{name}', f'{target}/{name}') for name in names])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Only a bucket can be missing where something is written."""
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
    """fsspec's file system of a URL; lists are asked for each time, since others write there too.

    Raises:
      StoreError: a package is missing, and which; or its settings are not enough.
    """
    return _filesystem(url.partition('://')[0])


@functools.cache
def _filesystem(scheme: str) -> Any:
    package = PACKAGES[scheme]
    # They log what they raise too, with pages of tracebacks.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {'use_listings_cache': False}
    try:
        if package == 'gcsfs':
            # Not the class that fsspec takes, which asks of every bucket for its kind, by another protocol.
            from gcsfs.core import GCSFileSystem, UnclosableBytesIO

            class Streaming(GCSFileSystem):  # type: ignore[misc]
                async def _call(self, *args: Any, data: Any = None, **kwargs: Any) -> Any:
                    # aiohttp warns of large bytes: sending them at once holds all other requests up.
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
    """Makes all calls, several at a time; once all have ended, raises the first error.

    fsspec's own transfers of many files raise it while others are under way: those would still write when
    what was written has been removed, and an older state put back in its place.
    """
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix='transfers') as pool:
        running = [pool.submit(call) for call in calls]
    for done in running:
        done.result()


@contextlib.contextmanager
def _plainly(url: str) -> Iterator[None]:
    """Whatever a package raises as a `StoreError` of one line, but for what is missing or there already."""
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
    """A path of this machine, made absolute, or of a store."""
    return StorePath(path) if is_remote(path) else Path(os.path.abspath(path))


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder of this machine to write into: `directory` itself, or one that is copied there at the end.

    Raises:
      StoreError: it cannot be copied. Nothing is, if the block raises.
    """
    if not is_remote(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob('*') if path.is_file()]
        StorePath(directory).upload(Path(folder), sorted(names))

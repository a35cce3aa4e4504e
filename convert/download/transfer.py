"""Downloads one file over HTTPS: resumes it after a break, verifies it, and leaves it whole or not at all.

Bytes are appended to `<name>.part` beside the target. If the process dies, the next one continues there.
`<name>.part.json` records the file's address and version, so that a file which has changed on its server is
downloaded from the start. The `.part` file is also the lock: the process that holds it writes, others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import IO, Any

from flaxnets.errors import FlaxnetsError
from flaxnets.store.files import sha256_of, sync_directory, written_whole

from .progress import Progress, megabytes
from .web import Linked, Request, Unavailable, check_url, open_url, reason

RETRIES = 4  # in a row without progress
RETRY_WAIT = 1.0  # seconds before the first; doubles

_CHUNK = 2**18
_PROGRESS = 2**20  # bytes that must have come for a break to count as the first again
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_WEB_PAGE = 'sends a web page in place of the file (a login page of this network, or a dead link)'


class _Broken(Exception):
    """The transfer broke off, and trying again may help."""


def is_intact(path: Path, sha256: str | None) -> bool:
    """Whether the file is there and whole: by `sha256`, else by the digest that `download` left beside it."""
    try:
        if sha256 is None:
            note = _digest_note(path)
            # A file of unknown hash that someone put there by hand is taken as it is.
            sha256 = note.read_text(encoding='utf-8').split(' ')[0] if note.exists() else ''
        return path.is_file() and (not sha256 or sha256_of(path).startswith(sha256))
    except (OSError, ValueError):
        return False


def download(request: Request, target: Path, *, quiet: bool = False) -> None:
    """Fetches a file to `target`, unless another process has just done so.

    A file whose hash is not in the request gets its digest noted in `<name>.sha256` beside it.

    Raises:
      Unavailable: this server does not give the file, or gives another one.
      FlaxnetsError: the disk is full or cannot be written to: no server will help.
    """
    check_url(request.url)
    progress = Progress(target.name, urllib.parse.urlsplit(request.url).hostname or '', quiet)
    part = target.with_name(target.name + '.part')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, progress) as file:
            if not is_intact(target, request.sha256):
                _Transfer(request, target, part, file, progress).run()
    except OSError as error:
        raise FlaxnetsError(f'{target}: cannot be written: {error.strerror or error}') from error
    finally:
        progress.close()


@contextlib.contextmanager
def _locked(part: Path, progress: Progress) -> Iterator[IO[bytes]]:
    """The `.part` file, open for appending by this process alone; removed at the end if it is empty."""
    while True:
        with part.open('ab', buffering=0) as file:
            _lock(file, progress)
            if not _is_at(file, part):  # whoever held the lock has renamed or removed what was opened here
                continue
            try:
                yield file
            finally:
                if _is_at(file, part) and os.fstat(file.fileno()).st_size == 0:
                    _remove(part, _origin_note(part))
            return


def _lock(file: IO[bytes], progress: Progress) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.say('another process is fetching it: waiting')
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks: two writers would fail at the hash


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _Transfer:
    """One file from one server into the `.part` file, which is held open and locked."""

    def __init__(
        self, request: Request, target: Path, part: Path, file: IO[bytes], progress: Progress
    ) -> None:
        self._request = request
        self._target = target
        self._part = part
        self._file = file
        self._progress = progress
        self._answered = False
        self._linked = Linked()
        self._digest = ''

    def run(self) -> None:
        inherited = self._size() > 0
        self._receive()
        problem = self._problem()
        if problem and inherited:
            self._progress.say(
                'what was here of it is the beginning of another file: once more, from the start'
            )
            self._discard()
            self._receive()
            problem = self._problem()
        if problem:
            self._discard()
            raise Unavailable(problem)
        self._publish()

    def _receive(self) -> None:
        """Requests until the file is complete, going on where the last one broke off."""
        failures, furthest = 0, self._size()
        while True:
            try:
                return self._receive_once()
            except _Broken as broken:
                size = self._size()
                failures = 1 if size >= furthest + _PROGRESS else failures + 1
                furthest = max(furthest, size)
                if failures > RETRIES:
                    raise Unavailable(f'{broken}, {failures} times in a row') from broken
                self._progress.say(f'{broken}: trying again')
                time.sleep(RETRY_WAIT * 2 ** (failures - 1))

    def _receive_once(self) -> None:
        headers = self._range()
        try:
            response, self._linked = open_url(self._request, headers)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            # A server that has never answered is not asked again: another one is more likely to.
            raise (_Broken if self._answered else Unavailable)(reason(error)) from error
        with response:
            self._answered = True
            self._copy(response, self._accept(response))

    def _range(self) -> dict[str, str]:
        """Headers that ask for the missing rest; discards what is here if nothing could show that it fits."""
        size = self._size()
        if not size:
            return {}
        origin = _read_note(_origin_note(self._part))
        headers = {'Range': f'bytes={size}-'}
        if origin.get('url') == self._request.url and origin.get('validator'):
            return {**headers, 'If-Range': origin['validator']}
        if self._request.sha256:
            return headers
        self._discard()
        return {}

    def _refused(self, error: urllib.error.HTTPError) -> None:
        size = self._size()
        if error.code == 416 and size:
            if error.headers.get('Content-Range', '') == f'bytes */{size}':
                return  # nothing is missing
            self._discard()
            raise _Broken('what was here of it is longer than the file')
        text = f'HTTP {error.code} {error.reason}'
        if error.code in _TRANSIENT:
            raise _Broken(text)
        raise Unavailable(text, error.code)

    def _accept(self, response: http.client.HTTPResponse) -> int | None:
        """Checks an answer against the request; returns the size of the whole file, None if it is unknown."""
        headers = response.headers
        if headers.get_content_type() in ('text/html', 'application/xhtml+xml'):
            raise Unavailable(_WEB_PAGE)
        if headers.get('Content-Encoding', 'identity') != 'identity':
            raise Unavailable(f'sends it compressed ({headers["Content-Encoding"]}) though asked not to')
        total: int | None
        if response.status == 206 and self._size():
            span = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', headers.get('Content-Range', ''))
            if span is None or int(span[1]) != self._size():
                self._discard()
                raise _Broken('sends another part of the file than it was asked for')
            total = int(span[2])
        elif response.status == 200:
            self._discard()
            total = response.length if response.length is not None else self._linked.size
            self._remember(headers)
        else:
            raise Unavailable(f'HTTP {response.status} {response.reason}', response.status)
        self._check_room(total)
        self._progress.start(self._size(), total)
        return total

    def _check_room(self, total: int | None) -> None:
        if total is None:
            return
        if total > self._request.max_bytes:
            raise Unavailable(
                f'has {megabytes(total)}, more than the {megabytes(self._request.max_bytes)} expected'
            )
        if shutil.disk_usage(self._part.parent).free < total - self._size():
            raise self._disk_full(total - self._size())

    def _disk_full(self, missing: int | None) -> FlaxnetsError:
        need = f', {megabytes(missing)} are needed' if missing else ''
        return FlaxnetsError(
            f'{self._target}: no space left on the disk{need}: free some, or set FLAXNETS_HOME to a folder '
            f'on another disk (what has come so far is kept in {self._part.name})'
        )

    def _copy(self, response: http.client.HTTPResponse, total: int | None) -> None:
        size = self._size()
        try:
            while chunk := response.read1(_CHUNK):
                size += len(chunk)
                if size > self._request.max_bytes:
                    raise Unavailable(f'goes on after {megabytes(self._request.max_bytes)}')
                self._write(chunk)
                self._progress.update(size)
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(reason(error)) from error
        if total is not None and size < total:
            raise _Broken(f'the connection ended after {megabytes(size)} of {megabytes(total)}')

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(None) from error
            raise FlaxnetsError(f'{self._part}: cannot be written: {error.strerror or error}') from error

    def _problem(self) -> str | None:
        """What is wrong with the complete file; None if nothing is."""
        os.fsync(self._file.fileno())
        with self._part.open('rb') as file:
            if file.read(512).lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
                return _WEB_PAGE
        size, linked = self._size(), self._linked
        if linked.size is not None and size != linked.size:
            return f'sends {size} bytes, and the hub says that the file has {linked.size}'
        self._digest = sha256_of(self._part)
        for wanted in (self._request.sha256, linked.sha256):
            if wanted and not self._digest.startswith(wanted):
                begins = f'its SHA-256 begins {self._digest[:8]}, not {wanted[:8]}'
                return f'sends another or a damaged file: {begins}'
        return None

    def _publish(self) -> None:
        if self._request.sha256 is None:
            with written_whole(_digest_note(self._target)) as file:
                file.write(f'{self._digest}  {self._target.name}\n'.encode())
        size = self._size()
        os.replace(self._part, self._target)
        _remove(_origin_note(self._part))
        sync_directory(self._target.parent)
        self._progress.finish(size)

    def _remember(self, headers: Message) -> None:
        """Records which file, in which version, the bytes to come are from."""
        validator = headers.get('ETag', '')
        if not validator or validator.startswith('W/'):  # a weak one cannot be used with ranges
            validator = headers.get('Last-Modified', '')
        with written_whole(_origin_note(self._part)) as file:
            file.write(json.dumps({'url': self._request.url, 'validator': validator}).encode())

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _discard(self) -> None:
        os.ftruncate(self._file.fileno(), 0)
        _remove(_origin_note(self._part))


def _digest_note(path: Path) -> Path:
    """Where the digest of a file is kept whose name does not have it, in the form of `sha256sum`."""
    return path.with_name(path.name + '.sha256')


def _origin_note(part: Path) -> Path:
    """Where the origin of a `.part` file is kept: {'url': ..., 'validator': its ETag or date}."""
    return part.with_name(part.name + '.json')


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()

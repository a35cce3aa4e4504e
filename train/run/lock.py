"""Locks a workdir, so that only one run writes to it.

Why not the package `filelock`: it has no lock for stores such as `gs://`, which is most of this file, and it
would replace one call of `flock`. Its versions before 4 empty the file at every attempt, in which the holder
of the lock is written. On file systems without locks it uses a file that outlives a killed run, which then
could not be resumed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, Protocol

from flaxnets.errors import FlaxnetsError
from flaxnets.store.files import is_running
from flaxnets.store.remote import StoreError, StorePath, is_remote

FILE = '.lock'
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
BEAT_SECONDS = 10.0  # between two signs of life of a run in a store
SETTLING_SECONDS = 2.0  # in which another run that takes the workdir over at the same time has done so
SILENT_SECONDS = 35.0  # without a sign of life, after which a run is taken for dead


class Lock:
    """Holds a workdir while it is open.

    In a folder of this machine the system releases the lock when the process dies, however it dies; on a file
    system without locks nothing is locked. The file stays: if it were removed, two runs could lock two files
    of one name.

    In a store such as `gs://` the holder writes an object again every `BEAT_SECONDS`. A killed run's lock is
    taken over at once on the machine where it ran, elsewhere after `SILENT_SECONDS` without a change.

    Args:
      workdir: created if it does not exist.

    Raises:
      FlaxnetsError: another run holds it (the message says which), or it cannot be written.
    """

    def __init__(self, workdir: str) -> None:
        self._held: _Held | None = _Lease(workdir) if is_remote(workdir) else _FileLock(workdir)

    def check(self) -> None:
        """Checks that this run still holds the workdir.

        Raises:
          FlaxnetsError: another run took this one for dead, and took the workdir over.
        """
        if self._held is not None:
            self._held.check()

    def close(self) -> None:
        """Releases the workdir; another call does nothing."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Held(Protocol):
    def check(self) -> None: ...

    def close(self) -> None: ...


class _FileLock:
    """A lock of the system on a file of the workdir."""

    def __init__(self, workdir: str) -> None:
        self._file: int | None = None
        path = os.path.join(workdir, FILE)
        try:
            os.makedirs(workdir, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FlaxnetsError(f'{workdir}: cannot be used as a workdir: {error.strerror}') from error
        try:
            # Of the open file, not of the process: a second run in this process is refused too.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000)
            os.close(file)
            raise _in_use(workdir, _parsed(holder)) from None
        except OSError as error:
            os.close(file)
            if error.errno in UNSUPPORTED:
                return
            raise FlaxnetsError(f'{path}: cannot be locked: {error.strerror}') from error
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}).encode())

    def check(self) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


class _Lease:
    """A lock in a store: an object that the run writes again every `BEAT_SECONDS`."""

    def __init__(self, workdir: str) -> None:
        self._workdir, self._path = workdir, StorePath(workdir) / FILE
        self._own = {'host': socket.gethostname(), 'pid': os.getpid(), 'run': secrets.token_hex(8)}
        self._beats = 0
        try:
            while not self._taken():
                pass
        except OSError as error:
            raise FlaxnetsError(
                f'{workdir}: cannot be used as a workdir: {error.strerror or error}'
            ) from error
        self._lost: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost is not None:
            raise _in_use(self._workdir, self._lost)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        try:
            if self._lost is None and _parsed(self._read()).get('run') == self._own['run']:
                self._path.unlink(missing_ok=True)
        except StoreError:
            pass  # this run is taken for dead later

    def _taken(self) -> bool:
        """Whether the object is this run's now; if not, it is to be tried again."""
        found = self._read()
        if found is not None:
            holder = _parsed(found)
            here = holder.get('host') == self._own['host']
            if holder.get('pid') == self._own['pid'] or not here or is_running(int(holder.get('pid', 0))):
                self._watch(found)
            self._path.unlink(missing_ok=True)
        try:
            self._path.create(self._content())
        except FileExistsError:  # another one was quicker
            return False
        if found is not None:  # a second one may have taken it for dead too, and have removed ours
            time.sleep(SETTLING_SECONDS)
            now = _parsed(self._read())
            if now.get('run') != self._own['run']:
                raise _in_use(self._workdir, now)
        return True

    def _watch(self, found: bytes) -> None:
        """Returns once the holder has given no sign of life for long enough.

        Raises:
          FlaxnetsError: the holder has given one.
        """
        print(
            f'{self._path}: waiting up to {SILENT_SECONDS:.0f} s for a sign of life of '
            f'{_named(_parsed(found))}',
            file=sys.stderr,
        )
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_SECONDS))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise _in_use(self._workdir, _parsed(now))

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                found = self._read()
                if found is not None and _parsed(found).get('run') != self._own['run']:
                    self._lost = _parsed(found)
                    return
                self._path.write_bytes(self._content())
            except StoreError:
                continue  # the network comes back, or the next save says that it did not

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._own, 'beats': self._beats}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None


def _in_use(workdir: str, holder: dict[str, Any]) -> FlaxnetsError:
    return FlaxnetsError(
        f'{workdir} is in use by {_named(holder)}; wait for it, stop it or choose another workdir'
    )


def _named(holder: dict[str, Any]) -> str:
    if 'pid' not in holder or 'host' not in holder:  # the holder has not written yet who it is
        return 'another run'
    return f'process {holder["pid"]} on {holder["host"]}'


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        holder = json.loads(content or b'')
        if not isinstance(holder, dict):
            return {}
        if type(holder.get('pid')) is not int:
            holder.pop('pid', None)
        return holder
    except ValueError:
        return {}

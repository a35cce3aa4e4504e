"""One run per workdir."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from types import TracebackType

from flaxnets.arrays import is_remote
from flaxnets.errors import FlaxnetsError

FILE = '.lock'
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Lock:
    """Holds a workdir while it is open; the system lets go when the process dies, however it dies.

    The file stays: removing it would let two runs lock two files of one name. Nothing is locked on a store
    such as `gs://`, nor on a file system without locks.

    Args:
      workdir: created if it does not exist.

    Raises:
      FlaxnetsError: another run holds it, and which; or it cannot be written.
    """

    def __init__(self, workdir: str) -> None:
        self._file: int | None = None
        if is_remote(workdir):
            return
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
            raise FlaxnetsError(
                f'{workdir} is in use by {_describe(holder)}; wait for it, stop it or choose another workdir'
            ) from None
        except OSError as error:
            os.close(file)
            if error.errno in UNSUPPORTED:
                return
            raise FlaxnetsError(f'{path}: cannot be locked: {error.strerror}') from error
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, json.dumps({'host': socket.gethostname(), 'pid': os.getpid()}).encode())

    def close(self) -> None:
        """Lets go. Again does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _describe(holder: bytes) -> str:
    try:
        data = json.loads(holder)
        return f'process {data["pid"]} on {data["host"]}'
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written yet
        return 'another run'

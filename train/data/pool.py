"""Has worker processes make batches. This is the main process's side; `train.data.worker` is theirs.

A batch is one slot of a file in memory that all of them have mapped. It is given out without a copy, and
its slot is used again once nothing refers to its arrays: JAX may go on reading them, or keep them. The file
has no name, so that nothing is left of it, however the processes end; and the limit of /dev/shm, which is low
in containers, is not its limit. Order and content do not depend on which worker makes what.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flaxnets
from flaxnets.errors import FlaxnetsError

from .images import Images
from .worker import GRACE, PIECE, Batch, Inbox, Layout

AHEAD = 2  # batches that are made before they are asked for, at least
IMAGES_AHEAD = 16  # for each worker, at least
LARGEST_PIECE = 16  # images that a worker takes at a time
PIPE_BYTES = 1 << 20

# The program of the workers' process. It imports our packages from their own folders, whatever else has
# their names.
_BOOT = """
import importlib.util, json, sys
told = json.loads(sys.argv[1])
sys.path[:] = told['path']
for name, home in told['packages'].items():
    file = home + '/__init__.py'
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[home])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
importlib.import_module(told['module']).serve(*told['files'])
"""
_ONE_THREAD = dict.fromkeys(('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'), '1')


class WorkerError(FlaxnetsError):
    """Worker processes cannot be started, or one of them has ended."""


@dataclass
class _Coming:
    """A batch that is being made."""

    slot: int
    left: int  # rows that are not made yet


class Pool(Iterator[Batch]):
    """Batches in their order, made by worker processes; an iterator to be closed.

    Args:
      images: makes the images; it is pickled.
      rows: images of a batch.
      steps: the numbers of the batches to make.
      processes: how many workers.
      bad: called for each image that cannot be read, with the number of its batch and what is wrong. What it
        raises is raised when that batch is due.
      made: called with how many images were made, and the seconds that they took.

    Raises:
      WorkerError: the images cannot be pickled, or this system has no `fork`; (while iterating) a worker
        has ended, or cannot open the images.
    """

    def __init__(
        self,
        images: Images,
        *,
        rows: int,
        steps: range,
        processes: int,
        bad: Callable[[int, str], None],
        made: Callable[[int, float], None],
    ) -> None:
        self._layout = Layout.of(images.example(), rows)
        self._rows, self._due, self._asked, self._last = rows, steps.start, steps.start, steps.stop
        self._ahead = max(AHEAD, -(-IMAGES_AHEAD * processes // rows))
        self._piece = max(1, min(LARGEST_PIECE, self._ahead * rows // (2 * processes)))
        self._bad, self._made = bad, made
        self._coming: dict[int, _Coming] = {}
        self._failed: dict[int, tuple[int, Exception]] = {}  # by batch: a row, and its error
        self._slots: list[npt.NDArray[np.uint8]] = []
        self._free: deque[int] = deque()
        self._unsent = bytearray()
        self._memory = _memory()
        try:
            self._workers = _Workers(images, self._layout, self._memory, processes)
        except BaseException:
            os.close(self._memory)
            raise
        self._end = weakref.finalize(self, _end, self._workers, self._memory)

    def __next__(self) -> Batch:
        if self._due == self._last:
            self.close()
            raise StopIteration
        if not self._end.alive:
            raise WorkerError('these batches are closed')
        try:
            self._ask()
            coming = self._coming[self._due]
            while coming.left and self._due not in self._failed:
                self._listen()
            if self._due in self._failed:
                raise self._failed[self._due][1]
        except BaseException:
            self.close()
            raise
        del self._coming[self._due]
        self._due += 1
        return self._given(coming.slot)

    def _given(self, slot: int) -> Batch:
        """The batch in a slot. The slot is free again once nothing refers to any of its arrays."""
        memory = self._slots[slot][:]
        # Its views, and views of those, have as their base an array of this slot alone.
        memory = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(memory, self._free.append, slot).atexit = False
        return self._layout.batch(memory)

    def _ask(self) -> None:
        """Has workers make the batch that is due and those after it."""
        end = min(self._due + self._ahead + 1, self._last)
        while self._asked < end:
            slot = self._free.popleft() if self._free else self._new_slot()
            self._coming[self._asked] = _Coming(slot, self._rows)
            for row in range(0, self._rows, self._piece):
                self._unsent += PIECE.pack(self._asked, slot, row, min(self._piece, self._rows - row))
            self._asked += 1
        self._send()

    def _new_slot(self) -> int:
        slot = len(self._slots)
        os.ftruncate(self._memory, (slot + 1) * self._layout.nbytes)
        self._slots.append(self._layout.opened(self._memory, slot))
        return slot

    def _send(self) -> None:
        """Sends what the pipe takes; the rest goes when workers have answered."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # dead workers are noticed by `_listen`
            while self._unsent:
                del self._unsent[: os.write(self._workers.pieces, self._unsent)]

    def _listen(self) -> None:
        """Waits for answers and takes them."""
        for kind, *what in self._workers.answers():
            if kind == 'made':
                batch, rows, seconds = what
                self._coming[batch].left -= rows
                self._made(rows, seconds)
            elif kind == 'failed':
                batch, row, error = what
                failed = self._failed.get(batch, (row, error))
                self._failed[batch] = min(failed, (row, error), key=itemgetter(0))
            else:
                batch, problem = what
                try:
                    self._bad(batch, problem)
                except FlaxnetsError as error:
                    self._failed.setdefault(batch, (-1, error))
        if self._unsent:
            self._send()

    def close(self) -> None:
        """Ends the workers. Batches that were given out stay as they are."""
        self._end()


def _memory() -> int:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('flaxnets-batches', os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Workers:
    """The processes and the pipes to them.

    Attributes:
      pieces: the pipe for work, which does not block.
    """

    def __init__(self, images: Images, layout: Layout, memory: int, processes: int) -> None:
        if not hasattr(os, 'fork'):
            raise WorkerError('this system has no fork, which worker processes need: use threads')
        try:
            payload = pickle.dumps((images, layout), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise WorkerError(
                f'the images cannot be handed to worker processes: {error}; use threads, or classes and '
                'functions of a module'
            ) from error
        self._selector = selectors.DefaultSelector()
        read, self.pieces = os.pipe()
        os.set_blocking(self.pieces, False)
        with contextlib.suppress(ImportError, AttributeError, OSError):  # Linux alone has it
            import fcntl

            fcntl.fcntl(self.pieces, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        pairs = [os.pipe() for _ in range(processes)]
        with _memory_file(payload) as held:
            theirs = [write for _, write in pairs]
            files = [held, memory, read, theirs]
            self._process = _start(files, (held, memory, read, *theirs))
        for descriptor in (read, *theirs):
            os.close(descriptor)
        assert self._process.stdout is not None
        self._status = Inbox(os.dup(self._process.stdout.fileno()))
        self._process.stdout.close()
        self._inboxes = [Inbox(answers) for answers, _ in pairs]
        for inbox in (self._status, *self._inboxes):
            self._selector.register(inbox.pipe, selectors.EVENT_READ, inbox)

    def answers(self) -> Iterator[tuple[Any, ...]]:
        """Waits for messages of workers, and gives those that have come.

        Raises:
          WorkerError: one of them has ended.
        """
        for key, _ in self._selector.select():
            inbox: Inbox = key.data
            try:
                messages = inbox.take()
            except (EOFError, OSError):
                raise self._lost() from None
            if inbox is self._status:
                raise self._lost(*messages[:1])
            yield from messages

    def _lost(self, message: tuple[Any, ...] | None = None) -> WorkerError:
        """The error to raise when the workers, or one of them, have ended."""
        if message is None and select.select([self._status.pipe], [], [], GRACE)[0]:
            with contextlib.suppress(EOFError, OSError, IndexError):
                message = self._status.take()[0]
        if message is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
            return WorkerError(f'the process of the workers {_ended(self._process.returncode)}')
        if message[0] == 'unopened':
            return WorkerError(
                f'worker processes cannot open the images: {message[1]}; use threads, or classes and '
                'functions of a module that can be imported without JAX'
            )
        return WorkerError(f'a worker process {_ended(message[2])}')

    def close(self) -> None:
        self._selector.close()
        os.close(self.pieces)
        for inbox in (self._status, *self._inboxes):
            inbox.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            'was killed (SIGKILL), as the system does where memory runs out: take fewer workers or threads. '
            'The run can be resumed'
        )
    if code is not None and code < 0:
        return f'ended by {signal.Signals(-code).name}. The run can be resumed'
    return f'ended with the exit code {code}; see its messages'


def _start(files: list[Any], passed: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """The process that opens the images and forks the workers."""
    package = __name__.partition('.')[0]
    homes = {'flaxnets': flaxnets.__file__, package: sys.modules[package].__file__}
    told = {
        'path': sys.path,
        'packages': {name: str(Path(str(file)).parent) for name, file in homes.items()},
        'module': f'{__package__}.worker',
        'files': files,
    }
    return subprocess.Popen(
        [sys.executable, '-c', _BOOT, json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=passed,
        env={**os.environ, **_ONE_THREAD},
    )


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A file without a name that holds `data`, to be read from its beginning."""
    descriptor = _memory()
    try:
        with open(descriptor, 'wb', closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _end(workers: _Workers, memory: int) -> None:
    workers.close()
    os.close(memory)

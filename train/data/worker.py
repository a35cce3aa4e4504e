"""Makes images in worker processes, and puts them into memory that they share with the main process.

The main process starts one process that does not import JAX (`serve`). It opens the images once and forks the
workers, which therefore share what it has read. Each takes pieces of batches from a common pipe, and reports
on a pipe of its own. All of them end when the main process closes its pipes or has ended, however it ended.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import mmap
import os
import pickle
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flaxnets.errors import FlaxnetsError

from .images import Fields, Images

Batch = dict[str, npt.NDArray[Any]]

# A piece of a batch: number of the batch, its slot, first row, rows. A power of two in size: a pipe never
# splits it.
PIECE = struct.Struct('<qiii12x')
GRACE = 5.0  # seconds that a worker has to finish its image when the work ends
ALIGNED = 64  # bytes; XLA takes arrays that are aligned so without a copy


@dataclass(frozen=True)
class Array:
    """Where an array of a batch lies in its slot.

    Attributes:
      shape: [rows, ...].
      dtype: NumPy's text for it, such as '<i4'.
      offset: bytes from the beginning of the slot.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """How a batch lies in a slot of the shared memory.

    Attributes:
      arrays: the arrays of a batch, by name.
      nbytes: the size of a slot.
    """

    arrays: Mapping[str, Array]
    nbytes: int

    @staticmethod
    def of(example: Fields, rows: int) -> Layout:
        """The layout of batches of `rows` images that have fields as `example` has."""
        arrays, end = {}, 0
        for name, value in example.items():
            value = np.asarray(value)
            arrays[name] = Array((rows, *value.shape), value.dtype.str, end)
            end += -(-arrays[name].nbytes // ALIGNED) * ALIGNED
        page = mmap.ALLOCATIONGRANULARITY
        return Layout(arrays, -(-end // page) * page)

    def opened(self, memory: int, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes of a slot. Views of it keep it alive."""
        return np.frombuffer(mmap.mmap(memory, self.nbytes, offset=slot * self.nbytes), np.uint8)

    def batch(self, memory: npt.NDArray[np.uint8]) -> Batch:
        """The arrays in a slot."""
        return {
            name: memory[a.offset : a.offset + a.nbytes].view(a.dtype).reshape(a.shape)
            for name, a in self.arrays.items()
        }


def serve(payload: int, memory: int, pieces: int, answers: Sequence[int]) -> None:
    """Opens the images and forks a worker for each of `answers`; returns when the workers have ended.

    Args:
      payload: file with the pickled `Images` and `Layout`.
      memory: the shared memory, a file of slots.
      pieces: pipe to read pieces from.
      answers: pipes to write to, one for each worker.

    Standard input is a pipe that the main process keeps open as long as it wants the workers. Standard output
    is a pipe to it, for what becomes of the workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # ctrl-C and Slurm mean the main process, which ends us
        signal.signal(number, signal.SIG_IGN)
    status = os.dup(1)
    os.dup2(2, 1)  # what anything prints belongs on the terminal
    sys.modules['jax'] = None  # type: ignore[assignment]  # an import, of a second and 150 MB, fails
    try:
        logging.disable()
        with open(payload, 'rb') as file:
            images, layout = pickle.load(file)
        images.prepare()
        logging.disable(logging.NOTSET)
    except Exception as error:
        send(status, 'unopened', f'{type(error).__name__}: {error}')
        return
    gc.collect()
    gc.freeze()  # else the collector would write to every page that the workers share
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    workers = {}
    for place, answer in enumerate(answers):
        pid = os.fork()
        if not pid:
            _be_worker(images, layout, memory, pieces, answers[place:], (woken, wake, status))
        workers[pid] = place
        os.close(answer)
    os.close(pieces)
    _watch(workers, status, woken)


def _be_worker(
    images: Images,
    layout: Layout,
    memory: int,
    pieces: int,
    answers: Sequence[int],
    foreign: Sequence[int],
) -> None:
    """All of a worker's life; does not return."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (*answers[1:], *foreign):
            os.close(descriptor)
        work(images, layout, memory, pieces, answers[0])
        code = 0
    except BrokenPipeError:  # the main process is gone
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def work(images: Images, layout: Layout, memory: int, pieces: int, answers: int) -> None:
    """Makes images until the pipe of pieces is closed."""
    slots: dict[int, Batch] = {}
    while piece := os.read(pieces, PIECE.size):
        batch, slot, first, rows = PIECE.unpack(piece)
        if slot not in slots:
            slots[slot] = layout.batch(layout.opened(memory, slot))
        start, row = time.perf_counter(), first

        def bad(problem: str, batch: int = batch) -> None:
            send(answers, 'bad', batch, problem)

        try:
            for row in range(first, first + rows):
                _put(slots[slot], row, images(batch, row, bad))
        except Exception as error:
            send(answers, 'failed', batch, row, _portable(error))
        else:
            send(answers, 'made', batch, rows, time.perf_counter() - start)


def send(pipe: int, *message: Any) -> None:
    """Writes a message; `Inbox` reads it."""
    data = pickle.dumps(message)
    data = len(data).to_bytes(4, 'big') + data
    while data:
        data = data[os.write(pipe, data) :]


class Inbox:
    """Messages from a pipe, as many as have come with one call of the system."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self._unread = bytearray()

    def take(self) -> list[tuple[Any, ...]]:
        """Waits for bytes, and gives the messages that are complete.

        Raises:
          EOFError: the pipe's other end is closed.
        """
        data = os.read(self.pipe, 1 << 16)
        if not data:
            raise EOFError
        self._unread += data
        messages = []
        while len(self._unread) >= (end := 4 + int.from_bytes(self._unread[:4], 'big')):
            messages.append(pickle.loads(self._unread[4:end]))
            del self._unread[:end]
        return messages

    def close(self) -> None:
        os.close(self.pipe)


def _put(batch: Batch, row: int, made: Fields) -> None:
    for name, value in made.items():
        found = np.asarray(value)
        if found.shape != batch[name].shape[1:] or found.dtype != batch[name].dtype:
            raise FlaxnetsError(
                f'{name}: {found.dtype}{list(found.shape)} differs from the first one of the data, '
                f'{batch[name].dtype}{list(batch[name].shape[1:])}; images of a batch must be alike'
            )
        batch[name][row] = found


def _portable(error: Exception) -> Exception:
    """An error as another process can raise it."""
    if not isinstance(error, FlaxnetsError):
        error.add_note(f'In a worker process:\n{"".join(traceback.format_exception(error))}')
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f'in a worker process: {"".join(traceback.format_exception(error))}')
    return error


def _watch(workers: dict[int, int], status: int, woken: int) -> None:
    """Reports workers that end, until the main process closes its pipe; then ends all of them."""
    wanted = True
    while workers and wanted:
        ready = select.select([0, woken], [], [])[0]
        wanted = 0 not in ready
        if woken in ready:
            os.read(woken, 1 << 12)
        with contextlib.suppress(BrokenPipeError):
            _bury(workers, lambda place, code: send(status, 'ended', place, code))
    deadline = time.monotonic() + GRACE
    while workers and time.monotonic() < deadline:
        select.select([woken], [], [], 0.05)
        _bury(workers, lambda place, code: None)
    for pid in workers:  # not reaped yet, so that these are still our children
        os.kill(pid, signal.SIGKILL)


def _bury(workers: dict[int, int], tell: Callable[[int, int], None]) -> None:
    """Removes the workers that have ended; `tell` is called with the place and exit code of each."""
    while workers:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        place = workers.pop(pid)
        tell(place, os.waitstatus_to_exitcode(code))

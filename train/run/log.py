"""Logs a run: a line on the terminal, a record in WORKDIR/log.jsonl, a point in TensorBoard's files.

A record is a JSON object on a line of its own, {'kind': 'train', 'eval' or an event, 'step': ...}.
A killed run leaves at most one broken line, the last one. A run that goes on after step N drops what was
recorded past it: those steps happen again. A log that cannot be written (a full disk) ends no run.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
from tqdm import tqdm

from flaxnets.errors import FlaxnetsError
from flaxnets.store.remote import StorePath, is_remote, place

from . import tensorboard

FILE = 'log.jsonl'
# tqdm's own is too long for what stands beside it.
BAR = '{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}'
_OF_STEPS = ('train', 'non_finite', 'bad_image')
_OF_EVALUATIONS = ('eval', 'eval_non_finite')
REWRITE_SECONDS = 60.0  # between two writings of the whole log where nothing can be appended (gs://)


class Log:
    """The log of one process; only the primary one says anything.

    Args:
      workdir: of the run; `gs://` too.
      primary: whether this process writes.
      total_steps: how many steps the run has.
      first_step: the step that it goes on after; 0 at the start.
      evaluated: whether that step has been evaluated already; an evaluation that was not kept is made again.
      images_per_step: images of the global batch.
      quiet: show nothing on the terminal but what went wrong.
      may_write: raises once another run has taken the workdir over; nothing is written to a store then.
    """

    def __init__(
        self,
        workdir: str,
        *,
        primary: bool,
        total_steps: int,
        first_step: int,
        evaluated: bool = True,
        images_per_step: int,
        quiet: bool = False,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._primary, self._quiet = primary, quiet
        self._total, self._images = total_steps, images_per_step
        self._bar: Any = None
        self._failed: set[str] = set()  # what cannot be written
        self._tensorboard: tensorboard.EventFile | None = None
        self._records: _Records | None = None
        if not primary:
            return
        try:
            if is_remote(workdir):
                self._records = _Object(workdir, first_step, evaluated, may_write)
            else:
                self._records = _File(workdir, first_step, evaluated)
        except OSError as error:
            raise FlaxnetsError(f'{workdir}/{FILE} cannot be written: {error.strerror or error}') from error
        if tensorboard.is_available() and not is_remote(workdir):
            with self._warning('tensorboard/'):
                self._tensorboard = tensorboard.EventFile(f'{workdir}/tensorboard', first_step)
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR)

    def advance(self, step: int) -> None:
        """Moves the progress bar to a step that is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Logs means over the steps since the last line: 'epoch', 'loss', 'top1' (percent), ..."""
        self._write('train', step, values)
        if self._bar is not None:
            self._bar.set_postfix_str(_train_text(values))
        elif self._speaks():
            left = _duration((self._total - step) * self._images / values['images_per_second'])
            self._say(f'step {step}/{self._total}  {_train_text(values)}  {left} left')

    def eval(self, step: int, values: dict[str, float]) -> None:
        """Logs the results of an evaluation after this step (`Evaluation.values`)."""
        self._write('eval', step, values)
        if self._speaks():
            self._say(
                f'step {step}: top-1 {values["top1"]:.2f} %, top-5 {values["top5"]:.2f} %, '
                f'loss {values["loss"]:.4f} on {values["images"]} images'
            )

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """Logs something that is not a measurement; the terminal shows it too."""
        self._write(kind, fields.pop('step', None), {'message': message, **fields})
        if not self._primary and kind == 'bad_image':  # what no other process knows
            self._say(f'process {jax.process_index()}: {message}')
        if self._primary and (not self._quiet or kind not in ('saved', 'resume', 'devices')):
            self._say(message)

    @contextlib.contextmanager
    def evaluating(self, images: int) -> Iterator[Callable[[int], Any]]:
        """Shows an evaluation's progress; gives a function to call with how many more images are done."""
        if self._bar is None:
            yield lambda more: None
            return
        with tqdm(total=images, unit='image', desc='evaluating', leave=False, dynamic_ncols=True) as bar:
            yield bar.update

    def flush(self) -> None:
        """Writes what is left, as must be done before a checkpoint is committed; any thread may call this."""
        if self._records is not None:
            with self._warning(FILE):
                self._records.flush()

    def close(self) -> None:
        """Writes what is left and closes the files; another call does nothing."""
        for part in (self._records, self._tensorboard, self._bar):
            if part is not None:
                with self._warning('the log'):
                    part.close()
        self._records = self._tensorboard = self._bar = None

    def _speaks(self) -> bool:
        return self._primary and not self._quiet

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, kind: str, step: int | None, values: dict[str, Any]) -> None:
        if self._records is None:
            return
        with self._warning(FILE):
            self._records.add({'kind': kind, 'step': step, 'time': time.time(), **values})
        if self._tensorboard is not None and kind in ('train', 'eval'):
            writer, self._tensorboard = self._tensorboard, None
            with self._warning('tensorboard/'):
                writer.add(step, {f'{kind}/{name}': value for name, value in values.items()})
                self._tensorboard = writer  # else there is no telling what its file holds

    @contextlib.contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """Says once that something cannot be written, and goes on."""
        try:
            yield
        except OSError as error:
            if what not in self._failed:
                self._say(f'{what} cannot be written: {error.strerror or error}; the run goes on')
            self._failed.add(what)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Records(Protocol):
    """Writes the records of log.jsonl; those that are there stay, but for steps that happen again."""

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record.

        Raises:
          OSError: it could not be written yet; it is written with a later one.
        """

    def flush(self) -> None:
        """Writes what is not written yet.

        Raises:
          OSError: it could not be written yet.
        """

    def close(self) -> None: ...


class _File:
    """Records that are appended to a file, each at once."""

    def __init__(self, workdir: str, first_step: int, evaluated: bool) -> None:
        path = Path(workdir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f'.{FILE}.part')
        beside.write_text(''.join(_kept(workdir, first_step, evaluated)))
        beside.replace(path)
        self._file = io.FileIO(path, 'a')
        self._waiting = b''  # to be appended once there is room
        self._lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._waiting += _line(record).encode()
        self.flush()

    def flush(self) -> None:
        with self._lock:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        with self._file:
            self.flush()


class _Object:
    """Records in a store, where nothing can be appended: all of them are written again now and then.

    A thread does it, so that no step waits for a network that is down.
    """

    def __init__(self, workdir: str, first_step: int, evaluated: bool, may_write: Callable[[], None]) -> None:
        self._path = StorePath(workdir) / FILE
        self._may_write = may_write
        self._lines = _kept(workdir, first_step, evaluated)
        self._lock = threading.Lock()  # held while they are written
        self._written = -1  # how many
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None  # that the thread met
        self._tried = 0.0  # when they were last written, or were to be
        self.flush()

    def add(self, record: dict[str, Any]) -> None:
        self._lines.append(_line(record))
        error, self._error = self._error, None
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() - self._tried > REWRITE_SECONDS:
            self._tried = time.monotonic()
            self._thread = threading.Thread(target=self._try)
            self._thread.start()
        if error is not None:
            raise error

    def _try(self) -> None:
        try:
            self.flush()
        except OSError as error:
            self._error = error

    def flush(self) -> None:
        with self._lock:
            self._tried = time.monotonic()
            try:
                self._may_write()
            except FlaxnetsError:  # another run has the workdir, and its log: the next save says so
                return
            lines = self._lines[:]
            if len(lines) != self._written:
                self._path.write_text(''.join(lines))
                self._written = len(lines)

    def close(self) -> None:
        self.flush()
        if self._thread is not None:
            self._thread.join()


def _kept(workdir: str, first_step: int, evaluated: bool) -> list[str]:
    """The lines of a log that stay when the run goes on after a step."""
    return [_line(record) for record in read(workdir) if not _is_past(record, first_step, evaluated)]


def _is_past(record: dict[str, Any], step: int, evaluated: bool) -> bool:
    """Whether what a record tells of will happen again in a run that goes on after `step`."""
    if record['kind'] in _OF_EVALUATIONS and not evaluated and record['step'] == step:
        return True
    return record['kind'] in (*_OF_STEPS, *_OF_EVALUATIONS) and record['step'] > step


def _line(record: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity: null stands for them.
    sound = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(sound) + '\n'


def read(workdir: str) -> list[dict[str, Any]]:
    """The records of a run, oldest first; none if there is no log.

    Raises:
      FlaxnetsError: a line that is not the last is no record.
    """
    path = place(workdir) / FILE
    try:
        lines = path.read_bytes().decode().split('\n')
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or 'kind' not in record:
                raise ValueError('not a record')
        except ValueError as error:
            # What follows the last newline is empty, or was being written when the run was killed.
            if number == len(lines):
                break
            raise FlaxnetsError(f'{path}, line {number}: not a record of a run ({error})') from error
        records.append(record)
    return records


def _train_text(values: dict[str, float]) -> str:
    parts = [f'epoch {values["epoch"]:.1f}']
    if 'loss' in values:
        parts.append(f'loss {values["loss"]:.3f}')
    if 'top1' in values:
        parts.append(f'top-1 {values["top1"]:.1f} %')
    parts.append(f'lr {values["learning_rate"]:.4g}')
    parts.append(f'{values["images_per_second"]:.0f} images/s')
    if 'feed_images_per_second' in values:
        parts.append(f'(feed {values["feed_images_per_second"]:.0f})')
    parts.append(f'waiting {100 * values["wait_share"]:.0f} %')
    return '  '.join(parts)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f'{seconds:.0f} s'
    return f'{minutes:.0f} min' if hours < 2 else f'{hours:.0f} h {minutes % 60:.0f} min'

"""Writes checkpoints of a run while it trains on, and checks them when it reads them.

    DIR/1200/           a step: `flaxnets.store.arrays` says what is in it
    DIR/1100.damaged/   set aside at a restore, because it was damaged; it is never deleted

Orbax's own manager is not used: it hides the error of a failed save until it is asked in a certain way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401 - here, and not by the thread that writes the first checkpoint
from jax.experimental import multihost_utils

from flaxnets.checks import all_finite
from flaxnets.errors import CheckpointError
from flaxnets.store import arrays
from flaxnets.store.files import fsync
from flaxnets.store.remote import StorePath, place
from flaxnets.words import some

from ..parallel import together

DAMAGED = '.damaged'
REPLACED = '.replaced'  # a step while another of its number is written
DELETED = '.deleted'
# An array in checkpoints of the first versions: optax's count of updates, which always equalled `step`.
FORMER = re.compile(r'opt_state/(.+/)?\d+/count')
Check = Callable[[dict[str, Any]], None]
NONE = -1  # in place of a step, from the first process to the others: there is no checkpoint


@dataclass(frozen=True)
class Save:
    """How a save ended.

    Attributes:
      step: the step that was to be saved.
      seconds: from the call of `save` until it was committed, or had failed.
      error: why there is no such checkpoint; None if there is.
    """

    step: int
    seconds: float
    error: Exception | None


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read and found sound.

    Attributes:
      step: its number.
      state: NumPy arrays in the structure of the target.
      meta: as it was given to `save`, after a trip through JSON.
      score: as it was given to `save`.
      skipped: newer steps that were damaged and are set aside, and why.
    """

    step: int
    state: Any
    meta: dict[str, Any]
    score: float | None
    skipped: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of a workdir; a context manager, at whose end the last save is finished.

    Args:
      directory: the folder of the steps and of nothing else; `gs://` too. In a job of several processes all
        must see the same one.
      keep_last: how many of the newest steps stay.
      keep_best: how many steps with the highest scores stay besides.
      primary: whether this process writes. The others read, and `save` does nothing there.
    """

    def __init__(self, directory: str, keep_last: int, keep_best: int, primary: bool = True) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f'at least one checkpoint must stay: {keep_last=}, {keep_best=}')
        self._directory = place(directory)
        self._keep_last, self._keep_best, self._primary = keep_last, keep_best, primary
        self._scores: dict[int, float | None] = {}
        self._saves: list[Save] = []
        self._thread: threading.Thread | None = None
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(arrays.quiet())  # while this is open: some messages of Orbax come late

    def save(
        self,
        step: int,
        state: Any,
        meta: dict[str, Any],
        score: float | None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins to write a checkpoint and returns; `poll` says how it ended.

        Waits for an earlier save that is not finished. A step that exists is replaced once the new one is
        committed. The arrays must not change any more: host copies, not views of donated device memory.

        Args:
          step: its number.
          state: a tree of NumPy arrays, the same in every process.
          meta: a JSON object: settings, data position.
          score: of an evaluation of this state, higher is better; None without one.
          before: called first by the thread that writes; it keeps what must be kept before the checkpoint is.

        Raises:
          CheckpointError: an array or the score is not finite: such a state is never saved.
        """
        state = {name: np.asarray(leaf) for name, leaf in arrays.named(state).items()}
        _check_finite(step, state, score)
        score = None if score is None else float(score)
        facts = json.loads(json.dumps({'step': step, 'score': score, 'meta': meta}, allow_nan=False))
        if not self._primary:
            return
        started = time.monotonic()
        self.wait()
        self._thread = threading.Thread(target=self._save, args=(step, state, facts, started, before))
        self._thread.start()

    def poll(self) -> list[Save]:
        """The saves that have ended since the last call, in their order; does not wait."""
        count = len(self._saves)  # the other thread may add one meanwhile
        finished, self._saves[:count] = self._saves[:count], []
        return finished

    def wait(self) -> None:
        """Waits until no save is under way; `poll` says how they ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._stack.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The committed steps, newest first; they may be damaged."""
        if not self._directory.exists():
            return []
        names = [path.name for path in self._directory.iterdir()]
        steps = [int(name) for name in names if name.isdecimal() and name == str(int(name))]
        return sorted((step for step in steps if arrays.is_committed(self._path(step))), reverse=True)

    def meta(self) -> dict[str, Any] | None:
        """What was saved as `meta` with the newest step that can be read; no array is looked at."""
        for step in self.steps():
            with contextlib.suppress(CheckpointError):
                return arrays.read_manifest(self._path(step)).facts['meta']
        return None

    def restore(self, target: Any, check: Check = lambda meta: None) -> Restored | None:
        """Reads the newest sound checkpoint. Every process must call it.

        A damaged one is set aside (renamed to STEP.damaged) and the one before it is tried. Of several
        processes the first decides and the others read the step that it found.

        Args:
          target: a tree of arrays or `jax.ShapeDtypeStruct`s, as the state that was saved.
          check: called with the `meta` of a checkpoint before any array is compared; raises an error of its
            own to refuse it.

        Returns:
          None if there is no checkpoint.

        Raises:
          CheckpointError: all are damaged; or the newest sound one holds other arrays than the target, with
            the differences. Of several processes all raise `train.parallel.JobError` for it.
        """
        self.wait()
        if jax.process_count() == 1:
            return self._restore(target, check)
        return self._restore_together(target, check)

    def _restore_together(self, target: Any, check: Check) -> Restored | None:
        """`_restore` by several processes: the others read the step that the first one found."""
        first = together(lambda: self._restore(target, check) if self._primary else None)
        own = np.int32(first.step if first else NONE)
        found = int(multihost_utils.broadcast_one_to_all(own, is_source=self._primary))
        if found == NONE:
            return None
        return together(lambda: first or self._open(found, target, check))

    def _restore(self, target: Any, check: Check) -> Restored | None:
        if self._primary:
            self._tidy()
        skipped: list[tuple[int, str]] = []
        for newest in self.steps():
            try:
                return self._open(newest, target, check, tuple(skipped))
            except arrays.DamagedError as error:
                skipped.append((newest, f'{error}{self._set_aside(newest)}'))
        aside = sorted(path.name for path in self._directory.glob(f'*{DAMAGED}*'))
        if skipped or aside:
            reasons = [f'{number}: {reason}' for number, reason in skipped] or aside
            raise CheckpointError(
                f'{self._directory}: no checkpoint is sound; the damaged ones are set aside. Remove them or '
                f'choose another workdir to start from the beginning. {"; ".join(reasons)}'
            )
        return None

    def _open(
        self, step: int, target: Any, check: Check, skipped: tuple[tuple[int, str], ...] = ()
    ) -> Restored:
        path = self._path(step)
        manifest = arrays.read_manifest(path)
        if manifest.facts.get('step') != step:
            raise arrays.DamagedError(f'{path}: holds step {manifest.facts.get("step")}')
        check(manifest.facts['meta'])
        wanted = arrays.named(target)
        _compare(path, manifest.arrays, wanted)
        found = arrays.read_arrays(path, manifest.arrays)
        state = jax.tree.unflatten(jax.tree.structure(target), [found[name] for name in wanted])
        return Restored(step, state, manifest.facts['meta'], manifest.facts['score'], skipped)

    def _set_aside(self, step: int) -> str:
        """Renames a damaged step; returns what to say if that is not possible."""
        if not self._primary:
            return ''
        names = itertools.chain([''], (f'.{n}' for n in itertools.count(1)))
        free = (self._directory / f'{step}{DAMAGED}{name}' for name in names)
        try:
            arrays.move(self._path(step), next(path for path in free if not path.exists()))
        except OSError as error:
            return f' (and it cannot be set aside: {error})'
        return ''

    def _save(
        self,
        step: int,
        state: dict[str, np.ndarray],
        facts: dict[str, Any],
        started: float,
        before: Callable[[], None],
    ) -> None:
        error = None
        try:
            before()
            self._commit(step, state, facts)
        except Exception as failure:  # a thread's errors are seen by nobody else
            error = failure
        self._saves.append(Save(step, time.monotonic() - started, error))

    def _commit(self, step: int, state: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        self._tidy()
        path, old = self._path(step), self._directory / f'{step}{REPLACED}'
        replaces = path.exists()
        if replaces:
            arrays.move(path, old)
        try:
            arrays.write(path, state, facts)
        except CheckpointError:
            if replaces:
                arrays.move(old, path)
            raise
        self._scores[step] = facts['score']
        _flush(path)
        arrays.remove(old)
        self._prune(step)

    def _tidy(self) -> None:
        """Removes what killed or failed saves left, and brings back the step that one was to replace."""
        if not self._directory.exists():
            return
        paths: list[Path | StorePath] = [*self._directory.iterdir()]
        for path in paths:
            started = path.name.isdecimal() and not arrays.is_committed(path)  # in a store without renames
            if started or arrays.UNFINISHED in path.name or path.suffix == DELETED:
                arrays.remove(path)
        replaced: list[Path | StorePath] = [*self._directory.glob(f'*{REPLACED}')]
        for old in replaced:
            if arrays.is_committed(path := self._directory / old.stem):
                arrays.remove(old)
            else:
                arrays.move(old, path)

    def _prune(self, written: int) -> None:
        steps = [step for step in self.steps() if self._is_readable(step)]
        keep = {written, *steps[: self._keep_last], *self._best(steps, self._keep_best)}
        for step in set(steps) - keep:
            path, doomed = self._path(step), self._directory / f'{step}{DELETED}'
            if isinstance(path, Path):  # half of a step must not look like one
                with contextlib.suppress(OSError):
                    path = path.rename(doomed)
            arrays.remove(path)
            self._scores.pop(step, None)

    def _best(self, steps: list[int], count: int) -> list[int]:
        scored = [(self._scores[step], step) for step in steps if self._is_readable(step)]
        ranked = sorted(((score, step) for score, step in scored if score is not None), reverse=True)
        return [step for _, step in ranked[:count]]

    def _is_readable(self, step: int) -> bool:
        """Whether a step's score is known, read from its manifest if need be."""
        if step not in self._scores:
            with contextlib.suppress(CheckpointError):
                self._scores[step] = arrays.read_manifest(self._path(step)).facts.get('score')
        return step in self._scores

    def _path(self, step: int) -> Path | StorePath:
        return self._directory / str(step)


def _check_finite(step: int, state: dict[str, np.ndarray], score: float | None) -> None:
    bad = [name for name, array in state.items() if not all_finite(array)]
    if score is not None and not math.isfinite(score):
        bad.insert(0, f'the score ({score})')
    if bad:
        raise CheckpointError(f'step {step} is not saved: not finite: {some(bad, 5)}')


def _compare(path: Path | StorePath, have: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Checks that a checkpoint has the arrays that are wanted.

    Raises:
      CheckpointError: it has others; the message lists the differences.
    """
    problems = [f'has no {name}' for name in wanted if name not in have]
    strange = (name for name in have if name not in wanted and not FORMER.fullmatch(name))
    problems += [f'has {name}, which is not wanted' for name in strange]
    for name, leaf in wanted.items():
        leaf = leaf if hasattr(leaf, 'dtype') else np.asarray(leaf)
        want = f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
        if name in have and (found := f'{have[name]["dtype"]}{have[name]["shape"]}') != want:
            problems.append(f'has {name} as {found}, wanted is {want}')
    if problems:
        more = f'; and {len(problems) - 10} more differences' if len(problems) > 10 else ''
        raise CheckpointError(f'{path} is of another run: it {"; ".join(problems[:10])}{more}')


def _flush(path: Path | StorePath) -> None:
    """Has the system write a step to the disk, so that it survives a loss of power: older ones go next."""
    if isinstance(path, StorePath):
        return
    for folder, _, files in os.walk(path):
        for name in ('.', *files):
            fsync(os.path.join(folder, name))
    fsync(path.parent)

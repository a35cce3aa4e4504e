"""A training run, in chapters: open, restore, train, evaluate, save, finish."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxnets.errors import FlaxnetsError
from flaxnets.store import weights
from flaxnets.store.remote import staged
from flaxnets.zoo.records import to_json

from . import parallel
from .data.augment import eval_transform, train_transform
from .data.batches import Batch, eval_batches, train_batches
from .evaluation import pictures
from .evaluation.metrics import Evaluation, Evaluator
from .job import Job, abstract_state, initial_state, make_job
from .notes import Note
from .run.checkpoints import Checkpoints
from .run.lock import Lock
from .run.log import Log, read
from .run.stop import Stop
from .settings import Settings, complete, difference, from_json, validate
from .settings import to_json as settings_json
from .step.schedule import learning_rate
from .step.state import TrainState
from .step.step import make_train_step

EVAL_IMAGES = 64  # of a device at a time
IN_FLIGHT = 2  # steps that may be under way: enough to hide the host, few enough to keep memory flat


class NonFiniteError(FlaxnetsError):
    """A loss, gradient or statistic was not a finite number, and the run was told to stop."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done.
      stopped: why it stopped early ('SIGTERM', 'SIGINT', 'preemption'); None if it came to its end.
      evaluation: the last one, None if there was none.
      weights: the directory of the trained weights, in the workdir; None if the run stopped early, and in
        all processes but the first.
    """

    step: int
    stopped: str | None
    evaluation: Evaluation | None
    weights: str | None


def train(
    settings: Settings, workdir: str, *, quiet: bool = False, profile: tuple[int, int] | None = None
) -> Outcome:
    """Trains, or goes on with what the workdir holds.

    A run that was stopped or killed continues bit by bit as if it had not been. In a job of several
    processes each calls this, after `jax.distributed.initialize`, with a workdir that all of them see.

    Args:
      settings: of the run; at a resume they must be those it began with, but for
        `train.settings.MAY_CHANGE`.
      workdir: folder of checkpoints, logs and results; `gs://` too.
      quiet: no progress bar.
      profile: first and last step of a profile, written to WORKDIR/profile.

    Raises:
      FlaxnetsError: bad settings or data, other settings than the workdir's, a workdir in use, numbers that
        are not finite, too many unreadable images.
    """
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        job, checkpoints, lock = parallel.together(
            lambda: _open(stack, settings, workdir, primary),
            alike=lambda opened: _what_all_share(opened[0]),
        )
        notes: list[str] = []
        start = restore(job, checkpoints, notes.append)
        first = int(start.state.step)
        if first > job.total_steps:
            raise FlaxnetsError(
                f'{workdir} holds a run of {first} steps, more than the {job.total_steps} asked for: give a '
                'larger max_steps, or 0'
            )
        log = parallel.together(
            lambda: stack.enter_context(
                Log(
                    workdir,
                    primary=primary,
                    total_steps=job.total_steps,
                    first_step=first,
                    evaluated=start.evaluated,
                    images_per_step=job.settings.batch_size,
                    epoch_steps=job.epoch_steps,
                    quiet=quiet,
                    may_write=lock.check if lock else lambda: None,
                )
            )
        )
        for note in notes:
            log.event('weights', note, step=first)
        for step, reason in start.damaged:
            log.event('damaged', f'checkpoint {step} is set aside: {reason}', step=step)
        if profile and first < job.total_steps and not (first < profile[1] and profile[0] <= job.total_steps):
            steps = f'steps {first + 1} to {job.total_steps}'
            log.event(
                'note', f'no profile of steps {profile[0]} to {profile[1]}: it is {steps} that are done'
            )
        stop = stack.enter_context(Stop())
        run = _Run(job, workdir, log, checkpoints, stop, lock, profile)
        return run.go(start)


def _open(
    stack: contextlib.ExitStack, settings: Settings, workdir: str, primary: bool
) -> tuple[Job, Checkpoints, Lock | None]:
    validate(settings)  # before anything is written
    lock = stack.enter_context(Lock(workdir)) if primary else None
    checkpoints = stack.enter_context(
        Checkpoints(f'{workdir}/checkpoints', settings.keep_last, settings.keep_best, primary)
    )
    meta = checkpoints.meta()
    return make_job(settings, from_json(meta['settings']) if meta else None), checkpoints, lock


def _what_all_share(job: Job) -> Any:
    """Of a job's processes; where the images lie and how many threads read them is each one's own."""
    own = dataclasses.replace(job.settings, data='', workers=0)
    return [settings_json(own), to_json(job.preprocess), job.fingerprints]


@dataclass(frozen=True)
class Start:
    """Where a run begins, or goes on.

    Attributes:
      state: its arrays.
      damaged: newer steps that were set aside, and why.
      evaluated: whether this state has been evaluated.
      bad_images: found so far.
      warnings: of the settings that the run began with.
    """

    state: TrainState
    damaged: tuple[tuple[int, str], ...] = ()
    evaluated: bool = False
    bad_images: int = 0
    warnings: tuple[str, ...] = ()


def restore(job: Job, checkpoints: Checkpoints, say: Callable[[str], None] = lambda note: None) -> Start:
    """The newest sound state of a workdir, or the initial one.

    Args:
      say: is told what became of the classifier of the weights that a new run begins with.

    Raises:
      FlaxnetsError: the workdir's run had other settings or data.
    """
    restored = checkpoints.restore(abstract_state(job), check=lambda meta: check_same_run(job, meta))
    if restored is None:
        return Start(parallel.together(lambda: initial_state(job, say)))
    # Earlier versions kept neither, and did not tell an evaluation that was not finite from none.
    evaluated = restored.meta.get('evaluated', restored.score is not None)
    meta = restored.meta
    return Start(
        restored.state,
        restored.skipped,
        evaluated,
        meta.get('bad_images', 0),
        tuple(meta.get('warnings', ())),
    )


def check_same_run(job: Job, meta: dict[str, Any]) -> None:
    """Refuses to go on with other settings or data than the run began with.

    Raises:
      FlaxnetsError: with every difference.
    """
    differences = difference(complete(from_json(meta['settings'])), job.settings)
    for part, fingerprint in job.fingerprints.items():
        if meta['data'].get(part) != fingerprint:
            differences.append(f'the {part} images are not the same ones ({job.settings.data})')
    if differences:
        raise FlaxnetsError(
            'the workdir holds a run with other settings; go on with its own, or choose another workdir:\n  '
            + '\n  '.join(differences)
        )


class _Interrupted(Exception):
    """An evaluation was asked to stop."""


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        job: Job,
        workdir: str,
        log: Log,
        checkpoints: Checkpoints,
        stop: Stop,
        lock: Lock | None,
        profile: tuple[int, int] | None,
    ) -> None:
        self.job, self.workdir, self.log, self.checkpoints = job, workdir, log, checkpoints
        self.stop, self.lock, self.primary, self.profile = stop, lock, lock is not None, profile
        self.evaluation: Evaluation | None = None
        self.evaluated = 0  # the step that it is of
        self.bad_images = self.bad_before = 0  # of all hosts, in the whole run and in earlier calls
        self.bad_elsewhere = 0  # of other hosts in this call, when last they were asked
        self.evaluator = Evaluator(job.inference, job.preprocess)
        self.saved: int | None = None
        self.trace = contextlib.ExitStack()
        self.profiling = False
        self.meta = {
            'settings': settings_json(job.settings),
            'config': to_json(job.config),
            'data': job.fingerprints,
            'warnings': [note.message for note in job.remarks if note.kind == 'warning'],
        }

    def go(self, start: Start) -> Outcome:
        job, first = self.job, int(start.state.step)
        self.bad_images = self.bad_before = start.bad_images
        if first:
            self.saved = first
            self.meta['warnings'] = list(start.warnings)
        if first == job.total_steps and start.evaluated:  # of which the log has all
            return self._finish(parallel.replicate(start.state), first, known=True)
        if first:
            self.log.event('resume', f'going on after step {first} of {job.total_steps}', step=first)
        else:
            for note in (*(Note('note', text) for text in job.notes), *job.remarks):
                self.log.event(note.kind, note.message, step=0)
        processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
        devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}{processes}'
        self.log.event('devices', f'training on {devices}', step=first)
        state = parallel.replicate(start.state)
        if first < job.total_steps:
            if first and self._evaluates(first) and not start.evaluated:  # it was stopped before that
                if self._evaluate(state, first) is None:
                    return self._stopped(state, first)
                self._save(state, first)
            try:
                with self._training_batches(first) as batches:
                    state, done = self._train(state, first, batches)
            finally:
                self.trace.close()
            if done < job.total_steps:
                return self._stopped(state, done)
        return self._finish(state, job.total_steps)

    # Chapters of the loop.

    def _train(self, state: TrainState, first: int, batches: Any) -> tuple[TrainState, int]:
        job = self.job
        step = parallel.map_train_step(
            make_train_step(
                job.model,
                job.optimizer,
                job.settings,
                job.preprocess,
                epoch_steps=job.epoch_steps,
                axis_name=parallel.AXIS,
            )
        )
        meter = _Meter(job, int(state.skipped))
        pending: deque[tuple[int, Any]] = deque()
        saved_at = time.monotonic()
        for done in range(first + 1, job.total_steps + 1):
            self._profile(done)
            batch = meter.wait_for(batches)
            state, metrics = step(state, parallel.shard(batch))
            pending.append((done, metrics))
            while len(pending) > IN_FLIGHT:
                self._absorb(meter, *pending.popleft())
            self.log.advance(done)
            if done == first + 1:  # it was compiled for, which is not a rate of training
                self._absorb(meter, *pending.popleft())
                meter.restart()
            stop, last = self.stop.requested(), done == job.total_steps
            evaluate, logs = self._evaluates(done), done % job.settings.log_steps == 0
            save = evaluate or last or self._saves(done, saved_at)
            if evaluate or logs or save or stop:
                while pending:  # what is logged or saved has been looked at
                    self._absorb(meter, *pending.popleft())
            # Not at a save by the clock, which other hosts do not see.
            by_steps = bool(job.settings.save_steps) and done % job.settings.save_steps == 0
            self._count_bad(batches, ask=logs or evaluate or stop or last or by_steps)
            for problem in batches.new_bad():
                self.log.event('bad_image', problem, step=done)
            if (logs or evaluate) and meter.steps:
                values = _of_all_hosts(meter.values(done), batches)
                self.log.train(done, {**values, 'bad_images': self.bad_images})
            if evaluate and not stop:
                stop = self._evaluate(state, done) is None
            if stop:
                return state, done
            if save:
                self._save(state, done)
                saved_at = time.monotonic()
            if evaluate or save:
                meter.restart()
            self._report_saves()
        return state, job.total_steps

    def _absorb(self, meter: _Meter, step: int, metrics: Any) -> None:
        """Waits for a step to be done and looks at what it found."""
        values = parallel.to_host(metrics)
        meter.add(values)
        if int(values['non_finite'][0]):
            message = f'step {step}: the loss, the gradient or a statistic is not finite'
            if self.job.settings.on_non_finite == 'stop':
                self.checkpoints.wait()
                newest = self.checkpoints.steps()[:1]
                raise NonFiniteError(
                    f'{message}. The newest checkpoint is of step {newest[0] if newest else 0}; a lower lr=, '
                    'a longer warmup_epochs= or clip_norm= may help, and on_non_finite=skip passes over it'
                )
            self.log.event('non_finite', f'{message}; nothing was updated', step=step)

    def _count_bad(self, batches: Any, ask: bool) -> None:
        """Bad images of the whole run; `ask` the other hosts for theirs, which all must do at once."""
        if ask:
            self.bad_elsewhere = int(parallel.gather([float(batches.bad)]).sum()) - batches.bad
        self.bad_images = self.bad_before + batches.bad + self.bad_elsewhere

    def _evaluates(self, done: int) -> bool:
        every = self.job.settings.eval_epochs * self.job.epoch_steps
        return done == self.job.total_steps or done % every == 0

    def _saves(self, done: int, saved_at: float) -> bool:
        s = self.job.settings
        # Only the primary process writes, so that its clock alone matters.
        by_time = s.save_minutes and time.monotonic() - saved_at >= 60 * s.save_minutes
        return bool(by_time or (s.save_steps and done % s.save_steps == 0))

    def _evaluate(self, state: TrainState, done: int, known: bool = False) -> Evaluation | None:
        """None if it was asked to stop; the state is saved if an image cannot be read.

        What is `known` is in the log already, and in the checkpoint of this step.
        """
        job = self.job
        batches = eval_batches(
            job.evaluation,
            eval_transform(job.preprocess, job.settings.in_chans),
            batch_size=EVAL_IMAGES * jax.device_count(),
            in_chans=job.settings.in_chans,
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=job.settings.workers,
        )
        try:
            with contextlib.closing(batches), self.log.evaluating(len(job.evaluation)) as on_batch:
                result = self.evaluator(state.variables, self._until_stopped(batches), on_batch)
        except _Interrupted:
            return None
        except FlaxnetsError:
            self._save(state, done)
            raise
        self.evaluation, self.evaluated = result, done
        if known:
            return result
        if self.saved == done:
            self.saved = None  # what was saved does not have the score
        self.log.eval(done, result.values())
        if result.non_finite:
            message = f'{result.non_finite} images had logits that are not finite: step {done} is no best one'
            self.log.event('eval_non_finite', message, step=done)
        return result

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            if self.stop.requested():
                raise _Interrupted

    def _save(self, state: TrainState, done: int) -> None:
        if self.saved == done or self.lock is None:
            return
        self.lock.check()
        self.saved = done
        found = self.evaluation if self.evaluated == done else None
        score = found.top1 if found and not found.non_finite else None
        meta = {**self.meta, 'evaluated': found is not None, 'bad_images': self.bad_images}
        self.checkpoints.save(done, parallel.to_host(state), meta, score, before=self.log.flush)

    def _report_saves(self) -> None:
        for outcome in self.checkpoints.poll():
            if outcome.error is None:
                message = f'checkpoint {outcome.step} in {outcome.seconds:.1f} s'
                self.log.event('saved', message, step=outcome.step, seconds=outcome.seconds)
                continue
            message = f'checkpoint {outcome.step} could not be saved: {outcome.error}'
            self.log.event('failed_save', message, step=outcome.step)
            if self.job.settings.on_failed_save == 'stop':
                raise FlaxnetsError(f'{message}; earlier checkpoints are untouched')

    def _stopped(self, state: TrainState, done: int) -> Outcome:
        self._save(state, done)
        self.checkpoints.wait()
        self._report_saves()
        reason = self.stop.reason
        self.log.event('stopped', f'{reason}: stopped after step {done}; run again to go on', step=done)
        return Outcome(done, reason, self.evaluation, None)

    def _finish(self, state: TrainState, done: int, known: bool = False) -> Outcome:
        """The last evaluation's pictures, and the weights where others find them."""
        # There is none if the run was stopped at the last step, or resumed after it.
        current = self.evaluation if self.evaluated == done else None
        evaluation = current or self._evaluate(state, done, known)
        if evaluation is None:
            return self._stopped(state, done)
        self._save(state, done)
        self.checkpoints.wait()
        self._report_saves()
        path = self._publish(state, done, evaluation) if self.primary else None
        return Outcome(done, None, evaluation, path)

    def _publish(self, state: TrainState, done: int, evaluation: Evaluation) -> str:
        """Puts weights and pictures into the workdir; returns where the weights are."""
        if self.lock is not None:
            self.lock.check()
        path = f'{self.workdir}/weights'
        notes = [f'trained by flaxnets for {done} steps on {self.job.settings.data}']
        notes += self.meta['warnings']
        source = weights.Source(notes=tuple(notes))
        weights.save(path, parallel.to_host(state.variables), self.job.config, source, overwrite=True)
        self.log.flush()
        with staged(self.workdir) as here:
            pictures.curves(read(self.workdir), f'{here}/curves.png')
            pictures.confusion(evaluation.confusion, self.job.training.classes, f'{here}/confusion.png')
        return path

    # What the chapters need.

    def _training_batches(self, first: int) -> Any:
        job = self.job
        return contextlib.closing(
            train_batches(
                job.training,
                train_transform(job.settings),
                batch_size=job.settings.batch_size,
                seed=job.settings.seed,
                start_step=first,
                in_chans=job.settings.in_chans,
                host=jax.process_index(),
                hosts=jax.process_count(),
                threads=job.settings.workers,
                max_bad=job.settings.max_bad_images,
                bad=self.bad_before // jax.process_count(),
            )
        )

    def _profile(self, step: int) -> None:
        """Records the steps of `profile`, or what a resumed run still does of them."""
        wanted = self.primary and self.profile is not None and self.profile[0] <= step <= self.profile[1]
        if wanted and not self.profiling:
            folder = self.trace.enter_context(staged(f'{self.workdir}/profile'))
            self.trace.enter_context(jax.profiler.trace(folder))
        if self.profiling and not wanted:
            self.trace.close()
        self.profiling = wanted


class _Meter:
    """Means of what the steps found, and how fast they went, since the last line of the log."""

    def __init__(self, job: Job, skipped: int) -> None:
        self._job = job
        self._rate = learning_rate(job.settings, job.epoch_steps)
        self._skipped = skipped  # from the beginning of the run
        self._sums: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew: what went before was not training."""
        self.steps, self._waited, self._started = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Any) -> dict[str, np.ndarray[Any, Any]]:
        start = time.perf_counter()
        batch: dict[str, np.ndarray[Any, Any]] = next(batches)
        self._waited += time.perf_counter() - start
        self.steps += 1
        return batch

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        self._skipped += int(metrics['non_finite'][0])
        for name, (total, count) in metrics.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += float(total)
            sums[1] += float(count)

    def values(self, done: int) -> dict[str, float]:
        """The line of the log after step `done`; starts anew."""
        seconds = time.perf_counter() - self._started
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        values = {
            'epoch': done / self._job.epoch_steps,
            **{name: means[name] for name in ('loss', 'grad_norm') if name in means},
            **({'top1': 100 * means['top1']} if 'top1' in means else {}),
            'learning_rate': float(self._rate(done - 1)),
            'images_per_second': self.steps * self._job.settings.batch_size / seconds,
            'wait_share': self._waited / seconds,
            'skipped': self._skipped,
        }
        self._sums.clear()
        self.restart()
        return values


def _of_all_hosts(values: dict[str, float], batches: Any) -> dict[str, float]:
    """With what each host alone knows of its images: the longest wait, the slowest feed."""
    found = parallel.gather([values['wait_share'], batches.images_per_second() or 0.0])
    feed = float(found[:, 1].min()) * len(found)
    return {
        **values,
        'wait_share': float(found[:, 0].max()),
        **({'feed_images_per_second': feed} if feed else {}),
    }

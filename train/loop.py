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

from flaxnets.errors import FlaxnetsError
from flaxnets.store import weights
from flaxnets.store.remote import staged
from flaxnets.zoo.records import to_json

from . import parallel
from .data.augment import train_transform
from .data.batches import Batch, train_batches, workers_for
from .evaluation import pictures
from .evaluation.feed import device_batches
from .evaluation.metrics import Evaluation, Evaluator
from .job import EVALUATION, Job, abstract_state, initial_state, make_job
from .notes import Note
from .run.checkpoints import Checkpoints
from .run.lock import Lock
from .run.log import Log, read
from .run.meter import BadImages, Meter, of_all_hosts
from .run.profile import Profile
from .run.stop import Stop
from .settings import Settings, complete, difference, from_json, validate
from .settings import to_json as settings_json
from .step.state import TrainState

EVAL_IMAGES = 64  # that a device evaluates at a time
IN_FLIGHT = 2  # steps that devices may have queued: enough to hide the host's work, few enough for memory


class NonFiniteError(FlaxnetsError):
    """A loss, gradient or statistic was not a finite number, and the run was told to stop."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done.
      stopped: why it stopped early ('SIGTERM', 'SIGINT', 'preemption'); None if it came to its end.
      evaluation: the last one, None if there was none.
      weights: the directory of the trained weights, in the workdir. None if the run stopped early, and
        always in all processes but the first.
    """

    step: int
    stopped: str | None
    evaluation: Evaluation | None
    weights: str | None


def train(
    settings: Settings, workdir: str, *, quiet: bool = False, profile: tuple[int, int] | None = None
) -> Outcome:
    """Trains, or resumes the run that the workdir holds.

    A run that was stopped or killed continues bit by bit as if nothing had happened. In a job of several
    processes each calls this, after `jax.distributed.initialize`, with a workdir that all of them see.

    Args:
      settings: of the run; at a resume they must be those it began with, except the fields in
        `train.settings.MAY_CHANGE`.
      workdir: folder of checkpoints, logs and results; `gs://` too.
      quiet: no progress bar.
      profile: first and last step of a profile, written to WORKDIR/profile.

    Raises:
      FlaxnetsError: bad settings or data, other settings than the workdir's, a workdir in use, numbers that
        are not finite, too many unreadable images.

    Examples:
      >>> from train import recipes, train
      >>> from train.settings import apply
      >>> settings = apply(recipes.get('digits'), ['model=resnext_tiny', 'max_steps=2'])
      >>> outcome = train(settings, 'runs/digits', quiet=True)
      >>> outcome.step, outcome.evaluation.images, outcome.weights
      (2, 360, 'runs/digits/weights')
    """
    primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        job, checkpoints, lock = parallel.together(
            lambda: _open(stack, settings, workdir, primary),
            alike=lambda opened: _what_all_share(opened[0]),
        )
        notes: list[str] = []
        start = restore(job, checkpoints, notes.append)
        if start.step > job.total_steps:
            raise FlaxnetsError(
                f'{workdir} holds a run of {start.step} steps, more than the {job.total_steps} asked for: '
                'give a larger max_steps, or 0'
            )
        log = parallel.together(
            lambda: stack.enter_context(
                Log(
                    workdir,
                    primary=primary,
                    total_steps=job.total_steps,
                    first_step=start.step,
                    evaluated=start.evaluated,
                    images_per_step=job.settings.batch_size,
                    quiet=quiet,
                    may_write=lock.check if lock else lambda: None,
                )
            )
        )
        for note in notes:  # of the weights that a run begins with, or of the images that it goes on with
            log.event('note' if start.step else 'weights', note, step=start.step)
        for step, reason in start.damaged:
            log.event('damaged', f'checkpoint {step} is set aside: {reason}', step=step)
        _check_profile(profile, start.step, job.total_steps, log)
        recorder = stack.enter_context(contextlib.closing(Profile(workdir, profile if primary else None)))
        stop = stack.enter_context(Stop())
        return _Run(job, start, Workdir(workdir, log, checkpoints, lock, stop, recorder)).go()


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


def _check_profile(profile: tuple[int, int] | None, first: int, total: int, log: Log) -> None:
    """Logs a note if none of the steps to be profiled will be done."""
    if profile and first < total and not (first < profile[1] and profile[0] <= total):
        done = f'it is steps {first + 1} to {total} that are done'
        log.event('note', f'no profile of steps {profile[0]} to {profile[1]}: {done}')


def _what_all_share(job: Job) -> Any:
    """What must be equal in all processes; where images lie and who reads them may differ."""
    own = dataclasses.replace(job.settings, data='', workers=0, feed='auto')
    return [settings_json(own), to_json(job.preprocess), job.fingerprints]


@dataclass(frozen=True)
class Start:
    """Where a run begins, or goes on.

    Attributes:
      state: the arrays.
      damaged: newer checkpoints that were set aside, by step, and why.
      evaluated: whether this state has been evaluated.
      bad_images: how many images could not be read so far.
      warnings: warnings about the settings, from the beginning of the run.
    """

    state: TrainState
    damaged: tuple[tuple[int, str], ...] = ()
    evaluated: bool = False
    bad_images: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.state.step)


def restore(job: Job, checkpoints: Checkpoints, say: Callable[[str], None] = lambda note: None) -> Start:
    """The newest sound state of a workdir, or the initial one.

    Args:
      job: the run.
      checkpoints: of its workdir.
      say: called with a note on whether a new run keeps the classifier of its initial weights, or on other
        images of the evaluation.

    Raises:
      FlaxnetsError: the workdir's run had other settings or data.
    """
    restored = checkpoints.restore(abstract_state(job), check=lambda meta: check_same_run(job, meta, say))
    if restored is None:
        return Start(parallel.together(lambda: initial_state(job, say)))
    # Checkpoints of earlier versions lack `evaluated`; their score says so, unless logits were not finite.
    evaluated = restored.meta.get('evaluated', restored.score is not None)
    meta = restored.meta
    return Start(
        restored.state,
        restored.skipped,
        evaluated,
        meta.get('bad_images', 0),
        tuple(meta.get('warnings', ())),
    )


def check_same_run(job: Job, meta: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuses to go on with other settings or training images than the run began with.

    The images of the evaluation may be others: one that could not be read has been repaired, for instance.

    Args:
      job: the run.
      meta: what its checkpoint says.
      say: called with a note if the images of the evaluation are not the same.

    Raises:
      FlaxnetsError: something differs; the message lists every difference.
    """
    differences = difference(complete(from_json(meta['settings'])), job.settings)
    for part, fingerprint in job.fingerprints.items():
        if meta['data'].get(part) == fingerprint:
            continue
        if part == EVALUATION:
            say(
                'the evaluation images are not those of before: '
                'earlier accuracies, the best one too, are of others'
            )
        else:
            differences.append(f'the {part} images are not the same ones ({job.settings.data})')
    if differences:
        raise FlaxnetsError(
            'the workdir holds a run with other settings; go on with its own, or choose another workdir:\n  '
            + '\n  '.join(differences)
        )


class _Interrupted(Exception):
    """An evaluation was asked to stop."""


@dataclass(frozen=True)
class Workdir:
    """What a run has open while it trains.

    Attributes:
      path: the folder; `gs://` too.
      log, checkpoints: both write there.
      lock: keeps other runs from writing there; None in all processes but the first, which alone writes.
      stop: tells whether the run is asked to stop.
      profile: records some steps.
    """

    path: str
    log: Log
    checkpoints: Checkpoints
    lock: Lock | None
    stop: Stop
    profile: Profile


@dataclass(frozen=True)
class _Due:
    """What is due after a step."""

    stop: bool
    evaluate: bool
    log: bool
    save_by_steps: bool
    save_by_clock: bool  # by this host's clock: other hosts may decide otherwise

    @property
    def save(self) -> bool:
        return self.evaluate or self.save_by_steps or self.save_by_clock

    @property
    def for_all(self) -> bool:
        """Whether anything is due on all hosts alike, so that they can exchange numbers."""
        return self.stop or self.evaluate or self.log or self.save_by_steps


class _Run:
    """One call of `train`, after everything was opened."""

    def __init__(self, job: Job, start: Start, workdir: Workdir) -> None:
        self.job, self.start, self.at = job, start, workdir
        self.evaluation: Evaluation | None = None
        self.evaluated = 0  # the step of that evaluation
        self.evaluator = Evaluator(job.inference, job.preprocess)
        self.bad_images = BadImages(start.bad_images)
        self.saved = start.step or None  # the newest step that has a checkpoint
        self.saved_at = time.monotonic()
        now = [note.message for note in job.remarks if note.kind == 'warning']
        self.meta = {
            'settings': settings_json(job.settings),
            'config': to_json(job.config),
            'data': job.fingerprints,
            'warnings': list(start.warnings) if start.step else now,
        }

    def go(self) -> Outcome:
        """Does the steps that are left, and evaluates, saves and publishes; or stops early."""
        job, start, first = self.job, self.start, self.start.step
        if first == job.total_steps and start.evaluated:  # the run was complete, and all is in the log
            return self._finish(parallel.replicate(start.state), first, known=True)
        self._announce(first)
        state = parallel.replicate(start.state)
        if first < job.total_steps:
            if first and self._evaluates(first) and not start.evaluated:  # stopped before its evaluation
                if self._evaluate(state, first) is None:
                    return self._stopped(state, first)
                self._save(state, first)
            try:
                with self._training_batches(first) as batches:
                    state, done = self._train(state, first, batches)
            finally:
                self.at.profile.close()
            if done < job.total_steps:
                return self._stopped(state, done)
        return self._finish(state, job.total_steps)

    # Chapters of the loop.

    def _announce(self, first: int) -> None:
        """Logs that the run begins or goes on, and on which devices."""
        job, log = self.job, self.at.log
        if first:
            log.event('resume', f'going on after step {first} of {job.total_steps}', step=first)
        else:
            for note in (*(Note('note', text) for text in job.notes), *job.remarks):
                log.event(note.kind, note.message, step=0)
        processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
        devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}{processes}'
        log.event('devices', f'training on {devices}', step=first)

    def _train(self, state: TrainState, first: int, batches: Any) -> tuple[TrainState, int]:
        """The steps after `first`, to the last one or until the run is asked to stop."""
        job = self.job
        step = parallel.map_train_step(job.train_step())
        meter = Meter(job, int(state.skipped))
        under_way: deque[tuple[int, Any]] = deque()
        self.saved_at = time.monotonic()
        for done in range(first + 1, job.total_steps + 1):
            self.at.profile.reach(done)
            batch = meter.wait_for(batches)
            state, metrics = step(state, parallel.shard(batch))
            under_way.append((done, metrics))
            self._look_at(under_way, meter, IN_FLIGHT)
            self.at.log.advance(done)
            if done == first + 1:  # the first step was compiled, which says nothing of the speed
                self._look_at(under_way, meter, 0)
                meter.restart()
            due = self._due(done)
            if due.for_all or due.save:  # nothing is logged or saved before its metrics were read
                self._look_at(under_way, meter, 0)
            self._tell(done, due, batches, meter)
            if due.stop or (due.evaluate and self._evaluate(state, done) is None):
                return state, done
            if due.save:
                self._save(state, done)
                self.saved_at = time.monotonic()
                meter.restart()
            self._report_saves()
        return state, job.total_steps

    def _look_at(self, under_way: deque[tuple[int, Any]], meter: Meter, left: int) -> None:
        """Waits for all steps under way but the last `left`, and reads their metrics."""
        while len(under_way) > left:
            step, metrics = under_way.popleft()
            values = parallel.to_host(metrics)
            meter.add(values)
            if int(values['non_finite'][0]):
                self._not_finite(step)

    def _not_finite(self, step: int) -> None:
        message = f'step {step}: the loss, the gradient or a statistic is not finite'
        if self.job.settings.on_non_finite == 'stop':
            self.at.checkpoints.wait()
            newest = self.at.checkpoints.steps()[:1]
            raise NonFiniteError(
                f'{message}. The newest checkpoint is of step {newest[0] if newest else 0}; a lower lr=, '
                'a longer warmup_epochs= or clip_norm= may help, and on_non_finite=skip passes over it'
            )
        self.at.log.event('non_finite', f'{message}; nothing was updated', step=step)

    def _due(self, done: int) -> _Due:
        """What is due after a step; every process must call it after every step."""
        s = self.job.settings
        minutes = (time.monotonic() - self.saved_at) / 60
        return _Due(
            stop=self.at.stop.requested(),
            evaluate=self._evaluates(done),
            log=done % s.log_steps == 0,
            save_by_steps=bool(s.save_steps) and done % s.save_steps == 0,
            save_by_clock=bool(s.save_minutes) and minutes >= s.save_minutes,
        )

    def _tell(self, done: int, due: _Due, batches: Any, meter: Meter) -> None:
        """Logs images that could not be read and, where a line of the log is due, the means of the steps."""
        self.bad_images.count(batches, ask=due.for_all)
        for problem in batches.new_bad():
            self.at.log.event('bad_image', problem, step=done)
        if (due.log or due.evaluate) and meter.steps:
            values = of_all_hosts(meter.values(done), batches)
            self.at.log.train(done, {**values, 'bad_images': self.bad_images.total})

    def _evaluates(self, done: int) -> bool:
        every = self.job.settings.eval_epochs * self.job.epoch_steps
        return done == self.job.total_steps or done % every == 0

    def _evaluate(self, state: TrainState, done: int, known: bool = False) -> Evaluation | None:
        """Evaluates the state; None if the run was asked to stop meanwhile.

        If an image cannot be read, the state is saved before the error is raised. With `known` the result is
        in the log and in this step's checkpoint already, and is not written again.
        """
        job = self.job
        batches = device_batches(
            job.evaluation,
            job.config,
            images=EVAL_IMAGES,
            feed=job.settings.feed,
            workers=job.settings.workers,
        )
        try:
            with contextlib.closing(batches), self.at.log.evaluating(len(job.evaluation)) as on_batch:
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
            self.saved = None  # the checkpoint lacks the score: it is saved again
        self.at.log.eval(done, result.values())
        if result.non_finite:
            message = f'{result.non_finite} images had logits that are not finite: step {done} is no best one'
            self.at.log.event('eval_non_finite', message, step=done)
        return result

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            if self.at.stop.requested():
                raise _Interrupted

    def _save(self, state: TrainState, done: int) -> None:
        if self.saved == done or self.at.lock is None:
            return
        self.at.lock.check()
        self.saved = done
        found = self.evaluation if self.evaluated == done else None
        score = found.top1 if found and not found.non_finite else None
        meta = {**self.meta, 'evaluated': found is not None, 'bad_images': self.bad_images.total}
        self.at.checkpoints.save(done, parallel.to_host(state), meta, score, before=self.at.log.flush)

    def _report_saves(self) -> None:
        for save in self.at.checkpoints.poll():
            if save.error is None:
                message = f'checkpoint {save.step} in {save.seconds:.1f} s'
                self.at.log.event('saved', message, step=save.step, seconds=save.seconds)
                continue
            message = f'checkpoint {save.step} could not be saved: {save.error}'
            self.at.log.event('failed_save', message, step=save.step)
            if self.job.settings.on_failed_save == 'stop':
                raise FlaxnetsError(f'{message}; earlier checkpoints are untouched')

    def _stopped(self, state: TrainState, done: int) -> Outcome:
        self._save(state, done)
        self.at.checkpoints.wait()
        self._report_saves()
        reason = self.at.stop.reason
        self.at.log.event('stopped', f'{reason}: stopped after step {done}; run again to go on', step=done)
        return Outcome(done, reason, self.evaluation, None)

    def _finish(self, state: TrainState, done: int, known: bool = False) -> Outcome:
        """Makes the last evaluation if need be, saves, and puts weights and pictures into the workdir."""
        # There is no evaluation of the last step if the run was stopped there, or resumed after it.
        current = self.evaluation if self.evaluated == done else None
        evaluation = current or self._evaluate(state, done, known)
        if evaluation is None:
            return self._stopped(state, done)
        self._save(state, done)
        self.at.checkpoints.wait()
        self._report_saves()
        path = self._publish(state, done, evaluation) if self.at.lock else None
        return Outcome(done, None, evaluation, path)

    def _publish(self, state: TrainState, done: int, evaluation: Evaluation) -> str:
        """Puts weights and pictures into the workdir; returns where the weights are."""
        if self.at.lock is not None:
            self.at.lock.check()
        path = f'{self.at.path}/weights'
        notes = [f'trained by flaxnets for {done} steps on {self.job.settings.data}']
        notes += self.meta['warnings']
        source = weights.Source(notes=tuple(notes))
        weights.save(path, parallel.to_host(state.variables), self.job.config, source, overwrite=True)
        self.at.log.flush()
        with staged(self.at.path) as here:
            pictures.curves(read(self.at.path), f'{here}/curves.png')
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
                **workers_for(job.settings.feed, job.settings.workers, len(job.training)),
                scaled=job.settings.decoding == 'scaled' and not job.settings.policy,
                max_bad=job.settings.max_bad_images,
                bad=self.bad_images.before // jax.process_count(),
            )
        )

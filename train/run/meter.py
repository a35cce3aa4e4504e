"""Measures training for the log: means of the steps' metrics, speed, and images that cannot be read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .. import parallel
from ..job import Job
from ..step.schedule import learning_rate


class Meter:
    """Means of the steps' metrics and the speed of training, both since the last line of the log.

    Args:
      job: of the run.
      skipped: steps that the run had skipped before this call.

    Attributes:
      steps: how many began since the clock was started.
    """

    def __init__(self, job: Job, skipped: int) -> None:
        self._job = job
        self._rate = learning_rate(job.settings, job.epoch_steps)
        self._skipped = skipped  # from the beginning of the run
        self._sums: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        """Restarts the clock, so that time spent on something else than training is left out."""
        self.steps, self._waited, self._started = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The next batch; the time until it is there counts as waiting."""
        start = time.perf_counter()
        batch: dict[str, np.ndarray[Any, Any]] = next(batches)
        self._waited += time.perf_counter() - start
        self.steps += 1
        return batch

    def add(self, metrics: dict[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of a step, {name: (sum, count)}."""
        self._skipped += int(metrics['non_finite'][0])
        for name, (total, count) in metrics.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += float(total)
            sums[1] += float(count)

    def values(self, done: int) -> dict[str, float]:
        """The values of a line of the log after step `done`; sums and clock then start again."""
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


def of_all_hosts(values: dict[str, float], batches: Any) -> dict[str, float]:
    """The same values, but of all hosts: the longest wait for images, and what the slowest feed allows."""
    found = parallel.gather([values['wait_share'], batches.images_per_second() or 0.0])
    feed = float(found[:, 1].min()) * len(found)
    return {
        **values,
        'wait_share': float(found[:, 0].max()),
        **({'feed_images_per_second': feed} if feed else {}),
    }


class BadImages:
    """Counts the images of the whole run that could not be read, on all hosts.

    Attributes:
      before: how many there were in earlier calls of `train`.
      total: `before`, and those of this call; of other hosts, those known when they were last asked.
    """

    def __init__(self, before: int) -> None:
        self.before = self.total = before
        self._elsewhere = 0

    def count(self, batches: Any, ask: bool) -> None:
        """Counts those of this host; with `ask` also those of the others, and then all hosts must ask."""
        if ask:
            self._elsewhere = int(parallel.gather([float(batches.bad)]).sum()) - batches.bad
        self.total = self.before + batches.bad + self._elsewhere

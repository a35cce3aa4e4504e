"""Notices that the system or the user asks a run to stop, so that it can stop between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Notes that the run is asked to stop; the loop calls `requested` after every step, and in evaluations.

    In one process, SIGTERM and ctrl-C ask it to stop; a second ctrl-C interrupts at once. In several, JAX
    notes a SIGTERM to any of them (or a preemption notice of the platform), and they agree on a step that
    none of them has passed yet, so that all stop at the same one; ctrl-C interrupts at once.

    It must be opened in the main thread, and after `jax.distributed.initialize`.

    Attributes:
      reason: 'SIGTERM', 'SIGINT' or 'preemption' once a stop is due; None before.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._asked = 0

    def requested(self) -> bool:
        """Whether to stop now; every process must call this equally often."""
        self._asked += 1
        if (
            self.reason is None
            and jax.process_count() > 1
            and multihost_utils.reached_preemption_sync_point(self._asked)
        ):
            self.reason = 'preemption'
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == 'SIGINT':
            signal.default_int_handler(number, frame)
        if self.reason != 'SIGINT':
            self.reason = signal.Signals(number).name

    def __enter__(self) -> Stop:
        if jax.process_count() == 1:  # else JAX has handlers, which ours would displace
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            # None is a handler that Python did not set and cannot put back.
            signal.signal(number, signal.SIG_DFL if old is None else old)
        self._old = {}

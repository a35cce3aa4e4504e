"""Records a profile of some steps with JAX's profiler."""

from __future__ import annotations

import contextlib

import jax

from flaxnets.store.remote import staged


class Profile:
    """Records steps into WORKDIR/profile.

    Args:
      workdir: of the run; `gs://` too.
      window: the first and the last step; None records none. A resumed run records those still to come.
    """

    def __init__(self, workdir: str, window: tuple[int, int] | None) -> None:
        self._workdir, self._window = workdir, window
        self._trace = contextlib.ExitStack()
        self._running = False

    def reach(self, step: int) -> None:
        """Starts or ends the recording; to be called before each step."""
        wanted = self._window is not None and self._window[0] <= step <= self._window[1]
        if wanted and not self._running:
            folder = self._trace.enter_context(staged(f'{self._workdir}/profile'))
            self._trace.enter_context(jax.profiler.trace(folder))
        if self._running and not wanted:
            self._trace.close()
        self._running = wanted

    def close(self) -> None:
        """Writes what was recorded. Another call does nothing."""
        self._trace.close()
        self._running = False

"""How far a download has come, on stderr: a bar on a terminal, a line at either end."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


def megabytes(count: int) -> str:
    """A number of bytes as megabytes of 1,000,000."""
    return f'{count / 1e6:.1f} MB'


class Progress:
    """Reports the progress of one download on stderr.

    Args:
      name: the file's name.
      host: the server's name.
      quiet: print nothing at all.
    """

    def __init__(self, name: str, host: str, quiet: bool) -> None:
        self._name, self._host, self._quiet = name, host, quiet
        self._bar: tqdm[None] | None = None
        self._begun: float | None = None

    def say(self, text: str) -> None:
        """Prints one line about the file."""
        if not self._quiet:
            tqdm.write(f'{self._name}: {text}', file=sys.stderr)

    def start(self, done: int, total: int | None) -> None:
        """Begins, or goes on after a break: `done` bytes of `total` (None: unknown) are here already."""
        if self._begun is None:
            resumed = f', resumed at {megabytes(done)}' if done else ''
            size = megabytes(total) if total is not None else 'unknown size'
            self.say(f'{size} from {self._host}{resumed}')
            self._begun = time.monotonic()
        self.close()
        self._bar = tqdm(
            desc=self._name,
            total=total,
            initial=done,
            unit='B',
            unit_scale=True,
            leave=False,
            disable=self._quiet or None,  # None: where stderr is no terminal
        )

    def update(self, done: int) -> None:
        """Moves the bar to `done` bytes."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def finish(self, done: int) -> None:
        """Prints how many bytes came and how long they took."""
        self.close()
        seconds = time.monotonic() - (self._begun or time.monotonic())
        self.say(f'{megabytes(done)} in {seconds:.1f} s')

    def close(self) -> None:
        """Takes the bar away, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""How far a download has come, on stderr: a bar on a terminal, a line at either end elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

_INTERVAL = 0.1  # seconds between two redrawings


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
        self._bar = not quiet and sys.stderr.isatty()
        self._drawn = False
        self._next = 0.0
        self._begun: float | None = None
        self._first = 0
        self._total: int | None = None

    def say(self, text: str) -> None:
        """Prints one line about the file."""
        if not self._quiet:
            self.close()
            print(f'{self._name}: {text}', file=sys.stderr, flush=True)

    def start(self, done: int, total: int | None) -> None:
        """Begins, or goes on after a break: `done` bytes of `total` (None: unknown) are here already."""
        if self._begun is None:
            resumed = f', resumed at {megabytes(done)}' if done else ''
            size = megabytes(total) if total is not None else 'unknown size'
            self.say(f'{size} from {self._host}{resumed}')
            self._begun = time.monotonic()
        self._first, self._total = done, total
        self._rate_from = time.monotonic()

    def update(self, done: int) -> None:
        """Redraws the bar for `done` bytes, a few times a second."""
        now = time.monotonic()
        if self._bar and now >= self._next:
            self._next = now + _INTERVAL
            self._draw(done, now)

    def finish(self, done: int) -> None:
        """Prints how many bytes came and how long they took."""
        if self._bar:
            self._draw(done, time.monotonic())
        seconds = time.monotonic() - (self._begun or time.monotonic())
        self.say(f'{megabytes(done)} in {seconds:.1f} s')

    def close(self) -> None:
        """Ends the line of the bar, if one was drawn."""
        if self._drawn:
            print(file=sys.stderr, flush=True)
            self._drawn = False

    def _draw(self, done: int, now: float) -> None:
        rate = (done - self._first) / max(now - self._rate_from, 1e-3)
        text = f'{self._name}  {megabytes(done)}'
        if self._total:
            left = (self._total - done) / max(rate, 1.0)
            text = (
                f'{self._name}  {done / 1e6:.1f}/{megabytes(self._total)}  {100 * done // self._total}%  '
                f'{rate / 1e6:.1f} MB/s  {_duration(left)} left'
            )
        width = shutil.get_terminal_size().columns - 1
        room = min(width - len(text) - 4, 40)
        if self._total and room > 5:
            filled = room * done // self._total
            text = f'{text}  [{"=" * filled}{" " * (room - filled)}]'
        print(f'\r{text[:width]:{width}}', end='', file=sys.stderr, flush=True)
        self._drawn = True


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.0f} h'

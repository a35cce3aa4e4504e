"""For readers of folders and tars: what was left out, and names in messages."""

from __future__ import annotations

from collections.abc import Sequence

from flaxnets import words
from flaxnets.images.names import natural

EXAMPLES = 3  # names of what is left out, in a message


def some(names: Sequence[str], most: int = EXAMPLES) -> str:
    """The first of several names, as a message has them, and how many more there are."""
    return words.some(map(natural, names), most)


class LeftOut:
    """Counts what is left out, by reason, and remembers a few names."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts a name; `reason` is words that follow a number: 'hidden entries'."""
        self._names.setdefault(reason, []).append(name)

    def notes(self) -> tuple[str, ...]:
        """For each reason how many were left out, and a few names."""
        return tuple(f'{len(names)} {reason}: {some(names)}' for reason, names in sorted(self._names.items()))

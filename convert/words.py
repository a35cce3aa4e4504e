"""Words for messages: what a file calls things, counted and cut short."""

from __future__ import annotations

from collections.abc import Sequence

from flaxnets.errors import shown


def plain(key: object) -> str:
    """A key of the file as a message may hold it, whatever it is."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) < 80 else shown(key)


def count(number: int, thing: str) -> str:
    """'1 tensor', '2 tensors'."""
    return f'{number} {thing}{"" if number == 1 else "s"}'


def some(words: Sequence[str], most: int = 8) -> str:
    """The first words of a list that may be long."""
    more = f' and {len(words) - most} more' if len(words) > most else ''
    return ', '.join(words[:most]) + more

"""Text for messages: names from files, counts, and lists that are cut short."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import shown


def plain(key: object) -> str:
    """A name as a message may hold it, whatever a file put into it."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) < 80 else shown(key)


def count(number: int, thing: str) -> str:
    """'1 tensor', '2 tensors'."""
    return f'{number} {thing}{"" if number == 1 else "s"}'


def short(name: str, length: int) -> str:
    """The first of several names, as 'tabby, tabby cat' has them, cut to a length."""
    first = name.partition(',')[0]
    return first if len(first) <= length else first[: length - 1] + '…'


def some(words: Iterable[str], most: int = 8, last: str = ', ') -> str:
    """The first words of a list that may be long: 'a, b and 7 more'.

    Args:
      last: what joins the last two where all are listed, such as ' or '.
    """
    words = list(words)
    if len(words) > most:
        return f'{", ".join(words[:most])} and {len(words) - most} more'
    return last.join(part for part in (', '.join(words[:-1]), *words[-1:]) if part)

"""Text for messages: names from files, counts, and shortened lists."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import shown


def plain(key: object) -> str:
    """A name from a file in a form that is safe to print: as it is, or else as a short `repr`."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) < 80 else shown(key)


def count(number: int, thing: str) -> str:
    """'1 tensor', '2 tensors'."""
    return f'{number} {thing}{"" if number == 1 else "s"}'


def short(name: str, length: int) -> str:
    """The first of the names in a text such as 'tabby, tabby cat', cut to at most `length` characters."""
    first = name.partition(',')[0]
    return first if len(first) <= length else first[: length - 1] + '…'


def some(words: Iterable[str], most: int = 8, last: str = ', ') -> str:
    """A list in words, cut short if it is long: 'a, b and 7 more'.

    Args:
      words: the list.
      most: how many words to name at most.
      last: what joins the last two words if all are named, such as ' or '.
    """
    words = list(words)
    if len(words) > most:
        return f'{", ".join(words[:most])} and {len(words) - most} more'
    return last.join(part for part in (', '.join(words[:-1]), *words[-1:]) if part)

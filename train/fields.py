"""Declares settings: each once, with its meaning, default, range, and whether it may change at a resume.

    lr: float = setting('highest learning rate, for this batch size', 0.1, ABOVE_0)

The checks, the parsing of `field=value`, the help and docs/settings.md are made from the declarations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, get_type_hints

from flaxnets.checks import is_finite

Size = int | tuple[int, int]
Numbers = tuple[float, ...]
Pair = tuple[float, float]


@dataclass(frozen=True)
class Range:
    """Values that a setting may have.

    Attributes:
      words: the range as text that follows 'must be'.
      holds: tells whether a value of the right type lies in the range.
    """

    words: str
    holds: Callable[[Any], bool]


ANY = Range('', lambda value: True)
FROM_0 = Range('at least 0', lambda x: x >= 0)
FROM_1 = Range('at least 1', lambda x: x >= 1)
ABOVE_0 = Range('above 0', lambda x: x > 0)
SHARE = Range('from 0 to 1', lambda x: 0 <= x <= 1)
BELOW_1 = Range('at least 0 and below 1', lambda x: 0 <= x < 1)
UP_TO_1 = Range('above 0 and at most 1', lambda x: 0 < x <= 1)
HALF = Range('from 0 to 0.5', lambda x: 0 <= x <= 0.5)
SHARES = Range('the smallest and the largest share, within 0..1', lambda p: 0 < p[0] <= p[1] <= 1)
RATIOS = Range('the smallest and the largest', lambda p: 0 < p[0] <= p[1])
ALL_ABOVE_0 = Range('above 0', lambda values: min(values, default=1) > 0)
SIZES = Range('at least 1, or 0 for the size of the weights', lambda s: s == 0 or min(sides(s)) >= 1)


def between(low: int, high: int) -> Range:
    """The range from `low` to `high`, both included."""
    return Range(f'from {low} to {high}', lambda x: low <= x <= high)


@dataclass(frozen=True)
class Field:
    """A declared setting.

    Attributes:
      name: its name.
      kind: its type.
      default: `dataclasses.MISSING` if it has to be given.
      what: its meaning, for the help and the docs.
      allowed: the values that it may have: a range, or a tuple that lists them.
      may_change: whether a run may be resumed with another value.
      chapter: heading of the group of settings that begins with this one; '' within a group.
    """

    name: str
    kind: Any
    default: Any
    what: str
    allowed: Range | tuple[Any, ...]
    may_change: bool
    chapter: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if not self.is_type_of(value):
            return f'must be {self.type_words}'
        if isinstance(self.allowed, tuple):
            fits = value in self.allowed
            return None if fits else f'is not one of {", ".join(map(repr, self.allowed))}'
        return None if self.allowed.holds(value) else f'must be {self.allowed.words}'

    def is_type_of(self, value: Any) -> bool:
        """Whether a value has the type of the setting."""
        return _is_of_type(value, self.kind)

    def parse(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
          ValueError: the text is no value of the field's type.
        """
        try:
            value = _parsed(text.strip(), self.kind)
        except (ValueError, ZeroDivisionError, OverflowError, IndexError) as error:
            raise ValueError(text) from error
        if not self.is_type_of(value):
            raise ValueError(text)
        return value

    @property
    def type_words(self) -> str:
        """The type as text that follows 'must be': 'a whole number'."""
        return _TYPES[self.kind]

    @property
    def values_words(self) -> str:
        """The values that it may have, as text: its choices, or its type and range."""
        if isinstance(self.allowed, tuple):
            return ', '.join(str(choice) or "''" for choice in self.allowed)
        if self.kind is bool or not self.allowed.words:
            return self.type_words
        return f'{self.type_words}, {self.allowed.words}'


def setting(
    what: str,
    default: Any = dataclasses.MISSING,
    allowed: Range | tuple[Any, ...] = ANY,
    *,
    may_change: bool = False,
    chapter: str = '',
) -> Any:
    """A field of a dataclass of settings; the arguments are those of `Field`."""
    said = {'what': what, 'allowed': allowed, 'may_change': may_change, 'chapter': chapter}
    return dataclasses.field(default=default, metadata=said)


@cache
def fields_of(settings: type) -> dict[str, Field]:
    """The declared fields of a dataclass, by name and in order."""
    types = get_type_hints(settings)
    return {
        field.name: Field(field.name, types[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(settings)
    }


def sides(size: Size) -> tuple[int, int]:
    """Height and width of images of a size."""
    return (size, size) if isinstance(size, int) else size


def as_text(value: Any) -> str:
    """A value for people: several numbers with commas between them."""
    if isinstance(value, tuple):
        return ','.join(f'{v:g}' for v in value)
    return "''" if value == '' else str(value)


_TYPES: dict[Any, str] = {
    str: 'text',
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    Size: 'a whole number, or two as in 224,320',
    Numbers: 'one number, or one for each channel as in 0.5,0.5,0.5',
    Pair: 'two numbers, as in 0.25,1',
}
_TRUTH = dict.fromkeys(('true', 'yes', 'on', '1'), True) | dict.fromkeys(('false', 'no', 'off', '0'), False)


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.lower()]
    if kind is int:
        return int(text)
    if kind is float:
        return float(Fraction(text))  # neither 'nan' nor 'inf'
    parts = [part.strip() for part in text.strip('()[]').split(',') if part.strip()]
    if kind == Size:
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)
    return tuple(_parsed(part, float) for part in parts)


def _is_of_type(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_finite(value)
    if kind in (str, int, bool):
        return type(value) is kind
    if kind == Size and type(value) is int:
        return True
    if not isinstance(value, tuple) or (kind != Numbers and len(value) != 2):
        return False
    return all(_is_of_type(v, int if kind == Size else float) for v in value)

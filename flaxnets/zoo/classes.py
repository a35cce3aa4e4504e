"""Matches the classes of a data set with the outputs of weights.

The names of the outputs come from the first of these that has them: the caller; the weights
(`Config.classes`, from the file or from the data that they were trained on); ImageNet's WordNet ids, for
published weights. Names are matched exactly, as names of ImageNet's classes
(`flaxnets.zoo.imagenet.places`), as numbers, or without regard to case and punctuation.

If the outputs have no names, the data's classes must be in the order that they had in training. Training
programs sort folders in one of two orders: as text (torchvision, mmpretrain), or in timm's natural order, in
which `c2` comes before `c10`. If the two differ and nothing says which it was, an error asks the caller.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlaxnetsError, shown
from ..words import some
from . import imagenet
from .records import Config

ORDERS = ('text', 'natural', 'data')  # of classes whose outputs have no names
PRESUMED = 'ImageNet, since there are 1000 outputs'  # the source of names if the weights have none
MAX_FILE_BYTES = 16_000_000


class ClassesError(FlaxnetsError):
    """The classes of data and the outputs of weights cannot be matched without more information."""


@dataclass(frozen=True)
class Matching:
    """Which output of weights each class of data is.

    Attributes:
      outputs: the number of the output of each class of the data; all are different.
      rule: how they were matched, in words.
      names: a name for each output, for people: the weights' own if they have names, else the data's.
    """

    outputs: tuple[int, ...]
    rule: str
    names: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every output is a class of the data."""
        return len(self.outputs) == len(self.names)


def match(
    data: Sequence[str], config: Config, *, classes: Sequence[str] | None = None, order: str | None = None
) -> Matching:
    """Matches the classes of data with the outputs of weights.

    Args:
      data: names of the data's classes, in the order of its labels; may be only some of the weights' classes.
      config: describes the weights.
      classes: names of the outputs, in their order, in place of those that the weights have.
      order: the order of the classes in training, for weights without names: 'text' or 'natural'
        (`in_order`), or 'data' for the order of `data`.

    Raises:
      ClassesError: the data has a class that the weights do not have, or it is uncertain which output is
        which class.
      FlaxnetsError: an unknown `order`, or one for weights that name their classes.
    """
    data = tuple(data)
    if order is not None and order not in ORDERS:
        raise FlaxnetsError(f'order={order!r} is not one of {", ".join(ORDERS)}')
    names, whose = _named(config, classes)
    if names is not None and order is not None:
        raise FlaxnetsError(f'order={order!r} is for weights whose classes have no names; {whose} names them')
    if names is not None:
        outputs, rule = match_names(data, names)
        rule = f'{rule}; the outputs are named by {whose}'
        return Matching(outputs, rule, _for_people(names))
    if config.class_order == 'file' and order is None:
        raise ClassesError(
            "the order of the weights' classes stood in a file of its own when they were trained (timm's "
            '--class-map); give classes= with its names'
        )
    presumed = _presumed_imagenet(data) if config.num_classes == imagenet.CLASSES and not order else None
    if presumed:
        return Matching(*presumed, imagenet.class_names())
    outputs, rule = _by_order(data, config.num_classes, order, config.class_order)
    called = [f'class {i}' for i in range(config.num_classes)]
    for name, output in zip(data, outputs, strict=True):
        called[output] = name
    return Matching(outputs, rule, _for_people(called))


def output_names(config: Config, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], str]:
    """The names of the outputs of weights, for people, and where they come from.

    Args:
      config: describes the weights.
      classes: names of the outputs, in their order, in place of those that the weights have.

    Returns:
      A name for each output, and the source of the names, in words. If nothing names the outputs, these are
      ImageNet's names for 1000 outputs, and otherwise numbers ('class 0').

    Raises:
      ClassesError: `classes` has more or fewer names than there are outputs.
    """
    names, whose = _named(config, classes)
    if names is not None:
        return _for_people(names), whose
    if config.num_classes == imagenet.CLASSES:
        return imagenet.class_names(), PRESUMED
    return tuple(f'class {i}' for i in range(config.num_classes)), 'their numbers'


def imagenet_places(config: Config, classes: Sequence[str] | None = None) -> tuple[int, ...] | None:
    """ImageNet's class number of each output; None if the outputs are other classes, or nothing says so."""
    names, _ = _named(config, classes)
    if names is not None:
        return imagenet.places(names)
    return tuple(range(imagenet.CLASSES)) if config.num_classes == imagenet.CLASSES else None


def in_order(names: Sequence[str], order: str) -> tuple[str, ...]:
    """Sorts names by `order`: 'text' (by character codes) or 'natural' (as timm sorts folders).

    The natural order ignores case and compares digits as numbers: `c2` comes before `c10`.

    Raises:
      ClassesError: two names are equal in natural order (`a1` and `A01`), so that timm's order is unknown.
    """
    if order == 'text':
        return tuple(sorted(names))

    def key(name: str) -> tuple[int | str, ...]:
        # Text and digits alternate, so that a number is never compared with a word.
        return tuple(int(p) if i % 2 else p for i, p in enumerate(re.split(r'(\d+)', name.lower())))

    keys = {key(name): name for name in names}
    if len(keys) != len(names):
        alike = [name for name in names if keys[key(name)] != name]
        raise ClassesError(f'{_some(alike)}: there is a name that is the same to timm, so give classes=')
    return tuple(sorted(names, key=key))


def _named(config: Config, classes: Sequence[str] | None) -> tuple[tuple[str, ...] | None, str]:
    """The names of the outputs, None if nothing names them, and where the names come from."""
    if classes is not None:
        if len(classes) != config.num_classes:
            raise ClassesError(f'{len(classes)} names are given for the {config.num_classes} outputs')
        return tuple(classes), 'the names given'
    if config.classes is not None:
        return config.classes, 'the weights'
    if config.weights is not None and config.num_classes == imagenet.CLASSES:
        return imagenet.wnids(), 'ImageNet, on which they are published'
    return None, ''


def _for_people(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with English ones in place of ImageNet's WordNet ids."""
    known = dict(zip(imagenet.wnids(), imagenet.class_names(), strict=True))
    return tuple(known.get(name, name) for name in names)


Found = tuple[tuple[int, ...], str]


def match_names(data: tuple[str, ...], names: tuple[str, ...]) -> Found:
    """Finds the place of each of the data's names among `names`.

    Returns:
      The places, and the rule by which they were found, in words.

    Raises:
      ClassesError: a name is not among them, or it is uncertain which one it is.
    """
    if data == names:
        return tuple(range(len(names))), 'by name'
    rules: tuple[tuple[Callable[..., tuple[int, ...] | None], str], ...] = (
        (_exactly, 'by name'),
        (_as_imagenet, "by name, both as ImageNet's classes"),
        (_by_number, "by number: the data's class 0 is the first output"),
        (_loosely, 'by name, without regard to case and signs'),
        (_without_numbers, 'by name, without regard to case, signs and leading numbers'),
    )
    for rule, words in rules:
        if (found := rule(data, names)) is not None:
            return found, words
    raise ClassesError(
        f'{_reason(data, names)}; the weights call theirs {_some(names)}: call the classes of the data so, '
        'or give classes= with what the data calls each output'
    )


def _reason(data: Sequence[str], names: Sequence[str]) -> str:
    """Says why no rule matches the names."""
    known = {*names, *map(imagenet.folded, names)}
    other = [name for name in data if name not in known]
    strange = [name for name in other if imagenet.folded(name) not in known]
    if imagenet.places(names) is not None:
        strange = [name for name in strange if not imagenet.is_known(name)]
    if strange:
        return (
            f'{len(strange)} of the {len(data)} classes of the data are none of the {len(names)} of the '
            f'weights: {_some(strange)}'
        )
    return f'it is not certain which of the {len(names)} classes of the weights are meant by {_some(other)}'


def _exactly(data: Sequence[Hashable], names: Sequence[Hashable]) -> tuple[int, ...] | None:
    counted: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        counted.setdefault(name, []).append(i)
    found = [counted.get(name, []) for name in data]
    if len(set(data)) != len(data) or any(len(places) != 1 for places in found):
        return None
    return tuple(place for (place,) in found)


def _loosely(data: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    return _exactly([imagenet.folded(n) for n in data], [imagenet.folded(n) for n in names])


def _without_numbers(data: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Matches names of which one side or both begin with numbers, such as `001.Black_footed_Albatross`."""

    def plain(those: Sequence[str]) -> list[str]:
        matches = [re.fullmatch(r'\d+ (.+)', imagenet.folded(name)) for name in those]
        found = [match[1] for match in matches if match]
        return found if len(found) == len(those) else [imagenet.folded(name) for name in those]

    return _exactly(plain(data), plain(names))


def _as_imagenet(data: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    wanted, there = imagenet.places(data), imagenet.places(names)
    return _exactly(wanted, there) if wanted and there else None


def _by_number(data: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Matches data whose classes are called by numbers, which are those of the outputs."""
    numbers = _numbers(data)
    if numbers is None:
        return None
    if (theirs := _numbers(names)) is not None:
        return _exactly(numbers, theirs)
    places = imagenet.places(names) if len(names) == imagenet.CLASSES else None
    if places and sorted(places) != list(places):
        return None  # ImageNet's numbers, or the outputs'?
    first_ones = sorted(numbers) == list(range(len(numbers)))  # numbers from 1 on are somebody's own
    return numbers if (first_ones or places) and max(numbers) < len(names) else None


def _numbers(names: Sequence[str]) -> tuple[int, ...] | None:
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return None
    numbers = tuple(map(int, names))
    return numbers if len(set(numbers)) == len(numbers) else None


def _presumed_imagenet(data: tuple[str, ...]) -> Found | None:
    """Matches data with 1000 outputs without names, if it has classes of ImageNet."""
    if (found := imagenet.places(data)) is not None:
        return found, "by name, as ImageNet's classes, since there are 1000 outputs"
    if (found := _by_number(data, imagenet.wnids())) is not None:
        return found, "by number, as ImageNet's classes, since there are 1000 outputs"
    return None


def _by_order(data: tuple[str, ...], count: int, order: str | None, told: str | None) -> Found:
    """Matches data with `count` outputs without names, by the order of the classes.

    Args:
      order: the order that the caller gives, 'text', 'natural' or 'data', or None.
      told: the order that the weights' file tells, 'text' or 'natural', or None.
    """
    unnamed = 'as the weights do not name their classes'
    places = tuple(range(len(data)))
    known = order or told
    if tuple(map(str, places)) == data and data != tuple(sorted(data)) and len(data) <= count and not order:
        return places, f'by number, {unnamed}'  # not folders, which are sorted: labels that never had names
    if len(data) < count and (numbers := _some_numbers(data, count, known)) is not None:
        return numbers, f'by number, {unnamed}'
    if len(data) != count:
        raise ClassesError(
            f'the data has {len(data)} classes, the weights {count}, which they do not name; give classes= '
            "with what the data calls each output, or order='data' if its labels are the outputs' numbers"
        )
    if known == 'data':
        return places, "in the data's own order, as asked"
    if known is not None:
        sorted_names = in_order(data, known)
        how = 'as asked' if order else 'as the training of the file sorts folders'
        return tuple(map(sorted_names.index, data)), f'in the {known} order of their names, {how}'
    orders = {'text': in_order(data, 'text'), 'natural': in_order(data, 'natural'), 'data': data}
    if len(set(orders.values())) == 1:
        return places, f'in the order of their names, {unnamed}'
    whose = {'text': 'torchvision, mmpretrain', 'natural': 'timm', 'data': 'the data itself'}
    told_apart = [f'{name!r} ({whose[name]}): {_some(names, 12)}' for name, names in orders.items()]
    if orders['data'] in (orders['text'], orders['natural']):
        told_apart.pop()
    first = next(i for i, names in enumerate(zip(*orders.values(), strict=True)) if len(set(names)) > 1)
    raise ClassesError(
        'the weights do not name their classes, and those of the data have several orders, which differ from '
        f'class {first} on; give order= {"; or ".join(told_apart)}. Or give classes= with what the data '
        'calls each output'
    )


def _some_numbers(data: Sequence[str], count: int, order: str | None) -> tuple[int, ...] | None:
    """The outputs of data with some of the classes 0 to count - 1; None if that is not certain."""
    numbers = _numbers(data)
    if numbers is None or 0 not in numbers or max(numbers) >= count:
        return None
    width = len(str(count - 1))
    if order in ('natural', 'data') or all(len(name) == width for name in data):  # leading zeros
        return numbers
    as_text = sorted(range(count), key=str)
    ranks = tuple(map(as_text.index, numbers))
    return ranks if order == 'text' or ranks == numbers else None


def _some(names: Sequence[str], most: int = 6) -> str:
    return some(map(shown, names), most)


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads the names of outputs, in their order, from a file.

    Args:
      path: a file with a name on each line (timm's `class_map.txt`), or with JSON: a list of names, a table
        of names by number (`{"0": "ant"}`; of `{"0": ["n01440764", "tench"]}` the first name is taken), or a
        table of numbers by name (`class_to_idx`).

    Raises:
      FlaxnetsError: the file cannot be read, or does not give each output one name.
    """
    where = os.fsdecode(path)
    try:
        with Path(path).open('rb') as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise FlaxnetsError(f'{where}: larger than any list of classes')
        text = content.decode('utf-8-sig')
        said = json.loads(text) if text.lstrip()[:1] in ('{', '[') else _lines(text)
    except OSError as error:
        raise FlaxnetsError(f'{where}: cannot be read: {error.strerror or error}') from error
    except (ValueError, RecursionError) as error:
        raise FlaxnetsError(f'{where}: neither JSON nor a name on each line: {error}') from error
    names = in_their_order(said)
    if names is None:
        raise FlaxnetsError(
            f'{where}: does not name each class once: expected is a name on each line, or JSON: a list of '
            'names, or a table of names by number or of numbers by name, from 0 on'
        )
    return names


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def in_their_order(said: object) -> tuple[str, ...] | None:
    """The names of classes in the order of the outputs, from any form in which files keep them.

    Args:
      said: a list of names; a table of names by number, or of numbers by name, whose numbers are 0, 1, ...

    Returns:
      The names; None if `said` has none of these forms.
    """
    if isinstance(said, Mapping):
        return _by_their_numbers(said)
    if isinstance(said, str | bytes) or not isinstance(said, Sequence):
        return None
    names = [_name(value) for value in said]
    return _all_names(names)


def _by_their_numbers(table: Mapping[Any, Any]) -> tuple[str, ...] | None:
    for pairs in (table.items(), [(value, key) for key, value in table.items()]):
        numbered = {_number(number): _name(name) for number, name in pairs}
        if len(numbered) == len(table) and numbered.keys() == set(range(len(table))):
            return _all_names([numbered[i] for i in range(len(table))])
    return None


def _number(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 9 else None
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # NumPy's numbers too
    except TypeError:  # not a number, or an array of several
        return None


def _name(value: object) -> str | None:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value.strip() or None if isinstance(value, str) else None


def _all_names(names: Sequence[str | None]) -> tuple[str, ...] | None:
    found = tuple(name for name in names if name is not None)
    return found if found and len(found) == len(names) else None

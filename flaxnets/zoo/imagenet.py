"""The 1000 classes of ImageNet-1k, in the order of the nets' outputs, and their names."""

from __future__ import annotations

import functools
import importlib.resources
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

CLASSES = 1000

# torchvision's names of two classes, which it changed so that all its names differ.
_OTHER_NAMES = {134: 'crane bird', 639: 'maillot tank suit'}


def class_names() -> tuple[str, ...]:
    """The WordNet synonyms of each class, the best known first (`tench, Tinca tinca`).

    Two classes have the same first name: 134 (the bird) and 517 (the machine) are both `crane`.
    """
    return tuple(names for _, names in _classes())


def wnids() -> tuple[str, ...]:
    """The WordNet id of each class (`n01440764`), which names its folder in ImageNet's train set."""
    return tuple(wnid for wnid, _ in _classes())


def subset(outputs: Collection[int]) -> str | None:
    """The name of the data set with exactly these classes, ImageNet-A or ImageNet-R; None for others."""
    return next((name for name, classes in _subsets().items() if classes == frozenset(outputs)), None)


def places(names: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers of the ImageNet classes that names mean, all different; None if any is uncertain.

    A name may be a WordNet id, alone or before other words (`n02085620-Chihuahua`), or English: all synonyms
    of a class (timm, mmpretrain), the first one (torchvision), or any one. Where a name has several meanings,
    the whole list decides. A list of 1000 names that is mostly in ImageNet's order is taken to be in that
    order throughout, so that the first of two `crane` is the bird. And no two names mean the same class.
    """
    ids = [re.match(r'n\d{8}(?!\d)', name) for name in names]
    if not names or (len(set(names)) != len(names) and len(names) != CLASSES):
        return None
    if all(ids):
        numbers = {wnid: i for i, wnid in enumerate(wnids())}
        found = [numbers.get(match[0]) for match in ids if match]
        return _all_different(found)
    if len(names) == CLASSES and (in_order := _in_order(names)):
        return in_order
    for form in ('as written', 'first', 'any'):
        meanings = [_meanings(form).get(_key(name, form), frozenset()) for name in names]
        if all(meanings):
            return _all_different(_by_elimination(meanings))
    return None


def _in_order(names: Sequence[str]) -> tuple[int, ...] | None:
    """The classes of a list of 1000 names that is mostly in ImageNet's order; None for other lists."""
    meanings = [_meanings('any').get(_key(name, 'any'), frozenset()) for name in names]
    found: list[int | None] = [i if i in meant else None for i, meant in enumerate(meanings)]
    if sum(i is not None for i in found) < CLASSES // 2:
        return None
    free = {i for i, place in enumerate(found) if place is None}
    unknown = [i for i in free if not meanings[i] & free]  # a name of its own, or one that is taken
    if len(unknown) == len(free):
        return tuple(range(CLASSES))
    rest = _by_elimination([meanings[i] & free for i in sorted(free)])
    for i, place in zip(sorted(free), rest, strict=True):
        found[i] = place
    return _all_different(found)


def _by_elimination(meanings: Sequence[frozenset[int]]) -> list[int | None]:
    """For each name its meaning, if all other meanings it may have are taken by other names; else None."""
    found: list[int | None] = [None] * len(meanings)
    taken: set[int] = set()
    changed = True
    while changed:
        changed = False
        for i, meant in enumerate(meanings):
            left = meant - taken
            if found[i] is None and len(left) == 1:
                found[i] = next(iter(left))
                taken |= left
                changed = True
    return found


def _all_different(found: Sequence[int | None]) -> tuple[int, ...] | None:
    known = [place for place in found if place is not None]
    return tuple(known) if len(known) == len(found) == len(set(known)) else None


def is_known(name: str) -> bool:
    """Whether a name is that of at least one of the classes."""
    return name in wnids() or folded(name) in _meanings('any')


def folded(name: str) -> str:
    """A name in lower case and with single spaces for punctuation, to compare different spellings."""
    name = unicodedata.normalize('NFKC', name).casefold()
    return ' '.join(re.findall(r'\w+', name.replace('_', ' ').replace("'", '')))


def _key(name: str, form: str) -> str:
    return name.strip() if form == 'as written' else folded(name)


@functools.cache
def _meanings(form: str) -> Mapping[str, frozenset[int]]:
    """The classes that a name may mean, for all names.

    Args:
      form: which names count. 'as written': all synonyms together, or the first one; 'first': the same
        without regard to case and punctuation; 'any': any single synonym too.
    """
    found: dict[str, set[int]] = {}
    for i, names in enumerate(class_names()):
        synonyms = names.split(', ')
        known = {names, synonyms[0]} | ({_OTHER_NAMES[i]} if i in _OTHER_NAMES else set())
        for name in known | (set(synonyms) if form == 'any' else set()):
            found.setdefault(_key(name, form), set()).add(i)
    return {name: frozenset(classes) for name, classes in found.items()}


@functools.cache
def _classes() -> tuple[tuple[str, str], ...]:
    rows = (line.partition('\t') for line in table_lines('imagenet_classes.tsv'))
    return tuple((wnid, names) for wnid, _, names in rows)


@functools.cache
def _subsets() -> Mapping[str, frozenset[int]]:
    rows = (line.partition('\t') for line in table_lines('imagenet_subsets.tsv'))
    return {name: frozenset(map(int, numbers.split())) for name, _, numbers in rows}


def table_lines(file: str) -> list[str]:
    """The lines of a table beside this module, without the comments."""
    text = importlib.resources.files(__package__).joinpath(file).read_text('utf-8')
    return [line for line in text.splitlines() if not line.startswith('#')]

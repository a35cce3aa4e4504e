"""The 1000 classes of ImageNet-1k, in the order of the nets' outputs, and how they are known."""

from __future__ import annotations

import functools
import importlib.resources
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence

CLASSES = 1000

# What torchvision calls two classes, so that no two of its names are alike.
_OTHER_NAMES = {134: 'crane bird', 639: 'maillot tank suit'}


def class_names() -> tuple[str, ...]:
    """The WordNet synonyms of each class, the best known first (`tench, Tinca tinca`).

    They do not tell every class apart: 134 (the bird) and 517 (the machine) are both `crane`.
    """
    return tuple(names for _, names in _classes())


def wnids() -> tuple[str, ...]:
    """The WordNet id of each class (`n01440764`), which names its folder in ImageNet's train set."""
    return tuple(wnid for wnid, _ in _classes())


def subset(outputs: Collection[int]) -> str | None:
    """The name of the data set that has exactly these of the 1000 classes: ImageNet-A or ImageNet-R."""
    return next((name for name, classes in _subsets().items() if classes == frozenset(outputs)), None)


def places(names: Sequence[str]) -> tuple[int, ...] | None:
    """Which of ImageNet's classes these names mean, each another one; None if that is not certain of all.

    Understood are WordNet ids, alone or before other words (`n02085620-Chihuahua`), and English names: all
    synonyms of a class (timm, mmpretrain), the first (torchvision), or any. Where names leave a choice, the
    list decides: a list of all 1000 mostly in ImageNet's order is taken to be in it throughout (so that of
    two `crane` the first is the bird), and a class that another name means is not meant again.
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
    """The classes of a list of 1000 names that is mostly in ImageNet's order."""
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
    """One of its meanings for each, where all others are those of names that have no other; else None."""
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
    """Whether a name is that of one of the classes, or of several."""
    return name in wnids() or folded(name) in _meanings('any')


def folded(name: str) -> str:
    """A name without what people write differently: case, and signs and spaces between its words."""
    name = unicodedata.normalize('NFKC', name).casefold()
    return ' '.join(re.findall(r'\w+', name.replace('_', ' ').replace("'", '')))


def _key(name: str, form: str) -> str:
    return name.strip() if form == 'as written' else folded(name)


@functools.cache
def _meanings(form: str) -> Mapping[str, frozenset[int]]:
    """Name -> the classes that it may mean.

    `form`: 'as written', of all synonyms or of the first one; 'first', the same without regard to case and
    signs; 'any', the same of any synonym too.
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

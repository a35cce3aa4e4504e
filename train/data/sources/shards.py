"""Finds the tars that a pattern stands for: `{split}`, {0000..0009}, {a,b}, *, a::b, or a folder of them."""

from __future__ import annotations

import itertools
import os
import re

from flaxnets.errors import FlaxnetsError
from flaxnets.images.names import is_hidden

from . import store
from .base import USUAL_SPLITS
from .entries import some
from .parts import Part

_BRACES = re.compile(r'\{([^{}]*,[^{}]*|[^{},]+?\.\.[^{},]+?)\}')
_RANGE = re.compile(r'(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?')
_LETTERS = re.compile(r'([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])')


def find(pattern: str, part: Part) -> tuple[list[str], bool]:
    """The tar files of a part, in the pattern's order, those of a wildcard in the order of their names.

    Returns:
      Their paths; and whether there may be several, which is False where the pattern is one file's name.

    Raises:
      FlaxnetsError: no file matches, one that is asked for by name is not there, or one is found twice.
    """
    splits = '{split}' in pattern
    if splits and part.shares_the_whole:
        raise FlaxnetsError(f"{pattern} has parts: name the one to take percents of, as in 'train[:80%]'")
    if not splits and store.is_folder(pattern):
        return _in_folder(pattern, part), True
    candidates = [pattern.replace('{split}', name) for name in part.names] if splits else [pattern]
    for candidate in candidates:
        names = [name for piece in candidate.split('::') for name in braced(piece)]
        found = [_matching(name) for name in names]
        if any(found):
            missing = [name for name, paths in zip(names, found, strict=True) if not paths]
            if missing:
                raise FlaxnetsError(f'{pattern}: no file matches {some(missing)}')
            paths = list(itertools.chain.from_iterable(found))
            if len(set(paths)) < len(paths):
                twice = next(path for path in paths if paths.count(path) > 1)
                raise FlaxnetsError(f'{pattern}: {twice} is in it twice')
            return paths, len(paths) > 1 or paths != names
    raise FlaxnetsError(f'no file matches {" or ".join(candidates)}')


def _in_folder(folder: str, part: Part) -> list[str]:
    """The tars in a folder: those of the part if folders or tars in it have parts' names, else all."""
    usual = dict.fromkeys((*USUAL_SPLITS, *part.names))
    there = {name: paths for name in usual if (paths := _called(folder, name))}
    if not there and not part.chosen:
        paths = _tars(folder)
        if not paths:
            raise FlaxnetsError(f'{folder}: no .tar file in it')
        return paths
    found = next((there[name] for name in part.names if name in there), None)
    if found is None or part.shares_the_whole:
        raise FlaxnetsError(f'{folder}: name one of its parts, which are {some(list(there)) or "not told"}')
    return found


def _called(folder: str, part: str) -> list[str]:
    """The tars of PART/ in a folder, or those called PART.tar, PART-*.tar, PART_*.tar."""
    for entry in store.scan(folder):
        named = entry.kind == 'folder' and entry.name.lower() == part.lower()
        if named and (paths := _tars(os.path.join(folder, entry.name))):
            return paths
    stems = [(path, os.path.basename(path)[:-4].lower()) for path in _tars(folder)]
    name = part.lower()
    return [path for path, stem in stems if stem == name or stem.startswith((f'{name}-', f'{name}_'))]


def _tars(folder: str) -> list[str]:
    return [
        os.path.join(folder, entry.name)
        for entry in store.scan(folder)
        if entry.kind == 'file' and entry.name.lower().endswith('.tar') and not is_hidden(entry.name)
    ]


def _matching(path: str) -> list[str]:
    """The files of one name: itself, the tars of a folder, or what matches it as a pattern."""
    if store.is_file(path):
        return [path]
    return _tars(path) if store.is_folder(path) else store.matching(path)


def braced(text: str) -> list[str]:
    """All names that braces stand for, as shells and WebDataset expand them; the last braces vary fastest."""
    for match in _BRACES.finditer(text):
        choices = _choices(match[1])
        if choices is not None:
            rest = braced(text[match.end() :])
            return [text[: match.start()] + c + r for c in choices for r in rest]
    return [text]


def _choices(inner: str) -> list[str] | None:
    if ',' in inner:
        return inner.split(',')
    if numbers := _RANGE.fullmatch(inner):
        first, last = int(numbers[1]), int(numbers[2])
        step = abs(int(numbers[3] or 1)) or 1
        padded = any(re.match(r'-?0\d', text) for text in numbers.group(1, 2))
        width = max(map(len, numbers.group(1, 2))) if padded else 0
        order = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f'{n:0{width}d}' for n in order]
    if letters := _LETTERS.fullmatch(inner):
        first, last = (ord(letter) for letter in letters.groups() if letter)
        order = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return [chr(n) for n in order]
    return None

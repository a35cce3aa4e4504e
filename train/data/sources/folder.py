"""Opens images in folders, one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flaxnets.errors import FlaxnetsError
from flaxnets.images.names import SNIFFED, is_hidden, named_as_image, natural
from flaxnets.images.transforms import is_image
from flaxnets.store.remote import StoreError

from . import metadata, store
from .base import USUAL_SPLITS, Labelled, Record
from .entries import LeftOut, some
from .parts import Part


class File(NamedTuple):
    """An image.

    Attributes:
      name: its name below the folder.
      size: in bytes.
      label: the number of its class.
    """

    name: str
    size: int
    label: int


class FolderSource(Labelled):
    """Images with one folder for each class, or with a table of labels beside them."""

    def __init__(
        self, folder: str, classes: Sequence[str], files: Sequence[File], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(folder, classes, np.array([file.label for file in files], np.int32), notes)
        self._folder = folder
        self._files = [file.name for file in files]
        self._sizes = [file.size for file in files]

    def __getitem__(self, index: int, /) -> Record:
        name = self.record_name(index)
        return Record(store.read_image(name, name), int(self.labels[index]), name)

    def record_name(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])

    def _identity(self) -> Iterable[bytes]:
        for name, size in zip(self._files, self._sizes, strict=True):
            yield f'{name} {size}'.encode('utf-8', 'surrogateescape')


def open_folder(path: str, part: Part) -> Labelled:
    """Opens PATH/PART/CLASS/*.jpg, or PATH/CLASS/*.jpg where the part is the whole.

    Classes are in the order of their names, and so are the images of each; a table has its own order.

    Raises:
      FlaxnetsError: there is no such folder or part, no image in it, or its table is wrong.
    """
    if not store.is_folder(path):
        raise FlaxnetsError(f'{path}: no such folder; expected is {path}/{part.names[0]}/CLASS/image.jpg')
    root = _root(path, part)
    left_out = LeftOut()
    listed = metadata.find(root)
    labels = metadata.read(os.path.join(root, listed)) if listed else None
    if labels:
        classes, files = _listed(root, labels, left_out)
        notes = [f'{root}: classes are those of {listed}']
    else:
        classes, files = _classes(root, left_out)
        notes = [f'{root}: {listed} has no labels, so that classes are the folders'] if listed else []
        notes += _nested(root, files)
        empty = _without(classes, files)
        if empty and (part.training or not files):
            classes = empty
            files = []
    if not files:
        raise FlaxnetsError(f'{root}: {_nothing(classes, left_out)}')
    notes += [f'{root}: left out are {note}' for note in left_out.notes()]
    return FolderSource(root, classes, files, notes)


def _root(path: str, part: Part) -> str:
    """The folder that holds the class folders of a part."""
    if part.chosen and store.is_folder(os.path.join(path, part.names[0])):
        return os.path.join(path, part.names[0])
    # Hugging Face's data sets may keep their parts in data/.
    candidates = [
        os.path.join(base, name) for base in (path, os.path.join(path, 'data')) for name in _folders(base)
    ]
    parts = [p for p in candidates if os.path.basename(p).lower() in USUAL_SPLITS and _has_classes(p)]
    if part.may_be_the_whole:
        if not parts:
            return path
        if part.shares_the_whole:
            names = [os.path.relpath(p, path) for p in parts]
            raise FlaxnetsError(
                f'{path} has the parts {some(names)}: name the one to take percents of, as in '
                f"'{names[0]}[:80%]'"
            )
    named = [p for wanted in part.names for p in _called(wanted, candidates)]
    found = next((p for p in named if _has_classes(p)), None)
    if found is not None:
        return found
    if named and parts:
        raise FlaxnetsError(f'{named[0]}: it holds no folder of a class')
    folders = _folders(path)
    holds = f'it holds {some(folders, 5)}' if folders else 'it has no folders'
    raise FlaxnetsError(
        f'{path}: no folder {" or ".join(part.names[:2])} in it ({holds}); expected is '
        f'{os.path.join(path, part.names[0])}/CLASS/image.jpg. If its folders are classes, take parts of '
        "each: train_split='[:80%]', eval_split='[80%:]'"
    )


def _has_classes(path: str) -> bool:
    """Whether a folder may be a part; one that holds images alone may be a class of that name."""
    return bool(metadata.find(path) or _folders(path))


def _called(wanted: str, paths: Sequence[str]) -> list[str]:
    """The paths whose last name is `wanted` in any case, the very name first."""
    found = [path for path in paths if os.path.basename(path).lower() == wanted.lower()]
    return sorted(found, key=lambda path: os.path.basename(path) != wanted)


def _folders(path: str) -> list[str]:
    """The folders in a folder that are not hidden; none if it is no folder."""
    entries = store.scan(path) if store.is_folder(path) else []
    return [entry.name for entry in entries if entry.kind == 'folder' and not is_hidden(entry.name)]


def _classes(root: str, left_out: LeftOut) -> tuple[tuple[str, ...], list[File]]:
    """Folders as classes, in the order of their names as text, and the images in each."""
    names = []
    for entry in store.scan(root):
        if is_hidden(entry.name):
            left_out.add('hidden entries', entry.name)
        elif entry.kind == 'folder':
            names.append(entry.name)
        elif entry.kind == 'broken':
            left_out.add('links that lead nowhere', entry.name)
        elif entry.name == 'metadata.parquet':
            left_out.add('tables that cannot be read (metadata.csv and metadata.jsonl can)', entry.name)
        elif entry.kind == 'file' and _is_image(root, entry.name, entry.size):
            left_out.add('images outside of every class', entry.name)
    files = []
    for label, name in enumerate(names):
        files += [File(inner, size, label) for inner, size in sorted(images(root, name, left_out))]
    return tuple(map(natural, names)), files


def images(root: str, below: str, left_out: LeftOut) -> Iterable[tuple[str, int]]:
    """(name below `root`, bytes) of all images in a folder and the folders in it; links are followed.

    A link with the name of an image that leads nowhere is an image that cannot be read: training counts
    it, and an evaluation does not pass it over.
    """
    pending = [(below, frozenset({store.identity(root)} if below else ()))]
    while pending:
        here, around = pending.pop()
        folder = os.path.join(root, here)
        identity = store.identity(folder)
        if identity in around:
            left_out.add('links back to a folder around them', here)
            continue
        for entry in store.scan(folder):
            inner = os.path.join(here, entry.name)
            if is_hidden(entry.name):
                left_out.add('hidden entries', inner)
            elif entry.kind == 'folder':
                pending.append((inner, around | {identity}))
            elif entry.kind == 'other':
                left_out.add('devices and pipes', inner)
            elif entry.kind == 'broken' and not named_as_image(entry.name):
                left_out.add('links that lead nowhere', inner)
            elif _is_image(root, inner, entry.size):
                yield inner, entry.size
            else:
                left_out.add('files that are no images', inner)


def _is_image(root: str, name: str, size: int) -> bool:
    """Whether a file is an image, by its name or else by its first bytes."""
    if named_as_image(name) or not size:
        return named_as_image(name)
    try:
        return is_image(store.read(os.path.join(root, name), 0, SNIFFED))
    except StoreError:  # a store that cannot be reached says nothing of the file
        raise
    except OSError:
        return False


def _listed(root: str, labels: dict[str, str | int], left_out: LeftOut) -> tuple[tuple[str, ...], list[File]]:
    """The images that a table beside them lists, in its order."""
    there = dict(images(root, '', left_out))
    absent = [name for name in labels if name not in there]
    if absent:
        raise FlaxnetsError(f'{root}: its metadata lists {some(absent)}, which is not there or no image')
    for name in there:
        if name not in labels:
            left_out.add('images that the metadata does not list', name)
    classes, numbers = metadata.classes_of(root, list(labels.values()))
    return classes, [File(n, there[n], label) for n, label in zip(labels, numbers, strict=True)]


def _nested(root: str, files: Sequence[File]) -> list[str]:
    """Notes which class an image in a deeper folder has: readers do not agree on that."""
    deep = [file.name for file in files if file.name.count(os.sep) > 1]
    if not deep:
        return []
    return [
        f'{root}: {len(deep)} images lie in folders of their class ({natural(deep[0])}); the class is the '
        'outermost folder, as in torchvision (timm and Hugging Face take the innermost)'
    ]


def _without(classes: Sequence[str], files: Sequence[File]) -> tuple[str, ...]:
    """The classes that have no files."""
    labels = {file.label for file in files}
    return tuple(name for label, name in enumerate(classes) if label not in labels)


def _nothing(classes: Sequence[str], left_out: LeftOut) -> str:
    what = f'no images in {some(classes, 5)}' if classes else 'it holds no folder of a class'
    notes = left_out.notes()
    return f'{what} (left out are {"; ".join(notes)})' if notes else what

"""Images in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from flaxnets.errors import FlaxnetsError

from . import store
from .base import IMAGE_SUFFIXES, Labelled, Record, Source


class FolderSource(Labelled):
    """A folder of each class; classes in the order of their names, images in that of theirs."""

    def __init__(self, folder: str, classes: Sequence[str], files: Sequence[tuple[str, int, int]]) -> None:
        """`files`: name below the folder, size in bytes, label."""
        super().__init__(folder, classes, np.array([label for _, _, label in files]))
        self._folder = folder
        self._files = [name for name, _, _ in files]
        self._sizes = [size for _, size, _ in files]

    def __getitem__(self, index: int, /) -> Record:
        name = self.record_name(index)
        return Record(store.read_image(name, name), int(self.labels[index]), name)

    def record_name(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])

    def _identity(self) -> Iterable[bytes]:
        for name, size in zip(self._files, self._sizes, strict=True):
            yield f'{name} {size}'.encode()


def open_folder(path: str, splits: tuple[str, ...]) -> Source:
    if not store.is_folder(path):
        raise FlaxnetsError(f'{path}: no such folder; expected is {path}/{splits[0]}/CLASS/image.jpg')
    found = next((s for s in splits if store.is_folder(os.path.join(path, s))), None)
    if found is None:
        there = [entry.name for entry in store.scan(path) if entry.kind == 'folder']
        holds = (
            f'it holds {", ".join(there[:5])}{", ..." * (len(there) > 5)}' if there else 'it has no folders'
        )
        raise FlaxnetsError(
            f'{path}: no folder {" or ".join(splits)} in it ({holds}); expected is '
            f'{os.path.join(path, splits[0])}/CLASS/image.jpg'
        )
    root = os.path.join(path, found)
    classes = [entry.name for entry in store.scan(root) if entry.kind == 'folder']
    files = [file for label, name in enumerate(classes) for file in _images_of(root, name, label)]
    counts = np.bincount([label for _, _, label in files], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not files or empty:
        what = f'no images in {", ".join(empty[:5])}' if empty else 'it holds no folder of a class'
        raise FlaxnetsError(f'{root}: {what}; images end in {", ".join(IMAGE_SUFFIXES)}')
    return FolderSource(root, classes, files)


def _images_of(root: str, name: str, label: int) -> list[tuple[str, int, int]]:
    """The images of a class, those of its own folders too."""
    found = []
    pending = [name]
    while pending:
        below = pending.pop()
        for entry in store.scan(os.path.join(root, below)):
            inner = os.path.join(below, entry.name)
            if entry.kind == 'folder':
                pending.append(inner)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((inner, entry.size, label))
    return sorted(found)

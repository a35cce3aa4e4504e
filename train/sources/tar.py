"""Images in tar files, read where they lie: WebDataset's shards, or folders of classes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Sequence

import numpy as np

from flaxnets.errors import FlaxnetsError

from . import store
from .base import IMAGE_SUFFIXES, Labelled, Record


class TarSource(Labelled):
    """Uncompressed tar files, each image read from where it lies."""

    def __init__(
        self, name: str, classes: Sequence[str], members: Sequence[tuple[str, str, int, int, int]]
    ) -> None:
        """`members`: shard, name, offset, size, label."""
        super().__init__(name, classes, np.array([label for *_, label in members]))
        self._members = members

    def __getitem__(self, index: int, /) -> Record:
        shard, name, offset, size, label = self._members[index]
        title = f'{shard}: {name}'
        return Record(store.read_image(shard, title, offset, size), label, title)

    def record_name(self, index: int) -> str:
        return f'{self._members[index][0]}: {self._members[index][1]}'

    def _identity(self) -> Iterable[bytes]:
        for shard, name, offset, size, _ in self._members:
            yield f'{os.path.basename(shard)} {name} {offset} {size}'.encode()


def open_tar(pattern: str, splits: tuple[str, ...]) -> TarSource:
    candidates = [pattern.replace('{split}', split) for split in splits]
    shards = next((found for p in candidates if (found := store.matching(p))), [])
    if not shards:
        raise FlaxnetsError(f'no file matches {" or ".join(dict.fromkeys(candidates))}')
    images: list[tuple[str, str, int, int]] = []
    numbers: dict[tuple[str, str], int] = {}
    for shard in shards:
        for member in _members(shard):
            stem, suffix = os.path.splitext(member.name)
            if suffix == '.cls':
                numbers[shard, stem] = _class_number(shard, member)
            elif suffix.lower() in IMAGE_SUFFIXES:
                images.append((shard, member.name, member.offset_data, member.size))
    if not images:
        raise FlaxnetsError(
            f'{pattern}: no images in {len(shards)} files; images end in {", ".join(IMAGE_SUFFIXES)}'
        )
    if numbers:
        return _numbered(pattern, images, numbers)
    folders = [name.rpartition('/')[0].rpartition('/')[2] for _, name, _, _ in images]
    if '' in folders:
        name = images[folders.index('')][1]
        raise FlaxnetsError(
            f'{pattern}: the class of {name} is unknown: neither a folder nor a .cls beside it'
        )
    classes = sorted(set(folders))
    labels = {name: i for i, name in enumerate(classes)}
    return TarSource(
        pattern, classes, [(*image, labels[folder]) for image, folder in zip(images, folders, strict=True)]
    )


def _members(shard: str) -> list[tarfile.TarInfo]:
    """The files of an uncompressed tar; nothing else may be in it but folders."""
    try:
        with store.opened(shard) as file, tarfile.open(fileobj=file, mode='r:') as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError) as error:
        hint = '; compressed ones cannot be read at random: gunzip it' if shard.endswith(('z', '2')) else ''
        raise FlaxnetsError(f'{shard}: not an uncompressed tar file ({error}){hint}') from error
    seen = set()
    for member in members:
        parts = member.name.split('/')
        if not (member.isreg() or member.isdir()) or member.name.startswith('/') or '..' in parts:
            raise FlaxnetsError(f'{shard}: {member.name!r} is a link, a device or outside of the archive')
        if member.isreg() and member.name in seen:
            raise FlaxnetsError(f'{shard}: {member.name!r} is in it twice')
        seen.add(member.name)
    size = store.size(shard)
    files = [member for member in members if member.isreg()]
    cut = next((member for member in files if member.offset_data + member.size > size), None)
    if cut is not None:
        raise FlaxnetsError(f'{shard}: truncated: {cut.name!r} is not there whole; fetch it again')
    return files


def _class_number(shard: str, member: tarfile.TarInfo) -> int:
    text = store.read(shard, member.offset_data, min(member.size, 32)).strip()
    if not text.isdigit():
        raise FlaxnetsError(f'{shard}: {member.name!r} must hold the number of a class, not {text!r}')
    return int(text)


def _numbered(
    pattern: str, images: list[tuple[str, str, int, int]], numbers: dict[tuple[str, str], int]
) -> TarSource:
    members = []
    for shard, name, offset, size in images:
        number = numbers.get((shard, os.path.splitext(name)[0]))
        if number is None:
            raise FlaxnetsError(f'{shard}: {name!r} has no .cls beside it')
        members.append((shard, name, offset, size, number))
    classes = tuple(map(str, range(max(numbers.values()) + 1)))
    return TarSource(pattern, classes, members)

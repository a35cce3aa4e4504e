"""Opens images in tar files, left packed: folders of classes, one tar a class, or WebDataset's shards."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from flaxnets.errors import FlaxnetsError
from flaxnets.images.names import SNIFFED, is_hidden, named_as_image, natural
from flaxnets.images.transforms import is_image
from flaxnets.store.remote import StoreError

from . import shards, store, webdataset
from .base import USUAL_SPLITS, Labelled, Record
from .entries import LeftOut, some
from .members import Member
from .metadata import classes_of, numbered
from .parts import Part


class TarSource(Labelled):
    """Images in uncompressed tar files, each read from its place in the file."""

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        members: Sequence[Member],
        labels: Sequence[int],
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(name, classes, np.array(labels, np.int32), notes)
        self._members = members

    def __getitem__(self, index: int, /) -> Record:
        member, name = self._members[index], self.record_name(index)
        data = store.read_image(member.shard, name, member.offset, member.size)
        return Record(data, int(self.labels[index]), name)

    def record_name(self, index: int) -> str:
        return f'{self._members[index].shard}: {self._members[index].name}'

    def _identity(self) -> Iterable[bytes]:
        for member in self._members:
            text = f'{os.path.basename(member.shard)} {member.name} {member.offset} {member.size}'
            yield text.encode('utf-8', 'surrogateescape')


def open_tar(pattern: str, part: Part) -> Labelled:
    """Opens the tars of a part; docs/training.md says how they tell the classes.

    Raises:
      FlaxnetsError: there are no such tars, parts or images; a tar is damaged or compressed; the class of an
        image is unknown.
    """
    paths, several = shards.find(pattern, part)
    left_out = LeftOut()
    members = [member for path in paths for member in _members(path, left_out)]
    members = _of_part(pattern, members, part)
    if not any(member.image for member in members):
        others = '; '.join(left_out.notes()) or 'nothing else'
        raise FlaxnetsError(f'{pattern}: no images in {len(paths)} files, which hold {others}')
    found = webdataset.labelled(members, left_out)
    if found is not None:
        images, labels, how = found
        classes, numbers = classes_of(pattern, labels)
        notes = [how] if how else []
    else:
        images = [member for member in members if member.image]
        # Tars can be the classes only where there may be several of them.
        classes, numbers = _by_place(pattern, images, several and len(images) == len(members))
        by_tar = sorted({image.tar for image in images if not image.folder})
        notes = [f'classes are the names of the tars: {some(by_tar)}'] if by_tar else []
        notes += _twice(images)
    notes += [f'left out are {note}' for note in left_out.notes()]
    return TarSource(pattern, classes, images, numbers, [f'{pattern}: {note}' for note in notes])


def _by_place(pattern: str, images: Sequence[Member], several: bool) -> tuple[tuple[str, ...], list[int]]:
    """Classes by where images lie: in the folder around them, or else in a tar of their own."""
    lost = next((m for m in images if not (m.folder or several or '.tar/' in m.name)), None)
    if lost is not None:
        raise FlaxnetsError(
            f'{pattern}: the class of {lost.name} is unknown: it lies in no folder, and no .cls, no .json '
            'with a label and no .txt with a class is beside it'
        )
    names = [natural(member.folder or member.tar) for member in images]
    return numbered(names)


def _twice(images: Sequence[Member]) -> list[str]:
    counts = Counter((image.shard, image.name) for image in images)
    names = [name for (_, name), count in counts.items() if count > 1]
    return [f'in a tar more than once, and taken as often: {some(names)}'] if names else []


def _parts(name: str) -> list[str]:
    return [part for part in name.split('/') if part not in ('', '.')]


def _of_part(pattern: str, members: list[Member], part: Part) -> list[Member]:
    """The files of a part alone, of tars that hold a whole data set: train/CLASS/1.jpg, val/CLASS/1.jpg."""
    if '{split}' in pattern or store.is_folder(pattern):
        return members
    usual = {*USUAL_SPLITS, part.names[0].lower()}
    of = [next((p.lower() for p in _parts(m.name)[:-2] if p.lower() in usual), '') for m in members]
    there = {name for name, member in zip(of, members, strict=True) if member.image}
    wanted = next((name.lower() for name in part.names if name.lower() in there), None)
    ambiguous = part.shares_the_whole and len(there) > 1
    if wanted is not None and (part.chosen or '' not in there) and not ambiguous:
        return [member for name, member in zip(of, members, strict=True) if name == wanted]
    if not part.chosen and ('' in there or len(there) < 2):
        return members
    raise FlaxnetsError(
        f'{pattern}: name one of its parts, which are {some(sorted(there - {""})) or "not told"}; '
        '{split} in the pattern would stand for the part'
    )


# The tool that unpacks a shard, by the ending of its name.
_UNPACKED_BY = {
    'gz': 'gunzip',
    '.Z': 'gunzip',
    'bz2': 'bunzip2',
    'xz': 'unxz',
    'zst': 'unzstd',
    'lz4': 'unlz4',
}


def _members(shard: str, left_out: LeftOut) -> list[Member]:
    """The images and files of labels in an uncompressed tar, and in tars in it."""
    try:
        with store.opened(shard) as file:
            return list(_walk(shard, file, 0, store.size(shard), '', left_out))
    except StoreError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        tool = next((tool for ending, tool in _UNPACKED_BY.items() if shard.endswith(ending)), None)
        hint = f'; compressed ones cannot be read at random: unpack it with {tool}' if tool else ''
        raise FlaxnetsError(f'{shard}: not an uncompressed tar file ({error}){hint}') from error


def _walk(
    shard: str, file: BinaryIO, start: int, end: int, within: str, left_out: LeftOut
) -> Iterator[Member]:
    """The same of the tar between two bytes of a file; `within` is its name if it lies in another tar."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode='r:') as archive:
        infos = [info for info in archive.getmembers() if info.offset < end]
        _check_end(shard, file, archive.offset, end)
    tar = os.path.splitext(os.path.basename(within or shard))[0]
    for info in infos:
        name, parts = f'{within}/{info.name}' if within else info.name, _parts(info.name)
        if info.isdir() or not parts:
            continue
        if info.isreg() and info.offset_data + info.size > end:
            raise FlaxnetsError(f'{shard}: truncated: {name!r} is not there whole; fetch it again')
        if any(map(is_hidden, parts)) or webdataset.is_meta(info.name):
            left_out.add('hidden entries', name)
        elif not info.isreg() or info.issparse():
            left_out.add('links, devices and sparse files', name)
        elif parts[-1].lower().endswith('.tar') and not within:
            yield from _inner(shard, file, info, left_out)
        else:
            label = webdataset.is_label(parts[-1])
            image = not label and (named_as_image(parts[-1]) or _holds_image(file, info))
            if image or label:
                folder = parts[-2] if len(parts) > 1 else ''
                yield Member(shard, name, info.offset_data, info.size, image, folder, tar)
            else:
                left_out.add('files that are no images', name)


def _inner(shard: str, file: BinaryIO, info: tarfile.TarInfo, left_out: LeftOut) -> Iterator[Member]:
    """The files of a tar in a tar, as ImageNet's is."""
    start, end = info.offset_data, info.offset_data + info.size
    try:
        yield from _walk(shard, file, start, end, info.name, left_out)
    except tarfile.TarError as error:
        raise FlaxnetsError(f'{shard}: {info.name!r} is not an uncompressed tar file ({error})') from error


def _holds_image(file: BinaryIO, info: tarfile.TarInfo) -> bool:
    file.seek(info.offset_data)
    return is_image(file.read(min(info.size, SNIFFED)))


def _check_end(shard: str, file: BinaryIO, offset: int, end: int) -> None:
    """Raises if a tar ends at a damaged header, as `tarfile` lets it: a true end is zeros, or nothing."""
    file.seek(offset)
    block = file.read(min(tarfile.BLOCKSIZE, max(0, end - offset)))
    if block.strip(b'\0'):
        raise FlaxnetsError(f'{shard}: damaged at byte {offset}: no file begins there; fetch it again')

"""Finds images by path: files, folders, patterns, tars, and lists of all these."""

from __future__ import annotations

import glob
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import FlaxnetsError, ImageError
from .names import SNIFFED, is_hidden, named_as_image, natural
from .transforms import decode, is_image

COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst', '.zip')


@dataclass(frozen=True)
class ImageFile:
    """An image that has not been read yet.

    Attributes:
      name: its name for people and tables, always valid UTF-8.
      path: path of the file, or of the tar that holds it.
      offset: where it begins in the tar, in bytes.
      size: its size in the tar, in bytes; None for a file of its own.
    """

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def open(self, in_chans: int = 3) -> str | Image.Image:
        """The image in a form that a `flaxnets.images.transforms.Transform` takes.

        Args:
          in_chans: 3, or 1 to decode an image of a tar as grey.

        Returns:
          The path of a file of its own, or a decoded image from a tar.

        Raises:
          ImageError: the tar has changed, or the image in it cannot be decoded.
        """
        if self.size is None:
            return self.path
        try:
            with open(self.path, 'rb') as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f'{self.name}: cannot be read: {error.strerror or error}') from error
        return decode(data, in_chans, self.name)


def find_images(paths: Sequence[str | os.PathLike[str]]) -> tuple[ImageFile, ...]:
    """All images at these paths, in the order of the paths.

    Args:
      paths: each an image; a folder, searched with all folders in it in the order of names; a pattern
        (`photos/**/*.jpg`); an uncompressed `.tar`; a `.txt` file with one such path on each line, relative
        to the working folder or else to the file's own folder; or `-` for such a list on standard input.

    Raises:
      FlaxnetsError: there is nothing at a path, or no image. Images are not decoded: whether one can be
        read shows only later.
    """
    found = [image for path in paths for image in _found(os.fspath(path))]
    if not found:
        raise FlaxnetsError('no images are given')
    return tuple(found)


def _found(path: str, lists: tuple[str, ...] = ()) -> Iterable[ImageFile]:
    """The images at a path. `lists` are the lists that led to it, from the outermost on."""
    if path == '-':
        return _listed(sys.stdin.read(), '.', 'standard input', lists)
    if '://' in path:
        raise FlaxnetsError(f'{path}: images of buckets and web sites are not read here; copy them first')
    if os.path.isdir(path):
        return _some_of(path, _of_folder(path), 'no images in this folder')
    if not os.path.lexists(path):
        matches = _matching(path) if glob.has_magic(path) else []
        if not matches:
            what = 'nothing matches this pattern' if glob.has_magic(path) else 'no such file or folder'
            raise FlaxnetsError(f'{path}: {what}')
        return [image for match in matches for image in _found(match, lists)]
    lower = path.lower()
    if lower.endswith(COMPRESSED):
        raise FlaxnetsError(f'{path}: compressed archives are not read; unpack it and give the folder')
    if lower.endswith('.tar'):
        return _some_of(path, _of_tar(path), 'no images in this tar')
    if lower.endswith('.txt'):
        own = os.path.realpath(path)
        if own in lists:
            raise FlaxnetsError(f'{path}: this list names itself, or a list that names it')
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            return _listed(file.read(), os.path.dirname(path), path, (*lists, own))
    return [ImageFile(natural(path), path)]


def _matching(pattern: str) -> list[str]:
    """The paths that match, each file once even if links lead to it; hidden ones only if the pattern is."""
    asked = set(pattern.split(os.sep))
    found: dict[str, str] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):
        if not any(is_hidden(part) and part not in asked for part in match.split(os.sep)):
            found.setdefault(os.path.realpath(match), match)
    return list(found.values())


def _some_of(path: str, images: Iterable[ImageFile], otherwise: str) -> list[ImageFile]:
    found = list(images)
    if not found:
        raise FlaxnetsError(f'{path}: {otherwise}')
    return found


def _listed(text: str, folder: str, name: str, lists: tuple[str, ...]) -> list[ImageFile]:
    found: list[ImageFile] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        beside = os.path.join(folder, line)
        path = beside if not os.path.lexists(line) and os.path.lexists(beside) else line
        # A wrong line must not stop a long list: it counts as an image that cannot be read.
        known = os.path.lexists(path) or glob.has_magic(path)
        found += _found(path, lists) if known else [ImageFile(natural(path), path)]
    return _some_of(name, found, 'no images in this list; it is to hold a path on each line')


def _of_folder(folder: str, around: frozenset[str] = frozenset()) -> Iterator[ImageFile]:
    """The images of a folder and of all folders in it.

    Links are followed, but not back to one of the folders `around` this one, which would never end.
    """
    identity = os.path.realpath(folder)
    if identity in around:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise FlaxnetsError(f'{folder}: the folder cannot be read: {error.strerror}') from error
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _of_folder(path, around | {identity})
        elif named_as_image(name) or _begins_as_image(path):
            yield ImageFile(natural(path), path)


def _begins_as_image(path: str) -> bool:
    if not os.path.isfile(path):  # to open a pipe would wait for its writer
        return False
    try:
        with open(path, 'rb') as file:
            return is_image(file.read(SNIFFED))
    except OSError:
        return False


def _of_tar(path: str) -> Iterator[ImageFile]:
    try:
        with tarfile.open(path, 'r:') as archive:
            for info in archive:
                parts = info.name.split('/')
                if not info.isreg() or any(map(is_hidden, parts)) or not named_as_image(parts[-1]):
                    continue
                yield ImageFile(f'{natural(path)}: {natural(info.name)}', path, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise FlaxnetsError(f'{path}: not an uncompressed tar file ({error})') from error

"""Reads labels in WebDataset's shards: files whose names are equal up to the first dot are a sample."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias

from flaxnets.errors import FlaxnetsError, shown

from . import metadata, store
from .entries import LeftOut
from .members import Member

FIELDS = ('cls', 'class', 'json', 'txt', 'index')  # that may tell the class, in this order
IF_FLAT = ('txt', 'index')  # often something else: they count only where no folder can be the class
JSON_KEYS = ('label', 'cls', 'class', 'target')
# Which of several images of a sample is taken: these in timm's order, then any other.
FIRST_IMAGES = ('jpg', 'png', 'webp', 'jpeg')
LONGEST = 100  # letters of a class name; longer texts are captions
MOST_BYTES = 1 << 20  # of a label's file

Key: TypeAlias = tuple[str, str]  # a shard and a sample in it


def split_name(name: str) -> tuple[str, str]:
    """The sample that a file belongs to, and its field: a/b.left.JPG is `left.jpg` of a/b."""
    folder, separator, last = name.rpartition('/')
    key, _, field = last.partition('.')
    return folder + separator + key, field.lower()


def _at_last_dot(name: str) -> tuple[str, str]:
    key, ending = os.path.splitext(name)
    return key, ending[1:].lower()


def is_label(name: str) -> bool:
    """Whether a file of this name may hold a label."""
    return _at_last_dot(name)[1] in FIELDS


def is_meta(name: str) -> bool:
    """Whether a file is about the shard itself (__NAME__): WebDataset passes over these."""
    return re.match(r'__[^/]*__($|/)', name) is not None


def labelled(
    members: Sequence[Member], left_out: LeftOut
) -> tuple[list[Member], list[str | int], str] | None:
    """One image of each sample, its label, and how it was found; None if no file holds labels.

    Raises:
      FlaxnetsError: an image without a label where others have one, or a file that holds none.
    """
    split = split_name
    if not any(split_name(m.name)[1] == 'cls' for m in members if not m.image) and any(
        m.name.lower().endswith('.cls') for m in members
    ):
        split = _at_last_dot  # of names as 1.5.jpg and 1.5.cls, whose sample is 1.5
    samples: dict[Key, list[Member]] = {}
    fields: dict[str, dict[Key, Member]] = {}
    for member in members:
        key, field = split(member.name)
        if member.image:
            samples.setdefault((member.shard, key), []).append(member)
        elif fields.setdefault(field, {}).setdefault((member.shard, key), member) is not member:
            raise FlaxnetsError(f'{member.shard}: {member.name!r} is in it twice')
    flat = not any(member.folder for member in members if member.image)
    for field in FIELDS:
        held = {key: member for key, member in fields.get(field, {}).items() if key in samples}
        labels = _read(field, held) if held and (flat or field not in IF_FLAT) else None
        if labels is None or (field in IF_FLAT and not _are_classes(list(labels.values()))):
            continue
        for sample in fields[field].keys() - samples.keys():
            left_out.add('labels without an image', fields[field][sample].name)
        lacking = next((images[0] for key, images in samples.items() if key not in labels), None)
        if lacking is not None:
            raise FlaxnetsError(f'{lacking.shard}: {lacking.name!r} has no .{field} beside it')
        how = '' if field == 'cls' else f'classes are those of the .{field} beside each image'
        return _one_each(samples, split, left_out), [labels[key] for key in samples], how
    return None


def _one_each(
    samples: dict[Key, list[Member]], split: Callable[[str], tuple[str, str]], left_out: LeftOut
) -> list[Member]:
    """One image of each sample, one with only a format after the first dot if there is any."""
    chosen = []
    for images in samples.values():
        fields = [split(image.name)[1] for image in images]
        twice = next((f for f in fields if fields.count(f) > 1), None)
        if twice is not None:
            raise FlaxnetsError(f'{images[0].shard}: {images[0].name!r} is in it twice')
        order = [*(f for f in FIRST_IMAGES if f in fields), *(f for f in fields if '.' not in f), *fields]
        for field, image in zip(fields, images, strict=True):
            if field == order[0]:
                chosen.append(image)
            else:
                left_out.add(f'further images of samples, of which .{order[0]} is taken', image.name)
    return chosen


def _read(field: str, held: dict[Key, Member]) -> dict[Key, str | int] | None:
    """The label in each file; None if the first file holds none, in a field that need not hold any."""
    labels: dict[Key, str | int] = {}
    for shard, items in groupby(held.items(), lambda item: item[0][0]):
        with store.opened(shard) as file:
            for key, member in items:
                file.seek(member.offset)
                data = file.read(min(member.size, MOST_BYTES))
                label = _from_json(data) if field == 'json' else _from_text(data)
                if label is None and not labels and field not in ('cls', 'class'):
                    return None
                if label is None:
                    raise FlaxnetsError(
                        f'{shard}: {member.name!r} must hold the number or the name of a class, not '
                        f'{shown(data)}'
                    )
                labels[key] = label
    return labels


def _from_text(data: bytes) -> str | None:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return None
    return text if text and len(text) <= LONGEST and '\n' not in text else None


def _from_json(data: bytes) -> str | int | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    label = value if not isinstance(value, dict) else next((value[k] for k in JSON_KEYS if k in value), None)
    return label if metadata.is_label(label) else None


def _are_classes(labels: Sequence[str | int]) -> bool:
    """Whether labels repeat, as classes do; captions and running numbers differ from image to image."""
    return len(set(labels)) <= 0.8 * len(labels)

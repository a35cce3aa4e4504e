"""Tables of labels beside images: Hugging Face's metadata.csv and metadata.jsonl."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any, TypeGuard

from flaxnets.errors import FlaxnetsError, shown

from . import store
from .entries import some

FILES = ('metadata.csv', 'metadata.jsonl')
LABELS = ('label', 'labels', 'class', 'category')  # columns, the first one that is there

MOST = 1_000_000  # classes


def find(folder: str) -> str | None:
    """The name of the table in a folder, if there is one."""
    return next((name for name in FILES if store.is_file(os.path.join(folder, name))), None)


def read(path: str) -> dict[str, str | int] | None:
    """The label of each file that a table lists, in its order; None if it has no column of labels.

    Raises:
      FlaxnetsError: it cannot be read, a row lacks the file's name or label, or a file is listed twice.
    """
    try:
        rows = _rows(path)
    except (OSError, ValueError, csv.Error) as error:
        raise FlaxnetsError(f'{path}: cannot be read: {error}') from error
    column = next((name for name in LABELS if rows and name in rows[0]), None)
    if column is None:
        return None
    found: dict[str, str | int] = {}
    for number, row in enumerate(rows, 1):
        name, label = row.get('file_name'), row.get(column)
        if not isinstance(name, str) or not is_label(label):
            raise FlaxnetsError(f'{path}: row {number} must have a file_name and one {column}: {shown(row)}')
        name = os.path.normpath(name)
        if name in found:
            raise FlaxnetsError(f'{path}: {name} is listed twice')
        found[name] = label
    return found


def is_label(value: object) -> TypeGuard[str | int]:
    """Whether a value may be the label of an image: the name or the number of a class."""
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ''


def _rows(path: str) -> list[dict[str, Any]]:
    text = store.read(path).decode('utf-8-sig')
    if path.endswith('.csv'):
        return list(csv.DictReader(io.StringIO(text, newline='')))
    rows = [json.loads(line) for line in text.split('\n') if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('a line is no object')
    return rows


def classes_of(where: str, values: Sequence[str | int]) -> tuple[tuple[str, ...], list[int]]:
    """The classes, and the class number of each image, from labels as files give them.

    Labels that are numbers are the numbers of the classes, which then have no other names. Labels that are
    names are numbered in their order as text.

    Args:
      where: the file or folder, for messages.
      values: the label of each image.

    Returns:
      The names of the classes; a number for each image.

    Raises:
      FlaxnetsError: some labels are numbers and some are names; a number is too large, or below 0 as in parts
        without labels.
    """
    texts = [str(value).strip() for value in values]
    numeric = [text for text in texts if text.removeprefix('-').removeprefix('+').isdecimal()]
    if len(numeric) == len(texts):
        numbers = list(map(int, texts))
        if min(numbers) < 0:
            raise FlaxnetsError(f'{where}: a label is {min(numbers)}: this part has no labels')
        if max(numbers) >= MOST:
            raise FlaxnetsError(f'{where}: a label is {max(numbers)}, which is no number of a class')
        return tuple(map(str, range(max(numbers) + 1))), numbers
    if numeric:
        names = sorted(set(texts) - set(numeric))
        raise FlaxnetsError(
            f'{where}: some labels are numbers ({numeric[0]}) and some are names ({some(names)})'
        )
    return numbered(texts)


def numbered(names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """The classes that images are of, in the order of their names as text, and each image's class number."""
    classes = tuple(sorted(set(names)))
    places = {name: i for i, name in enumerate(classes)}
    return classes, [places[name] for name in names]

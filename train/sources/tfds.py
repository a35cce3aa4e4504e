"""Data sets of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flaxnets.errors import FlaxnetsError, ImageError

from .base import Labelled, Record


class TfdsSource(Labelled):
    """A prepared data set of TensorFlow Datasets, in array_record files, without TensorFlow."""

    def __init__(self, name: str, classes: Sequence[str], records: Any, identity: str) -> None:
        # Labels are not read beforehand: that would take a pass over the whole data set.
        super().__init__(name, classes, np.zeros(0, np.int32))
        self._records, self._what = records, identity

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        try:
            record = self._records[index]
        except Exception as error:  # its own kinds for damage of any sort
            raise ImageError(f'{self.name} record {index}: cannot be read: {_first_line(error)}') from error
        name = record.get('file_name', b'')
        shown = name.decode(errors='replace') if name else f'{self.name} record {index}'
        return Record(record['image'], int(record['label']), shown)

    def record_name(self, index: int) -> str:
        return self[index].name  # the file's name, which only the record knows

    def _identity(self) -> Iterable[bytes]:
        yield self._what.encode()


def open_tfds(name: str, splits: tuple[str, ...]) -> TfdsSource:
    """`NAME`, `NAME/CONFIG:VERSION`, and `?data_dir=DIR` after it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise FlaxnetsError(f"data=tfds:... needs pip install 'flaxnets[train]': {error}") from error
    name, _, query = name.partition('?')
    key, _, folder = query.partition('=')
    if query and key != 'data_dir':
        raise FlaxnetsError(f'tfds:{name}?{query}: only ?data_dir=DIR is understood')
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except Exception as error:  # its own kinds for unknown names, and any for files that cannot be read
        raise FlaxnetsError(f'tfds:{name}: {_first_line(error)}') from error
    features = builder.info.features or {}
    if 'image' not in features or 'label' not in features:
        raise FlaxnetsError(f'tfds:{name} is not for classification: it has {", ".join(features)}')
    there = list(builder.info.splits)
    split = next((s for s in splits if s in there), None if there else splits[0])
    if split is None:
        raise FlaxnetsError(f'tfds:{name}: no part {" or ".join(splits)}; its parts are {", ".join(there)}')
    try:
        records = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
    except Exception as error:
        place = f' --data_dir={folder}' if folder else ''
        raise FlaxnetsError(
            f'tfds:{name}: cannot be read here ({_first_line(error)}). Prepare it, where TensorFlow is '
            f'installed, with: tfds build {name} --file_format=array_record{place}'
        ) from error
    info = builder.info
    identity = f'{info.full_name} {split} {len(records)}'
    return TfdsSource(f'tfds:{name}', info.features['label'].names, records, identity)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0]

"""Data sets of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flaxnets.errors import FlaxnetsError
from train.sources import Labelled, Record


class TfdsSource(Labelled):
    """A prepared data set of TensorFlow Datasets, in array_record files, without TensorFlow."""

    def __init__(self, name: str, classes: Sequence[str], records: Any, identity: str) -> None:
        # Labels are not read beforehand: that would take a pass over the whole data set.
        super().__init__(name, classes, np.zeros(0, np.int32))
        self._records, self._what = records, identity

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        record = self._records[index]
        name = record.get('file_name', b'')
        shown = name.decode(errors='replace') if isinstance(name, bytes) and name else self.record_name(index)
        return Record(record['image'], int(record['label']), shown)

    def record_name(self, index: int) -> str:
        return f'{self.name} record {index}'

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
        raise FlaxnetsError(f'tfds:{name}: {str(error).partition(chr(10))[0]}') from error
    features = builder.info.features or {}
    if 'image' not in features or 'label' not in features:
        raise FlaxnetsError(f'tfds:{name} is not for classification: it has {", ".join(features)}')
    there = list(builder.info.splits)
    split = next((s for s in splits if s in there), None)
    if split is None:
        state = f'its parts are {", ".join(there)}' if there else 'it has not been prepared here'
        raise FlaxnetsError(
            f'tfds:{name}: no part {" or ".join(splits)}: {state}. Prepare it (where TensorFlow is installed) with\n'
            f'  tfds build {name} --file_format=array_record --data_dir={builder.data_dir.rpartition("/" + name.partition("/")[0])[0]}'
        )
    try:
        records = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
    except Exception as error:
        raise FlaxnetsError(
            f'tfds:{name}: cannot be read at random: {str(error).partition(chr(10))[0]}. It must have been '
            'prepared with --file_format=array_record'
        ) from error
    info = builder.info
    identity = f'{info.full_name} {split} {len(records)}'
    return TfdsSource(f'tfds:{name}', info.features['label'].names, records, identity)

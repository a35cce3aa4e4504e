"""Opens data sets of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.store.remote import is_remote

from .base import SPLITS, Labelled, Record
from .entries import some


class TfdsSource(Labelled):
    """A prepared data set of TensorFlow Datasets, in array_record files, without TensorFlow.

    Args:
      name: for messages.
      classes: the names of the classes.
      records: a sequence of records, as `builder.as_data_source` gives it.
      identity: a text that is different for other records.
      keys: the keys of the image and of its label in a record.
    """

    def __init__(
        self, name: str, classes: Sequence[str], records: Any, identity: str, keys: tuple[str, str]
    ) -> None:
        # Labels are not read beforehand: that would take a pass over the whole data set.
        super().__init__(name, classes, np.zeros(0, np.int32))
        self._records, self._what, self._keys = records, identity, keys

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        try:
            record = self._records[index]
        except Exception as error:  # array_record raises errors of its own for any damage
            raise ImageError(f'{self.name} record {index}: cannot be read: {_first_line(error)}') from error
        name = record.get('file_name', b'')
        shown = name.decode(errors='replace') if name else f'{self.name} record {index}'
        label = int(record[self._keys[1]])
        if not 0 <= label < self.num_classes:
            raise FlaxnetsError(
                f'{self.name}: the label of {shown} is {label}, and not in 0..{self.num_classes - 1}; parts '
                'for testing are often published without labels: choose another part'
            )
        return Record(record[self._keys[0]], label, shown)

    def record_name(self, index: int) -> str:
        return self[index].name  # the file's name, which only the record knows

    def among(self, classes: Sequence[str]) -> Labelled:
        if self.classes != tuple(classes):
            raise FlaxnetsError(f'{self.name} has other classes than the images of training')
        return self

    def empty_classes(self) -> tuple[str, ...]:
        return ()

    def _identity(self) -> Iterable[bytes]:
        yield self._what.encode()


def open_tfds(name: str, split: str, training: bool) -> TfdsSource:
    """Opens a prepared data set.

    Args:
      name: `NAME` or `NAME/CONFIG:VERSION`, perhaps followed by `?data_dir=DIR`.
      split: as `tfds.load` takes it; '' takes the usual part.
      training: whether the usual part is the one for training or for evaluation.

    Raises:
      FlaxnetsError: the package is not installed; there is no such data set or part, it is not prepared, or
        it is not one of images with labels.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise FlaxnetsError(
            f'data=tfds:... needs the package tensorflow-datasets: pip install tensorflow-datasets ({error})'
        ) from error
    name, _, query = name.partition('?')
    key, _, folder = query.partition('=')
    if query and key != 'data_dir':
        raise FlaxnetsError(f'tfds:{name}?{query}: only ?data_dir=DIR is understood')
    if folder and is_remote(folder):
        raise FlaxnetsError(
            f'tfds:{name}?{query}: array_record files are read from this machine only; copy or mount the '
            'folder (gcloud storage cp -r, gcsfuse), or put the images there as tar files or folders'
        )
    try:
        builder = tfds.builder(name, data_dir=folder or None)
    except Exception as error:  # errors of its own for unknown names, others for files that cannot be read
        raise FlaxnetsError(f'tfds:{name}: {_first_line(error)}') from error
    image, label = _keys(name, builder.info)
    there = list(builder.info.splits)
    # `train[:80%]` and `train+test` are TensorFlow Datasets' own; the usual parts are looked for here.
    usual = SPLITS[training]
    part = split or next((s for s in usual if s in there), None if there else usual[0])
    unknown = [s for s in re.split(r'\s*\+\s*', part or '') if there and s.partition('[')[0] not in there]
    if part is None or (unknown and part != 'all'):
        hint = (
            ''
            if part
            else f". Percents make parts: train_split='{there[0]}[:80%]', and eval_split='{there[0]}[80%:]'"
        )
        raise FlaxnetsError(
            f'tfds:{name}: no part {some(unknown) or " or ".join(usual[:2])}; its parts are '
            f'{", ".join(there)}{hint}'
        )
    if there and not _size(name, builder.info, part):
        raise FlaxnetsError(f'tfds:{name}: {part} has no images')
    try:
        records = builder.as_data_source(split=part, decoders={image: tfds.decode.SkipDecoding()})
        count = len(records)
    except Exception as error:
        place = f' --data_dir={folder}' if folder else ''
        raise FlaxnetsError(
            f'tfds:{name}: {part} cannot be read here ({_first_line(error)}). Prepare it, where TensorFlow '
            f'is installed, with: tfds build {name} --file_format=array_record{place}'
        ) from error
    identity = f'{builder.info.full_name} {part} {count}'
    source = TfdsSource(f'tfds:{name}', builder.info.features[label].names, records, identity, (image, label))
    source[0]  # raises now if the part has no labels
    return source


def _size(name: str, info: Any, part: str) -> int:
    """How many images a part has."""
    try:
        return int(info.splits[part].num_examples)
    except Exception as error:
        raise FlaxnetsError(f'tfds:{name}: the part {part!r}: {_first_line(error)}') from error


def _keys(name: str, info: Any) -> tuple[str, str]:
    """The keys of the image and its label in a record: as declared, or the only ones that can be."""
    import tensorflow_datasets as tfds

    features = info.features or {}
    images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    declared = info.supervised_keys or ()
    for image, label in (('image', 'label'), tuple(declared)[:2] or ('', '')):
        if image in images and label in labels:
            return image, label
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise FlaxnetsError(
        f'tfds:{name} is not for classification: it must have one image and one label of a class, or say '
        f'which; it has {", ".join(features)}'
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0]

"""A data set of TensorFlow Datasets, prepared and read without TensorFlow."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from flaxnets.errors import FlaxnetsError
from train.sources import open_source


class Tiny(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """Six grey squares to learn from, four to be judged by."""

    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = epath.Path(__file__).parent

    def _info(self) -> Any:
        features = {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
            'label': tfds.features.ClassLabel(names=['even', 'odd']),
            'file_name': tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> Any:
        return {'train': self._generate_examples(6), 'validation': self._generate_examples(4)}

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for i in range(count):
            file = io.BytesIO()
            Image.new('RGB', (9, 7), (i, i, i)).save(file, 'jpeg')
            file.seek(0)
            yield i, {'image': file, 'label': i % 2, 'file_name': f'{i}.jpg'}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('tfds')
    Tiny(data_dir=folder, file_format='array_record').download_and_prepare()
    return folder


def test_records_are_read_as_they_are_stored(prepared: Path) -> None:
    train = open_source(f'tfds:tiny?data_dir={prepared}', '', True)
    val = open_source(f'tfds:tiny?data_dir={prepared}', '', False)
    assert (len(train), len(val), train.classes) == (6, 4, ('even', 'odd'))
    assert train.fingerprint != val.fingerprint
    for i in range(6):
        record = train[i]
        number = int(record.name.removesuffix('.jpg'))
        assert record.label == number % 2
        assert isinstance(record.image, bytes)
        assert Image.open(io.BytesIO(record.image)).getpixel((0, 0)) == (number,) * 3
    assert sorted(train[i].name for i in range(6)) == [f'{i}.jpg' for i in range(6)]
    assert [train.record_name(i) for i in range(6)] == [train[i].name for i in range(6)]
    assert 'tensorflow' not in sys.modules


def test_what_is_not_there(prepared: Path) -> None:
    with pytest.raises(FlaxnetsError, match='no part other; its parts are train, validation'):
        open_source(f'tfds:tiny?data_dir={prepared}', 'other', True)
    with pytest.raises(FlaxnetsError, match=r'only \?data_dir=DIR'):
        open_source('tfds:tiny?split=x', '', True)
    with pytest.raises(FlaxnetsError, match='tfds:nosuchset: '):
        open_source('tfds:nosuchset', '', True)
    empty = prepared / 'empty'
    with pytest.raises(FlaxnetsError, match=r'tfds build mnist --file_format=array_record --data_dir='):
        open_source(f'tfds:mnist?data_dir={empty}', '', True)
    with pytest.raises(FlaxnetsError, match='tfds:lm1b.* is not for classification|lm1b: '):
        open_source('tfds:lm1b', '', True)

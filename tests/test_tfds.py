"""A data set of TensorFlow Datasets, prepared and read without TensorFlow."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feeds
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from flaxnets.errors import FlaxnetsError
from train.data.batches import train_batches
from train.data.sources import Source, open_source


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


class Single(Tiny):
    """One part to learn from, under other names, and one whose labels were never published."""

    name = 'single'

    def _info(self) -> Any:
        features = {
            'picture': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
            'kind': tfds.features.ClassLabel(names=['even', 'odd']),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> Any:
        return {'train': self._examples(20, True), 'test': self._examples(3, False)}

    def _examples(self, count: int, labelled: bool) -> Iterator[Any]:
        for i, example in self._generate_examples(count):
            yield i, {'picture': example['image'], 'kind': i % 2 if labelled else -1}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('tfds')
    for kind in (Tiny, Single):
        kind(data_dir=folder, file_format='array_record').download_and_prepare()
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


def grey(source: Source) -> list[int]:
    """The value of each image's first pixel, which is its number."""
    return [Image.open(io.BytesIO(source[i].image)).getpixel((0, 0))[0] for i in range(len(source))]


@pytest.mark.parametrize(
    'split', ['train[:80%]', 'train[80%:]', 'train[-5:]', 'train[3:7]', 'train[25%:75%]', 'all']
)
def test_parts_of_parts_are_tensorflow_datasets_own(prepared: Path, split: str) -> None:
    name = 'tiny' if split == 'all' else 'single'
    builder = tfds.builder(name, data_dir=prepared)
    oracle = builder.as_data_source(split=split)
    source = open_source(f'tfds:{name}?data_dir={prepared}', split, True)
    key = 'image' if split == 'all' else 'picture'
    assert grey(source) == [int(record[key][0, 0, 0]) for record in oracle]


def test_one_part_makes_two(prepared: Path) -> None:
    spec = f'tfds:single?data_dir={prepared}'
    train, val = open_source(spec, 'train[:80%]', True), open_source(spec, 'train[80%:]', False)
    assert (len(train), len(val)) == (16, 4) and train.fingerprint != val.fingerprint
    assert sorted(grey(train) + grey(val)) == list(range(20))
    assert all(train[i].label == grey(train)[i] % 2 for i in range(16))
    both = open_source(f'tfds:tiny?data_dir={prepared}', 'train+validation', True)
    assert len(both) == 10


def test_a_part_without_labels_is_refused(prepared: Path) -> None:
    with pytest.raises(FlaxnetsError, match='single record 0 is -1, and not in 0..1'):
        open_source(f'tfds:single?data_dir={prepared}', 'test', False)


def test_what_is_not_there(prepared: Path) -> None:
    with pytest.raises(FlaxnetsError, match='no part other; its parts are train, validation'):
        open_source(f'tfds:tiny?data_dir={prepared}', 'other', True)
    with pytest.raises(FlaxnetsError, match=r'only \?data_dir=DIR'):
        open_source('tfds:tiny?split=x', '', True)
    with pytest.raises(FlaxnetsError, match='tfds:nosuchset: '):
        open_source('tfds:nosuchset', '', True)
    with pytest.raises(FlaxnetsError, match=r'no part other; its parts'):
        open_source(f'tfds:tiny?data_dir={prepared}', 'train[:50%]+other', True)
    with pytest.raises(FlaxnetsError, match=r"the part 'train\[oops\]'"):
        open_source(f'tfds:tiny?data_dir={prepared}', 'train[oops]', True)
    with pytest.raises(FlaxnetsError, match=r'train\[:0%\] has no images'):
        open_source(f'tfds:tiny?data_dir={prepared}', 'train[:0%]', True)
    empty = prepared / 'empty'
    with pytest.raises(FlaxnetsError, match=r'tfds build mnist --file_format=array_record --data_dir='):
        open_source(f'tfds:mnist?data_dir={empty}', '', True)
    with pytest.raises(FlaxnetsError, match='tfds:lm1b.* is not for classification|lm1b: '):
        open_source('tfds:lm1b', '', True)


def test_worker_processes_read_them_without_jax(prepared: Path) -> None:
    source = open_source(f'tfds:tiny?data_dir={prepared}', '', True)
    options: dict[str, Any] = {'batch_size': 4, 'seed': 0, 'start_step': 0}
    for kind in ({'threads': 1}, {'processes': 1}):
        batches = train_batches(source, feeds.small, **options, **kind)
        found = [next(batches) for _ in range(3)]
        batches.close()
        if 'threads' in kind:
            expected = found
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours['label'], theirs['label'])
        np.testing.assert_array_equal(ours['image'], theirs['image'])

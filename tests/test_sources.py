"""Sources of images: what they hold, what they refuse."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.images.transforms import decode, is_image
from train.data.sources import Source, open_source


def jpeg(colour: int = 100, mode: str = 'RGB', size: tuple[int, int] = (8, 6), form: str = 'jpeg') -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour if mode in ('L', 'P', 'I;16', '1') else (colour,) * len(mode)).save(
        file, form
    )
    return file.getvalue()


def listed(source: Source) -> list[tuple[str, int]]:
    return [(os.path.basename(source[i].name), source[i].label) for i in range(len(source))]


# The digits.


def test_digits_are_scikit_learns_split_by_class() -> None:
    digits = load_digits()
    train, test = (open_source('digits', '', training) for training in (True, False))
    assert (len(train), len(test), train.classes) == (1437, 360, tuple('0123456789'))
    # The split of the accuracy anchors: the first 36 of a permutation of each class, RandomState(0).
    rng = np.random.RandomState(0)
    chosen = [rng.permutation(np.flatnonzero(digits.target == c))[:36] for c in range(10)]
    rows = np.sort(np.concatenate(chosen))
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(test[i].image, np.round(digits.images[row] * 255 / 16))
        assert test[i].label == digits.target[row]
    left = np.setdiff1d(np.arange(1797), rows)
    np.testing.assert_array_equal([train[i].label for i in range(1437)], digits.target[left])


def test_digits_have_two_parts() -> None:
    assert len(open_source('digits', 'test', True)) == 360
    with pytest.raises(FlaxnetsError, match="train and test, not 'other'"):
        open_source('digits', 'other', True)


# Folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, names in (('train', 'abc'), ('val', 'ab')):
        for label, name in enumerate(('n02', 'n01')):
            where = tmp_path / split / name / ('deeper' * label)
            where.mkdir(parents=True)
            for letter in names:
                (where / f'{letter}.JPEG').write_bytes(jpeg(label))
            (where / 'notes.txt').write_text('no image')
    return tmp_path


def test_a_folder_of_each_class(folder: Path) -> None:
    train, val = (open_source(f'folder:{folder}', '', training) for training in (True, False))
    assert train.classes == val.classes == ('n01', 'n02')
    assert listed(train) == [(f'{x}.JPEG', label) for label in (0, 1) for x in 'abc']
    assert len(val) == 4
    assert train[0].image == (folder / 'train' / 'n01' / 'deeper' / 'a.JPEG').read_bytes()
    assert train.record_name(0) == train[0].name
    pickle.loads(pickle.dumps(train))


def test_a_fingerprint_is_of_names_sizes_and_labels(folder: Path) -> None:
    def fingerprint() -> str:
        return open_source(f'folder:{folder}', '', True).fingerprint

    first = fingerprint()
    assert first == fingerprint() != open_source(f'folder:{folder}', '', False).fingerprint
    image = folder / 'train' / 'n02' / 'a.JPEG'
    image.write_bytes(jpeg(size=(80, 60)))
    second = fingerprint()
    image.rename(image.with_name('z.JPEG'))
    assert len({first, second, fingerprint()}) == 3


def remove(*parts: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for image in folder.joinpath(*parts).rglob('*.JPEG'):
            image.unlink()

    return act


@pytest.mark.parametrize(
    'act, message',
    [
        (remove('train', 'n01'), 'train: no images in n01'),
        (lambda folder: (folder / 'train').rename(folder / 'other'), r'no folder train or training .*other'),
        (lambda folder: (folder / 'train' / 'empty').mkdir(), r'no images in empty'),
    ],
)
def test_folders_that_are_refused(folder: Path, act: Callable[[Path], None], message: str) -> None:
    act(folder)
    with pytest.raises(FlaxnetsError, match=message):
        open_source(f'folder:{folder}', '', True)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(FlaxnetsError, match='it has no folders.*expected is'):
        open_source(f'folder:{tmp_path}', '', True)
    with pytest.raises(FlaxnetsError, match='absent: no such folder'):
        open_source(f'folder:{tmp_path}/absent', '', True)


# Tar files.


def write_tar(path: Path, members: dict[str, bytes], mode: str = 'w') -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_images_and_numbers(tmp_path: Path) -> None:
    for shard in range(2):
        members = {}
        for i in range(3):
            members[f'{shard}{i}.jpg'] = jpeg(10 * shard + i)
            members[f'{shard}{i}.cls'] = str((shard + i) % 3).encode()
        write_tar(tmp_path / f'train-{shard}.tar', members)
    source = open_source(f'tar:{tmp_path}/{{split}}-*.tar', '', True)
    assert source.num_classes == 3
    assert [source[i].label for i in range(6)] == [0, 1, 2, 1, 2, 0]
    assert source[4].image == jpeg(11)
    assert source[4].name.endswith('train-1.tar: 11.jpg') and source.record_name(4) == source[4].name
    with pytest.raises(FlaxnetsError, match='no file matches .*val-'):
        open_source(f'tar:{tmp_path}/{{split}}-*.tar', '', False)


def test_shards_of_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / 'a.tar', {'dog/1.jpg': jpeg(1), 'cat/1.jpg': jpeg(2), 'dog/2.jpg': jpeg(3)})
    source = open_source(f'tar:{tmp_path}/a.tar', '', True)
    assert source.classes == ('cat', 'dog')
    assert [source[i].label for i in range(3)] == [1, 0, 1]


@pytest.mark.parametrize(
    'members, message',
    [
        ({'1.jpg': b'1'}, 'the class of 1.jpg is unknown'),
        ({'1.jpg': b'1', '2.jpg': b'2', '1.cls': b'0'}, "'2.jpg' has no .cls"),
        ({'1.jpg': b'1', '1.cls': b'\xff'}, r"must hold the number or the name of a class, not b'\\xff'"),
        ({'1.jpg': b'1', '1.cls': b'-1'}, 'a label is -1: this part has no labels'),
        ({'1.jpg': b'1', '1.cls': b'5000000'}, '5000000, which is no number of a class'),
        (
            {'1.jpg': b'1', '1.cls': b'1', '2.jpg': b'2', '2.cls': b'a'},
            'some are names',
        ),
        ({'x/1.txt': b'1'}, 'no images'),
    ],
)
def test_tar_files_that_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / 'a.tar', members)
    with pytest.raises(FlaxnetsError, match=message):
        open_source(f'tar:{tmp_path}/a.tar', '', True)


def test_compressed_and_truncated_tar_files(tmp_path: Path) -> None:
    for ending, tool in (('gz', 'gunzip'), ('bz2', 'bunzip2'), ('xz', 'unxz')):
        write_tar(tmp_path / f'a.tar.{ending}', {'cat/1.jpg': jpeg()}, f'w:{ending}')
        with pytest.raises(FlaxnetsError, match=f'not an uncompressed tar file.* with {tool}$'):
            open_source(f'tar:{tmp_path}/a.tar.{ending}', '', True)
    whole = write_tar(tmp_path / 'b.tar', {'cat/1.jpg': os.urandom(5000), 'cat/2.jpg': os.urandom(5000)})
    whole.write_bytes(whole.read_bytes()[:8000])
    with pytest.raises(FlaxnetsError, match='b.tar: '):
        open_source(f'tar:{tmp_path}/b.tar', '', True)


# Arrays.


def test_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    path = tmp_path / 'a.npz'
    np.savez(path, x_train=images, y_train=np.arange(5) % 3, x_test=images[:2], y_test=np.array([0, 2]))
    source = open_source(f'arrays:{path}', '', True)
    assert (len(source), source.num_classes) == (5, 3)
    np.testing.assert_array_equal(source[3].image, images[3])
    test = open_source(f'arrays:{path}', '', False)
    assert [test[i].label for i in range(2)] == [0, 2]


IMAGES = np.zeros((4, 2, 2), np.uint8)


@pytest.mark.parametrize(
    'arrays, message',
    [
        (dict(images=IMAGES), 'no x_train in it; it has images'),
        (
            dict(x_train=IMAGES.astype(float), y_train=np.arange(4)),
            r'must be uint8 .* not float64\[4, 2, 2\]',
        ),
        (dict(x_train=IMAGES, y_train=np.arange(3)), r'labels must be whole numbers \[4\]'),
        (dict(x_train=IMAGES, y_train=np.arange(4) - 1), 'y_train lies in -1..2.*without a label'),
        (
            dict(x_train=IMAGES, y_train=np.arange(4), classes=['a', 'b']),
            'lies in 0..3, for 2 classes',
        ),
        (dict(x_train=IMAGES), 'cannot be read'),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / 'a.npz', **arrays)
    with pytest.raises(FlaxnetsError, match=message):
        open_source(f'arrays:{tmp_path}/a.npz', '', True)


def test_arrays_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / 'a.npz').write_text('<html>')
    with pytest.raises(FlaxnetsError, match='cannot be read as an .npz file'):
        open_source(f'arrays:{tmp_path}/a.npz', '', True)


@pytest.mark.parametrize('spec', ['', 'imagenet', 'folder:', 'folder', 'zip:x', 'digits:', 'digits:x'])
def test_descriptions_that_mean_nothing(spec: str) -> None:
    with pytest.raises(FlaxnetsError, match='is not understood: it can be digits, folder:PATH'):
        open_source(spec, '', True)


# Images of every kind, as data sets have them.


@pytest.mark.parametrize(
    'data',
    [
        jpeg(mode='L'),
        jpeg(mode='CMYK'),
        jpeg(mode='RGBA', form='png'),
        jpeg(mode='P', form='png'),
        jpeg(mode='1', form='png'),
        jpeg(mode='P', form='gif'),
        jpeg(form='webp'),
        jpeg(form='bmp'),
        jpeg(form='avif'),
        jpeg(form='jpeg2000'),
        jpeg(size=(1, 1)),
        jpeg(size=(500, 33)),
    ],
)
def test_images_of_every_kind_become_rgb_or_grey(data: bytes) -> None:
    size = Image.open(io.BytesIO(data)).size
    assert (decode(data, 3, 'x').mode, decode(data, 3, 'x').size) == ('RGB', size)
    assert decode(data, 1, 'x').mode == 'L'
    assert is_image(data[:16])


@pytest.mark.parametrize(
    'start', [b'', b'BMW, Audi, Fiat ', b'P1,P2,P3,P4,P5,P6', b'RIFF....WAVEfmt ', b'<html>', b'%PDF-1.7']
)
def test_what_begins_like_an_image_but_is_none(start: bytes) -> None:
    assert not is_image(start)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 32896, np.uint16)).save(file, 'png')
    assert np.asarray(decode(file.getvalue(), 1, 'x')).tolist() == [[128, 128], [128, 128]]


@pytest.mark.parametrize(
    'data, message',
    [
        (b'', 'the file is empty'),
        (b'<html>not found</html>', 'not a JPEG'),
        (jpeg(size=(64, 64))[:300], 'damaged or truncated'),
    ],
)
def test_images_that_cannot_be_read(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f'x.jpg: .*{message}'):
        decode(data, 3, 'x.jpg')


def test_a_picture_too_large_to_believe_is_refused_before_it_takes_memory() -> None:
    file = io.BytesIO()
    Image.new('1', (20000, 20000)).save(file, 'png')
    with pytest.raises(ImageError, match='20000 x 20000 pixels are more than max_pixels'):
        decode(file.getvalue(), 3, 'bomb.png')

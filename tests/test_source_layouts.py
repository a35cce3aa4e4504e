"""The tables of docs/training.md: which folders, tars and arrays open, and what is left out of them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_sources import jpeg, write_tar
from webdataset.shardlists import expand_urls

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.images.transforms import decode
from train.__main__ import main
from train.data.batches import train_batches
from train.data.sources import Source, open_source
from train.data.sources.open import KINDS
from train.data.sources.shards import braced
from train.evaluation.metrics import Evaluation
from train.job import make_job
from train.settings import FIELDS, Settings


def put(root: Path, *names: str, data: bytes | None = None) -> None:
    """A picture under each of these names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(number) if data is None else data)


def pairs(source: Source) -> list[tuple[str, str]]:
    """Name and class of each image."""
    records = [source[i] for i in range(len(source))]
    return [(os.path.basename(record.name), source.classes[record.label]) for record in records]


def test_every_kind_of_source_is_documented() -> None:
    text = (Path(__file__).parent.parent / 'docs' / 'training.md').read_text()
    rows = text.partition('\n| `--data` | images |\n')[2].partition('\n\n')[0].splitlines()[1:]
    assert [row.split('`')[1] for row in rows] == [kind.form for kind in KINDS]
    row = next(line for line in text.splitlines() if line.startswith('| 2, 4, 5, ... |'))
    for kind in KINDS:
        name = f'`{kind.form.partition(":")[0]}:`'
        assert (name in row) == (name in FIELDS['in_chans'].what) == kind.any_channels


# Parts.


@pytest.mark.parametrize(
    'name',
    ['val', 'validation', 'valid', 'dev', 'test', 'testing', 'eval', 'Val', 'TEST', 'data/val', 'data/Test'],
)
def test_parts_go_by_many_names(tmp_path: Path, name: str) -> None:
    put(tmp_path, 'train/a/1.jpg', f'{name}/a/2.jpg')
    assert pairs(open_source(f'folder:{tmp_path}', '', False)) == [('2.jpg', 'a')]
    if '/' not in name:
        assert pairs(open_source(f'folder:{tmp_path}', name.upper(), True)) == [('2.jpg', 'a')]


@pytest.fixture
def undivided(tmp_path: Path) -> str:
    put(
        tmp_path,
        *(f'{c}/{i}.jpg' for c, count in (('cat', 10), ('dog', 25), ('test', 3)) for i in range(count)),
    )
    return f'folder:{tmp_path}'


def test_a_folder_without_parts_is_not_guessed_at(undivided: str) -> None:
    for training in (True, False):
        with pytest.raises(FlaxnetsError, match=r"train_split='\[:80%\]'"):
            open_source(undivided, '', training)
    whole = open_source(undivided, '', False, whole=True)  # as `train eval` does, which learns from nothing
    assert (len(whole), whole.classes) == (38, ('cat', 'dog', 'test'))


@pytest.mark.parametrize('bounds', [(0, 80, 100), (0, 50, 100), (0, 33, 67, 100), (0, 10, 20, 90, 100)])
def test_percents_share_every_class_and_leave_nothing_out(undivided: str, bounds: tuple[int, ...]) -> None:
    whole = open_source(undivided, '', False, whole=True)
    shares = [open_source(undivided, f'[{a}%:{b}%]', False) for a, b in itertools.pairwise(bounds)]
    names = [share.record_name(i) for share in shares for i in range(len(share))]
    assert sorted(names) == sorted(whole.record_name(i) for i in range(38))
    for share, a, b in zip(shares, bounds, bounds[1:], strict=False):
        counts = np.bincount([share[i].label for i in range(len(share))], minlength=3)
        assert np.all(abs(counts - np.array([10, 25, 3]) * (b - a) / 100) <= 1)
        assert share.classes == whole.classes
    assert len({share.fingerprint for share in shares}) == len(shares)
    again = open_source(undivided, f'[:{bounds[1]}%]', True)
    assert again.fingerprint == shares[0].fingerprint
    assert pairs(open_source(undivided, f'[-{100 - bounds[1]}%:]', True))[0] is not None


def test_percents_of_parts(tmp_path: Path) -> None:
    put(tmp_path, *(f'train/a/{i}.jpg' for i in range(10)), 'val/a/x.jpg')
    spec = f'folder:{tmp_path}'
    train, rest = (open_source(spec, split, True) for split in ('train[:70%]', 'train[70%:]'))
    assert (len(train), len(rest)) == (7, 3) and not set(pairs(train)) & set(pairs(rest))
    with pytest.raises(FlaxnetsError, match='has the parts train, val: name the one'):
        open_source(spec, '[:70%]', True)
    for split in ('train[70%]', 'train[:3]', 'train[:80%', 'train+val'):
        with pytest.raises(FlaxnetsError, match='is not understood'):
            open_source(spec, split, True)
    for split in ('train[80%:20%]', 'train[:0%]'):
        with pytest.raises(FlaxnetsError, match='is empty'):
            open_source(spec, split, True)
    digits = [open_source('digits', split, True) for split in ('train[:50%]', 'train[50%:]')]
    assert sum(map(len, digits)) == 1437


def test_a_flat_part_is_no_part(tmp_path: Path) -> None:
    put(tmp_path, 'train/a/1.jpg', 'val/ILSVRC2012_val_00000001.JPEG')
    with pytest.raises(FlaxnetsError, match='val: it holds no folder of a class'):
        open_source(f'folder:{tmp_path}', '', False)
    put(tmp_path / 'other', 'train/a/1.jpg')
    with pytest.raises(FlaxnetsError):  # what was learnt from is never judged by without being asked for
        open_source(f'folder:{tmp_path}/other', '', False, whole=True)


# Folders.


def test_a_snapshot_of_the_hub_is_links(tmp_path: Path) -> None:
    put(tmp_path, 'blobs/1f', 'blobs/2e')
    for name, blob in (('train/a/1.jpg', '1f'), ('test/a/2', '2e')):
        link = tmp_path / 'snapshots' / 'hash' / name
        link.parent.mkdir(parents=True)
        link.symlink_to(f'../../../../blobs/{blob}')
    spec = f'folder:{tmp_path}/snapshots/hash'
    assert pairs(open_source(spec, '', True)) == [('1.jpg', 'a')]
    assert pairs(open_source(spec, '', False)) == [('2', 'a')]  # a picture without an ending


@pytest.mark.parametrize('form', ['csv', 'jsonl'])
@pytest.mark.parametrize('labels', [('dog', 'cat', 'dog'), (2, 0, 1), ('2', '0', '1')])
def test_metadata_beside_images_holds_the_labels(tmp_path: Path, form: str, labels: tuple[Any, ...]) -> None:
    put(tmp_path, 'train/3.png', 'train/1.jpg', 'train/in/2.jpg', 'train/unlisted.jpg')
    names = ['3.png', '1.jpg', 'in/2.jpg']
    table = tmp_path / 'train' / f'metadata.{form}'
    if form == 'csv':
        rows = ['file_name,text,label', *(f'{n},"a, b",{c}' for n, c in zip(names, labels, strict=True))]
        table.write_text('\n'.join(rows) + '\n')
    else:
        rows = [json.dumps({'file_name': n, 'label': c}) for n, c in zip(names, labels, strict=True)]
        table.write_text('\n'.join(rows))
    source = open_source(f'folder:{tmp_path}', '', True)
    assert pairs(source) == [(os.path.basename(n), str(c)) for n, c in zip(names, labels, strict=True)]
    assert source.classes == (('cat', 'dog') if labels[0] == 'dog' else ('0', '1', '2'))
    assert any('1 images that the metadata does not list: unlisted.jpg' in note for note in source.notes)


@pytest.mark.parametrize(
    'text, words',
    [
        ('file_name,label\nabsent.jpg,1\n', 'lists absent.jpg'),
        ('file_name,label\n1.jpg,\n', 'row 1'),
        ('file_name,label\n1.jpg,1\n1.jpg,2\n', 'listed twice'),
        ('file_name,label\n1.jpg,-1\n', 'no labels'),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, text: str, words: str) -> None:
    put(tmp_path, 'train/1.jpg')
    (tmp_path / 'train' / 'metadata.csv').write_text(text)
    with pytest.raises(FlaxnetsError, match=words):
        open_source(f'folder:{tmp_path}', '', True)


def test_metadata_without_labels_leaves_folders_as_classes(tmp_path: Path) -> None:
    put(tmp_path, 'train/a/1.jpg')
    (tmp_path / 'train' / 'metadata.csv').write_text('file_name,caption\na/1.jpg,what it shows\n')
    source = open_source(f'folder:{tmp_path}', '', True)
    assert pairs(source) == [('1.jpg', 'a')] and 'has no labels' in source.notes[0]


def test_a_table_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    put(tmp_path, 'train/a/1.jpg')
    put(tmp_path, 'train/metadata.parquet', data=b'PAR1')
    assert 'metadata.parquet' in open_source(f'folder:{tmp_path}', '', True).notes[0]


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path: Path) -> None:
    train = tmp_path / 'train'
    put(train, 'a/1.jpg', 'a/._1.jpg', 'a/@eaDir/x.jpg', '__MACOSX/x.jpg', 'loose.jpg', 'a/deep/2.jpg')
    put(train, 'a/notes.txt', data=b'text')
    (train / 'a' / 'broken').symlink_to('nowhere')
    (train / 'a' / 'loop').symlink_to(train)
    os.mkfifo(train / 'a' / 'pipe.jpg')
    source = open_source(f'folder:{tmp_path}', '', True)
    assert sorted(pairs(source)) == [('1.jpg', 'a'), ('2.jpg', 'a')] and source.classes == ('a',)
    notes = '\n'.join(source.notes)
    for words in (
        '3 hidden entries: __MACOSX, a/._1.jpg, a/@eaDir',
        '1 files that are no images: a/notes.txt',
        '1 images outside of every class: loose.jpg',
        '1 links that lead nowhere: a/broken',
        '1 links back to a folder around them: a/loop',
        '1 devices and pipes: a/pipe.jpg',
        'the class is the outermost folder',
    ):
        assert words in notes


def test_a_broken_link_of_an_image_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, *(f'train/a/{i}.jpg' for i in range(5)))
    (tmp_path / 'train' / 'a' / 'broken.jpg').symlink_to(tmp_path / 'nowhere')
    source = open_source(f'folder:{tmp_path}', '', True)
    assert len(source) == 6
    with pytest.raises(ImageError, match='broken.jpg: cannot be read: No such file'):
        source[5]
    batches = train_batches(
        source, lambda image, rng: np.asarray(image), batch_size=6, seed=0, start_step=0, threads=1
    )
    assert next(batches)['image'].shape == (6, 6, 8, 3)
    batches.close()
    assert batches.bad == 1 and 'broken.jpg' in batches.new_bad()[0]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 'train/a/1.jpg', 'train/b/1.jpg')
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith('b'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refusing)  # the tests may run as root, who may read everything
    with pytest.raises(FlaxnetsError, match='train/b: the folder cannot be read: Permission denied'):
        open_source(f'folder:{tmp_path}', '', True)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    put(tmp_path, 'train/a/1.jpg')
    odd = os.fsencode(tmp_path / 'train') + b'/\xff\xfe'
    os.mkdir(odd)
    with open(odd + b'/\xe9.jpg', 'wb') as file:
        file.write(jpeg())
    source = open_source(f'folder:{tmp_path}', '', True)
    assert source.classes == ('a', '\\udcff\\udcfe') and len(source.fingerprint) == 16
    assert decode(source[1].image, 3, 'x').size == (8, 6)


# Classes.


def few(data: str) -> Settings:
    return Settings(model='resnext_tiny', data=data, batch_size=jax.device_count(), image_size=32)


def test_the_classes_of_training_are_the_classes(tmp_path: Path) -> None:
    put(tmp_path, *(f'train/{name}/{i}.jpg' for name in 'abc' for i in (1, 2)), 'val/c/2.jpg', 'val/a/3.jpg')
    (tmp_path / 'val' / 'b').mkdir()
    job = make_job(few(f'folder:{tmp_path}'))
    assert job.evaluation.classes == ('a', 'b', 'c') and pairs(job.evaluation) == [
        ('3.jpg', 'a'),
        ('2.jpg', 'c'),
    ]
    assert 'evaluation has no images of 1 classes: b' in job.notes
    labels = np.array([job.evaluation[i].label for i in range(2)])
    result = Evaluation(labels, labels, np.zeros(2, int), np.zeros(2), 3)
    np.testing.assert_array_equal(result.per_class, [100, np.nan, 100])
    put(tmp_path, 'val/zebra/4.jpg')
    with pytest.raises(FlaxnetsError, match='images of zebra, which is none of the 3 classes'):
        make_job(job.settings)
    (tmp_path / 'train' / 'empty').mkdir()
    with pytest.raises(FlaxnetsError, match='train: no images in empty'):
        make_job(job.settings)


def test_classes_of_the_parts_that_are_written_otherwise(tmp_path: Path) -> None:
    put(tmp_path, *(f'train/{name}/{i}.jpg' for name in ('ant', 'bee_fly', 'cat') for i in (1, 2, 3)))
    put(tmp_path, 'val/CAT/1.jpg', 'val/Bee-Fly/2.jpg')
    job = make_job(few(f'folder:{tmp_path}'))
    assert job.evaluation.classes == ('ant', 'bee_fly', 'cat')
    assert sorted(pairs(job.evaluation)) == [('1.jpg', 'cat'), ('2.jpg', 'bee_fly')]
    assert any('without regard to case' in note for note in job.notes)
    shutil.rmtree(tmp_path / 'val')
    put(tmp_path, 'val/n02123045/1.jpg')
    with pytest.raises(FlaxnetsError, match='n02123045'):
        make_job(job.settings)
    shutil.rmtree(tmp_path / 'train')
    put(tmp_path, *(f'train/{name}/{i}.jpg' for name in ('tench', 'tabby') for i in (1, 2, 3)))
    assert pairs(make_job(few(f'folder:{tmp_path}')).evaluation) == [('1.jpg', 'tabby')]


def test_numbers_and_arrays_whose_highest_class_is_missing(tmp_path: Path) -> None:
    images = np.zeros((4, 4, 4, 3), np.uint8)
    np.savez(tmp_path / 'a.npz', x_train=images, y_train=[[0], [1], [2], [2]], x_test=images[:1], y_test=[1])
    for split, label in (('train', 2), ('val', 0)):
        names = {f'{i}.jpg': jpeg(i) for i in range(4)}
        write_tar(tmp_path / f'{split}.tar', names | {f'{i}.cls': b'%d' % label for i in range(4)})
    for data, places in ((f'arrays:{tmp_path}/a.npz', [1]), (f'tar:{tmp_path}/{{split}}.tar', [0])):
        job = make_job(few(data))
        assert job.evaluation.classes == job.training.classes == ('0', '1', '2')
        assert [job.evaluation[i].label for i in range(1)] == places


def test_judging_by_the_images_of_training_is_said(tmp_path: Path) -> None:
    write_tar(tmp_path / 'a.tar', {f'{c}/{i}.jpg': jpeg(i) for c in ('dog', 'cat') for i in (1, 2)})
    settings = few(f'tar:{tmp_path}/a.tar')
    assert any('judges by the images of training' in note for note in make_job(settings).notes)
    assert not any('judges by' in note for note in make_job(few('digits')).notes)


# Tars.


@pytest.mark.parametrize(
    'pattern',
    [
        'a{0..3}',
        'a{00..12}b',
        '{3..1}',
        'x{a,b}{0..1}y',
        '{0..6..2}',
        '{a..c}',
        'plain',
        '{8..11}',
        'a::b',
    ],
)
def test_braces_are_webdatasets(pattern: str) -> None:
    assert [name for piece in pattern.split('::') for name in braced(piece)] == expand_urls(pattern)


def test_lists_of_shards_are_whole(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        write_tar(tmp_path / f'{number}.tar', {f'cat/{number}.jpg': jpeg()})
    assert len(open_source(f'tar:{tmp_path}/{{0..1}}.tar', '', True)) == 2
    assert len(open_source(f'tar:{tmp_path}/3.tar::{tmp_path}/0.tar', '', True)) == 2
    with pytest.raises(FlaxnetsError, match=r'no file matches .*/2\.tar$'):
        open_source(f'tar:{tmp_path}/{{0..3}}.tar', '', True)
    with pytest.raises(FlaxnetsError, match=r'/0\.tar is in it twice'):
        open_source(f'tar:{tmp_path}/{{0,0}}.tar', '', True)


def test_one_tar_of_a_folder_is_one_of_several_classes(tmp_path: Path) -> None:
    (tmp_path / 'val').mkdir()
    write_tar(tmp_path / 'val' / 'cat.tar', FLAT)
    for pattern in ('', '/{split}', '/{split}/*.tar', '/val'):
        assert open_source(f'tar:{tmp_path}{pattern}', '', False).classes == ('cat',)
    with pytest.raises(
        FlaxnetsError, match='the class of 1.jpg is unknown'
    ):  # asked for alone: of all classes
        open_source(f'tar:{tmp_path}/val/cat.tar', '', False)


def test_a_tar_of_a_whole_data_set_has_parts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / 'a.tar', {'d/train/cat/1.jpg': jpeg(1), 'd/val/cat/2.jpg': jpeg(2)})
    assert pairs(open_source(f'tar:{path}', '', True)) == [('1.jpg', 'cat')]
    assert pairs(open_source(f'tar:{path}', '', False)) == [('2.jpg', 'cat')]
    with pytest.raises(FlaxnetsError, match='name one of its parts, which are train, val'):
        open_source(f'tar:{path}', 'other', False)


FLAT = {'1.jpg': jpeg(1), '2.jpg': jpeg(2), '3.jpg': jpeg(3)}


@pytest.mark.parametrize(
    'beside, classes',
    [
        ({'1.cls': b'2', '2.cls': b'0\n', '3.cls': b'+1'}, ['2', '0', '1']),
        ({'1.cls': b'dog', '2.cls': b'cat', '3.cls': b'dog'}, ['dog', 'cat', 'dog']),
        ({'1.json': b'{"label": 1}', '2.json': b'{"label": 0}', '3.json': b'{"label": 1}'}, ['1', '0', '1']),
        ({'1.json': b'"a"', '2.json': b'"b"', '3.json': b'"a"'}, ['a', 'b', 'a']),
        ({'1.txt': b'dog', '2.txt': b'cat', '3.txt': b'dog\n'}, ['dog', 'cat', 'dog']),
        ({'1.index': b'1', '2.index': b'0', '3.index': b'1'}, ['1', '0', '1']),
        ({'1.txt': b'a dog', '2.txt': b'a cat', '3.txt': b'a bird'}, None),  # captions: all different
        ({'1.txt': b'word ' * 50, '2.txt': b'word ' * 50, '3.txt': b'x'}, None),
        ({'1.json': b'{"width": 1}', '2.json': b'{}', '3.json': b'{}'}, None),
        ({'1.index': b'0', '2.index': b'1', '3.index': b'2'}, None),  # a running number
        ({'1.cls': b'0', '2.cls': b'', '3.cls': b'0'}, None),
        ({'1.cls': b'0', '2.cls': b'1'}, None),
    ],
)
def test_what_tells_the_class_in_shards(
    tmp_path: Path, beside: dict[str, bytes], classes: list[str] | None
) -> None:
    write_tar(tmp_path / 'a.tar', {**FLAT, **beside})
    if classes is None:
        with pytest.raises(FlaxnetsError, match='is unknown|must hold|has no .cls'):
            open_source(f'tar:{tmp_path}/a.tar', '', True)
    else:
        assert [c for _, c in pairs(open_source(f'tar:{tmp_path}/a.tar', '', True))] == classes


def test_names_with_dots_whose_writer_meant_the_last_one(tmp_path: Path) -> None:
    members = {'a.1.jpg': jpeg(1), 'a.1.cls': b'1', 'a.2.jpg': jpeg(2), 'a.2.cls': b'0'}
    write_tar(tmp_path / 'a.tar', members)
    assert [c for _, c in pairs(open_source(f'tar:{tmp_path}/a.tar', '', True))] == ['1', '0']


def test_what_is_left_out_of_tars_is_counted_and_named(tmp_path: Path) -> None:
    with tarfile.open(write_tar(tmp_path / 'a.tar', {'cat/1.jpg': jpeg()}), 'a') as archive:
        for name, kind in (('cat/2.jpg', tarfile.SYMTYPE), ('cat/3.jpg', tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, '1.jpg'
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo('cat/._1.jpg'))
        archive.addfile(tarfile.TarInfo('cat/readme'))
        archive.addfile(tarfile.TarInfo('../cat/4.jpg'))  # nothing is unpacked: a name can do no harm
    source = open_source(f'tar:{tmp_path}/a.tar', '', True)
    assert [name for name, _ in pairs(source)] == ['1.jpg', '4.jpg'] or len(source) == 2
    notes = '\n'.join(source.notes)
    for words in (
        '2 links, devices and sparse files: cat/2.jpg, cat/3.jpg',
        '1 hidden entries: cat/._1.jpg',
        '1 files that are no images: cat/readme',
    ):
        assert words in notes


def test_an_image_of_a_tar_that_cannot_be_read_ends_no_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / 'a.tar', {'cat/1.jpg': jpeg(), 'cat/2.jpg': os.urandom(3000)})
    source = open_source(f'tar:{path}', '', True)
    os.truncate(path, 2500)
    assert source[0].image == jpeg()
    with pytest.raises(ImageError, match=r'2\.jpg: .* bytes are left'):
        source[1]
    path.unlink()
    with pytest.raises(ImageError, match=r'1\.jpg: cannot be read'):
        source[0]


# Arrays as others write them.


def test_arrays_of_keras_and_medmnist(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    np.savez(tmp_path / 'keras.npz', x_train=images, y_train=[[1], [0], [1]], x_test=images, y_test=[[0]] * 3)
    np.savez(tmp_path / 'med.npz', train_images=images, train_labels=[[1], [0], [1]])
    np.savez(tmp_path / 'plain.npz', x=images, y=[1, 0, 1])
    for name, split in (('keras', ''), ('med', ''), ('plain', '[:100%]')):
        source = open_source(f'arrays:{tmp_path}/{name}.npz', split, True)
        assert [source[i].label for i in range(3)] == [1, 0, 1]
        np.testing.assert_array_equal(source[2].image, images[2])


@pytest.mark.parametrize('damage', ['npy', 'cut', 'flipped'])
def test_arrays_that_are_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / 'a.npz'
    pixels = np.random.default_rng(0).integers(0, 9, (50, 8, 8), dtype=np.uint8)
    np.savez_compressed(path, x_train=pixels, y_train=np.arange(50))
    data = bytearray(path.read_bytes())
    if damage == 'npy':
        with path.open('wb') as file:
            np.save(file, pixels)
    elif damage == 'cut':
        path.write_bytes(data[:300])
    else:
        data[200:260] = bytes(60)
        path.write_bytes(data)
    with pytest.raises(FlaxnetsError, match=r'a\.npz: cannot be read'):
        open_source(f'arrays:{path}', '', True)


@pytest.mark.parametrize(
    'option', [('--batch', '0'), ('--batch', '-3'), ('--batch', 'x'), ('--threads', '-1')]
)
def test_counts_on_the_command_line(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(['eval', '--model', 'x', '--data', 'digits', *option])
    assert end.value.code == 2 and f'{option[0]}: must be a whole number' in capsys.readouterr().err


def test_batches_of_nothing() -> None:
    for counts in ({'batch_size': 0}, {'batch_size': 4, 'threads': -1}):
        with pytest.raises(FlaxnetsError, match='must be'):
            source = open_source('digits', '', True)
            train_batches(source, lambda image, rng: np.asarray(image), seed=0, start_step=0, **counts)

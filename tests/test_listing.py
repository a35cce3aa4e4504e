"""Which images paths stand for."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.images.listing import find_images


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path, 'PNG')
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / 'photos'
    for name in ('b/2.png', 'b/10.png', 'a.jpg', 'c/d/no_suffix', '.hidden/x.png', '__MACOSX/y.png'):
        picture(root / name)
    (root / 'notes.md').write_text('not an image')
    (root / 'broken.png').write_text('named as one')
    (root / 'c' / 'round').symlink_to(root)
    os.mkfifo(root / 'pipe')
    return root


def names(root: Path, *paths: str | Path) -> list[str]:
    return [os.path.relpath(image.name, root) for image in find_images(paths)]


def test_folders(folder: Path) -> None:
    expected = ['a.jpg', 'b/10.png', 'b/2.png', 'broken.png', 'c/d/no_suffix']
    assert names(folder, folder) == expected
    assert names(folder, folder / 'b', folder / 'a.jpg', folder / 'b') == [
        *expected[1:3],
        'a.jpg',
        *expected[1:3],
    ]


def test_patterns_and_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(folder, f'{folder}/**/*.png') == ['b/10.png', 'b/2.png', 'broken.png']
    picture(folder / 'odd [1].png')
    assert names(folder, folder / 'odd [1].png') == ['odd [1].png'], 'a file is no pattern'
    lines = folder / 'list.txt'
    lines.write_text('b/2.png\n\nb\n  gone.png  \n')
    found = find_images([lines])
    assert [image.name for image in found] == [
        *(f'{folder}/b/{name}.png' for name in ('2', '10', '2')),
        'gone.png',
    ]
    monkeypatch.chdir(folder)
    assert [image.name for image in find_images(['list.txt'])] == [
        'b/2.png',
        'b/10.png',
        'b/2.png',
        'gone.png',
    ]
    monkeypatch.setattr('sys.stdin', io.StringIO('a.jpg\n'))
    assert [image.name for image in find_images(['-'])] == ['a.jpg']


def test_tars(folder: Path, tmp_path: Path) -> None:
    tar = tmp_path / 'all.tar'
    with tarfile.open(tar, 'w') as archive:
        archive.add(picture(tmp_path / 'one.png', 7), 'in/one.png')
        archive.add(folder / 'broken.png', 'in/broken.png')
        archive.add(folder / 'notes.md', 'in/notes.md')
    good, broken = find_images([tar])
    assert good.name == f'{tar}: in/one.png'
    np.testing.assert_array_equal(np.asarray(good.open()), 7)
    with pytest.raises(ImageError, match='broken.png'):
        broken.open()


@pytest.mark.parametrize(
    ('paths', 'words'),
    [
        ([], 'no images'),
        (['gone'], 'gone'),
        (['*.gone'], r'\*\.gone'),
        (['gs://bucket/photos'], 'gs://'),
        (['empty'], 'empty'),
        (['none.txt'], 'none.txt'),
        (['bad.tar'], 'bad.tar'),
        (['packed.tar.gz'], 'packed.tar.gz'),
    ],
)
def test_refused(paths: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    for name in ('none.txt', 'bad.tar', 'packed.tar.gz'):
        (tmp_path / name).write_text('\n')
    with pytest.raises(FlaxnetsError, match=words):
        find_images(paths)


def test_lists_that_name_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_text('b.txt\n')
    (tmp_path / 'b.txt').write_text('a.txt\n')
    with pytest.raises(FlaxnetsError, match='this list names itself'):
        find_images([str(tmp_path / 'a.txt')])

"""Tensors and storages that a file describes wrongly, by hand-made pickles in both containers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pth_files as pf
import pytest

from convert.formats.pth import read_pth


@pytest.mark.parametrize(
    ('shape', 'stride', 'offset', 'told'),
    [
        ((3, 2), (1, 1), 0, 'overlapping'),
        ((2**30, 2**30), (0, 0), 0, 'overlapping'),
        ((2, 2), (3, 1), 0, 'reaches number 4 of a storage of 4'),
        ((4,), (1,), 1, 'reaches number 4'),
        ((), (), 4, 'reaches number 4'),
        ((1,), (1,), -1, 'not all whole numbers from 0 on'),
        ((2,), (-1,), 1, 'not all whole numbers from 0 on'),
        ((-4,), (1,), 0, 'not all whole numbers from 0 on'),
        ((-2, -2), (2, 1), 0, 'not all whole numbers from 0 on'),
        ((2**100,), (1,), 0, 'not all whole numbers from 0 on'),
        ((2,), (2**62,), 0, 'not all whole numbers from 0 on'),
        ((2**40, 2**40), (1, 1), 0, 'reaches number'),
        ((0, 2**60), (1, 1), 0, 'not all whole numbers'),
        ((1,) * 40, (1,) * 40, 0, '40 dimensions'),
        ((2, 2), (1,), 0, '2 dimensions and 1 strides'),
    ],
)
def test_tensors_outside_their_storage(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, told: str
) -> None:
    saved = pf.state_dict(pf.text('layer.weight'), pf.tensor(shape, stride, offset))
    pf.refused(pf.write_zip(tmp_path / 'zip.pth', saved), told)
    pf.refused(pf.write_legacy(tmp_path / 'legacy.pth', saved), told)
    pf.refused(tmp_path / 'zip.pth', 'layer.weight')


def test_views_inside_their_storage_are_right(tmp_path: Path) -> None:
    views = [((2, 2), (1, 1), 0), ((2, 2), (0, 0), 1), ((2, 4), (0, 1), 0), ((2, 2), (0, 2), 1)]
    views += [((1, 4), (2**47, 1), 0), ((2,), (3,), 0), ((), (), 3)]
    saved = pf.state_dict(*(p for i, view in enumerate(views) for p in (pf.text(str(i)), pf.tensor(*view))))
    got = read_pth(pf.write_zip(tmp_path / 'a.pth', saved))
    expected: list[Any] = [[[1, 2], [2, 3]], [[2, 2], [2, 2]], [[1, 2, 3, 4]] * 2, [[2, 4], [2, 4]]]
    expected += [[[1, 2, 3, 4]], [1, 4], 4]
    assert [array.tolist() for array in got.values()] == expected


@pytest.mark.parametrize(
    'numbers',
    [
        pf.MARK + pf.text('4') + pf.TUPLE,
        pf.MARK + b'G' + struct.pack('>d', 4.0) + pf.TUPLE,
        pf.MARK + pf.TRUE + pf.TUPLE,
        pf.MARK + pf.integers([4]) + pf.TUPLE,
        pf.EMPTY_LIST,
        pf.NONE,
    ],
)
def test_shapes_that_are_not_numbers(tmp_path: Path, numbers: bytes) -> None:
    start = pf.name('torch._utils', '_rebuild_tensor') + pf.MARK + pf.storage() + pf.integer(0)
    for dimensions in (numbers + pf.integers([1]), pf.integers([1]) + numbers):
        pf.refused(
            pf.write_zip(
                tmp_path / 'a.pth', pf.state_dict(pf.text('w'), start + dimensions + pf.TUPLE + pf.REDUCE)
            )
        )


@pytest.mark.parametrize('numel', [3, 5, 0, -4, 2**31, 2**61, 2**200])
def test_storages_of_another_size(tmp_path: Path, numel: int) -> None:
    saved = pf.state_dict(pf.text('w'), pf.tensor((1,), (1,), where=pf.storage(numel=numel)))
    empty = pf.state_dict(pf.text('w'), pf.tensor((0,), (1,), where=pf.storage(numel=numel)))
    for program in (saved, empty):
        pf.refused(pf.write_zip(tmp_path / 'zip.pth', program))
        pf.refused(pf.write_legacy(tmp_path / 'legacy.pth', program))
        stored = numel if -(2**63) <= numel < 2**63 else -1
        pf.refused(pf.write_legacy(tmp_path / 'legacy.pth', program, {'0': (stored, pf.FOUR_FLOATS)}))


@pytest.mark.parametrize(
    ('where', 'told'),
    [
        (pf.storage(key='1'), "'data/1' is missing"),
        (pf.storage(key='../../etc/passwd'), 'is missing'),
        (pf.storage(kind=pf.text('torch.FloatStorage')), 'instead of a storage'),
        (pf.storage(kind=pf.name('torch', 'float32')), 'instead of a storage'),
        (pf.text('0') + pf.BINPERSID, "refers to '0'"),
        (pf.MARK + pf.text('module') + pf.NONE + pf.TUPLE + pf.BINPERSID, 'instead of a storage'),
        (pf.text('not a storage'), 'a tensor is not made the way'),
    ],
)
def test_storages_that_are_none(tmp_path: Path, where: bytes, told: str) -> None:
    pf.refused(pf.write_zip(tmp_path / 'a.pth', pf.state_dict(pf.text('w'), pf.tensor(where=where))), told)


def test_one_storage_of_two_types(tmp_path: Path) -> None:
    other = pf.storage(kind=pf.name('torch', 'IntStorage'))
    saved = pf.state_dict(pf.text('a'), pf.tensor(), pf.text('b'), pf.tensor(where=other))
    pf.refused(pf.write_zip(tmp_path / 'a.pth', saved), 'described in two ways')


def test_views_of_storages(tmp_path: Path) -> None:
    view = pf.integers([7, 0, 4])
    where = pf.storage().replace(pf.TUPLE + pf.BINPERSID, view + pf.TUPLE + pf.BINPERSID)
    pf.refused(
        pf.write_legacy(tmp_path / 'a.pth', pf.state_dict(pf.text('w'), pf.tensor(where=where))), 'before 0.4'
    )


def test_bools_that_are_neither(tmp_path: Path) -> None:
    saved = pf.state_dict(pf.text('w'), pf.tensor(where=pf.storage(kind=pf.name('torch', 'BoolStorage'))))
    assert read_pth(pf.write_zip(tmp_path / 'a.pth', saved, {'data/0': b'\0\1\1\0'}))['w'].tolist() == [
        0,
        1,
        1,
        0,
    ]
    pf.refused(pf.write_zip(tmp_path / 'b.pth', saved, {'data/0': b'\0\1\2\0'}), 'bools')


@pytest.mark.parametrize(('copies', 'sound'), [(10, True), (200, False)])
def test_a_storage_shared_too_often(tmp_path: Path, copies: int, sound: bool) -> None:
    one = pf.tensor((4096,), (1,), where=pf.storage(numel=4096))
    saved = pf.state_dict(*(part for i in range(copies) for part in (pf.text(str(i)), one)))
    path = pf.write_zip(tmp_path / 'a.pth', saved, {'data/0': bytes(4096 * 4)})
    if sound:
        assert len(read_pth(path)) == copies
    else:
        pf.refused(path, '16 times the size of the file')

"""What `write_pth` writes is what `torch.save` writes, and is written whole or not at all."""

from __future__ import annotations

import errno
import os
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from convert.formats.pth import read_pth
from convert.formats.pth_write import write_pth
from flaxnets.errors import FlaxnetsError

DTYPES = ['float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool']


def tensors_of_every_kind() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {}
    for name in DTYPES:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)
        raw = random.integers(0, 2 if name == 'bool' else 256, 30 * dtype.itemsize, np.uint8)
        tensors[f'{name}.matrix'] = raw.view(dtype).reshape(5, 6)
        tensors[f'{name}.number'] = raw.view(dtype)[3].reshape(())
        tensors[f'{name}.empty'] = raw.view(dtype)[:0].reshape(4, 0)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_loads_the_same_bits(tmp_path: Path, mmap: bool) -> None:
    tensors = tensors_of_every_kind()
    write_pth(tmp_path / 'a.pth', tensors)
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True, mmap=mmap)
    assert isinstance(loaded, OrderedDict) and list(loaded) == list(tensors)
    for name, tensor in loaded.items():
        assert str(tensor.dtype) == f'torch.{tensors[name].dtype.name}'
        assert tuple(tensor.shape) == tensors[name].shape and tensor.is_contiguous()
        assert bits(tensor) == tensors[name].tobytes(), name


def test_our_reader_reads_the_same_bits(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    write_pth(tmp_path / 'a.pth', tensors)
    got = read_pth(tmp_path / 'a.pth')
    assert list(got) == list(tensors)
    for name, array in got.items():
        assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
        assert array.tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize('count', [1, 2, 60, 1000, 1001, 2000, 2002])
def test_the_pickle_is_torchs_own(tmp_path: Path, count: int) -> None:
    shapes = [(), (3,), (300, 2), (70_000, 1, 1), (2, 1, 3, 3), (2, 2, 2, 2, 2), (0, 4), (4, 0), (0, 2**33)]
    state, tensors = OrderedDict(), {}
    for i in range(count):
        name, kind, shape = (
            f'layer{i}.weight',
            DTYPES[i % len(DTYPES)],
            shapes[i % len(shapes)] if i < 60 else (),
        )
        state[name] = torch.zeros(shape, dtype=getattr(torch, kind))
        tensors[name] = np.zeros(shape, ml_dtypes.bfloat16 if kind == 'bfloat16' else kind)
    torch.save(state, tmp_path / 'torch.pth')
    write_pth(tmp_path / 'ours.pth', tensors)
    with zipfile.ZipFile(tmp_path / 'ours.pth') as ours, zipfile.ZipFile(tmp_path / 'torch.pth') as theirs:
        assert ours.read('archive/data.pkl') == theirs.read('torch/data.pkl')
        assert ours.read('archive/version') == theirs.read('torch/version')
        assert ours.read('archive/byteorder') == theirs.read('torch/byteorder')


@pytest.mark.parametrize('large', [zipfile.ZIP64_LIMIT, 50])
def test_numbers_are_aligned_stored_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', large)  # above it entries take the form of large ones
    tensors = {'x' * n: np.arange(n, dtype=np.int16) for n in range(1, 90)}
    path = tmp_path / 'a.pth'
    write_pth(path, tensors)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for number, array in enumerate(tensors.values()):
            entry = archive.getinfo(f'archive/data/{number}')
            lengths = np.frombuffer(data, '<u2', 2, entry.header_offset + 26)
            start = entry.header_offset + 30 + int(lengths.sum())
            assert start % 64 == 0
            assert data[start : start + array.nbytes] == array.tobytes()
    assert list(torch.load(path, weights_only=True, mmap=True)) == list(read_pth(path)) == list(tensors)


def test_any_layout_and_byte_order(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {
        'transposed': base.T,
        'strided': base[::2, 1::2],
        'backwards': base[::-1, ::-1],
        'fortran': np.asfortranarray(base),
        'big-endian': base.astype('>f4'),
        'broadcast': np.broadcast_to(np.float32(3), (2, 3)),
        'numpy number': np.int64(7),
        'jax': jnp.arange(3, dtype=jnp.bfloat16),
    }
    write_pth(tmp_path / 'a.pth', tensors)
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True)
    for name, tensor in loaded.items():
        assert tensor.shape == tensors[name].shape
        np.testing.assert_array_equal(tensor.float().numpy(), np.asarray(tensors[name]).astype(np.float32))


def test_names_of_every_script(tmp_path: Path) -> None:
    tensors = {
        name: np.ones(1, np.float32)
        for name in ('', 'a.b', 'größe', '重み', '0', 'storage', 'cpu', '😀' * 99)
    }
    write_pth(tmp_path / 'a.pth', tensors)
    assert list(torch.load(tmp_path / 'a.pth', weights_only=True)) == list(tensors)


def test_no_tensors(tmp_path: Path) -> None:
    write_pth(tmp_path / 'a.pth', {})
    assert torch.load(tmp_path / 'a.pth', weights_only=True) == OrderedDict()


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    for name in 'ab':
        write_pth(tmp_path / f'{name}.pth', tensors_of_every_kind())
    assert (tmp_path / 'a.pth').read_bytes() == (tmp_path / 'b.pth').read_bytes()


def test_few_tensors_are_copied_at_a_time(tmp_path: Path) -> None:
    tensors = {str(i): np.zeros((512, 512), np.float32).T for i in range(64)}
    tracemalloc.start()
    write_pth(tmp_path / 'a.pth', tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / 'plain').touch()
    write_pth(tmp_path / 'a.pth', {})
    assert (tmp_path / 'a.pth').stat().st_mode == (tmp_path / 'plain').stat().st_mode


# Failures.


class Broken:
    """An array that fails when its numbers are asked for."""

    dtype, shape = np.dtype(np.float32), (2,)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize(
    'error', [RuntimeError('deleted buffer'), KeyboardInterrupt(), OSError(errno.EIO, 'bad disk')]
)
@pytest.mark.parametrize('existing', [False, True])
def test_failure_half_way(tmp_path: Path, error: BaseException, existing: bool) -> None:
    path = tmp_path / 'a.pth'
    if existing:
        write_pth(path, {'old': np.ones(3)})
        before = path.read_bytes()
    expected = FlaxnetsError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_pth(path, {'a': np.zeros(10_000), 'b': Broken(error), 'c': np.zeros(3)})
    assert os.listdir(tmp_path) == (['a.pth'] if existing else [])
    if existing:
        assert path.read_bytes() == before


@pytest.mark.parametrize('where', ['write', 'fsync', 'replace'])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / 'a.pth'
    write_pth(path, {'old': np.ones(3)})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == 'write':
        writes = iter(range(5))
        write = zipfile._ZipWriteFile.write  # what every entry goes through
        monkeypatch.setattr(
            zipfile._ZipWriteFile, 'write', lambda *a: full() if next(writes) == 3 else write(*a)
        )
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(FlaxnetsError, match=f'{path}: cannot be written: No space left on device'):
        write_pth(path, {str(i): np.zeros(1000) for i in range(9)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ['a.pth'] and path.read_bytes() == before


@pytest.mark.parametrize(
    ('name', 'told'),
    [('no/a.pth', 'No such file'), ('file/a.pth', 'Not a directory'), ('dir', 'Is a directory')],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / 'file').touch()
    (tmp_path / 'dir').mkdir()
    with pytest.raises(FlaxnetsError, match=f'{tmp_path / name}: cannot be written: {told}'):
        write_pth(tmp_path / name, {'a': np.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ['dir', 'file'] and not os.listdir(tmp_path / 'dir')


def test_what_torch_has_no_tensor_for(tmp_path: Path) -> None:
    wrong = {
        'good': np.ones(1),
        'complex': np.ones(1, np.complex64),
        'words': np.array(['a']),
        'list': [1.0],
        7: np.ones(1),
    }
    with pytest.raises(FlaxnetsError) as error:
        write_pth(tmp_path / 'a.pth', wrong)
    message = str(error.value)
    for told in (
        "'complex' (ndarray, complex64)",
        "'words' (ndarray, <U1)",
        "'list' (list, no dtype)",
        '7 (ndarray',
    ):
        assert told in message
    assert 'good' not in message and not os.listdir(tmp_path)

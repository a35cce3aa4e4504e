"""safetensors files read and written as the safetensors package does."""

from __future__ import annotations

import errno
import json
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.store.safetensors_file import DTYPES, read_safetensors, write_safetensors


def tensors_of_every_kind() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {}
    for dtype in DTYPES.values():
        raw = random.integers(0, 2 if dtype == np.bool_ else 256, 30 * dtype.itemsize, np.uint8)
        tensors[f'{dtype.name}.matrix'] = raw.view(dtype).reshape(5, 6)
        tensors[f'{dtype.name}.number'] = raw.view(dtype)[3:4].reshape(())
        tensors[f'{dtype.name}.empty'] = raw.view(dtype)[:0].reshape(4, 0)
    return tensors


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_same(got: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> None:
    assert set(got) == set(tensors)
    for name, array in got.items():
        assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape, name
        assert array.tobytes() == tensors[name].tobytes(), name


def test_reads_what_torch_saved(tmp_path: Path) -> None:
    tensors = tensors_of_every_kind()
    saved = {name: to_torch(array) for name, array in tensors.items()}
    safetensors.torch.save_file(saved, tmp_path / 'a.safetensors', {'format': 'pt', 'note': 'ü'})
    got, metadata = read_safetensors(tmp_path / 'a.safetensors')
    assert_same(got, tensors)
    assert not any(array.flags.writeable for array in got.values())
    assert metadata == {'format': 'pt', 'note': 'ü'}


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    big = np.arange(4_000_000, dtype=np.float32)
    safetensors.numpy.save_file({'big': big}, tmp_path / 'a.safetensors')
    tracemalloc.start()
    got, metadata = read_safetensors(tmp_path / 'a.safetensors')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 and metadata == {}
    with pytest.raises(ValueError, match='read-only'):
        got['big'][0] = 1
    assert np.array_equal(got['big'], big)


def test_written_as_the_package_writes(tmp_path: Path) -> None:
    tensors = {f'{name} "ü\n\x01': array for name, array in tensors_of_every_kind().items()}
    write_safetensors(tmp_path / 'ours', tensors, {'format': 'pt'})
    safetensors.torch.save_file(
        {name: to_torch(array) for name, array in tensors.items()}, tmp_path / 'theirs', {'format': 'pt'}
    )
    assert (tmp_path / 'ours').read_bytes() == (tmp_path / 'theirs').read_bytes()


@pytest.mark.parametrize('metadata', [{}, {'format': 'pt', 'from': 'here'}])
def test_the_package_reads_what_is_written(tmp_path: Path, metadata: dict[str, str]) -> None:
    tensors = tensors_of_every_kind()
    write_safetensors(tmp_path / 'a', tensors, metadata)
    with safetensors.safe_open(tmp_path / 'a', 'pt') as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(tensors)
        for name, array in tensors.items():
            tensor = file.get_tensor(name)
            assert str(tensor.dtype) == f'torch.{array.dtype.name}' and tuple(tensor.shape) == array.shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    got, read = read_safetensors(tmp_path / 'a')
    assert_same(got, tensors)
    assert read == metadata


def test_any_layout_and_byte_order_is_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype='>f4').reshape(2, 3, 4).transpose(2, 0, 1)
    write_safetensors(tmp_path / 'a', {'x': array, 'y': array[::2]})
    got = safetensors.numpy.load_file(tmp_path / 'a')
    assert got['x'].dtype == np.dtype('<f4') and np.array_equal(got['x'], array)
    assert np.array_equal(got['y'], array[::2])


@pytest.mark.parametrize(
    ('tensors', 'metadata', 'match'),
    [
        ({'a': np.zeros(2, np.complex64)}, None, "'a' \\(ndarray, complex64\\)"),
        ({'a': np.zeros(2, 'U4'), 'b': [1.0]}, None, "'a' .*'b' \\(list, no dtype\\)"),
        ({'__metadata__': np.zeros(2)}, None, '__metadata__'),
        ({3: np.zeros(2)}, None, '3 '),
        ({'\ud800': np.zeros(2)}, None, 'ud800'),
        ({'a': np.zeros(2)}, {'epoch': 3}, "metadata 'epoch'"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(
    tmp_path: Path, tensors: Any, metadata: Any, match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        write_safetensors(tmp_path / 'a', tensors, metadata)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'a'
    path.write_bytes(b'before')

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(FlaxnetsError, match='No space left'):
            write_safetensors(path, {'x': np.zeros(3)})
    assert path.read_bytes() == b'before' and os.listdir(tmp_path) == ['a']
    with pytest.raises(FlaxnetsError, match='No such file or directory'):
        write_safetensors(tmp_path / 'none' / 'a', {'x': np.zeros(3)})


def file_of(header: Any, data: bytes = b'') -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(encoded)) + encoded + data


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = 'F32', **more: Any) -> dict[str, Any]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end], **more}


BROKEN = {
    'empty': (b'', 'the file is empty'),
    'seven bytes': (b'\x08' + bytes(6), 'not a safetensors file'),
    'no header': (bytes(8), 'header is not JSON'),
    'web page': (b'<!DOCTYPE html><html>' + bytes(100), 'web page'),
    'LFS pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    'zip': (b'PK\x03\x04' + bytes(100), 'PyTorch checkpoint'),
    'pickle': (b'\x80\x02\x8a\x0a' + bytes(100), 'PyTorch checkpoint'),
    'header past the end': (struct.pack('<Q', 1000) + b'{}', 'truncated: its header alone has 1,000'),
    'header of 2**63': (struct.pack('<Q', 2**63) + b'{}', 'not a safetensors file'),
    'not JSON': (file_of(b'{"a": nonsense'), 'not JSON'),
    'not UTF-8': (file_of(b'{"\xff": 1}'), 'not JSON'),
    'a list': (file_of([1]), 'not a safetensors file'),
    'tensor twice': (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'a' is there twice",
    ),
    'dtype twice': (file_of(b'{"a":{"dtype":"F32","dtype":"I8"}}'), "'dtype' is there twice"),
    'metadata numbers': (file_of({'__metadata__': {'a': 1}}), '__metadata__'),
    'metadata list': (file_of({'__metadata__': []}), '__metadata__'),
    'entry is a number': (file_of({'a': 1}), 'not described by dtype'),
    'entry without dtype': (file_of({'a': {'shape': [], 'data_offsets': [0, 0]}}), 'not described'),
    'entry with more': (file_of({'a': entry(strides=[1])}, bytes(8)), 'not described'),
    'three offsets': (
        file_of({'a': {'dtype': 'I8', 'shape': [1], 'data_offsets': [0, 1, 2]}}, bytes(2)),
        'not described',
    ),
    'dtype F8': (file_of({'a': entry(0, 2, dtype='F8_E4M3')}, bytes(2)), "'F8_E4M3'; those that can be read"),
    'dtype U16': (file_of({'a': entry(0, 4, dtype='U16')}, bytes(4)), "'U16'; those"),
    'dtype C64': (file_of({'a': entry(0, 16, dtype='C64')}, bytes(16)), "'C64'; those"),
    'negative size': (file_of({'a': entry(0, 8, [-2])}, bytes(8)), 'not all whole numbers'),
    'two negative sizes': (file_of({'a': entry(0, 8, [-2, -1])}, bytes(8)), 'not all whole numbers'),
    'fraction': (file_of({'a': entry(0, 8, [2.0])}, bytes(8)), 'not all whole numbers'),
    'boolean size': (file_of({'a': entry(0, 4, [True])}, bytes(4)), 'not all whole numbers'),
    'NaN': (file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), 'not all whole'),
    'text offset': (file_of({'a': entry('0', 8)}, bytes(8)), 'not all whole numbers'),
    'negative offset': (file_of({'a': entry(-8, 0)}, bytes(8)), 'not all whole numbers'),
    'huge size': (file_of({'a': entry(0, 8, [2**70])}, bytes(8)), 'not all whole numbers'),
    '33 axes': (file_of({'a': entry(0, 4, [1] * 33)}, bytes(4)), 'not all whole numbers'),
    'overflow': (file_of({'a': entry(0, 0, [2**32, 2**32])}), 'takes 73786976294838206464 bytes'),
    'empty, but too large for NumPy': (file_of({'a': entry(0, 0, [0, 2**40, 2**40])}), 'takes 0 bytes'),
    'more bytes than the shape': (file_of({'a': entry(0, 12)}, bytes(12)), 'takes 8 bytes'),
    'fewer bytes than the shape': (file_of({'a': entry(0, 4)}, bytes(4)), 'takes 8 bytes'),
    'end before begin': (file_of({'a': entry(8, 0)}, bytes(8)), 'takes 8 bytes'),
    'overlap': (file_of({'a': entry(0, 8), 'b': entry(4, 12)}, bytes(12)), "'b' overlaps"),
    'the same bytes twice': (file_of({'a': entry(0, 8), 'b': entry(0, 8)}, bytes(8)), 'overlaps'),
    'gap': (file_of({'a': entry(0, 8), 'b': entry(9, 17)}, bytes(17)), "'b' leaves a gap"),
    'gap at the start': (file_of({'a': entry(8, 16)}, bytes(16)), "'a' leaves a gap"),
    'bytes at the end': (file_of({'a': entry()}, bytes(9)), 'goes on after its last tensor: 9 bytes'),
    'truncated': (file_of({'a': entry()}, bytes(7)), 'truncated: 7 bytes of tensors instead of 8'),
    'bool of 2': (file_of({'a': entry(0, 1, [1], 'BOOL')}, b'\x02'), 'bytes other than 0 and 1'),
    'nested': (file_of(b'{"a":' * 100_000), 'not JSON'),
    'number of 5,000 digits': (file_of(b'{"a":%b}' % (b'9' * 5000)), 'not JSON'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_and_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, match = BROKEN[name]
    path = tmp_path / 'a.safetensors'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize('bomb', ['entries', 'commas', 'shape'])
def test_header_bombs_are_refused_quickly(tmp_path: Path, bomb: str) -> None:
    header: Any
    if bomb == 'entries':
        header = {f'{i}': entry(0, 0, [0]) for i in range(60_000)}
    elif bomb == 'commas':
        header = b'{"a":[' + b'0,' * 20_000_000 + b'0]}'
    else:
        header = {'a': entry(0, 8, [1] * 900_000)}
    path = tmp_path / 'a.safetensors'
    path.write_bytes(file_of(header))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        read_safetensors(path)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10 and peak < 2 * path.stat().st_size + 300e6


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / 'a', {'x': np.arange(6.0), 'y': np.arange(3, dtype=np.int8)}, {'format': 'pt'}
    )
    content = (tmp_path / 'a').read_bytes()
    for length in range(len(content)):
        (tmp_path / 'b').write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path / 'b')


def test_fuzzed_headers_end_in_our_error_or_as_the_package_reads_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_safetensors(
        tmp_path / 'a', {'x': np.arange(6.0), 'y': np.arange(3, dtype=np.int8)}, {'format': 'pt'}
    )
    content = (tmp_path / 'a').read_bytes()
    accepted = 0
    for _ in range(3000):
        changed = bytearray(content)
        for _ in range(random.integers(1, 4)):
            changed[random.integers(len(content) - 51)] = random.integers(256)
        (tmp_path / 'b').write_bytes(changed)
        try:
            got, _ = read_safetensors(tmp_path / 'b')
        except CheckpointError:
            continue
        accepted += 1
        theirs = safetensors.numpy.load_file(tmp_path / 'b')
        assert_same(got, theirs)
    assert 10 < accepted < 1500  # changed names and metadata, say


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='No such file'):
        read_safetensors(tmp_path / 'none')
    with pytest.raises(CheckpointError, match='a directory'):
        read_safetensors(tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointError, match='device or pipe'):
        read_safetensors(tmp_path / 'pipe')

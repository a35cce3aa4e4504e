"""Damaged and hostile files: one error that names the file, nothing allocated, no wrong number."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pth_files as pf
import pytest
import torch

from convert.formats.pth import read_pth
from flaxnets.errors import CheckpointError


def small_zip(path: Path) -> Path:
    """A file as PyTorch writes it, of five tensors, one of them shared."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator)
    state = OrderedDict(weight=weight, row=weight[2], bias=torch.randn(7, generator=generator).bfloat16())
    state['num_batches_tracked'] = torch.tensor(3)
    state['mask'] = torch.tensor([True, False])
    state._metadata = OrderedDict({'': {'version': 1}})
    torch.save(state, path)
    return path


def small_legacy(path: Path) -> Path:
    torch.save(torch.load(small_zip(path), weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def same(got: object, expected: dict[str, np.ndarray]) -> bool:
    return (
        isinstance(got, dict)
        and list(got) == list(expected)
        and all(np.array_equal(got[k], v) and got[k].dtype == v.dtype for k, v in expected.items())
    )


@pytest.mark.parametrize('small', [small_zip, small_legacy])
def test_truncation(tmp_path: Path, small: Callable[[Path], Path]) -> None:
    data = small(tmp_path / 'whole.pth').read_bytes()
    path = tmp_path / 'cut.pth'
    for length in {
        1,
        2,
        3,
        4,
        5,
        len(data) - 1,
        len(data) - 2,
        *np.linspace(6, len(data) - 3, 60).astype(int),
    }:
        path.write_bytes(data[:length])
        pf.refused(path)


@pytest.mark.parametrize('extra', [b'\0', b'garbage', pickle.dumps(1), bytes(100)])
@pytest.mark.parametrize('small', [small_zip, small_legacy])
def test_something_after_the_end(tmp_path: Path, small: Callable[[Path], Path], extra: bytes) -> None:
    path = small(tmp_path / 'a.pth')
    expected = {k: v.copy() for k, v in read_pth(path).items()}
    longer = tmp_path / 'longer.pth'
    longer.write_bytes(path.read_bytes() + extra)
    if small is small_legacy:
        pf.refused(longer, 'goes on after its last tensor')
    else:  # a zip archive may end in a comment, but not change what it holds
        with contextlib.suppress(CheckpointError):
            assert same(read_pth(longer), expected)


def test_every_flipped_byte_of_a_zip_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = small_zip(tmp_path / 'whole.pth')
    expected = {k: v.copy() for k, v in read_pth(whole).items()}
    data = whole.read_bytes()
    path = tmp_path / 'flipped.pth'
    refusals = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.unlink(missing_ok=True)
        path.write_bytes(flipped)
        try:
            assert same(read_pth(path), expected), position
        except CheckpointError as error:
            assert str(error).startswith(str(path))
            refusals += 1
    assert refusals > len(data) / 3


def test_every_flipped_byte_of_the_numbers_is_refused(tmp_path: Path) -> None:
    whole = small_zip(tmp_path / 'whole.pth')
    data = whole.read_bytes()
    path = tmp_path / 'flipped.pth'
    for value in read_pth(whole).values():
        start = data.index(value.tobytes())
        for position in range(start, start + value.nbytes):
            flipped = bytearray(data)
            flipped[position] ^= 0x10
            path.write_bytes(flipped)
            pf.refused(path, 'does not match its CRC-32')


def test_a_file_without_checksums_says_so(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        pf.refused(small_zip(tmp_path / 'a.pth'), 'set_crc32_options')
    finally:
        torch.serialization.set_crc32_options(before)


def test_random_damage(tmp_path: Path) -> None:
    """Only `CheckpointError` comes out, whatever the bytes; the old format cannot notice all."""
    random = np.random.default_rng(0)
    path = tmp_path / 'damaged.pth'
    for small in (small_zip, small_legacy):
        data = np.frombuffer(small(tmp_path / 'whole.pth').read_bytes(), np.uint8)
        for _ in range(400):
            damaged = data.copy()
            start = random.integers(len(data))
            span = slice(start, start + random.integers(1, 9))
            damaged[span] = random.integers(0, 256, len(damaged[span]))
            if random.random() < 0.3:
                cut = random.integers(len(data))
                damaged = np.delete(damaged, slice(cut, cut + random.integers(1, 30)))
            path.unlink(missing_ok=True)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(CheckpointError):
                read_pth(path)


def test_random_pickles(tmp_path: Path) -> None:
    """Damaged and random programs under a right CRC-32."""
    random = np.random.default_rng(1)
    with zipfile.ZipFile(small_zip(tmp_path / 'whole.pth')) as archive:
        program = np.frombuffer(archive.read('whole/data.pkl'), np.uint8)
    pieces = [
        pf.tensor(),
        pf.storage(),
        pf.call('collections', 'OrderedDict'),
        pf.text('a'),
        b'K\x01',
        b'q\x01',
    ]
    pieces += [
        b'h\x01',
        pf.name('argparse', 'Namespace'),
        pf.call('numpy', 'dtype', pf.text('f4')),
        b'C\x02ab',
    ]
    pieces += [bytes([opcode]) for opcode in b'()}]\x8f\x90\x91\x85\x86\x87tRbQsuaeld\x81\x93\x94\x88\x89N']
    outcomes = set()
    for _ in range(1500):
        if random.random() < 0.5:
            damaged = program.copy()
            damaged[random.integers(len(program), size=random.integers(1, 4))] = random.integers(256)
            saved = damaged.tobytes()
        else:
            picked = random.integers(len(pieces), size=random.integers(1, 30))
            saved = b'\x80\x04' + b''.join(pieces[i] for i in picked) + pf.STOP
        path = pf.write_zip(tmp_path / 'random.pth', saved)
        try:
            read_pth(path)
            outcomes.add('read')
        except CheckpointError as error:
            outcomes.add(str(error).split(':')[1][:20])
        path.unlink()
    assert 'read' in outcomes and len(outcomes) > 3


def test_compressed_entries(tmp_path: Path) -> None:
    """A bomb: 64 KB that would be 64 MB."""
    path = tmp_path / 'bomb.pth'
    saved = pf.state_dict(pf.text('w'), pf.tensor((2**24,), (1,), where=pf.storage(numel=2**24)))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', saved, zipfile.ZIP_STORED)
        archive.writestr('archive/data/0', bytes(2**26))
    tracemalloc.start()
    pf.refused(path, 'is compressed')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', pf.GOOD)
    pf.refused(path, 'is compressed')


@pytest.mark.parametrize(('local', 'central', 'lie'), [(8, 10, 8), (22, 24, 2**20)], ids=['method', 'size'])
def test_entries_that_claim_compression(tmp_path: Path, local: int, central: int, lie: int) -> None:
    """Stored bytes under the name of deflate, or said to become more than they are."""
    path = pf.write_zip(tmp_path / 'a.pth', pf.GOOD)
    data = bytearray(path.read_bytes())
    for start in (data.index(b'archive/data/0') - 30 + local, data.rindex(b'archive/data/0') - 46 + central):
        struct.pack_into('<H' if lie == 8 else '<L', data, start, lie)
    path.write_bytes(data)
    pf.refused(path, 'is compressed')


@pytest.mark.parametrize(
    ('names', 'told'),
    [
        (['archive/data.pkl', 'archive/data/0', 'archive/data/0'], 'is there twice'),
        (['archive/data.pkl', 'archive/data.pkl', 'archive/data/0'], 'is there twice'),
        (['archive/data.pkl', 'archive/data/0', '../evil'], 'name that no checkpoint uses'),
        (['archive/data.pkl', 'archive/data/0', 'archive/../../evil'], 'name that no checkpoint uses'),
        (['archive/data.pkl', 'archive/data/0', '/evil'], 'name that no checkpoint uses'),
        (['archive/data.pkl', 'archive/data/0', 'archive\\evil'], 'name that no checkpoint uses'),
        (['archive/data.pkl', 'b/data.pkl', 'archive/data/0'], 'not of torch.save'),
        (['a/b/data.pkl', 'a/b/data/0'], 'not of torch.save'),
        (['data.pkl', 'data/0'], 'not of torch.save'),
        (['weights.npy'], "not of torch.save (<name>/data.pkl): it holds 'weights.npy'"),
        (['net/data.pkl', 'net/constants.pkl', 'net/code/net.py'], 'TorchScript'),
    ],
)
def test_names_in_the_archive(tmp_path: Path, names: list[str], told: str) -> None:
    path = tmp_path / 'a.pth'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # zipfile's own, of duplicate names
        with zipfile.ZipFile(path, 'w') as archive:
            for entry in names:
                archive.writestr(entry, pf.GOOD if entry.endswith('data.pkl') else pf.FOUR_FLOATS)
    pf.refused(path, told)


def test_a_name_that_ends_early_for_some(tmp_path: Path) -> None:
    records = {'data/0': pf.FOUR_FLOATS, 'data/0X.txt': b''}
    path = pf.write_zip(tmp_path / 'a.pth', pf.GOOD, records)
    path.write_bytes(path.read_bytes().replace(b'data/0X.txt', b'data/0\0.txt'))
    pf.refused(path, 'name that no checkpoint uses')


def test_encrypted_entries(tmp_path: Path) -> None:
    path = pf.write_zip(tmp_path / 'a.pth', pf.GOOD)
    data = bytearray(path.read_bytes())
    data[data.index(b'PK\x01\x02') + 8] |= 1
    path.write_bytes(data)
    pf.refused(path)
    data[6] |= 1
    path.write_bytes(data)
    pf.refused(path, 'is encrypted')


def test_overlapping_entries(tmp_path: Path) -> None:
    """Two names of one entry: the local header can agree with only one of them."""
    path = pf.write_zip(tmp_path / 'a.pth', pf.GOOD, {'data/0': pf.FOUR_FLOATS, 'data/1': pf.FOUR_FLOATS})
    data = bytearray(path.read_bytes())
    offsets = [i + 42 for i in range(len(data)) if data[i : i + 4] == b'PK\x01\x02']
    data[offsets[2] : offsets[2] + 4] = data[offsets[1] : offsets[1] + 4]
    path.write_bytes(data)
    pf.refused(path, 'disagrees')


def test_an_entry_inside_another(tmp_path: Path) -> None:
    """A whole entry, header and all, hidden in the bytes of a tensor."""
    inner = struct.pack('<4s5H3L2H', b'PK\3\4', 20, 0, 0, 0, 0, 0, 0, 0, 14, 0) + b'archive/data/1'
    record = inner.ljust(64, b'\0')
    saved = pf.state_dict(pf.text('w'), pf.tensor((16,), (1,), where=pf.storage(numel=16)))
    path = pf.write_zip(tmp_path / 'a.pth', saved, {'data/0': record, 'data/1': b''})
    assert read_pth(path)['w'].shape == (16,)
    data = bytearray(path.read_bytes())
    entry = [i for i in range(len(data)) if data[i : i + 4] == b'PK\x01\x02'][2]
    struct.pack_into('<L', data, entry + 42, data.index(inner))
    path.write_bytes(data)
    pf.refused(path, 'overlap')


@pytest.mark.parametrize('field', [0, 6, 8, 14, 18, 22, 26, 28])
def test_local_headers_that_lie(tmp_path: Path, field: int) -> None:
    path = pf.write_zip(tmp_path / 'a.pth', pf.GOOD)
    data = bytearray(path.read_bytes())
    header = data.index(b'archive/data/0') - 30
    data[header + field] ^= 0x01
    path.write_bytes(data)
    pf.refused(path)


@pytest.mark.parametrize('offset', [4, 24, 32, 40, 48])
@pytest.mark.parametrize('value', [0, 1, 2**31, 2**62, 2**64 - 1])
def test_zip64_records_that_lie(tmp_path: Path, offset: int, value: int) -> None:
    path = small_zip(tmp_path / 'a.pth')
    expected = {k: v.copy() for k, v in read_pth(path).items()}
    data = bytearray(path.read_bytes())
    struct.pack_into('<Q', data, data.rindex(b'PK\x06\x06') + offset, value)
    lying = tmp_path / 'b.pth'
    lying.write_bytes(data)
    with contextlib.suppress(CheckpointError):  # a number that nobody needs may be wrong
        assert same(read_pth(lying), expected)


def test_zip64_sizes_that_lie(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    for size, offset in ((2**40, 0), (16, 2**40), (2**63, 2**63), (2**64 - 1, 2**64 - 1)):
        pf.write_zip(path, pf.GOOD)
        data = bytearray(path.read_bytes())
        entry = [i for i in range(len(data)) if data[i : i + 4] == b'PK\x01\x02'][1]
        struct.pack_into('<LL', data, entry + 20, 2**32 - 1, 2**32 - 1)
        struct.pack_into('<H', data, entry + 30, 28)
        struct.pack_into('<L', data, entry + 42, 2**32 - 1)
        extra = struct.pack('<HHQQQ', 1, 24, size, size, offset)
        data[entry + 46 + 14 : entry + 46 + 14] = extra
        end = data.index(b'PK\x05\x06')
        struct.pack_into('<L', data, end + 12, struct.unpack_from('<L', data, end + 12)[0] + len(extra))
        path.write_bytes(data)
        pf.refused(path)


def test_big_endian_archives(tmp_path: Path) -> None:
    records = {'data/0': pf.FOUR_FLOATS, 'byteorder': b'big'}
    pf.refused(pf.write_zip(tmp_path / 'a.pth', pf.GOOD, records), 'byte order')


@pytest.mark.parametrize(
    'keys', [[], ['0', '0'], ['1'], ['0', '1'], [0], '0', None, {'0': 1}, [['0']], ['0', 0]], ids=repr
)
def test_legacy_lists_of_storages(tmp_path: Path, keys: object) -> None:
    pf.refused(pf.write_legacy(tmp_path / 'a.pth', pf.GOOD, keys=pickle.dumps(keys, 2)), 'list of storages')


@pytest.mark.parametrize(
    ('parts', 'told'),
    [
        ({'magic': pickle.dumps(1, 2)}, 'not one that torch.save wrote'),
        ({'magic': pickle.dumps({'w': 1}, 2)}, 'not one that torch.save wrote'),
        ({'protocol': pickle.dumps(1000, 2)}, 'its protocol is 1000'),
        ({'system': pickle.dumps(None, 2)}, 'little-endian'),
        ({'system': pickle.dumps({}, 2)}, 'little-endian'),
    ],
)
def test_legacy_headers(tmp_path: Path, parts: dict[str, bytes], told: str) -> None:
    pf.refused(pf.write_legacy(tmp_path / 'a.pth', pf.GOOD, **parts), told)


def test_legacy_sizes(tmp_path: Path) -> None:
    for numel, content, told in (
        (4, pf.FOUR_FLOATS[:-1], 'is truncated'),
        (4, pf.FOUR_FLOATS + b'\0', 'goes on'),
        (3, pf.FOUR_FLOATS, "storage '0' is not 4 long"),
        (-4, pf.FOUR_FLOATS, "storage '0' is not 4 long"),
    ):
        pf.refused(pf.write_legacy(tmp_path / 'a.pth', pf.GOOD, {'0': (numel, content)}), told)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as archive:
        for part in ('sys_info', 'pickle', 'tensors', 'storages'):
            archive.addfile(tarfile.TarInfo(part))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('content', 'told'),
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html><html><body>404 Not Found</body></html>', 'web page'),
        (b'\xef\xbb\xbf\r\n  <html>', 'web page'),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n', 'git lfs pull'),
        (tar(), 'tar archive'),
        (b'\x1f\x8b\x08' + bytes(20), 'gzip'),
        (b'\x89HDF\r\n\x1a\n' + bytes(20), 'HDF5'),
        (b'\x93NUMPY\x01\x00', 'NumPy'),
        (struct.pack('<Q', 2) + b'{}', 'safetensors'),
        (b'PK\x05\x06' + bytes(18), 'empty zip archive'),
        (b'PK\x03\x04', 'truncated or damaged'),
        (b'\x80', 'damaged'),
        (b'\x80\x02', 'damaged'),
        (bytes(4096), 'not a PyTorch checkpoint'),
        (b'hello', "starts with b'hello'"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    pf.refused(path, told)


def test_no_file_at_all(tmp_path: Path) -> None:
    pf.refused(tmp_path / 'missing.pth', 'No such file')
    pf.refused(tmp_path, 'is a directory')
    os.mkfifo(tmp_path / 'pipe.pth')
    pf.refused(tmp_path / 'pipe.pth', 'pipe')

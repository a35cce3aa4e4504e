"""Finds the records of a zip archive that `torch.save` wrote, and checks that they are intact."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from itertools import pairwise
from typing import IO, cast

from flaxnets.errors import CheckpointError, shown

from .torch_names import Storage

# Signature, flags, method, CRC-32, compressed size, size, length of the name, of the extra field.
_LOCAL_HEADER = struct.Struct('<4s2x2H4x3L2H')
_ENCRYPTED = 0x2041


class Archive:
    """The records of a zip file that `torch.save` wrote."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self._data = memoryview(data)
        self._where = where
        self._records = _zip_records(data, where)
        self._top = self._top_folder()
        order = bytes(self.read('byteorder')) if f'{self._top}/byteorder' in self._records else b'little'
        if order != b'little':
            raise CheckpointError(
                f'{where}: its byte order is {shown(order)}; only little-endian can be read'
            )

    def read(self, name: str) -> memoryview:
        """The bytes of a record, checked against its CRC-32."""
        start, size, crc = self._record(name)
        content = self._data[start : start + size]
        if zlib.crc32(content) != crc:
            hint = ', or saved without checksums (set_crc32_options)' if crc == 0 else ''
            raise CheckpointError(f'{self._where}: {shown(name)} does not match its CRC-32: damaged{hint}')
        return content

    def find(self, storage: Storage) -> memoryview:
        """The bytes of a storage, which must be as many as the pickle says."""
        name = f'data/{storage.key}'
        _, size, _ = self._record(name)
        if size != storage.numel * storage.dtype.itemsize:
            raise CheckpointError(
                f'{self._where}: {shown(name)} has {size} bytes instead of '
                f'{shown(storage.numel)} numbers of {storage.dtype}'
            )
        return self.read(name)

    def _record(self, name: str) -> tuple[int, int, int]:
        record = self._records.get(f'{self._top}/{name}')
        if record is None:
            raise CheckpointError(f'{self._where}: {shown(name)} is missing from the archive')
        return record

    def _top_folder(self) -> str:
        """The folder that `torch.save` puts everything into."""
        tops = [name.removesuffix('/data.pkl') for name in self._records if name.endswith('/data.pkl')]
        if len(tops) != 1 or '/' in tops[0]:
            held = ', '.join(shown(name) for name in list(self._records)[:4])
            raise CheckpointError(
                f'{self._where}: a zip archive, but not of torch.save (<name>/data.pkl): it holds {held}'
            )
        return tops[0]


def _zip_records(data: mmap.mmap, where: str) -> dict[str, tuple[int, int, int]]:
    """Name -> (start, size, CRC-32) of each entry of a zip archive.

    Refuses whatever two programs could read in two ways: compressed, encrypted, duplicate or
    overlapping entries, and entries whose own header disagrees with the archive's directory.
    """
    try:
        with zipfile.ZipFile(cast(IO[bytes], data)) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except Exception as error:  # zipfile fails with whatever error the bytes lead it to
        raise CheckpointError(
            f'{where}: a zip archive, but truncated or damaged ({str(error)[:200]})'
        ) from error
    if any(entry.orig_filename.endswith('/constants.pkl') for entry in entries):
        raise CheckpointError(
            f'{where}: a TorchScript archive, which holds a program: '
            'load it with torch.jit.load and save model.state_dict() instead'
        )
    records: dict[str, tuple[int, int, int]] = {}
    spans = [(directory, directory)]
    for entry in entries:
        start = _data_start(data, entry, directory)
        problem = 'is there twice' if entry.orig_filename in records else _entry_problem(entry)
        if problem or start is None:
            problem = problem or 'has a header that disagrees with the directory of the archive'
            raise CheckpointError(f'{where}: entry {shown(entry.orig_filename)} {problem}')
        records[entry.orig_filename] = (start, entry.file_size, entry.CRC)
        spans.append((entry.header_offset, start + entry.file_size))
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        if end > start:
            raise CheckpointError(f'{where}: entries of the zip archive overlap')
    return records


def _entry_problem(entry: zipfile.ZipInfo) -> str | None:
    name = entry.orig_filename
    if '\0' in name or '\\' in name or name.startswith('/') or '..' in name.split('/'):
        return 'has a name that no checkpoint uses'
    if entry.flag_bits & _ENCRYPTED:
        return 'is encrypted'
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return 'is compressed, which torch.save never does: save it anew'
    return None


def _data_start(data: mmap.mmap, entry: zipfile.ZipInfo, directory: int) -> int | None:
    """Where an entry's bytes start, or None if its local header is not what the directory says."""
    offset = entry.header_offset
    if not 0 <= offset <= directory - _LOCAL_HEADER.size:
        return None
    signature, flags, method, crc, compressed, size, name_length, extra_length = _LOCAL_HEADER.unpack_from(
        data, offset
    )
    name_start = offset + _LOCAL_HEADER.size
    start = int(name_start + name_length + extra_length)
    later = {0} if flags & 8 else set()  # sizes and CRC follow the data, and PyTorch writes zeros here
    agrees = (
        signature == b'PK\x03\x04'
        and method == entry.compress_type
        and flags & _ENCRYPTED == entry.flag_bits & _ENCRYPTED
        and data[name_start : name_start + name_length] == _encoded_name(entry)
        and crc in {entry.CRC} | later
        and {compressed, size} <= {entry.compress_size, entry.file_size, 0xFFFFFFFF} | later
    )
    return start if agrees else None


def _encoded_name(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode('utf-8' if entry.flag_bits & 0x800 else 'cp437')

"""Checkpoint files made by hand: pickles opcode by opcode, in either container of `torch.save`."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from convert.formats.pth import read_pth
from flaxnets.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C
SYS_INFO = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}

# Opcodes of `pickletools`, those that take no argument.
MARK, STOP, REDUCE, BUILD, NONE, TUPLE, BINPERSID = b'(', b'.', b'R', b'b', b'N', b't', b'Q'
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, FALSE, TRUE = b'}', b']', b')', b'\x89', b'\x88'
TUPLE1, TUPLE2, SETITEM, SETITEMS, APPEND = b'\x85', b'\x86', b's', b'u', b'a'
NEWOBJ, NEWOBJ_EX, STACK_GLOBAL, OBJ = b'\x81', b'\x92', b'\x93', b'o'


def text(value: str) -> bytes:
    encoded = value.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def python2(value: str) -> bytes:
    """SHORT_BINSTRING: a `str` of Python 2."""
    return b'U' + bytes([len(value)]) + value.encode('latin-1')


def name(module: str, attribute: str) -> bytes:
    return f'c{module}\n{attribute}\n'.encode()


def integer(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(encoded)]) + encoded


def integers(values: Iterable[int]) -> bytes:
    return MARK + b''.join(map(integer, values)) + TUPLE


def storage(key: str = '0', numel: int = 4, kind: bytes = name('torch', 'FloatStorage')) -> bytes:
    return MARK + text('storage') + kind + text(key) + text('cpu') + integer(numel) + TUPLE + BINPERSID


def tensor(
    shape: Iterable[int] = (4,),
    stride: Iterable[int] = (1,),
    offset: int = 0,
    where: bytes | None = None,
    hooks: bytes = name('collections', 'OrderedDict') + EMPTY_TUPLE + REDUCE,
) -> bytes:
    return (
        name('torch._utils', '_rebuild_tensor_v2')
        + MARK
        + (storage() if where is None else where)
        + integer(offset)
        + integers(shape)
        + integers(stride)
        + FALSE
        + hooks
        + TUPLE
        + REDUCE
    )


def state_dict(*items: bytes) -> bytes:
    """A whole pickle of a dictionary whose keys and values are given in turn."""
    return b'\x80\x02' + EMPTY_DICT + MARK + b''.join(items) + SETITEMS + STOP


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + MARK + b''.join(arguments) + TUPLE + REDUCE


GOOD = state_dict(text('w'), tensor())
FOUR_FLOATS = struct.pack('<4f', 1, 2, 3, 4)


def write_zip(path: Path, data_pkl: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """An archive as torch.save lays it out; `records` replace storage '0' of four floats."""
    records = {'data/0': FOUR_FLOATS} if records is None else records
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        for key, content in records.items():
            archive.writestr(f'archive/{key}', content)
        archive.writestr('archive/version', '3\n')
    return path


def write_legacy(
    path: Path,
    saved: bytes,
    storages: Mapping[str, tuple[int, bytes]] | None = None,
    *,
    magic: bytes = pickle.dumps(MAGIC, 2),
    protocol: bytes = pickle.dumps(1001, 2),
    system: bytes = pickle.dumps(SYS_INFO, 2),
    keys: bytes | None = None,
) -> Path:
    """The stream of torch.save before 1.6; `storages` maps keys to numel and bytes."""
    storages = {'0': (4, FOUR_FLOATS)} if storages is None else storages
    keys = pickle.dumps(list(storages), 2) if keys is None else keys
    data = b''.join(struct.pack('<q', numel) + content for numel, content in storages.values())
    path.write_bytes(magic + protocol + system + saved + keys + data)
    return path


def refused(path: Path, told: str = '') -> None:
    """`path` is refused with one short message that starts with its name and says `told`."""
    with pytest.raises(CheckpointError) as error:
        read_pth(path)
    message = str(error.value)
    assert message.startswith(str(path)) and told in message
    assert len(message) < 1000


class Trap:
    """A class that leaves a directory behind, however a pickle touches it."""

    def __new__(cls, path: str = '', **more: str) -> Trap:
        if path or more:
            os.mkdir(path or more['path'])
        return super().__new__(cls)

    def __setstate__(self, path: str) -> None:
        os.mkdir(path)

    def __setitem__(self, key: str, path: str) -> None:
        os.mkdir(path)

    def append(self, path: str) -> None:
        os.mkdir(path)

    def add(self, path: str) -> None:
        os.mkdir(path)


class Armed:
    """A class whose attribute, once set, leaves a directory behind."""

    def _set(self, path: str) -> None:
        os.mkdir(path)

    path = property(None, _set)

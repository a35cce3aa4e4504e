"""Writes a state dict as `torch.save` would, without PyTorch.

The file is the zip archive of PyTorch 1.6 and later: `archive/data.pkl`, an OrderedDict of tensors,
and one stored record `archive/data/<n>` for each, aligned to 64 bytes so that
`torch.load(mmap=True)` can map it. Equal tensors give equal files, byte by byte.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from flaxnets.errors import FlaxnetsError
from flaxnets.store.digest import Description, prepared
from flaxnets.store.files import written_whole
from flaxnets.store.safetensors_file import unfit
from flaxnets.words import some

from .torch_names import STORAGE_DTYPES

_ALIGNMENT = 64  # torch.serialization's own
_STORAGE_NAMES = {dtype.name: name for name, dtype in STORAGE_DTYPES.items()}
_ZIP64_EXTRA = 20  # bytes that zipfile adds to the header of a large entry
_BATCH = 1000  # items that pickle sets at once


def write_pth(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> dict[str, Description]:
    """Writes a PyTorch checkpoint, whole or not at all.

    `torch.load(path, weights_only=True)` returns the same tensors, bit by bit and in this order. A
    file that was there stays as it is until the new one is complete and on the disk.

    Args:
      path: the file to write, usually `.pth`.
      tensors: name -> array. Arrays of any layout and byte order; a few are copied at a time.

    Returns:
      The description of each tensor (`flaxnets.store.digest.describe`).

    Raises:
      FlaxnetsError: a name that is not text, a dtype that PyTorch has no storage for (all of them
        named), or the file cannot be written (no such directory, no space left).
    """
    target = Path(path)
    _check(target, tensors)
    with written_whole(target) as file:
        return _write(file, tensors)


def _check(target: Path, tensors: Mapping[str, np.ndarray]) -> None:
    wrong = unfit(tensors, _STORAGE_NAMES, lambda name: isinstance(name, str))
    if wrong:
        raise FlaxnetsError(
            f'{target}: cannot be written, since a PyTorch checkpoint needs named arrays of '
            f'{", ".join(_STORAGE_NAMES)}, not {some(wrong)}'
        )


def _write(file: IO[bytes], tensors: Mapping[str, np.ndarray]) -> dict[str, Description]:
    described = {}
    with zipfile.ZipFile(file, 'w') as archive:
        _add(archive, 'data.pkl', _pickled((name, t.dtype, t.shape) for name, t in tensors.items()))
        _add(archive, 'byteorder', b'little')
        for number, (name, (array, description)) in enumerate(
            zip(tensors, prepared(tensors.values()), strict=True)
        ):
            _add(archive, f'data/{number}', array.reshape(-1).view(np.uint8).data)
            described[name] = description
        _add(archive, 'version', b'3\n')
    return described


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds a stored entry, its bytes pushed to the next multiple of 64 by a padded extra field."""
    entry = zipfile.ZipInfo(f'archive/{name}', date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 0
    start = archive.start_dir + 30 + len(entry.filename) + 4
    if len(content) * 1.05 > zipfile.ZIP64_LIMIT:  # zipfile's own condition
        start += _ZIP64_EXTRA
    padding = -start % _ALIGNMENT
    entry.extra = b'FB' + struct.pack('<H', padding) + b'Z' * padding  # the tag PyTorch uses
    archive.writestr(entry, content)


def _pickled(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The pickle, protocol 2, of OrderedDict(name -> tensor); tensor n lies in storage 'n'."""
    pickle = _Pickle()
    pickle.call('collections', 'OrderedDict', b')')
    items = [(name, number, dtype, shape) for number, (name, dtype, shape) in enumerate(tensors)]
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        pickle.out += b'(' if len(batch) > 1 else b''
        for name, number, dtype, shape in batch:
            pickle.text(name)
            pickle.tensor(number, dtype, shape)
        pickle.out += b'u' if len(batch) > 1 else b's'
    return bytes(pickle.out) + b'.'


class _Pickle:
    """Builds a pickle with the opcodes, the order and the memo of `pickle.Pickler`."""

    def __init__(self) -> None:
        self.out = bytearray(b'\x80\x02')
        self._memo: dict[object, int] = {}

    def _remember(self, value: object) -> None:
        """Puts what was just built into the memo, under the key `value`."""
        index = len(self._memo)
        self._memo[value] = index
        self.out += struct.pack('<cB', b'q', index) if index < 256 else struct.pack('<cI', b'r', index)

    def _recall(self, value: object) -> bool:
        """Takes what has the key `value` from the memo; False if it is not there."""
        index = self._memo.get(value)
        if index is None:
            return False
        self.out += struct.pack('<cB', b'h', index) if index < 256 else struct.pack('<cI', b'j', index)
        return True

    def text(self, text: str) -> None:
        if not self._recall(text):
            encoded = text.encode('utf-8', 'surrogatepass')
            self.out += b'X' + struct.pack('<I', len(encoded)) + encoded
            self._remember(text)

    def name(self, module: str, name: str) -> None:
        if not self._recall((module, name)):
            self.out += f'c{module}\n{name}\n'.encode()
            self._remember((module, name))

    def call(self, module: str, name: str, arguments: bytes) -> None:
        self.name(module, name)
        self.out += arguments + b'R'
        self._remember(object())

    def integer(self, number: int) -> None:
        if number < 2**8:
            self.out += struct.pack('<cB', b'K', number)
        elif number < 2**16:
            self.out += struct.pack('<cH', b'M', number)
        elif number < 2**31:
            self.out += struct.pack('<ci', b'J', number)
        else:
            encoded = number.to_bytes(number.bit_length() // 8 + 1, 'little')
            self.out += struct.pack('<cB', b'\x8a', len(encoded)) + encoded

    def integers(self, numbers: tuple[int, ...]) -> None:
        """A tuple of integers from 0 on."""
        if not numbers:
            self.out += b')'
            return
        self.out += b'(' if len(numbers) > 3 else b''
        for number in numbers:
            self.integer(number)
        self.out += {1: b'\x85', 2: b'\x86', 3: b'\x87'}.get(len(numbers), b't')
        self._remember(object())

    def tensor(self, number: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """_rebuild_tensor_v2(storage, offset 0, shape, stride, requires_grad False, no hooks)."""
        self.name('torch._utils', '_rebuild_tensor_v2')
        self.out += b'(('
        self.text('storage')
        self.name('torch', _STORAGE_NAMES[dtype.name])
        self.text(str(number))
        self.text('cpu')
        self.integer(math.prod(shape))
        self.out += b't'
        self._remember(object())
        self.out += b'Q'
        self.integer(0)
        self.integers(shape)
        self.integers(_contiguous(shape))
        self.out += b'\x89'
        self.call('collections', 'OrderedDict', b')')
        self.out += b't'
        self._remember(object())
        self.out += b'R'
        self._remember(object())


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor stored row by row."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))

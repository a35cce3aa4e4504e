"""Reads PyTorch checkpoint files without PyTorch, and without running anything they contain.

Two formats of `torch.save` are read: the zip archive of PyTorch 1.6 and later (`<name>/data.pkl`
beside one record per storage) and the stream before it (five pickles, then the storages one after
the other). The pickles go through `convert.pickles`; the numbers stay where they are: every tensor
is a read-only view of the mapped file, checked to lie inside its storage, and every zip record is
checked against its CRC-32, which PyTorch itself does not do. The stream has no checksums: compare
the file with its published SHA-256.
"""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.pickles import Machine
from convert.pth_zip import Archive
from convert.torch_names import NAMES, NumpyArray, Storage, Storages, Tensor
from flaxnets.errors import CheckpointError, shown
from flaxnets.files import lookalike, map_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_MAX_DEPTH = 64
_MAX_VALUES = 500_000
# Tensors may share a storage (a net saved twice, tied weights), but not multiply a file without end.
_MAX_SHARING = 16


def read_pth(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` put into a file, with NumPy arrays for tensors.

    Dictionaries, lists, tuples, sets, numbers, text and bytes come back as such; `OrderedDict` and
    `argparse.Namespace` as `dict`, `torch.Size` as a tuple, `torch.device` and dtypes as text.

    Args:
      path: a `.pth`, `.pt`, `.bin` or `.pth.tar` file that `torch.save` wrote, in either format.

    Returns:
      The saved object. Arrays are read-only views of the file, which must not be changed in place
      while they are in use; those of the old format may lie at odd addresses, which NumPy and JAX
      take as they are.

    Raises:
      CheckpointError: there is no such file; it is not a checkpoint, damaged or truncated; it asks
        for anything but data; it holds complex, quantized or sparse tensors; a tensor reaches
        outside its storage. The message names the file.
    """
    where = os.fsdecode(path)
    data = map_file(where)
    if data[:4] == b'PK\x03\x04':
        return _read_zip(data, where)
    if data[:1] == b'\x80':
        return _read_legacy(data, where)
    raise CheckpointError(f'{where}: {_lookalike(data)}')


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file that holds a state dict, bare or under the key 'state_dict'.

    Args:
      path: as for `read_pth`.

    Returns:
      Parameter name -> array, in the file's order.

    Raises:
      CheckpointError: as for `read_pth`, or the file holds something else than named tensors.
    """
    where = os.fsdecode(path)
    saved = read_pth(path)
    if isinstance(saved, dict) and isinstance(saved.get('state_dict'), dict):
        saved = saved['state_dict']
    if not isinstance(saved, dict):
        raise CheckpointError(f'{where}: holds a {type(saved).__name__}, not a state dict (name -> tensor)')
    wrong = [
        f'{shown(key)} ({type(value).__name__})'
        for key, value in saved.items()
        if not isinstance(key, str) or not isinstance(value, np.ndarray)
    ]
    if wrong:
        more = f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''
        raise CheckpointError(
            f'{where}: not a state dict (name -> tensor), which may be bare or under the key '
            f"'state_dict': it holds {', '.join(wrong[:8])}{more}"
        )
    return saved


def _lookalike(data: mmap.mmap) -> str:
    """What a file that is neither zip nor pickle seems to be."""
    head = data[:512]
    if head.startswith(b'PK\x05\x06'):
        seems = 'it is an empty zip archive'
    elif head[257:262] == b'ustar':
        seems = 'it is a tar archive (PyTorch before 0.1.10?): load and save it with a newer PyTorch'
    elif head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= len(data):
        seems = 'it looks like a safetensors file'
    else:
        seems = lookalike(data)
    return f'not a PyTorch checkpoint: {seems}'


def _read_zip(data: mmap.mmap, where: str) -> Any:
    archive = Archive(data, where)
    with io.BytesIO(archive.read('data.pkl')) as stream:
        saved = Machine(f'{where} (data.pkl)', NAMES, Storages()).run(stream)
        if stream.read(1):
            raise CheckpointError(f'{where} (data.pkl): something follows the pickle')
    return _Builder(where, len(data), archive.find).value(saved)


def _read_legacy(data: mmap.mmap, where: str) -> Any:
    if Machine(where).run(data) != _LEGACY_MAGIC:
        raise CheckpointError(f'{where}: a pickle, but not one that torch.save wrote')
    protocol = Machine(f'{where} (protocol)').run(data)
    if protocol != _LEGACY_PROTOCOL:
        raise CheckpointError(f'{where}: its protocol is {shown(protocol)} and not {_LEGACY_PROTOCOL}')
    system = Machine(f'{where} (sys_info)').run(data)
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise CheckpointError(f'{where}: was not saved on a little-endian machine, so it cannot be read')
    storages = Storages()
    saved = Machine(where, NAMES, storages).run(data)
    keys = Machine(f'{where} (storage keys)').run(data)
    spans = _legacy_spans(data, where, keys, storages.by_key)

    def find(storage: Storage) -> memoryview:
        start, end = spans[storage.key]
        return memoryview(data)[start:end]

    return _Builder(where, len(data), find).value(saved)


def _legacy_spans(
    data: mmap.mmap, where: str, keys: Any, storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
    """Key -> (start, end) of each storage after the pickles, whose lengths must use up the file."""
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or sorted(keys) != sorted(storages):
        raise CheckpointError(f'{where}: damaged: its list of storages is not that of its tensors')
    spans = {}
    position = data.tell()
    for key in keys:
        storage = storages[key]
        length = int.from_bytes(data[position : position + 8], 'little', signed=True)
        start, end = position + 8, position + 8 + storage.numel * storage.dtype.itemsize
        if start > len(data) or length != storage.numel:
            raise CheckpointError(
                f'{where}: truncated or damaged: storage {shown(key)} is not {shown(storage.numel)} long'
            )
        spans[key] = (start, end)
        position = end
    if position != len(data):
        verb = 'is truncated' if position > len(data) else 'goes on after its last tensor'
        raise CheckpointError(f'{where}: {verb}: {len(data)} bytes instead of {shown(position)}')
    return spans


class _Builder:
    """Turns what the pickle built into plain Python values and arrays.

    Args:
      where: the file's name.
      size: its bytes.
      find: the bytes of a storage.
    """

    def __init__(self, where: str, size: int, find: Callable[[Storage], memoryview]) -> None:
        self._where = where
        self._bytes_left = _MAX_SHARING * size
        self._values_left = _MAX_VALUES
        self._find = find
        self._found: dict[str, memoryview] = {}

    def value(self, saved: Any, trail: tuple[Any, ...] = ()) -> Any:
        """`saved` with arrays in it; `trail` is the keys that lead to it."""
        # Copied as a tree, not as a graph: what contains itself, or shares parts so that it would
        # be endless when walked, ends here and not in the hands of the caller.
        self._values_left -= 1
        if len(trail) > _MAX_DEPTH or self._values_left < 0:
            raise CheckpointError(f'{self._where}: the saved object contains itself, or is absurdly large')
        if isinstance(saved, Tensor):
            return self._array(saved, trail)
        if isinstance(saved, dict):
            return {key: self.value(item, (*trail, key)) for key, item in saved.items()}
        if isinstance(saved, (list, tuple)):
            return type(saved)(self.value(item, (*trail, i)) for i, item in enumerate(saved))
        if isinstance(saved, NumpyArray) and saved.value is not None:
            return saved.value
        if saved is None or isinstance(saved, (str, int, float, bytes, set, frozenset, np.generic)):
            return saved
        raise self._refusal(trail, f'is a {type(saved).__name__}, which is neither a tensor nor plain data')

    def _refusal(self, trail: tuple[Any, ...], problem: str) -> CheckpointError:
        plain = (isinstance(key, str) and key.isprintable() and len(key) < 100 for key in trail)
        name = '.'.join(key if simple else shown(key) for key, simple in zip(trail, plain, strict=True))
        return CheckpointError(f'{self._where}: {name or "the saved object"} {problem}')

    def _array(self, tensor: Tensor, trail: tuple[Any, ...]) -> np.ndarray:
        shape, stride, itemsize = tensor.shape, tensor.stride, tensor.dtype.itemsize
        if len(shape) > 32 or len(stride) != len(shape):
            raise self._refusal(trail, f'has {len(shape)} dimensions and {len(stride)} strides')
        if not all(type(n) is int and 0 <= n < 2**48 for n in (tensor.offset, *shape, *stride)):
            raise self._refusal(
                trail,
                f'has shape {shown(shape)}, strides {shown(stride)} and offset {shown(tensor.offset)}: '
                'not all whole numbers from 0 on',
            )
        storage = tensor.storage
        available = storage.numel * storage.dtype.itemsize // itemsize
        numel = math.prod(shape)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if numel and last >= available:
            raise self._refusal(trail, f'reaches number {last} of a storage of {shown(available)}')
        if numel > available or (numel == 0 and math.prod(n or 1 for n in shape) >= 2**31):
            raise self._refusal(
                trail, f'has shape {shape} over a storage of {shown(available)} numbers: expanded, not stored'
            )
        self._bytes_left -= numel * itemsize
        if self._bytes_left < 0:
            raise self._refusal(
                trail, f'and those before it would fill {_MAX_SHARING} times the size of the file'
            )
        if storage.key not in self._found:
            self._found[storage.key] = self._find(storage)
        if numel == 0:
            empty = np.empty(shape, tensor.dtype)
            empty.flags.writeable = False
            return empty
        steps = [step * itemsize for step in stride]
        array = np.ndarray(shape, tensor.dtype, self._found[storage.key], tensor.offset * itemsize, steps)
        if array.dtype == np.bool_ and array.view(np.uint8).max() > 1:
            raise self._refusal(trail, 'is a tensor of bools, but holds bytes other than 0 and 1')
        return array

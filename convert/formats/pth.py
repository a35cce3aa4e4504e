"""Reads PyTorch checkpoint files without PyTorch, and without running anything they contain.

Two formats of `torch.save` are read: the zip archive of PyTorch 1.6 and later (`<name>/data.pkl`
beside one record per storage) and the stream before it (five pickles, then the storages one after
the other). The pickles go through `convert.formats.pickles`; the numbers stay where they are: every tensor
is a read-only view of the mapped file, checked to lie inside its storage, and every zip record is
checked against its CRC-32, which PyTorch itself does not do. The stream has no checksums: compare
the file with its published SHA-256.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxnets.errors import CheckpointError, shown
from flaxnets.store.files import lookalike, map_file

from .modules import MOST, is_module, module_state
from .pickles import Machine, Placeholder
from .pth_zip import Archive
from .torch_names import MAGIC, NAMES, NumpyArray, Storage, Storages, Tensor

_LEGACY_PROTOCOL = 1001

_MAX_DEPTH = 64
# Counted as a tree, shared values once for each use: ImageNet's list of images has 4 million.
_MAX_VALUES = 20_000_000
_MAX_NAMES = 50  # that are reported of one inert object
_MAX_LOOKS = 1_000_000  # values in all inert objects that are searched for names
_PLAIN = (str, int, float, complex, bytes, np.generic, type(None))
# Tensors may share a storage (a net saved twice, tied weights), but not multiply a file without end.
_MAX_SHARING = 16


@dataclass(frozen=True)
class Inert:
    """An object in a file that means nothing here: an optimizer, a loss, a date. Nothing of it was called.

    Attributes:
      names: the class or function that the file asks for to make it, and those inside it.
    """

    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.names[0]


def read_pth(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` put into a file, with NumPy arrays for tensors.

    Dictionaries, lists, tuples, sets, numbers, text and bytes come back as such; `OrderedDict`,
    `argparse.Namespace` and subclasses of `dict` as `dict`, a pickled module as the `dict` of its state,
    `torch.Size` as a tuple, `torch.device` and dtypes as text. Any other object is `Inert`.

    Args:
      path: a `.pth`, `.pt`, `.bin` or `.pth.tar` file that `torch.save` wrote, in either format; or a
        pickle of the same.

    Returns:
      The saved object. Arrays are read-only views of the file, which must not be changed in place
      while they are in use; those of the old format may be unaligned, which NumPy and JAX accept.
      Dictionaries and lists that the file shares are shared.

    Raises:
      CheckpointError: there is no such file; it is not a checkpoint, damaged or truncated; a tensor
        reaches outside its storage. The message names the file.
    """
    where = os.fsdecode(path)
    data = map_file(where)
    if data[:4] == b'PK\x03\x04':
        return _read_zip(data, where)
    if data[:1] == b'\x80':
        return _read_legacy(data, where)
    raise CheckpointError(f'{where}: {_lookalike(data)}')


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
    first = Machine(where, NAMES).run(data)
    if first != MAGIC:
        if data.tell() != len(data):
            raise CheckpointError(f'{where}: a pickle, but not one that torch.save wrote')
        return _Builder(where, len(data), _nowhere).value(first)
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


def _nowhere(storage: Storage) -> memoryview:
    raise CheckpointError('a pickle has no storages beside it')  # storages inside a pickle have their bytes


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
      size: the file's size in bytes.
      find: gives the bytes of a storage.
    """

    def __init__(self, where: str, size: int, find: Callable[[Storage], memoryview]) -> None:
        self._where = where
        self._bytes_left = _MAX_SHARING * size
        self._looks_left = _MAX_LOOKS
        self._layers_left = MOST
        self._find = find
        self._found: dict[str, memoryview] = {}
        # By the identity of what the pickle built: the value, and how many values it is as a tree.
        self._built: dict[int, tuple[Any, int]] = {}
        self._under_way: set[int] = set()

    def value(self, saved: Any) -> Any:
        """`saved` with arrays in place of tensors.

        Raises:
          CheckpointError: it is too large, or a tensor in it is not valid.
        """
        return self._value(saved, ())[0]

    def _value(self, saved: Any, trail: tuple[Any, ...]) -> tuple[Any, int]:
        """The value, and its size as a tree; `trail` is the keys that lead to it."""
        if isinstance(saved, _PLAIN):
            return saved, 1
        found = self._built.get(id(saved))
        if found is None:
            if id(saved) in self._under_way:
                return Inert(('an object that contains itself',)), 1
            if len(trail) > _MAX_DEPTH:
                return Inert(('an object that is nested too deep',)), 1
            self._under_way.add(id(saved))
            found = self._built_of(saved, trail)
            self._under_way.discard(id(saved))
            self._built[id(saved)] = found
        if found[1] > _MAX_VALUES:
            raise CheckpointError(f'{self._where}: the saved object is absurdly large')
        return found

    def _built_of(self, saved: Any, trail: tuple[Any, ...]) -> tuple[Any, int]:
        if isinstance(saved, Tensor):
            return self._array(saved, trail), 1
        if isinstance(saved, dict):
            return self._mapping(saved, trail, {})
        if isinstance(saved, (list, tuple)):
            values, sizes = self._items(saved, trail)
            return (values if isinstance(saved, list) else tuple(values)), sizes
        if isinstance(saved, (set, frozenset)):
            return saved, 1 + len(saved)
        if isinstance(saved, NumpyArray) and saved.value is not None:
            return self._converted(saved.value, saved.dtype, trail), 1
        if isinstance(saved, Placeholder):
            if is_module(saved):
                state = module_state(saved, lambda count: self._spend_layers(count, trail))
                for said in (state.attributes, state.statistics):
                    self._mapping(said, trail, said)
                return self._mapping(state, trail, state)
            if saved.items and saved.state is None:
                return self._mapping(saved.items, trail, {})
        return Inert(self._names_in(saved)), 1

    def _mapping(
        self, saved: dict[Any, Any], trail: tuple[Any, ...], out: dict[Any, Any]
    ) -> tuple[dict[Any, Any], int]:
        size = 1
        for key, item in list(saved.items()):
            out[key], inner = self._value(item, (*trail, key))
            size += inner
        return out, size

    def _items(self, saved: Sequence[Any], trail: tuple[Any, ...]) -> tuple[list[Any], int]:
        if all(isinstance(item, _PLAIN) for item in saved):
            return list(saved), 1 + len(saved)
        built = [self._value(item, (*trail, i)) for i, item in enumerate(saved)]
        return [value for value, _ in built], 1 + sum(size for _, size in built)

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
        # Dimensions of stride 0 repeat what is there: an expanded tensor.
        stored = math.prod(n for n, step in zip(shape, stride, strict=True) if step or not n)
        available = storage.numel * storage.dtype.itemsize // itemsize
        numel = math.prod(shape)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if numel and last >= available:
            raise self._refusal(trail, f'reaches number {last} of a storage of {shown(available)}')
        if stored > available or math.prod(n or 1 for n in shape) >= 2**48:
            raise self._refusal(
                trail, f'has shape {shape} over a storage of {shown(available)} numbers: overlapping'
            )
        self._spend_bytes(stored * itemsize, trail)
        if storage.key not in self._found:
            inside = storage.data
            self._found[storage.key] = self._find(storage) if inside is None else memoryview(inside)
        if numel == 0:
            empty = np.empty(shape, tensor.dtype)
            empty.flags.writeable = False
            return empty
        steps = [step * itemsize for step in stride]
        array = np.ndarray(shape, tensor.dtype, self._found[storage.key], tensor.offset * itemsize, steps)
        once = array[tuple(slice(None) if step else slice(1) for step in stride)]
        if array.dtype == np.bool_ and once.view(np.uint8).max() > 1:
            raise self._refusal(trail, 'is a tensor of bools, but holds bytes other than 0 and 1')
        return array

    def _converted(
        self, array: np.ndarray, dtype: np.dtype[Any] | None, trail: tuple[Any, ...]
    ) -> np.ndarray:
        if dtype is None or dtype == array.dtype:
            return array
        self._spend_bytes(array.size * dtype.itemsize, trail)
        return array.astype(dtype)

    def _spend_bytes(self, count: int, trail: tuple[Any, ...]) -> None:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise self._refusal(
                trail, f'and those before it would fill {_MAX_SHARING} times the size of the file'
            )

    def _spend_layers(self, count: int, trail: tuple[Any, ...]) -> None:
        self._layers_left -= count
        if self._layers_left < 0:
            raise self._refusal(
                trail,
                f'and the models before it have more than {MOST:,} layers and tensors, shared ones each time',
            )

    def _names_in(self, saved: object) -> tuple[str, ...]:
        """The names of an object that means nothing here, and of those inside it.

        In a file with many large ones, the search ends after `_MAX_LOOKS` values.
        """
        names: dict[str, None] = {}
        left, seen = [saved], {id(saved)}
        while left and len(names) < _MAX_NAMES:
            item = left.pop()
            if isinstance(item, Placeholder):
                names[item.name] = None
                inner: Iterable[Any] = item.parts()
            elif isinstance(item, dict):
                inner = itertools.chain(item, item.values())
            else:
                inner = item if isinstance(item, (list, tuple)) else ()
            for part in itertools.islice(inner, self._looks_left):
                self._looks_left -= 1
                if not isinstance(part, _PLAIN) and id(part) not in seen:
                    seen.add(id(part))
                    left.append(part)
        if not names:
            name = getattr(saved, 'name', None)
            return (name if isinstance(name, str) else f'a {type(saved).__name__.lstrip("_")}',)
        return tuple(names)

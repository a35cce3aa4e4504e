"""Reads and writes safetensors files without the `safetensors` package.

A file has three parts: the length of its header (8 bytes, little-endian); the header, JSON that gives the
dtype, shape and byte range of each tensor by name, and texts under `__metadata__`; and the tensors, one after
the other without a gap. The format has no checksum: compare the file with its published SHA-256.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError, shown
from ..words import some
from .digest import Description, prepared
from .files import lookalike, map_file, written_whole

# In the order in which the safetensors package writes tensors, so that all of them are aligned.
DTYPES: dict[str, np.dtype[Any]] = {
    'I64': np.dtype('<i8'),
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'I32': np.dtype('<i4'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F16': np.dtype('<f2'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_METADATA = '__metadata__'

_MAX_HEADER = 100_000_000  # the safetensors package's own limit
# A net here has at most 2,447 tensors; each takes some eight commas.
_MAX_TENSORS = 50_000
_MAX_COMMAS = 1_000_000


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header describes it; `begin` and `end` count bytes after the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Args:
      path: the file.

    Returns:
      Name -> array, in the header's order, and the texts under `__metadata__`. Arrays are read-only
      views of the file, which must not be changed in place while they are in use.

    Raises:
      CheckpointError: there is no such file; it is not a safetensors file, or is damaged or truncated; its
        tensors overlap or leave bytes unused; a dtype is not in `DTYPES`. The message names the file, and
        the tensor if one is at fault.
    """
    where = os.fsdecode(path)
    data = map_file(path)
    start, header = _read_header(data, where)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f'{where}: damaged: its {_METADATA} is not a table of texts')
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f'{where}: has {len(header):,} tensors, far beyond any net')
    entries = [_entry(where, name, described) for name, described in header.items()]
    _check_spans(where, entries, len(data) - start)
    return {entry.name: _view(where, data, start, entry) for entry in entries}, metadata


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> dict[str, Description]:
    """Writes a safetensors file, whole or not at all, with the same bytes as the safetensors package.

    Args:
      path: the file to write, usually `.safetensors`. An existing file stays as it is until the new one is
        complete and on the disk.
      tensors: name -> array of NumPy or JAX, in any memory layout and byte order. Only a few are copied at a
        time.
      metadata: texts for `__metadata__`. transformers needs a 'format', which says whose names and layouts
        the tensors have: 'pt' or 'flax'.

    Returns:
      The description of each tensor (`flaxnets.store.digest.describe`), in the order of `tensors`.

    Raises:
      CheckpointError: a name, dtype or metadata that the format cannot hold, all of them named.
      FlaxnetsError: the file cannot be written (no such directory, no space left).
    """
    metadata = metadata or {}
    check_tensors(os.fsdecode(path), tensors, metadata)
    with written_whole(path) as file:
        return write_into(file, tensors, metadata)


def write_into(
    file: IO[bytes], tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, Description]:
    """`write_safetensors` into an open file. The caller makes sure that the file is written whole.

    Raises:
      OSError: it cannot be written.
    """
    order = list(DTYPES)
    ordered = sorted(tensors, key=lambda name: (order.index(_CODES[tensors[name].dtype.name]), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in ordered:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            'dtype': _CODES[tensors[name].dtype.name],
            'shape': list(tensors[name].shape),
            'data_offsets': [begin, end],
        }
    encoded = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
    encoded += b' ' * (-len(encoded) % 8)
    described: dict[str, Description] = {}
    file.write(len(encoded).to_bytes(8, 'little') + encoded)
    for name, (array, description) in zip(ordered, prepared(tensors[n] for n in ordered), strict=True):
        file.write(array.reshape(-1).view(np.uint8).data)
        described[name] = description
    return {name: described[name] for name in tensors}


def _read_header(data: mmap.mmap, where: str) -> tuple[int, dict[str, Any]]:
    """Where the tensors start, and the header. It is checked only to be a JSON object of plausible size."""
    length = int.from_bytes(data[:8], 'little')
    start = 8 + length
    if len(data) < 8 or length > _MAX_HEADER or data[8:9] not in (b'{', b''):
        raise CheckpointError(f'{where}: {_lookalike(data)}')
    if start > len(data):
        raise CheckpointError(f'{where}: truncated: its header alone has {length:,} bytes')
    raw = data[8:start]
    # Counted before parsing, since a hostile header could take gigabytes as Python objects.
    if raw.count(b',') > _MAX_COMMAS:
        raise CheckpointError(f'{where}: its header describes far more than any net has')
    try:
        header: dict[str, Any] = json.loads(raw.decode(), object_pairs_hook=_unique)  # it begins with {
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{where}: damaged: its header is not JSON as it should be ({error})'
        ) from error
    return start, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'{shown(twice)} is there twice')
    return table


def _lookalike(data: mmap.mmap) -> str:
    if data[:4] == b'PK\x03\x04' or data[:1] == b'\x80':
        seems = 'it looks like a PyTorch checkpoint: give it the ending .pth'
    else:
        seems = lookalike(data)
    return f'not a safetensors file: {seems}'


def _entry(where: str, name: str, described: Any) -> _Entry:
    match described:
        case {'dtype': str() as code, 'shape': list() as shape, 'data_offsets': [begin, end], **rest} if (
            not rest
        ):
            pass
        case _:
            raise CheckpointError(
                f'{where}: damaged: {shown(name)} is not described by dtype, shape and data_offsets'
            )
    if code not in DTYPES:
        raise CheckpointError(
            f'{where}: {shown(name)} has the dtype {shown(code)}; '
            f'those that can be read are {", ".join(DTYPES)}'
        )
    dtype = DTYPES[code]
    numbers = (begin, end, *shape)
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise CheckpointError(
            f'{where}: damaged: {shown(name)} has shape {shown(shape)} and data_offsets '
            f'{shown([begin, end])}: not all whole numbers from 0 on'
        )
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin or math.prod(n or 1 for n in shape) >= 2**59:
        raise CheckpointError(
            f'{where}: damaged: {shown(name)} of dtype {code} and shape {shown(shape)} takes {shown(needed)} '
            f'bytes, its data_offsets {shown([begin, end])} hold {end - begin}'
        )
    return _Entry(name, dtype, tuple(shape), begin, end)


def _check_spans(where: str, entries: Iterable[_Entry], size: int) -> None:
    """Checks that every byte after the header belongs to exactly one tensor."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            problem = 'overlaps the tensor before it' if entry.begin < position else 'leaves a gap before it'
            raise CheckpointError(f'{where}: damaged: {shown(entry.name)} {problem} (byte {entry.begin})')
        position = entry.end
    if position != size:
        problem = 'truncated' if position > size else 'damaged: it goes on after its last tensor'
        raise CheckpointError(f'{where}: {problem}: {size} bytes of tensors instead of {position}')


def _view(where: str, data: mmap.mmap, start: int, entry: _Entry) -> np.ndarray:
    if entry.begin == entry.end:
        array: np.ndarray = np.empty(entry.shape, entry.dtype)
        array.flags.writeable = False
        return array
    array = np.ndarray(entry.shape, entry.dtype, data, start + entry.begin)
    if array.dtype == np.bool_ and array.view(np.uint8).max() > 1:
        raise CheckpointError(
            f'{where}: damaged: {shown(entry.name)} is of bools, but holds bytes other than 0 and 1'
        )
    return array


def check_tensors(where: str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Checks that the format can hold tensors and metadata.

    Raises:
      CheckpointError: it cannot; the message has every such name, dtype and text.
    """
    wrong = unfit(tensors, _CODES, lambda name: _is_text(name) and name != _METADATA)
    wrong += [
        f'metadata {shown(key)}' for key in metadata if not _is_text(key) or not _is_text(metadata[key])
    ]
    if wrong:
        raise CheckpointError(
            f'{where}: cannot be written, since a safetensors file needs named arrays of '
            f'{", ".join(_CODES)}, and metadata of texts, not {some(wrong)}'
        )


def unfit(
    tensors: Mapping[Any, Any], dtypes: Collection[str], is_name: Callable[[object], bool]
) -> list[str]:
    """Those of named arrays that a format cannot hold, in words.

    Args:
      tensors: name -> array.
      dtypes: names of the dtypes that it has.
      is_name: whether it can have a tensor of this name.
    """
    return [
        f'{shown(name)} ({type(tensor).__name__}, {getattr(tensor, "dtype", "no dtype")})'
        for name, tensor in tensors.items()
        if not is_name(name) or not hasattr(tensor, 'dtype') or tensor.dtype.name not in dtypes
    ]


def _is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can hold."""
    return isinstance(value, str) and not any('\ud800' <= character <= '\udfff' for character in value)

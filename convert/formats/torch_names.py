"""The names in the pickle of a PyTorch checkpoint that mean something here, and what is made of them.

`NAMES` is the whole list: tensors and parameters, the storages they lie in, dtypes and devices,
dictionaries and lists, the arguments that timm keeps beside its weights, and NumPy's numbers and
arrays, in which trainers keep their metrics. Every function below builds plain data. Any other name
becomes a `Placeholder` (`convert.formats.pickles`).
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from flaxnets.errors import shown

from .pickles import Class, Function, Machine, Placeholder, Stateful, Unfit

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    'DoubleStorage': np.dtype('<f8'),
    'FloatStorage': np.dtype('<f4'),
    'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'),
    'CharStorage': np.dtype('i1'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
}
# Only their sizes matter: no tensor of weights lies in one.
_OTHER_STORAGES: dict[str, np.dtype[Any]] = {
    'ComplexFloatStorage': np.dtype('<c8'),
    'ComplexDoubleStorage': np.dtype('<c16'),
    'QInt8Storage': np.dtype('i1'),
    'QInt32Storage': np.dtype('<i4'),
    'QUInt8Storage': np.dtype('u1'),
    'QUInt4x2Storage': np.dtype('u1'),
    'QUInt2x4Storage': np.dtype('u1'),
    'UntypedStorage': np.dtype('u1'),
}
_FLOAT8 = ('float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'float8_e8m0fnu')
_TORCH_DTYPES = {f'torch.{dtype.name}': dtype for dtype in STORAGE_DTYPES.values()}
_TORCH_DTYPES |= {f'torch.uint{bits}': np.dtype(f'<u{bits // 8}') for bits in (16, 32, 64)}
_TORCH_DTYPES |= {'torch.complex64': np.dtype('<c8'), 'torch.complex128': np.dtype('<c16')}
_TORCH_DTYPES |= {f'torch.{name}': np.dtype(getattr(ml_dtypes, name)) for name in _FLOAT8}
_NUMPY_CODES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8', 'c8', 'c16')
MAGIC = 0x1950A86A20F9469CFC6C  # the first number of a file of torch.save before 1.6
_STORAGES_INSIDE = itertools.count()  # gives each storage whose bytes are in a pickle a key of its own
_DEVICES = ('cpu', 'cuda', 'hip', 'hpu', 'meta', 'mps', 'npu', 'xla', 'xpu')


@dataclass(frozen=True)
class Storage:
    """Numbers outside the pickle, in which tensors lie.

    Attributes:
      key: under which the file has them.
      dtype: of the numbers.
      numel: how many there are.
      data: their bytes, in a pickle that `torch.save` did not write; else None.
    """

    key: str
    dtype: np.dtype[Any]
    numel: int
    data: memoryview | None = None


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage as the file describes it; nothing about it has been checked.

    Attributes:
      storage: where its numbers lie.
      dtype: of its numbers; the storage's own dtype unless that is untyped bytes.
      offset, stride: in elements of `dtype`.
      shape: its sides.
    """

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


class NumpyArray(Stateful):
    """An array that NumPy itself pickled, made empty and filled afterwards.

    Attributes:
      value: the array; None until it is filled, or if it is not one of numbers.
      dtype: the dtype that its numbers are to be converted to; None leaves them as they are.
    """

    def __init__(self, value: np.ndarray | None = None, dtype: np.dtype[Any] | None = None) -> None:
        self.value = value
        self.dtype = dtype

    def set_state(self, machine: Machine, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _NumpyDtype(dtype=dtype), fortran, data):
                if dtype is not None and isinstance(data, bytes):
                    self.value = _array_of(machine, data, dtype, shape, bool(fortran))
            case _:
                raise machine.damage('a NumPy array is not made the way NumPy makes it')


class _NumpyDtype(Stateful):
    """A pickled dtype of NumPy; `dtype` is None unless it is one of plain numbers."""

    def __init__(self, dtype: np.dtype[Any] | None) -> None:
        self.dtype = dtype

    def set_state(self, machine: Machine, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if self.dtype is not None and order == '>':
            self.dtype = self.dtype.newbyteorder('>')
        elif order not in ('<', '|', '='):
            self.dtype = None


class _OrderedDict(dict[Any, Any], Stateful):
    """`collections.OrderedDict`; its attributes (a state dict's `_metadata`) are left out."""

    def set_state(self, machine: Machine, state: object) -> None:
        if not isinstance(state, dict):
            raise machine.damage('an OrderedDict is not made the way Python makes it')


class _Record(dict[Any, Any], Stateful):
    """An object of which only the attributes count, as a dictionary."""

    def set_state(self, machine: Machine, state: object) -> None:
        if not isinstance(state, dict):
            raise machine.damage('the attributes of an object are no dictionary')
        machine.spend(len(state))
        self.update(state)


@dataclass(frozen=True)
class _StorageType:
    """A class of storages: 'FloatStorage' and its dtype."""

    name: str
    dtype: np.dtype[Any]


class Storages:
    """Makes a `Storage` of each persistent id of a checkpoint, and keeps them in `by_key`."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def __call__(self, machine: Machine, identity: object) -> object:
        match identity:
            case ('storage', _StorageType() as kind, str() as key, str(), int() as numel, *view) if (
                numel >= 0
            ):
                pass
            case ('module', Class() | Function() | Placeholder() as kind, *_):
                return kind  # before 1.6 the source code of a module's class followed
            case _:
                raise machine.damage(f'it refers to {shown(identity)} instead of a storage')
        if any(part is not None for part in view):
            raise machine.refusal(
                'holds storages that are parts of others (PyTorch before 0.4): save it anew'
            )
        storage = Storage(key, kind.dtype, numel)
        if self.by_key.setdefault(key, storage) != storage:
            raise machine.damage(f'storage {shown(key)} is described in two ways')
        return storage


def _tensor(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    """What _rebuild_tensor makes, its _v2 (+ requires_grad, hooks, metadata) and _v3 (+ a dtype)."""
    match arguments:
        case (Storage(dtype=dtype) as storage, int() as offset, tuple() as shape, tuple() as stride, *more):
            pass
        case (Placeholder(), *_):
            raise Unfit
        case _:
            raise machine.damage('a tensor is not made the way PyTorch makes it')
    for extra in more[2:]:
        if isinstance(extra, str) and extra in _TORCH_DTYPES:
            dtype = _TORCH_DTYPES[extra]
        elif extra:
            raise Unfit  # a dtype that NumPy has not, or numbers to be conjugated or negated when read
    return Tensor(storage, dtype, offset, shape, stride)


def _same_tensor(machine: Machine, arguments: tuple[Any, ...]) -> Tensor | NumpyArray:
    """The tensor that a parameter, or the same tensor on another device, is made of."""
    match arguments:
        case (Tensor() | NumpyArray() as tensor, *_):
            return tensor
    raise Unfit


def _tensor_with_attributes(machine: Machine, arguments: tuple[Any, ...]) -> object:
    """A tensor with attributes, or of a class of its own: only its numbers are kept."""
    match arguments:
        case (Function(build=build), Class() | Placeholder(), tuple() as inner, *_) if build in _TENSORS:
            return build(machine, inner)
    raise Unfit


def _tensor_of_numpy(machine: Machine, arguments: tuple[Any, ...]) -> NumpyArray:
    """A tensor of a device without storages (XLA): an array and the tensor's dtype.

    PyTorch writes an array of that dtype. NumPy has no bfloat16, for which it writes float32.
    """
    match arguments:
        case (NumpyArray(value=np.ndarray() as array), str() as name, *_) if name in _TORCH_DTYPES:
            dtype = _TORCH_DTYPES[name]
            if array.dtype == dtype or (array.dtype, name) == (np.float32, 'torch.bfloat16'):
                return NumpyArray(array, dtype)
    raise Unfit


def _storage_of_bytes(machine: Machine, arguments: tuple[Any, ...]) -> Storage:
    """A storage as `pickle.dump` writes it: bytes that are a whole file of torch.save's old format."""
    match arguments:
        case (bytes() as data,):
            pass
        case _:
            raise Unfit
    machine.spend(len(data) // 64)
    where, stream, storages = f'{machine.where} (storage)', io.BytesIO(data), Storages()
    if Machine(where, outer=machine).run(stream) != MAGIC:
        raise Unfit
    for _ in ('protocol', 'system'):
        Machine(where, outer=machine).run(stream)
    storage = Machine(where, _STORAGE_TYPES, storages, outer=machine).run(stream)
    keys = Machine(where, outer=machine).run(stream)
    if not isinstance(storage, Storage) or keys != [storage.key]:
        raise Unfit
    start = stream.tell() + 8
    if len(data) - start != storage.numel * storage.dtype.itemsize:
        raise machine.damage(f'a storage of {shown(storage.numel)} numbers has {len(data) - start} bytes')
    key = f'in the pickle, {next(_STORAGES_INSIDE)}'
    return Storage(key, storage.dtype, storage.numel, memoryview(data)[start:])


def _mapping(machine: Machine, arguments: tuple[Any, ...]) -> _Record:
    """An object made empty, whose items and attributes follow: a defaultdict, a SimpleNamespace."""
    return _Record()


def _ordered_dict(machine: Machine, arguments: tuple[Any, ...]) -> _OrderedDict:
    """OrderedDict() or, from Python 2, OrderedDict([[key, value], ...]); Counter({key: count})."""
    match arguments:
        case ():
            return _OrderedDict()
        case (dict() as counts,):
            machine.spend(len(counts))
            return _OrderedDict(counts)
        case (list() as pairs,):
            machine.spend(len(pairs))
            if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                machine.checked_keys([key for key, _ in pairs])
                return _OrderedDict(pairs)
    raise Unfit


def _set(machine: Machine, arguments: tuple[Any, ...]) -> set[Any]:
    match arguments:
        case (list() as items,):
            machine.spend(len(items))
            return set(machine.checked_keys(items))
    raise Unfit


def _frozenset(machine: Machine, arguments: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_set(machine, arguments))


def _list(machine: Machine, arguments: tuple[Any, ...]) -> list[Any]:
    """list() and deque(items, longest)."""
    match arguments:
        case () | ((), *_) | ([], *_):
            return []
        case (list() | tuple() as items, *_):
            machine.spend(len(items))
            return list(items)
    raise Unfit


def _complex(machine: Machine, arguments: tuple[Any, ...]) -> complex:
    match arguments:
        case (int() | float() as real, int() | float() as imaginary):
            return complex(real, imaginary)
    raise Unfit


def _path(machine: Machine, arguments: tuple[Any, ...]) -> str:
    if not all(isinstance(part, str) for part in arguments):
        raise Unfit
    machine.spend(sum(map(len, arguments)) // 64)
    return '/'.join(arguments).replace('//', '/')


def _encode(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: how pickles of protocol 2 hold bytes."""
    match arguments:
        case (str() as text, 'latin1' | 'latin-1'):
            machine.spend(len(text) // 64)
            try:
                return text.encode('latin-1')
            except UnicodeEncodeError as error:
                raise machine.damage('bytes are not made the way Python makes them') from error
    raise Unfit


def _bytes(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """bytes() and bytearray()."""
    match arguments:
        case ():
            return b''
        case (bytes() as data,):
            return data
    return _encode(machine, arguments)


def _size(machine: Machine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple() as shape,):
            return shape
    raise Unfit


def _device(machine: Machine, arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str() as kind,) if kind in _DEVICES:
            return kind
        case (str() as kind, int() as index) if kind in _DEVICES:
            return f'{kind}:{index}'
    raise Unfit


def _numpy_dtype(machine: Machine, arguments: tuple[Any, ...]) -> _NumpyDtype:
    match arguments:
        case (str() as code, *_):
            return _NumpyDtype(np.dtype(f'<{code}') if code in _NUMPY_CODES else None)
    raise Unfit


def _numpy_scalar(machine: Machine, arguments: tuple[Any, ...]) -> np.generic:
    match arguments:
        case (_NumpyDtype(dtype=np.dtype() as dtype), str() | bytes() as data) if len(data) == dtype.itemsize:
            # Bytes that happen to be ASCII arrive as text from Python 2.
            raw = data.encode() if isinstance(data, str) else data
            if len(raw) == dtype.itemsize and (dtype.kind != 'b' or raw in (b'\0', b'\1')):
                return cast(np.generic, np.frombuffer(raw, dtype)[0])
    raise Unfit


def _numpy_array(machine: Machine, arguments: tuple[Any, ...]) -> NumpyArray:
    match arguments:
        case (Class(name='numpy.ndarray'), (0,), _):
            return NumpyArray()
    raise Unfit


def _numpy_array_of_bytes(machine: Machine, arguments: tuple[Any, ...]) -> NumpyArray:
    """`numpy._core.numeric._frombuffer`: how pickles of protocol 5 hold an array."""
    match arguments:
        case (bytes() as data, _NumpyDtype(dtype=np.dtype() as dtype), tuple() as shape, 'C' | 'F' as order):
            return NumpyArray(_array_of(machine, data, dtype, shape, order == 'F'))
    raise Unfit


def _array_of(
    machine: Machine, data: bytes, dtype: np.dtype[Any], shape: tuple[Any, ...], fortran: bool
) -> np.ndarray:
    sound = len(shape) <= 32 and all(type(n) is int and 0 <= n <= len(data) for n in shape)
    if not sound or math.prod(shape) * dtype.itemsize != len(data):
        raise machine.refusal(f'a NumPy array of shape {shown(shape)} has {len(data)} bytes of {dtype}')
    return np.frombuffer(data, dtype).reshape(shape, order='F' if fortran else 'C')


_TENSORS = (_tensor, _same_tensor)


def _storage_types() -> dict[str, object]:
    storages: dict[str, np.dtype[Any]] = {**STORAGE_DTYPES, **_OTHER_STORAGES}
    return {
        f'{module}.{name}': _StorageType(name, dtype)
        for module in ('torch', 'torch.cuda', 'torch.storage')
        for name, dtype in storages.items()
    }


def _names() -> dict[str, object]:
    numpy = {'scalar': _numpy_scalar, '_reconstruct': _numpy_array}
    functions: dict[str, Callable[[Machine, tuple[Any, ...]], object]] = {
        'collections.OrderedDict': _ordered_dict,
        'collections.Counter': _ordered_dict,
        'collections.defaultdict': _mapping,
        'collections.deque': _list,
        'types.SimpleNamespace': _mapping,
        'torch._utils._rebuild_tensor': _tensor,
        'torch._utils._rebuild_tensor_v2': _tensor,
        'torch._utils._rebuild_tensor_v3': _tensor,
        'torch._utils._rebuild_parameter': _same_tensor,
        'torch._utils._rebuild_parameter_with_state': _same_tensor,
        'torch._utils._rebuild_device_tensor_from_numpy': _tensor_of_numpy,
        'torch._utils._rebuild_xla_tensor': _tensor_of_numpy,
        'torch._utils._rebuild_device_tensor_from_cpu_tensor': _same_tensor,
        'torch._tensor._rebuild_from_type_v2': _tensor_with_attributes,
        'torch._tensor._rebuild_from_type': _tensor_with_attributes,
        'fastai.torch_core._rebuild_from_type': _tensor_with_attributes,
        'torch.storage._load_from_bytes': _storage_of_bytes,
        'torch.Size': _size,
        'torch.device': _device,
        '_codecs.encode': _encode,
        **{f'numpy.core.multiarray.{name}': build for name, build in numpy.items()},
        **{f'numpy._core.multiarray.{name}': build for name, build in numpy.items()},
        'numpy.core.numeric._frombuffer': _numpy_array_of_bytes,
        'numpy._core.numeric._frombuffer': _numpy_array_of_bytes,
        'numpy.dtype': _numpy_dtype,
    }
    builtins = {
        'set': _set,
        'frozenset': _frozenset,
        'list': _list,
        'complex': _complex,
        'bytes': _bytes,
        'bytearray': _bytes,
    }
    for module in ('pathlib', 'pathlib._local'):  # the second in Python 3.13
        functions |= {f'{module}.{name}': _path for name in ('PosixPath', 'PurePosixPath')}
    for module in ('builtins', '__builtin__'):
        functions |= {f'{module}.{name}': build for name, build in builtins.items()}
    names: dict[str, object] = {name: Function(name, build) for name, build in functions.items()}
    names |= {name: Class(name) for name in ('torch.Tensor', 'numpy.ndarray')}
    for name in (
        'argparse.Namespace',
        'mmengine.logging.history_buffer.HistoryBuffer',
        'timm.models._pretrained.PretrainedCfg',
    ):
        names[name] = Class(name, make=_Record)
    names |= {name: name for name in _TORCH_DTYPES}
    return names | _STORAGE_TYPES


_STORAGE_TYPES = _storage_types()
NAMES = _names()

"""Everything that the pickle of a PyTorch checkpoint may name, and what each name stands for here.

`NAMES` is the whole list: tensors and parameters, the storages they lie in, dtypes and devices,
ordered dictionaries, the arguments that timm keeps beside its weights, and NumPy's numbers and
arrays, in which trainers keep their metrics. Every function below builds plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ml_dtypes
import numpy as np

from convert.pickles import Class, Function, Machine, Stateful
from flaxnets.errors import CheckpointError, shown

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
_UNREADABLE_STORAGES = (
    'ComplexFloatStorage',
    'ComplexDoubleStorage',
    'QInt8Storage',
    'QInt32Storage',
    'QUInt8Storage',
    'QUInt4x2Storage',
    'QUInt2x4Storage',
)
_TORCH_DTYPES = {f'torch.{dtype.name}': dtype for dtype in STORAGE_DTYPES.values()}
_TORCH_DTYPES |= {f'torch.uint{bits}': np.dtype(f'<u{bits // 8}') for bits in (16, 32, 64)}
_NUMPY_CODES = ('i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
_DEVICES = ('cpu', 'cuda', 'hip', 'hpu', 'meta', 'mps', 'npu', 'xla', 'xpu')


@dataclass(frozen=True)
class Storage:
    """Numbers kept outside the pickle: `numel` elements of `dtype`, found in the file under `key`."""

    key: str
    dtype: np.dtype[Any]
    numel: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage as the file describes it; nothing about it has been checked.

    `offset` and `stride` count elements of `dtype`, which differs from the storage's own only where
    the storage is untyped bytes.
    """

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]


class NumpyArray(Stateful):
    """An array pickled by NumPy itself, made empty and filled afterwards."""

    value: np.ndarray | None = None

    def set_state(self, machine: Machine, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _NumpyDtype(dtype=dtype), fortran, bytes() as data):
                pass
            case _:
                raise _bad_arguments(machine, 'a NumPy array')
        sound = len(shape) <= 32 and all(type(n) is int and 0 <= n <= len(data) for n in shape)
        if not sound or math.prod(shape) * dtype.itemsize != len(data):
            raise machine.refusal(f'a NumPy array of shape {shown(shape)} has {len(data)} bytes of {dtype}')
        self.value = np.frombuffer(data, dtype).reshape(shape, order='F' if fortran else 'C')


@dataclass(frozen=True)
class _NumpyDtype(Stateful):
    dtype: np.dtype[Any]

    def set_state(self, machine: Machine, state: object) -> None:
        match state:
            case (int(), '<' | '|' | '=', *_):
                pass
            case _:
                raise machine.refusal(f'holds NumPy values of an unusual type: {shown(state)}')


class _OrderedDict(dict[Any, Any], Stateful):
    """`collections.OrderedDict`; its attributes (a state dict's `_metadata`) are left out."""

    def set_state(self, machine: Machine, state: object) -> None:
        if not isinstance(state, dict):
            raise _bad_arguments(machine, 'OrderedDict')


class _Record(dict[Any, Any], Stateful):
    """An object that is nothing but its attributes."""

    def set_state(self, machine: Machine, state: object) -> None:
        if not isinstance(state, dict):
            raise _bad_arguments(machine, 'an object')
        machine.spend(len(state))
        self.update(state)


@dataclass(frozen=True)
class _StorageType:
    name: str
    dtype: np.dtype[Any] | None


class Storages:
    """Turns a checkpoint's persistent ids into `Storage`s, and keeps them in `by_key`."""

    def __init__(self) -> None:
        self.by_key: dict[str, Storage] = {}

    def __call__(self, machine: Machine, identity: object) -> Storage:
        match identity:
            case ('storage', _StorageType() as kind, str() as key, str(), int() as numel, *view) if (
                numel >= 0
            ):
                pass
            case ('module', *_):
                raise machine.refusal('holds a whole model: load it in PyTorch and save model.state_dict()')
            case _:
                raise machine.damage(f'it refers to {shown(identity)} instead of a storage')
        if any(part is not None for part in view):
            raise machine.refusal(
                'holds storages that are parts of others (PyTorch before 0.4): save it anew'
            )
        if kind.dtype is None:
            readable = ', '.join(dtype.name for dtype in STORAGE_DTYPES.values())
            raise machine.refusal(f'holds tensors in a {kind.name}; those that can be read are {readable}')
        storage = Storage(key, kind.dtype, numel)
        if self.by_key.setdefault(key, storage) != storage:
            raise machine.damage(f'storage {shown(key)} is described in two ways')
        return storage


def _bad_arguments(machine: Machine, what: str) -> CheckpointError:
    return machine.damage(f'{what} is not made the way PyTorch and NumPy make it')


def _tensor(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor, its _v2 (+ requires_grad, hooks, metadata) and _v3 (the same with a dtype)."""
    match arguments:
        case (Storage(dtype=dtype) as storage, int() as offset, tuple() as shape, tuple() as stride, *more):
            pass
        case _:
            raise _bad_arguments(machine, 'a tensor')
    for extra in more[2:]:
        if isinstance(extra, str) and extra in _TORCH_DTYPES:
            dtype = _TORCH_DTYPES[extra]
        elif extra:
            raise machine.refusal(
                f'holds a tensor marked {shown(extra)}: save tensor.resolve_neg().resolve_conj() instead'
            )
    return Tensor(storage, dtype, offset, shape, stride)


def _parameter(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Tensor() as tensor, *_):
            return tensor
    raise _bad_arguments(machine, 'a parameter')


def _tensor_with_attributes(machine: Machine, arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Function(build=build), Class(name='torch.Tensor'), tuple() as inner, _) if build is _tensor:
            return _tensor(machine, inner)
    raise _bad_arguments(machine, 'a tensor with attributes')


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
    raise _bad_arguments(machine, 'OrderedDict')


def _set(machine: Machine, arguments: tuple[Any, ...]) -> set[Any]:
    match arguments:
        case (list() as items,):
            machine.spend(len(items))
            return set(machine.checked_keys(items))
    raise _bad_arguments(machine, 'a set')


def _encode(machine: Machine, arguments: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: how pickles of protocol 2 hold bytes."""
    match arguments:
        case (str() as text, 'latin1'):
            machine.spend(len(text) // 64)
            try:
                return text.encode('latin-1')
            except UnicodeEncodeError as error:
                raise _bad_arguments(machine, 'a bytes object') from error
    raise _bad_arguments(machine, 'a bytes object')


def _size(machine: Machine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple() as shape,):
            return shape
    raise _bad_arguments(machine, 'torch.Size')


def _device(machine: Machine, arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str() as kind,) if kind in _DEVICES:
            return kind
        case (str() as kind, int() as index) if kind in _DEVICES:
            return f'{kind}:{index}'
    raise _bad_arguments(machine, 'torch.device')


def _numpy_dtype(machine: Machine, arguments: tuple[Any, ...]) -> _NumpyDtype:
    match arguments:
        case (str() as code, *_) if code in _NUMPY_CODES:
            return _NumpyDtype(np.dtype(f'<{code}'))
    raise machine.refusal(f'holds NumPy values that are not numbers: {shown(arguments)}')


def _numpy_scalar(machine: Machine, arguments: tuple[Any, ...]) -> np.generic:
    match arguments:
        case (_NumpyDtype(dtype=dtype), str() | bytes() as data) if len(data) == dtype.itemsize:
            # Bytes that happen to be ASCII arrive as text from Python 2.
            raw = data.encode() if isinstance(data, str) else data
            if len(raw) == dtype.itemsize:
                return cast(np.generic, np.frombuffer(raw, dtype)[0])
    raise _bad_arguments(machine, 'a NumPy number')


def _numpy_array(machine: Machine, arguments: tuple[Any, ...]) -> NumpyArray:
    match arguments:
        case (Class(name='numpy.ndarray'), (0,), _):
            return NumpyArray()
    raise _bad_arguments(machine, 'a NumPy array')


def _names() -> dict[str, object]:
    functions: dict[str, Callable[[Machine, tuple[Any, ...]], object]] = {
        'collections.OrderedDict': _ordered_dict,
        'collections.Counter': _ordered_dict,
        'torch._utils._rebuild_tensor': _tensor,
        'torch._utils._rebuild_tensor_v2': _tensor,
        'torch._utils._rebuild_tensor_v3': _tensor,
        'torch._utils._rebuild_parameter': _parameter,
        'torch._utils._rebuild_parameter_with_state': _parameter,
        'torch._tensor._rebuild_from_type_v2': _tensor_with_attributes,
        'torch.Size': _size,
        'torch.device': _device,
        '_codecs.encode': _encode,
        'builtins.set': _set,
        '__builtin__.set': _set,
        'numpy.dtype': _numpy_dtype,
        'numpy.core.multiarray.scalar': _numpy_scalar,
        'numpy._core.multiarray.scalar': _numpy_scalar,
        'numpy.core.multiarray._reconstruct': _numpy_array,
        'numpy._core.multiarray._reconstruct': _numpy_array,
    }
    names: dict[str, object] = {name: Function(build) for name, build in functions.items()}
    names |= {name: Class(name) for name in ('torch.Tensor', 'numpy.ndarray')}
    for name in ('argparse.Namespace', 'mmengine.logging.history_buffer.HistoryBuffer'):
        names[name] = Class(name, make=_Record)
    names |= {name: name for name in _TORCH_DTYPES}
    storages = {**STORAGE_DTYPES, 'UntypedStorage': np.dtype('u1'), **dict.fromkeys(_UNREADABLE_STORAGES)}
    for module in ('torch', 'torch.cuda', 'torch.storage'):
        names |= {f'{module}.{name}': _StorageType(name, dtype) for name, dtype in storages.items()}
    return names


NAMES = _names()

"""Hostile pickles: nothing they ask for is called, and every way to be wrong is one error."""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pth_files as pf
import pytest

from convert.formats.pth import Inert, read_pth
from convert.names.layouts import to_canonical
from flaxnets.errors import CheckpointError

# Every one of these makes the directory `canary` when Python's own unpickler reads it.


def make(canary: str) -> bytes:
    return pf.call('os', 'mkdir', pf.text(canary))


def python(canary: str) -> bytes:
    return pf.text(f'__import__("os").mkdir({canary!r})')


def trap(canary: str = '') -> bytes:
    return pf.name('pth_files', 'Trap') + pf.EMPTY_TUPLE + pf.NEWOBJ


def extension(opcode: bytes) -> Callable[[str], bytes]:
    return lambda canary: opcode + pf.MARK + pf.text(canary) + pf.TUPLE + pf.REDUCE


PAYLOADS: dict[str, Callable[[str], bytes]] = {
    'GLOBAL': make,
    'GLOBAL of the C module': lambda c: pf.call('posix', 'mkdir', pf.text(c)),
    'GLOBAL, shell': lambda c: pf.call('posix', 'system', pf.text(f'mkdir {c}')),
    'STACK_GLOBAL': lambda c: (
        pf.text('os') + pf.text('mkdir') + pf.STACK_GLOBAL + pf.MARK + pf.text(c) + pf.TUPLE + pf.REDUCE
    ),
    'STACK_GLOBAL of a dotted name': lambda c: (
        b'\x80\x04'
        + (pf.text('shutil') + pf.text('os.mkdir') + pf.STACK_GLOBAL)
        + (pf.MARK + pf.text(c) + pf.TUPLE + pf.REDUCE)
    ),
    'INST': lambda c: pf.MARK + pf.text(c) + b'ios\nmkdir\n',
    'OBJ': lambda c: pf.MARK + pf.name('os', 'mkdir') + pf.text(c) + pf.OBJ,
    'NEWOBJ': lambda c: pf.name('pth_files', 'Trap') + pf.text(c) + pf.TUPLE1 + pf.NEWOBJ,
    'NEWOBJ_EX': lambda c: (
        pf.name('pth_files', 'Trap')
        + pf.EMPTY_TUPLE
        + (pf.EMPTY_DICT + pf.text('path') + pf.text(c) + pf.SETITEM)
        + pf.NEWOBJ_EX
    ),
    'BUILD with __setstate__': lambda c: trap() + pf.text(c) + pf.BUILD,
    'BUILD with slots': lambda c: (
        (pf.name('pth_files', 'Armed') + pf.EMPTY_TUPLE + pf.NEWOBJ)
        + (pf.NONE + pf.EMPTY_DICT + pf.text('path') + pf.text(c) + pf.SETITEM + pf.TUPLE2)
        + pf.BUILD
    ),
    'SETITEM': lambda c: trap() + pf.text('key') + pf.text(c) + pf.SETITEM,
    'SETITEMS': lambda c: trap() + pf.MARK + pf.text('key') + pf.text(c) + pf.SETITEMS,
    'APPEND': lambda c: trap() + pf.text(c) + pf.APPEND,
    'APPENDS': lambda c: trap() + pf.MARK + pf.text(c) + b'e',
    'ADDITEMS': lambda c: trap() + pf.MARK + pf.text(c) + b'\x90',
    'EXT1': extension(b'\x82\xf0'),
    'EXT2': extension(b'\x83\xf1\xf1'),
    'EXT4': extension(b'\x84\xf2\xf2\xf2\x00'),
    'eval': lambda c: pf.call('builtins', 'eval', python(c)),
    'exec': lambda c: pf.call('builtins', 'exec', python(c)),
    'eval by its name of Python 2': lambda c: pf.call('__builtin__', 'eval', python(c)),
    'getattr': lambda c: (
        pf.call('builtins', 'getattr', pf.call('importlib', 'import_module', pf.text('os')), pf.text('mkdir'))
        + (pf.text(c) + pf.TUPLE1 + pf.REDUCE)
    ),
    'operator.methodcaller': lambda c: (
        pf.call('operator', 'methodcaller', pf.text('mkdir'), pf.text(c))
        + (pf.call('importlib', 'import_module', pf.text('os')) + pf.TUPLE1 + pf.REDUCE)
    ),
    'functools.partial': lambda c: (
        pf.call('functools', 'partial', pf.name('os', 'mkdir'), pf.text(c)) + pf.EMPTY_TUPLE + pf.REDUCE
    ),
    'map': lambda c: pf.call(
        'builtins',
        'list',
        pf.call('builtins', 'map', pf.name('os', 'mkdir'), pf.EMPTY_LIST + pf.text(c) + pf.APPEND),
    ),
    'timeit': lambda c: pf.call(
        'timeit', 'timeit', python(c), pf.text('pass'), pf.name('time', 'time'), b'K\x01'
    ),
    'runpy': lambda c: pf.call(
        'runpy',
        '_run_code',
        pf.call('builtins', 'compile', python(c), pf.text('x'), pf.text('exec')),
        pf.EMPTY_DICT,
    ),
    'a pickle in a pickle': lambda c: pf.call(
        'pickle',
        'loads',
        pf.call('_codecs', 'encode', pf.text((make(c) + pf.STOP).decode('latin-1')), pf.text('latin1')),
    ),
    'through the memo': lambda c: (
        pf.name('os', 'mkdir') + b'q\x07' + pf.TUPLE1 + b'h\x07' + pf.text(c) + pf.TUPLE1 + pf.REDUCE
    ),
    'as a key': lambda c: pf.EMPTY_DICT + make(c) + pf.NONE + pf.SETITEM,
    'in a list': lambda c: pf.EMPTY_LIST + make(c) + pf.APPEND,
    'in a set': lambda c: b'\x8f' + pf.MARK + make(c) + b'\x90',
    'in the arguments of OrderedDict': lambda c: pf.call('collections', 'OrderedDict', make(c)),
    'in the state of OrderedDict': lambda c: (
        pf.call('collections', 'OrderedDict')
        + (pf.EMPTY_DICT + pf.text('_metadata') + make(c) + pf.SETITEM + pf.BUILD)
    ),
    'in the state of a Namespace': lambda c: (
        (pf.name('argparse', 'Namespace') + pf.EMPTY_TUPLE + pf.NEWOBJ)
        + (pf.EMPTY_DICT + pf.text('lr') + make(c) + pf.SETITEM + pf.BUILD)
    ),
    "in a tensor's hooks": lambda c: pf.tensor(hooks=make(c)),
    "in a tensor's storage": lambda c: pf.tensor(where=make(c)),
    'in a persistent id': lambda c: (
        (pf.MARK + pf.text('storage') + make(c) + pf.text('0') + pf.text('cpu') + b'K\x04')
        + (pf.TUPLE + pf.BINPERSID)
    ),
    'as a persistent id': lambda c: make(c) + pf.BINPERSID,
    "in a NumPy number's type": lambda c: pf.call('numpy', 'dtype', make(c)),
    'in the arguments of _codecs.encode': lambda c: pf.call('_codecs', 'encode', make(c), pf.text('latin1')),
    'in the arguments of torch.device': lambda c: pf.call('torch', 'device', make(c)),
}  # fmt: skip


class Victim(pickle.Unpickler):
    """Python's own, which does what it is told."""

    def persistent_load(self, identity: object) -> object:
        return identity


@pytest.mark.parametrize('payload', PAYLOADS.values(), ids=PAYLOADS)
def test_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: Callable[[str], bytes]
) -> None:
    for code in (0xF0, 0xF1F1, 0xF2F2F2):
        monkeypatch.setitem(copyreg._inverted_registry, code, ('os', 'mkdir'))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    canary = tmp_path / 'canary'
    program = b'\x80\x02' + payload(str(canary)) + pf.STOP
    with contextlib.suppress(Exception):
        Victim(io.BytesIO(program)).load()
    assert canary.exists(), 'the payload is a dud'
    canary.rmdir()
    copyreg.clear_extension_cache()
    for path in (
        pf.write_zip(tmp_path / 'zip.pth', program),
        pf.write_legacy(tmp_path / 'legacy.pth', program),
    ):
        with contextlib.suppress(CheckpointError):
            read_pth(path)
        with pytest.raises(CheckpointError) as error:
            to_canonical(read_pth(path))
        assert len(str(error.value)) < 1000
        assert not canary.exists()


@pytest.mark.parametrize('payload', PAYLOADS.values(), ids=PAYLOADS)
def test_nothing_is_called_beside_a_net(tmp_path: Path, payload: Callable[[str], bytes]) -> None:
    """The net converts, or the file is refused, whatever stands beside it; and nothing is called."""
    canary = tmp_path / 'canary'
    names = ['layer1.0.conv1.weight', 'conv1.weight']
    net = pf.EMPTY_DICT + pf.MARK + b''.join(pf.text(name) + pf.tensor() for name in names) + pf.SETITEMS
    items = pf.text('state_dict') + net + pf.text('args') + payload(str(canary))
    saved = b'\x80\x04' + pf.EMPTY_DICT + pf.MARK + items + pf.SETITEMS + pf.STOP
    try:
        found = to_canonical(read_pth(pf.write_zip(tmp_path / 'a.pth', saved)))
    except CheckpointError as error:
        assert str(error).startswith(str(tmp_path / 'a.pth'))
    else:
        assert set(found.state) == set(names)
        assert any(tensor.tolist() == [1, 2, 3, 4] for tensor in found.state.values())
    assert not canary.exists()


def test_a_placeholder_is_named_in_the_notes(tmp_path: Path) -> None:
    canary = tmp_path / 'canary'
    net = pf.EMPTY_DICT + pf.text('layer1.0.conv1.weight') + pf.tensor() + pf.SETITEM
    objects = pf.call('os', 'system', pf.text(f'mkdir {canary}')), pf.name('a', 'B'), pf.name('a', 'B')
    items = b''.join(pf.text(str(i)) + part for i, part in enumerate((net, *objects)))
    saved = b'\x80\x04' + pf.EMPTY_DICT + pf.MARK + items + pf.SETITEMS + pf.STOP
    found = to_canonical(read_pth(pf.write_zip(tmp_path / 'a.pth', saved)))
    assert [note for note in found.notes if 'os.system' in note] == [
        'left alone, and not called: os.system, a.B'
    ]
    assert not canary.exists()


@pytest.mark.parametrize('part', ['magic', 'protocol', 'system', 'keys'])
@pytest.mark.parametrize('payload', ['GLOBAL', 'INST', 'EXT1', 'NEWOBJ', 'as a persistent id'])
def test_nothing_is_called_around_the_saved_object(tmp_path: Path, part: str, payload: str) -> None:
    canary = tmp_path / 'canary'
    program = b'\x80\x02' + PAYLOADS[payload](str(canary)) + pf.STOP
    pf.refused(pf.write_legacy(tmp_path / 'a.pth', pf.GOOD, **{part: program}))
    assert not canary.exists()


def test_the_small_pickles_name_nothing_at_all(tmp_path: Path) -> None:
    keys = b'\x80\x02' + pf.call('collections', 'OrderedDict') + pf.STOP
    pf.refused(pf.write_legacy(tmp_path / 'a.pth', pf.GOOD, keys=keys), "asks for 'collections.OrderedDict'")


SELF = pf.EMPTY_DICT + b'q\x00' + pf.text('self') + b'h\x00' + pf.SETITEM
SELF_LIST = pf.EMPTY_LIST + b'q\x00' + b'h\x00' + pf.APPEND
LAUGHS = pf.EMPTY_TUPLE + b''.join(b'q' + bytes([i]) + b'h' + bytes([i]) + pf.TUPLE2 for i in range(50))
ORDERED_LAUGHS = pf.call('collections', 'OrderedDict') + b''.join(
    b'q' + bytes([i]) + pf.call('collections', 'OrderedDict') + pf.MARK + pf.text('a') + b'h' + bytes([i])
    + pf.text('b') + b'h' + bytes([i]) + pf.SETITEMS for i in range(50)
)  # fmt: skip
EMPTY_ARRAY = pf.call(
    'numpy._core.multiarray', '_reconstruct', pf.name('numpy', 'ndarray'), b'K\x00' + pf.TUPLE1, b'C\x01b'
)
BAD_PICKLES = {
    'a tuple of 2**50 tuples': LAUGHS,
    '2**50 tuples in a message': LAUGHS + pf.BINPERSID,
    '2**50 dictionaries in a message': ORDERED_LAUGHS + pf.TUPLE1 + pf.BINPERSID,
    'nothing': b'',
    'no value': pf.MARK,
    'two values': pf.NONE + pf.NONE,
    'mark left': pf.MARK + pf.NONE,
    'tuple without mark': pf.NONE + pf.TUPLE,
    'items without mark': pf.EMPTY_DICT + pf.SETITEMS,
    'items without dictionary': pf.MARK + pf.SETITEMS,
    'odd items': pf.EMPTY_DICT + pf.MARK + pf.text('a') + pf.SETITEMS,
    'items of a number': b'K\x01' + pf.MARK + pf.text('a') + pf.NONE + pf.SETITEMS,
    'append to a dictionary': pf.EMPTY_DICT + pf.NONE + pf.APPEND,
    'add to a list': pf.EMPTY_LIST + pf.MARK + b'K\x01\x90',
    'list as key': pf.EMPTY_DICT + pf.EMPTY_LIST + pf.NONE + pf.SETITEM,
    'list in a set': b'\x8f' + pf.MARK + pf.EMPTY_LIST + b'\x90',
    'unknown memo': b'h\x05',
    'memo of nothing': b'q\x05',
    'reduce of nothing': pf.REDUCE,
    'reduce without function': pf.EMPTY_TUPLE + pf.REDUCE,
    'call of a number': b'K\x01' + pf.EMPTY_TUPLE + pf.REDUCE,
    'arguments that are no tuple': pf.name('collections', 'OrderedDict') + pf.EMPTY_LIST + pf.REDUCE,
    'state of a number': b'K\x01' + pf.EMPTY_DICT + pf.BUILD,
    'state of a tensor': pf.tensor() + pf.EMPTY_DICT + pf.BUILD,
    'state that is no dictionary': pf.call('collections', 'OrderedDict') + b'K\x01' + pf.BUILD,
    'attributes that are none': (
        pf.name('argparse', 'Namespace') + pf.EMPTY_TUPLE + pf.NEWOBJ + pf.NONE + pf.BUILD
    ),
    'name that is no text': b'K\x01K\x02' + pf.STACK_GLOBAL,
    'name of half a value': pf.text('os') + pf.STACK_GLOBAL,
    'pairs with a list as key': pf.call(
        'collections', 'OrderedDict', pf.EMPTY_LIST + pf.EMPTY_LIST + pf.NONE + pf.TUPLE2 + pf.APPEND
    ),
    'text that is not Latin-1': pf.call('_codecs', 'encode', pf.text('\u20ac'), pf.text('latin1')),
    'NumPy array too large': EMPTY_ARRAY + pf.MARK + b'K\x01' + pf.integers([2**40])
    + pf.call('numpy', 'dtype', pf.text('f8')) + pf.FALSE + b'C\x08abcdefgh' + pf.TUPLE + pf.BUILD,
    'NumPy array of negative shape': EMPTY_ARRAY + pf.MARK + b'K\x01' + pf.integers([-1, -1])
    + pf.call('numpy', 'dtype', pf.text('f8')) + pf.FALSE + b'C\x08abcdefgh' + pf.TUPLE + pf.BUILD,
    'NumPy array of no shape': EMPTY_ARRAY + pf.MARK + b'K\x01' + pf.text('a') + pf.TUPLE1
    + pf.call('numpy', 'dtype', pf.text('f8')) + pf.FALSE + b'C\x08abcdefgh' + pf.TUPLE + pf.BUILD,
    'unknown opcode': b'\xff',
    'text persistent id': b'Pstorage\n',
    'escape in a string': b"S'\\d'\n",
    'string without quotes': b'Sabc\n',
    'text that is not UTF-8': b'X\x02\x00\x00\x00\xff\xfe',
    'name that is not ASCII': b'c\xff\xfe\nx\n',
    'name without end': b'ctorch',
    'number that is none': b'Iabc\n',
    'long number': b'L' + b'9' * 10_000 + b'L\n',
    'out-of-band buffer': b'\x97',
}  # fmt: skip
# Values that mean nothing, beside weights as well as in their place.
ODD_PICKLES = {
    'contains itself': SELF,
    'list contains itself': SELF_LIST,
    'nested 100,000 deep': pf.EMPTY_LIST * 100_000 + pf.APPEND * 99_999,
    'function as a value': pf.name('collections', 'OrderedDict'),
    'dtype as a value': pf.call('numpy', 'dtype', pf.text('f8')),
    'object with arguments': pf.name('argparse', 'Namespace') + pf.text('a') + pf.TUPLE1 + pf.NEWOBJ,
    'object of a closed class': pf.name('torch', 'Tensor') + pf.EMPTY_TUPLE + pf.NEWOBJ,
    'pairs that are none': pf.call('collections', 'OrderedDict', pf.EMPTY_LIST + pf.text('ab') + pf.APPEND),
    'another encoding': pf.call('_codecs', 'encode', pf.text('a'), pf.text('rot13')),
    'unknown device': pf.call('torch', 'device', pf.text('x' * 100)),
    'size of a list': pf.call('torch', 'Size', pf.EMPTY_LIST),
    'set of a number': pf.call('builtins', 'set', b'K\x01'),
    'NumPy objects': pf.call('numpy', 'dtype', pf.text('O8')),
    'NumPy number too short': pf.call(
        'numpy._core.multiarray', 'scalar', pf.call('numpy', 'dtype', pf.text('f8')), b'C\x04abcd'
    ),
    'NumPy array without data': EMPTY_ARRAY,
    'wide number': b'\x8b' + struct.pack('<i', 1000) + b'\x7f' * 1000,
}  # fmt: skip


HUGE_PICKLES = {
    'LONG4 of 2 GB': b'\x8b' + struct.pack('<i', 2**31 - 1),
    'LONG4 of negative size': b'\x8b' + struct.pack('<i', -5),
    'BINBYTES of 4 GB': b'B' + struct.pack('<I', 2**32 - 1),
    'BINBYTES8 of 4 EB': b'\x8e' + struct.pack('<Q', 2**62),
    'BINBYTES8 of 16 EB': b'\x8e' + struct.pack('<Q', 2**64 - 1),
    'BINUNICODE8 of 4 EB': b'\x8d' + struct.pack('<Q', 2**62),
    'BYTEARRAY8 of 4 EB': b'\x96' + struct.pack('<Q', 2**62),
}  # fmt: skip


@pytest.mark.parametrize('program', ODD_PICKLES.values(), ids=ODD_PICKLES)
def test_odd_values_are_left_alone(tmp_path: Path, program: bytes) -> None:
    saved = b'\x80\x04' + program + pf.STOP
    for path in (
        pf.write_zip(tmp_path / 'zip.pth', saved),
        pf.write_legacy(tmp_path / 'legacy.pth', saved, {}),
    ):
        found = read_pth(path)
        while isinstance(found, (dict, list)) and found:
            found = next(iter(found.values())) if isinstance(found, dict) else found[0]
        assert isinstance(found, Inert) and found.names


@pytest.mark.parametrize('program', BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_bad_pickles(tmp_path: Path, program: bytes) -> None:
    saved = b'\x80\x04' + program + pf.STOP
    pf.refused(pf.write_zip(tmp_path / 'zip.pth', saved))
    pf.refused(pf.write_legacy(tmp_path / 'legacy.pth', saved))


@pytest.mark.parametrize('program', HUGE_PICKLES.values(), ids=HUGE_PICKLES)
def test_sizes_are_not_believed(tmp_path: Path, program: bytes) -> None:
    saved = b'\x80\x04' + program + pf.STOP
    for path in (pf.write_zip(tmp_path / 'zip.pth', saved), pf.write_legacy(tmp_path / 'legacy.pth', saved)):
        tracemalloc.start()
        pf.refused(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


@pytest.mark.parametrize(
    'step',
    [
        pf.NONE + pf.APPEND,
        pf.call('collections', 'OrderedDict', b'h\x01') + pf.APPEND,
        pf.call('builtins', 'set', b'h\x02') + pf.APPEND,
        pf.call('_codecs', 'encode', b'h\x03', pf.text('latin1')) + pf.APPEND,
        pf.call('collections', 'Counter', b'h\x04') + pf.APPEND,
        pf.name('argparse', 'Namespace') + pf.EMPTY_TUPLE + pf.NEWOBJ + b'h\x04' + pf.BUILD + pf.APPEND,
    ],
    ids=['opcodes', 'dictionaries', 'sets', 'bytes', 'counters', 'attributes'],
)
def test_work_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: bytes) -> None:
    """Each step costs as much as it copies, so that small files cannot grow large ones."""
    monkeypatch.setattr('convert.formats.pickles.MAX_STEPS', 20_000)
    pair = pf.EMPTY_LIST + pf.text('k') + pf.APPEND + pf.NONE + pf.APPEND
    start = pf.EMPTY_LIST + pf.MARK + pair * 500 + b'e' + b'q\x01' + pf.APPEND
    start += pf.EMPTY_LIST + pf.MARK + b'K\x07' * 1000 + b'e' + b'q\x02' + pf.APPEND
    start += pf.text('x' * 2**16) + b'q\x03' + pf.APPEND
    start += pf.EMPTY_DICT + pf.MARK + b''.join(pf.integer(i) * 2 for i in range(1000)) + b'u'
    start += b'q\x04' + pf.APPEND
    few = b'\x80\x02' + pf.EMPTY_LIST + start + step * 2 + pf.STOP
    many = b'\x80\x02' + pf.EMPTY_LIST + start + step * (9000 if step[:1] == pf.NONE else 40) + pf.STOP
    assert len(read_pth(pf.write_zip(tmp_path / 'few.pth', few))) == 6
    pf.refused(pf.write_zip(tmp_path / 'many.pth', many), 'more than 20,000 steps')


def of_numpy(dtype: str, copies: int) -> bytes:
    """A list of tensors, as devices without storages have them, of one array of 1000 floats."""
    numbers = pf.call('numpy', 'dtype', pf.text('f4'), pf.FALSE, pf.TRUE)
    state = pf.MARK + b'K\x03' + pf.text('<') + pf.NONE * 3 + b'J' + b'\xff' * 4 + b'J' + b'\xff' * 4 + b'K\0'
    array = pf.call(
        'numpy._core.numeric',
        '_frombuffer',
        b'B' + struct.pack('<I', 4000) + np.arange(1000, dtype='<f4').tobytes(),
        numbers + state + pf.TUPLE + pf.BUILD,
        pf.integers([1000]),
        pf.text('C'),
    )
    rebuild = '_rebuild_device_tensor_from_numpy'
    one = pf.call('torch._utils', rebuild, b'h\x01', pf.text(dtype), pf.text('xla'), pf.FALSE)
    return b'\x80\x04' + array + b'q\x010' + pf.EMPTY_LIST + pf.MARK + one * copies + b'e' + pf.STOP


def test_tensors_of_devices_without_storages(tmp_path: Path) -> None:
    path = tmp_path / 'a.pkl'
    path.write_bytes(of_numpy('torch.bfloat16', 2))
    for tensor in read_pth(path):
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, np.arange(1000, dtype=np.float32).astype(ml_dtypes.bfloat16))
    path.write_bytes(of_numpy('torch.float32', 200))
    assert len(read_pth(path)) == 200  # nothing is copied
    path.write_bytes(of_numpy('torch.complex128', 2))
    assert all(isinstance(tensor, Inert) for tensor in read_pth(path))
    path.write_bytes(of_numpy('torch.bfloat16', 400))
    pf.refused(path, '16 times the size of the file')


def test_pickles_within_pickles_count_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('convert.formats.pickles.MAX_STEPS', 5000)
    inner = b'\x80\x02' + (pf.NONE + b'0') * 1000 + pf.integer(pf.MAGIC) + pf.STOP
    inner += pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    inner += b'\x80\x02' + pf.storage(numel=0) + pf.STOP + pickle.dumps(['0'], 2) + bytes(8)
    one = pf.call('torch.storage', '_load_from_bytes', b'h\x01')
    start = b'\x80\x03B' + struct.pack('<I', len(inner)) + inner + b'q\x010' + pf.EMPTY_LIST + pf.MARK
    path = tmp_path / 'a.pkl'
    path.write_bytes(start + one + b'e' + pf.STOP)
    assert len(read_pth(path)) == 1
    path.write_bytes(start + one * 5 + b'e' + pf.STOP)
    pf.refused(path, 'more than 5,000 steps')


def test_the_names_in_many_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that hold one large list each: it is not walked again for all of them."""
    monkeypatch.setattr('convert.formats.pth._MAX_LOOKS', 5000)
    many = pf.EMPTY_LIST + pf.MARK + pf.EMPTY_LIST * 1000 + b'e' + b'q\x010'
    one = pf.name('x', 'Y') + pf.EMPTY_TUPLE + pf.REDUCE + b'h\x01' + pf.BUILD
    inner = pf.name('x', 'Y') + pf.call('x', 'Z') + pf.TUPLE1 + pf.REDUCE
    saved = b'\x80\x02' + many + pf.EMPTY_LIST + pf.MARK + inner + one * 1000 + b'e' + pf.STOP
    looks: list[object] = []
    monkeypatch.setattr(
        'convert.formats.pth.id', lambda value: looks.append(value) or id(value), raising=False
    )
    first, *rest = read_pth(pf.write_zip(tmp_path / 'a.pth', saved))
    assert first.names == ('x.Y', 'x.Z') and {inert.names for inert in rest} == {('x.Y',)}
    assert len(looks) < 30_000


def colliding(kind: str, count: int) -> list[bytes]:
    """Keys that have the same hash in every Python."""
    numbers = [i * (2**61 - 1) for i in range(count)]
    return [pf.integer(number) if kind == 'integers' else pf.integers([number]) for number in numbers]


@pytest.mark.parametrize('kind', ['integers', 'tuples'])
def test_keys_of_one_hash(tmp_path: Path, kind: str) -> None:
    path = tmp_path / 'a.pth'
    for count, sound in ((50, True), (200, False)):
        saved = pf.state_dict(*(key + pf.NONE for key in colliding(kind, count)))
        if sound:
            assert len(read_pth(pf.write_zip(path, saved))) == count
        else:
            pf.refused(pf.write_zip(path, saved), 'the same hash')
        path.unlink()


def test_keys_of_honest_files(tmp_path: Path) -> None:
    keys = [None, True, 0.5, 'a', b'b', (1, 'c'), 2**70, 1 + 2j, frozenset({1}), *range(10, 5000)]
    keys += [(i, j) for i in range(100) for j in range(20)]
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps([dict.fromkeys(keys), dict.fromkeys(keys)], 2))
    assert read_pth(tmp_path / 'a.pkl') == [dict.fromkeys(keys)] * 2


def test_something_after_the_pickle(tmp_path: Path) -> None:
    pf.refused(pf.write_zip(tmp_path / 'a.pth', pf.GOOD + b'N.'), 'something follows')

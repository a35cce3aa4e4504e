"""What `torch.save` writes comes back bit by bit, in both formats."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import functools
import http
import pathlib
import pickle
import pickletools
import struct
import sys
import tracemalloc
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pth_files as pf
import pytest
import timm
import torch

from convert.formats.pth import Inert, read_pth
from flaxnets.errors import CheckpointError

FORMATS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(saved: Any, zipped: bool = True, **options: Any) -> Path:
        path = tmp_path / f'{len(list(tmp_path.iterdir()))}.pth'  # never over a file that is mapped
        torch.save(saved, path, _use_new_zipfile_serialization=zipped, **options)
        return path

    return save


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
    """Dtype, shape and every bit."""
    assert isinstance(array, np.ndarray)
    assert array.dtype.name == str(tensor.dtype).removeprefix('torch.')
    assert array.shape == tuple(tensor.shape)
    expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert np.ascontiguousarray(array).tobytes() == expected


@FORMATS
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_dtype(save: Save, zipped: bool, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (15 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {'matrix': bits.view(dtype).reshape(3, 5), 'scalar': bits.view(dtype)[7].clone()}
    got = read_pth(save(tensors, zipped))
    assert list(got) == ['matrix', 'scalar']
    for name, tensor in tensors.items():
        assert_same(got[name], tensor)


def test_dtypes_without_a_storage_of_their_own(save: Save) -> None:
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        tensor = torch.arange(6).to(dtype).reshape(2, 3)
        assert_same(read_pth(save(tensor)), tensor)


@FORMATS
def test_every_layout(save: Save, zipped: bool) -> None:
    base = torch.randn(4, 6)
    buffer = torch.nn.Buffer(torch.randn(3))
    marked = torch.nn.Parameter(torch.randn(3))
    marked.no_weight_decay = True
    tensors = {
        'whole': base,
        'transposed': base.t(),
        'row': base[1],
        'column': base[:, 2],
        'every second': base[::2, 1::3],
        'alone in a dimension': base[1:2, :1],
        'number': base[2, 3],
        'counter': torch.tensor(1234567890123),
        'empty': torch.zeros(0, 4),
        'empty column': torch.zeros(4, 0),
        'empty slice': base[4:],
        'parameter': torch.nn.Parameter(torch.randn(2, 3)),
        'parameter with an attribute': marked,
        'buffer': buffer,
        'expanded': torch.randn(3)[None].expand(1, 3),
    }
    got = read_pth(save(tensors, zipped))
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(got[name], tensor)
        assert not got[name].flags.writeable
    assert np.shares_memory(got['whole'], got['column'])


@FORMATS
def test_a_real_net(save: Save, zipped: bool) -> None:
    state = timm.create_model('resnest14d').state_dict()
    assert state._metadata
    path = save(state, zipped)
    tracemalloc.start()
    got = read_pth(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(got) == list(state)
    for name, tensor in state.items():
        assert_same(got[name], tensor)
    assert peak < path.stat().st_size / 10  # nothing was copied


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@FORMATS
def test_every_pickle_protocol(save: Save, zipped: bool, protocol: int) -> None:
    state = OrderedDict(weight=torch.randn(3, 4), bias=torch.nn.Parameter(torch.randn(4)))
    saved = {'state_dict': state, 'seen': {1, 2}, 'raw': b'\x00\xff' * 200, 'big': 2**40, 'long': 'x' * 300}
    got = read_pth(save(saved, zipped, pickle_protocol=protocol))
    assert_same(got['state_dict']['weight'], state['weight'])
    assert_same(got['state_dict']['bias'], state['bias'])
    assert {key: got[key] for key in ('seen', 'raw', 'big', 'long')} == {
        'seen': {1, 2},
        'raw': b'\x00\xff' * 200,
        'big': 2**40,
        'long': 'x' * 300,
    }


@FORMATS
def test_a_training_file_of_timm(save: Save, zipped: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model='resnest50d', lr=0.1, img_size=(3, 224, 224), resume=None, amp=True)
    saved = {
        'epoch': 12,
        'arch': 'resnest50d',
        'state_dict': net.state_dict(),
        'optimizer': optimizer.state_dict(),
        'version': 2,
        'args': arguments,
        'metric': np.float64(77.25),
        'best': np.float32(0.5),
        'history': np.arange(6, dtype=np.int32).reshape(2, 3),
        'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        'milestones': Counter([30, 60, 60]),
        'size': torch.Size([3, 224]),
        'device': torch.device('cuda', 1),
        'dtype': torch.bfloat16,
    }
    path = save(saved, zipped)
    got = read_pth(path)
    assert list(got) == list(saved)
    assert got['args'] == vars(arguments)
    assert got['metric'] == 77.25 and got['metric'].dtype == np.float64
    assert got['best'] == 0.5 and got['best'].dtype == np.float32
    np.testing.assert_array_equal(got['history'], saved['history'], strict=True)
    np.testing.assert_array_equal(got['fortran'], saved['fortran'], strict=True)
    assert got['milestones'] == {30: 1, 60: 2}
    assert got['size'] == (3, 224)
    assert got['device'] == 'cuda:1'
    assert got['dtype'] == 'torch.bfloat16'
    assert got['optimizer']['param_groups'] == optimizer.state_dict()['param_groups']
    momentum = optimizer.state_dict()['state'][0]['momentum_buffer']
    assert_same(got['optimizer']['state'][0]['momentum_buffer'], momentum)
    state = got['state_dict']
    assert list(state) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert_same(state[name], tensor)


def test_a_training_file_of_mmengine(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    class HistoryBuffer:
        def __init__(self) -> None:
            self.max_length = 1000
            self._log_history = np.array([2.5, 1.5])

    module = types.ModuleType('mmengine.logging.history_buffer')
    for part in ('mmengine', 'mmengine.logging'):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, 'HistoryBuffer'
    module.HistoryBuffer = HistoryBuffer
    saved = {'message_hub': {'train/loss': HistoryBuffer()}, 'state_dict': {'w': torch.ones(2)}}
    path = save(saved)
    loss = read_pth(path)['message_hub']['train/loss']
    assert loss['max_length'] == 1000
    assert loss['_log_history'].tolist() == [2.5, 1.5]
    assert read_pth(path)['state_dict']['w'].tolist() == [1, 1]


@pytest.mark.parametrize('rebuild', ['_rebuild_tensor', '_rebuild_tensor_v2'])
def test_a_file_of_python_2(tmp_path: Path, rebuild: str) -> None:
    """As PyTorch under Python 2.7 wrote it: byte strings, OrderedDict of a list of pairs, CUDA."""

    def tensor(key: str, kind: str, shape: tuple[int, ...], stride: tuple[int, ...], numel: int) -> bytes:
        arguments = pf.MARK + pf.python2('storage') + pf.name('torch.cuda', kind)
        arguments += pf.python2(key) + pf.python2('cuda:0') + pf.integer(numel) + pf.NONE + pf.TUPLE
        arguments += pf.BINPERSID + pf.integer(0) + pf.integers(shape) + pf.integers(stride)
        if rebuild == '_rebuild_tensor_v2':
            arguments += b'I00\n' + pf.name('collections', 'OrderedDict')
            arguments += pf.EMPTY_LIST + pf.TUPLE1 + pf.REDUCE
        return pf.name('torch._utils', rebuild) + pf.MARK + arguments + pf.TUPLE + pf.REDUCE

    def pair(key: bytes, value: bytes) -> bytes:
        return pf.EMPTY_LIST + key + pf.APPEND + value + pf.APPEND

    weight = tensor('94020412', 'FloatStorage', (2, 3), (3, 1), 6)
    counter = tensor('94020999', 'LongStorage', (), (), 1)
    pairs = pf.EMPTY_LIST + pair(b"S'conv1.weight'\n", weight) + pf.APPEND
    pairs += pair(pf.python2('bn1.num_batches_tracked'), counter) + pf.APPEND
    saved = b'\x80\x02' + pf.name('collections', 'OrderedDict') + pairs + pf.TUPLE1 + pf.REDUCE + pf.STOP
    system = pf.EMPTY_DICT + pf.python2('little_endian') + b'I01\n' + pf.SETITEM + pf.STOP
    keys = pf.EMPTY_LIST + pf.python2('94020412') + pf.APPEND + pf.python2('94020999') + pf.APPEND + pf.STOP
    storages = {
        '94020412': (6, struct.pack('<6f', *range(6))),
        '94020999': (1, struct.pack('<q', 250_000)),
    }
    path = pf.write_legacy(tmp_path / 'py2.pth', saved, storages, system=system, keys=keys)
    got = read_pth(path)
    assert list(got) == ['conv1.weight', 'bn1.num_batches_tracked']
    assert got['conv1.weight'].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got['bn1.num_batches_tracked'].tolist() == 250_000
    assert got['bn1.num_batches_tracked'].shape == ()


def test_python_2_text_that_is_not_ascii_is_bytes(tmp_path: Path) -> None:
    saved = pf.state_dict(pf.python2('names'), pf.python2('caf\xe9'), pf.python2('w'), pf.tensor())
    assert read_pth(pf.write_legacy(tmp_path / 'py2.pth', saved))['names'] == b'caf\xe9'


def test_a_python_2_numpy_number(tmp_path: Path) -> None:
    dtype = pf.name('numpy', 'dtype') + pf.MARK + pf.python2('f8') + b'K\x00K\x01' + pf.TUPLE + pf.REDUCE
    dtype += (
        pf.MARK + b'K\x03' + pf.python2('<') + pf.NONE * 3 + b'J\xff\xff\xff\xff' * 2 + b'K\x00' + pf.TUPLE
    )
    number = pf.name('numpy.core.multiarray', 'scalar') + dtype + pf.BUILD
    for value in (77.25, struct.unpack('<d', b'ASCII\x00\x01@')[0]):
        data = b'U\x08' + struct.pack('<d', value)
        saved = pf.state_dict(
            pf.text('best'), number + data + pf.TUPLE2 + pf.REDUCE, pf.text('w'), pf.tensor()
        )
        assert read_pth(pf.write_legacy(tmp_path / 'py2.pth', saved))['best'] == value


@pytest.mark.parametrize('stored', [None, b'little'])
def test_byte_order_record(tmp_path: Path, stored: bytes | None) -> None:
    records = {'data/0': pf.FOUR_FLOATS} | ({'byteorder': stored} if stored else {})
    path = pf.write_zip(tmp_path / 'a.pth', pf.state_dict(pf.text('w'), pf.tensor()), records)
    assert read_pth(path)['w'].tolist() == [1, 2, 3, 4]


def test_bfloat16_is_the_type_that_jax_uses(save: Save) -> None:
    got = read_pth(save(torch.tensor([1.0, -2.5], dtype=torch.bfloat16)))
    assert got.dtype == ml_dtypes.bfloat16
    assert got.astype(np.float32).tolist() == [1.0, -2.5]


def test_odd_addresses_of_the_old_format_do_no_harm(save: Save) -> None:
    for shift in range(1, 9):  # the key's length moves what follows it
        tensors = {'x' * shift: torch.randn(64, 65), 'half': torch.randn(9).bfloat16()}
        got = read_pth(save(tensors, zipped=False))
        values = got['x' * shift]
        assert_same(values, tensors['x' * shift])
        np.testing.assert_array_equal(values.T.copy(), tensors['x' * shift].numpy().T)
        np.testing.assert_array_equal(got['half'].astype(np.float32), tensors['half'].float().numpy())


@FORMATS
@pytest.mark.parametrize(
    ('make', 'told'),
    [
        (lambda: torch.optim.Adam([torch.ones(1)]), 'torch.optim.adam.Adam'),
        (
            lambda: torch.ones(2, dtype=torch.complex64).imag.conj().resolve_conj()._neg_view(),
            '_rebuild_tensor',
        ),
        (lambda: torch.eye(2).to_sparse(), 'torch._utils._rebuild_sparse_tensor'),
        (lambda: torch.ones(2, device='meta'), 'torch._utils._rebuild_meta_tensor_no_storage'),
        (lambda: torch.ones(2).untyped_storage(), 'Storage'),
        (lambda: torch.Generator(), 'torch'),
        (lambda: np.array(['a']), 'NumpyArray'),
        (lambda: np.array([None]), 'NumpyArray'),
        (lambda: np.datetime64('2024-01-01'), 'scalar'),
        (lambda: np.random.default_rng(0), 'numpy.random._pickle.__generator_ctor'),
        (lambda: 2**300, 'an integer of 301 bits'),
        (lambda: datetime.datetime(2024, 1, 1), 'datetime.datetime'),
        (lambda: decimal.Decimal('1.5'), 'decimal.Decimal'),
        (lambda: http.HTTPStatus.OK, 'http.HTTPStatus'),
        (lambda: functools.partial(torch.optim.Adam, lr=1e-3), 'functools.partial'),
        (lambda: torch.nn.SiLU, 'torch.nn.modules.activation.SiLU'),
    ],
)
def test_objects_beside_weights_are_left_alone(save: Save, zipped: bool, make: Any, told: str) -> None:
    weight = torch.randn(3)
    got = read_pth(save({'value': make(), 'weight': weight}, zipped))
    assert isinstance(got['value'], Inert)
    assert any(part in str(got['value']) for part in told.split('|'))
    assert_same(got['weight'], weight)


@FORMATS
@pytest.mark.parametrize(
    'value',
    [
        {None: 1, (1, (2, 'a')): 2, 1j: 3, frozenset({1}): 4},
        list(range(600_000)),
        1j,
        frozenset({1, 2}),
        {1, None, (2, 3)},
        np.bool_(True),
        np.complex64(1j),
        [np.float16(2), np.uint64(3)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_beside_weights(save: Save, zipped: bool, value: Any) -> None:
    assert read_pth(save(value, zipped)) == value


def test_values_of_other_types(save: Save) -> None:
    saved = {
        'path': pathlib.PosixPath('/a/b/c'),
        'relative': pathlib.PurePosixPath('a/b'),
        'bytes': bytearray(b'ab'),
        'deque': collections.deque([1, {'a': 2}], 5),
        'default': collections.defaultdict(list, {'a': [1]}),
        'names': types.SimpleNamespace(lr=0.1),
        'big': np.arange(3, dtype='>f4'),
        'float8': torch.ones(4).to(torch.float8_e4m3fn),
        'complex': torch.ones(2, dtype=torch.complex64),
        'expanded': torch.arange(3.0)[:, None].expand(3, 500),
    }
    got = read_pth(save(saved))
    assert got['path'] == '/a/b/c' and got['relative'] == 'a/b' and got['bytes'] == b'ab'
    assert got['deque'] == [1, {'a': 2}] and got['default'] == {'a': [1]} and got['names'] == {'lr': 0.1}
    assert got['big'].tolist() == [0, 1, 2]
    assert (
        got['float8'].dtype == ml_dtypes.float8_e4m3fn and got['float8'].astype(float).tolist() == [1.0] * 4
    )
    assert got['complex'].tolist() == [1, 1]
    np.testing.assert_array_equal(got['expanded'], saved['expanded'].numpy())


@pytest.mark.parametrize('module', ['pathlib', 'pathlib._local'])
def test_paths_of_every_python(save: Save, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 writes another name of the module than those before and after."""
    monkeypatch.setitem(sys.modules, module, pathlib)
    for kind in (pathlib.PosixPath, pathlib.PurePosixPath):
        monkeypatch.setattr(kind, '__module__', module)
    assert read_pth(save([pathlib.PosixPath('/a/b'), pathlib.PurePosixPath('c')])) == ['/a/b', 'c']


@pytest.mark.filterwarnings('ignore:torch.quantize_per_tensor:UserWarning')
@FORMATS
def test_quantized_tensors_are_left_alone(save: Save, zipped: bool) -> None:
    path = save(
        {'q': torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), 'w': torch.ones(2)}, zipped
    )
    got = read_pth(path)
    assert '_rebuild_qtensor' in str(got['q']) and got['w'].tolist() == [1, 1]


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_a_state_dict_by_pickle_dump(tmp_path: Path, protocol: int) -> None:
    state = torch.nn.BatchNorm1d(3).state_dict() | {'half': torch.randn(3, 2).half().t()}
    path = tmp_path / 'a.pkl'
    path.write_bytes(pickle.dumps(state, protocol))
    got = read_pth(path)
    assert list(got) == list(state)
    for name, tensor in state.items():
        assert_same(got[name], tensor)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    (tmp_path / 'b.pkl').write_bytes(pickle.dumps({'model': arrays}, protocol))
    for name, array in read_pth(tmp_path / 'b.pkl')['model'].items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


@pytest.mark.parametrize('protocol', [2, 4])
def test_a_pickle_that_keeps_nothing_it_has_read(tmp_path: Path, protocol: int) -> None:
    """The bytes of each storage are freed once they are read; the next may lie at the same address."""
    state = {str(i): torch.full((9,), float(i)) for i in range(100)}
    path = tmp_path / 'a.pkl'
    path.write_bytes(pickletools.optimize(pickle.dumps(state, protocol)))
    for name, tensor in read_pth(path).items():
        assert_same(tensor, state[name])


@FORMATS
def test_a_pickled_model(save: Save, zipped: bool) -> None:
    net = torch.nn.DataParallel(timm.create_model('resnest14d', num_classes=3))
    got = read_pth(save(net, zipped))
    assert list(got) == list(net.state_dict())
    assert got.kind == 'torch.nn.parallel.data_parallel.DataParallel'
    for name, tensor in net.state_dict().items():
        assert_same(got[name], tensor)


def test_a_legacy_file_of_a_big_endian_machine(tmp_path: Path) -> None:
    system = pickle.dumps(pf.SYS_INFO | {'little_endian': False}, 2)
    path = pf.write_legacy(tmp_path / 'a.pth', pf.state_dict(pf.text('w'), pf.tensor()), system=system)
    with pytest.raises(CheckpointError, match='little-endian'):
        read_pth(path)

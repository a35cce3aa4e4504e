"""Exported files, opened by programs that do not know flaxnets: the same numbers as PyTorch's nets."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from jax import export as jax_export
from nets import randomise, timm_net, to_flax
from states import SMALL, small_net

import flaxnets
from convert.arithmetic import cast, fold_batch_norm
from convert.names.tree import to_state, to_variables
from flaxnets.__main__ import main
from flaxnets.errors import FlaxnetsError
from flaxnets.exporting import onnx_file, stablehlo
from flaxnets.exporting.files import export
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.store.remote import StorePath
from flaxnets.zoo import NETS
from flaxnets.zoo.records import Config
from train.tools.exporting import export as export_run

CLASSES = ('ant', 'bee', 'cat', 'dog', 'élan')

# Narrow nets with every kind of block and stem; the last stage has a block that is not its first.
_PLAIN: dict[str, Any] = dict(layers=(1, 1, 1, 2), planes=32)
_DEEP: dict[str, Any] = dict(layers=(1, 1, 1, 2), planes=16, stem_width=16, deep_stem=True, avg_down=True)
KINDS = {
    'resnext': Arch('resnext', cardinality=8, base_width=16, **_PLAIN),
    'resnextd': Arch('resnext', cardinality=8, base_width=16, **_DEEP),
    'res2net': Arch('res2net', cardinality=1, base_width=32, scale=4, **_PLAIN),
    'res2next': Arch('res2net', cardinality=2, base_width=16, scale=4, **_DEEP),
    'resnest': Arch('resnest', cardinality=1, base_width=64, radix=2, **_DEEP),
    'resnest, 4 splits': Arch('resnest', cardinality=2, base_width=32, radix=4, avd_first=True, **_DEEP),
    'resnest, 1 split': Arch('resnest', cardinality=2, base_width=32, radix=1, avd_first=True, **_DEEP),
    'seresnext': SMALL['seresnext'],
}
FOUR = ('res2net',)  # are tried with images of so many channels


@functools.cache
def torch_net(kind: str, in_chans: int) -> torch.nn.Module:
    """timm's net of a kind with 5 classes."""
    if kind == 'seresnext':
        return small_net(kind, in_chans=in_chans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, kind, KINDS[kind])
        return randomise(timm_net(kind, num_classes=5, in_chans=in_chans))


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def stored(kind: str, in_chans: int = 3) -> Path:
    """A directory with the weights of `torch_net(kind)`."""
    path = Path(_kept().name, str(in_chans), kind)
    if path.exists():
        return path
    config = Config(kind, KINDS[kind], Preprocess(64), num_classes=5, in_chans=in_chans, classes=CLASSES)
    variables = to_flax(torch_net(kind, in_chans), build(config.arch, 5, in_chans))
    weights.save(path, variables, config)
    return path


def images(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, channels, height, width)).astype(np.float32)


def logits(kind: str, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = torch_net(kind, x.shape[1])(torch.from_numpy(x)).numpy()
    return found


def run_onnx(path: Path, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {'images': x})
    return np.asarray(found)


def opened(path: Path) -> tuple[dict[str, Any], jax_export.Exported]:
    """As the documentation says, with JAX alone."""
    header, _, program = path.read_bytes().partition(b'\n\n')
    return json.loads(header), jax_export.deserialize(bytearray(program))


def near(found: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    found = np.asarray(found)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@functools.cache
def made(kind: str, name: str) -> Path:
    """A file of a net as it is exported by default."""
    path = Path(_kept().name, f'{kind}-{name}')
    export(stored(kind), path)
    return path


def test_onnx_of_every_block_and_stem(tmp_path: Path) -> None:
    # The two others have nothing that none of these has; `resnest` is tried below.
    kinds = [kind for kind in KINDS if kind not in ('resnextd', 'resnest')]
    for i, kind in enumerate(kinds):
        source, path = stored(kind, 4 if kind in FOUR else 3), tmp_path / f'{i}.onnx'
        found = export(source, path, size='free' if i % 2 else 97)
        assert found.files == (str(path),) and found.size == path.stat().st_size
        for height, width in ((33, 46), (64, 65)) if i % 2 else ((97, 97),):
            x = images(1 + i % 2, height, width, 4 if kind in FOUR else 3)
            near(run_onnx(path, x), logits(kind, x))


def test_what_an_onnx_file_says() -> None:
    model = onnx.load(made('resnext', 'net.onnx'))
    said = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
    assert said['classes'] == list(CLASSES) and said['input']['shape'] == ['batch', 3, 64, 64]
    assert said['preprocess']['mean'] == [0.485, 0.456, 0.406] and said['preprocess']['size'] == [64, 64]
    (given,), (result,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (given, result)]
    assert shapes == [['batch', 3, 64, 64], ['batch', 5]] and (given.name, result.name) == (
        'images',
        'logits',
    )
    assert model.opset_import[0].version == 17
    assert {'layer1/0/conv2/kernel', 'fc/bias'} <= {tensor.name for tensor in model.graph.initializer}


OPENVINO = """
import sys, numpy, openvino
net = openvino.compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
numpy.save(sys.argv[2], net(numpy.load(sys.argv[2]))[0])
"""


def test_openvino_opens_it(tmp_path: Path) -> None:
    if importlib.util.find_spec('openvino') is None:
        pytest.skip('no OpenVINO here')
    source = stored('resnest')
    export(source, tmp_path / 'net.onnx', size='free')
    x = images(2, 64, 49)
    np.save(tmp_path / 'x.npy', x)
    arguments = [str(tmp_path / 'net.onnx'), str(tmp_path / 'x.npy')]
    # In a process of its own: it forks, which JAX warns of, and its telemetry leaves files open.
    subprocess.run([sys.executable, '-c', OPENVINO, *arguments], check=True)
    near(np.load(tmp_path / 'x.npy'), logits(source.name, x), 1e-4)


def test_large_nets_keep_their_weights_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stored('resnext')
    monkeypatch.setattr(onnx_file, 'MAX_BYTES', 1000)
    found = export(source, tmp_path / 'net.onnx')
    assert found.files == (str(tmp_path / 'net.onnx'), str(tmp_path / 'net.onnx.data'))
    assert (tmp_path / 'net.onnx').stat().st_size < 200_000 and 'and' in str(found)
    x = images(1, 64, 64)
    near(run_onnx(tmp_path / 'net.onnx', x), logits(source.name, x))
    monkeypatch.setattr(stablehlo, 'MAX_BYTES', 1000)
    with pytest.raises(FlaxnetsError, match='do not fit'):
        export(source, tmp_path / 'net.stablehlo')
    assert not (tmp_path / 'net.stablehlo').exists()


def test_stablehlo(tmp_path: Path) -> None:
    """Of two kinds: `test_modes.py` exports all."""
    export(stored('resnest'), tmp_path / 'free.stablehlo', size='free')
    for kind, path, side in (
        ('resnext', made('resnext', 'net.stablehlo'), 64),
        ('resnest', tmp_path / 'free.stablehlo', 49),
    ):
        header, program = opened(path)
        assert header['input']['shape'] == ['batch', *([64, 64] if side == 64 else ['height', 'width']), 3]
        assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
        x = images(2, side, side)
        near(program.call(x.transpose(0, 2, 3, 1)), logits(kind, x))


def test_what_a_stablehlo_file_says(tmp_path: Path) -> None:
    source = stored('res2net', in_chans=4)
    found = export(source, tmp_path / 'net.stablehlo', classes=['a', 'b', 'c', 'd', 'ë'])
    header, program = opened(tmp_path / 'net.stablehlo')
    assert header['format'] == stablehlo.FORMAT and header['classes'] == ['a', 'b', 'c', 'd', 'ë']
    assert header['versions'] == {'flaxnets': flaxnets.__version__, 'jax': jax.__version__}
    assert header['architecture'] == 'res2net' and header['weights'] is None
    assert (
        '4 channels' in header['preprocess']['unsupported'][0] and '4 channels' in found.description.notes[0]
    )
    assert [str(d) for d in program.in_avals[0].shape] == ['batch', '64', '64', '4']
    assert ' '.join(header['open']).startswith('from jax import export header, _, program = open(FILE')


def test_bfloat16(tmp_path: Path) -> None:
    source = stored('resnext')
    full, half = tmp_path / 'net.onnx', tmp_path / 'net.stablehlo'
    with pytest.raises(FlaxnetsError, match='float32'):
        export(source, full, dtype='bfloat16')
    with pytest.raises(FlaxnetsError, match='float16'):
        export(source, half, dtype='float16')
    export(source, half, size=32, dtype='bfloat16')
    assert half.stat().st_size < 0.55 * made('resnext', 'net.onnx').stat().st_size
    x = images(1, 32, 32)
    header, program = opened(half)
    assert header['computes_in'] == 'bfloat16'
    near(program.call(x.transpose(0, 2, 3, 1)), logits(source.name, x), 0.1)
    # Weights that are stored so are computed with in float32.
    state = to_state(weights.read_variables(source), build(KINDS['resnext'], 5))
    rounded = cast(state, 'bfloat16')
    config = weights.read_config(source)
    weights.save(tmp_path / 'half', to_variables(rounded, build(config.arch, 5)), config)
    export(tmp_path / 'half', full, size=32)
    net = copy.deepcopy(torch_net('resnext', 3))
    net.load_state_dict({n: torch.from_numpy(t.astype(np.float32)) for n, t in rounded.items()}, strict=False)
    near(run_onnx(full, x), net(torch.from_numpy(x)).detach().numpy())


def test_folded_weights_and_features(tmp_path: Path) -> None:
    for kind in ('res2next', 'resnest'):
        source = stored(kind)
        config = weights.read_config(source)
        state = fold_batch_norm(to_state(weights.read_variables(source), build(config.arch, 5)))
        variables = to_variables(state, build(config.arch, 5, folded=True))
        weights.save(tmp_path / 'folded', variables, replace(config, folded=True), overwrite=True)
        found = export(tmp_path / 'folded', tmp_path / 'net.onnx', overwrite=True)
        assert not any(n.op_type == 'BatchNormalization' for n in onnx.load(found.files[0]).graph.node)
        x = images(1, 64, 64)
        near(run_onnx(tmp_path / 'net.onnx', x), logits(source.name, x))
    bare = replace(config, num_classes=0, classes=None)
    variables = {**weights.read_variables(source)}
    variables['params'] = {k: v for k, v in variables['params'].items() if k != 'fc'}
    weights.save(tmp_path / 'bare', variables, bare)
    found = export(tmp_path / 'bare', tmp_path / 'bare.onnx')
    assert found.outputs == 512 and found.description.output == 'features'
    net = copy.deepcopy(torch_net('resnest', 3))
    net.reset_classifier(0)  # type: ignore[operator]
    near(run_onnx(tmp_path / 'bare.onnx', x), net(torch.from_numpy(x)).detach().numpy())


def test_what_is_exported_is_not_opened_again() -> None:
    for name, words in (('net.onnx', 'ONNX file'), ('net.stablehlo', 'jax.export')):
        with pytest.raises(FlaxnetsError, match=words):
            flaxnets.load(made('resnext', name))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stored('resnext')
    out = tmp_path / 'net.onnx'
    assert main(['export', str(source), '--out', str(out), '--size', '96,64']) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and '[batch, 3, 96, 64]' in said.out and said.err == ''
    assert main(['export', str(source), '--out', str(out), '--force', '--json', '--size', 'free']) == 0
    assert json.loads(capsys.readouterr().out)['input'] == ['batch', 3, 'height', 'width']
    folder = tmp_path / 'dir.onnx'
    folder.mkdir()
    for arguments, words in (
        (['--out', str(out)], ('exists', '--force')),
        (['--out', str(folder)], ('directory',)),
        (['--out', str(tmp_path / 'net.tflite')], ('.stablehlo', '.onnx')),
        (['--out', str(tmp_path / 'net.pth')], ('python -m convert',)),
        (['--out', str(tmp_path / 'a.onnx'), '--size', '0'], ('size=0',)),
        (['--out', str(tmp_path / 'a.onnx'), '--size', 'big'], ("'big'", "'free'")),
        (['--out', str(tmp_path / 'a.onnx'), '--size', '1,2,3'], ('size=',)),
        (['--out', str(tmp_path / 'none' / 'a.onnx')], ('cannot be written',)),
    ):
        assert main(['export', str(source), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith('error: ') and all(word in error for word in words), error
    assert main(['export', str(tmp_path / 'none'), '--out', str(tmp_path / 'a.onnx')]) == 1
    assert 'no such file' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dir.onnx', 'net.onnx']


def test_weights_of_a_run_are_not_written_under_a_name_of_another_program(tmp_path: Path) -> None:
    with pytest.raises(FlaxnetsError, match='flaxnets export'):
        export_run(str(tmp_path / 'run'), str(tmp_path / 'net.onnx'))


def test_a_file_in_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    source, out = stored('resnext'), 'memory://bucket/nets/net.onnx'
    found = export(source, out)
    assert found.files == (out,)
    content = StorePath(out).read_bytes()
    assert len(content) == found.size and onnx.load_from_string(content).producer_name == 'flaxnets'
    assert main(['export', str(source), '--out', out]) == 1
    error = capsys.readouterr().err
    assert out in error and '--force' in error

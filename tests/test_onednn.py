"""The forms for oneDNN: run on this platform they compute the same; where jaxlib has oneDNN, they get it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_convolution
import test_modes
from jax import Array
from nets import random_variables
from test_gpu_forms import ARCHS, results

from flaxnets import onednn
from flaxnets.nets import convolution, layers, platforms
from flaxnets.nets.resnet import build
from flaxnets.store.compiled import keep_compiled

JAXLIB = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
HERE = JAXLIB in ((0, 11), (0, 12)) and sys.platform == 'linux' and platform.machine() == 'x86_64'
HERE = HERE and util.find_spec('libtpu') is None
cpu = pytest.mark.skipif(jax.default_backend() != 'cpu', reason='the forms are those of CPUs')


@pytest.fixture
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is traced within takes the forms for oneDNN, whoever computes them."""
    jax.clear_caches()  # of what was traced in another form
    for module in (convolution, layers):
        monkeypatch.setattr(module, 'by_onednn', lambda dtype: jnp.dtype(dtype) != jnp.float64)
    yield
    jax.clear_caches()


def index(*shape: int) -> int:
    return test_convolution.SHAPES.index(shape)


@cpu
@pytest.mark.usefixtures('with_onednn')
@pytest.mark.parametrize(
    'case',
    [
        index(15, 13, 8, 8, 6, 3, 2, 1),
        index(9, 11, 4, 4, 12, 3, 1, 2),
        index(8, 8, 32, 64, 2, 3, 1, 1),
        index(8, 7, 4, 4, 32, 3, 1, 1),  # the kernel's gradient in a loop
        index(9, 8, 16, 8, 1, 1, 2, 1),
        index(5, 5, 7, 3, 4, 1, 2, 1),
        index(31, 29, 3, 16, 1, 7, 2, 1),
        index(7, 8, 72, 24, 1, 3, 1, 1),
    ],
)
def test_values_and_gradients_are_torchs(case: int) -> None:
    test_convolution.test_values_and_gradients_are_torchs(case)


@cpu
@pytest.mark.usefixtures('with_onednn')
@pytest.mark.parametrize('groups, grouped, kind', [(2, 0, 'bf16'), (32, 1, 'f32')])
def test_no_convolution_of_bfloat16_is_grouped(groups: int, grouped: int, kind: str) -> None:
    """Those oneDNN does not get; few groups are convolved apart, many in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 64)), 'bfloat16')
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64 // groups, 64)), 'bfloat16')

    def run(x: Array, kernel: Array) -> Array:
        return convolution.conv2d(x, kernel, padding=1, groups=groups)

    text = jax.jit(run).lower(x, kernel).as_text()
    assert text.count(f'feature_group_count = {groups}') == grouped
    assert all(f'x{kind}>' in line for line in text.splitlines() if 'stablehlo.convolution' in line)
    exact = run(x.astype('float32'), kernel.astype('float32'))
    assert jnp.abs(run(x, kernel).astype('float32') - exact).max() < 1e-2 * jnp.abs(exact).max()


@cpu
@pytest.mark.parametrize('name, train', [('resnext', False), ('res2net', False), ('resnest', True)])
def test_nets_compute_the_same(name: str, train: bool, request: pytest.FixtureRequest) -> None:
    model = build(ARCHS[name], num_classes=7)
    variables = random_variables(model)
    images = jax.random.normal(jax.random.key(0), (8, 48, 48, 3))
    expected = results(model, variables, images, train)
    request.getfixturevalue('with_onednn')
    # Where rounding moves a value over the edge of a ReLU, its gradient is another one.
    for found, wanted, near in zip(
        results(model, variables, images, train), expected, (1e-4, 1e-4, 1e-2), strict=True
    ):
        rounding = 1e-6 * max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(wanted))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert jnp.linalg.norm(one - other) <= near * jnp.linalg.norm(other) + rounding


@cpu
@pytest.mark.usefixtures('with_onednn')
def test_a_batch_norm_is_within_the_convolution_where_its_kernel_is_small() -> None:
    """Of one image of 32 pixels, maps are smaller than kernels from the first block on; of 32 images none."""
    model = build(ARCHS['resnext'], num_classes=7)
    variables = random_variables(model)

    def subtractions(n: int) -> int:
        """Of means, from maps."""
        text = jax.jit(model.apply).lower(variables, jnp.ones((n, 32, 32, 3))).as_text()
        return sum(f'tensor<{n}x' in line for line in text.splitlines() if 'stablehlo.subtract' in line)

    norms = sum('mean' in str(path[-1]) for path, _ in jax.tree.leaves_with_path(variables['batch_stats']))
    few, many = subtractions(32), subtractions(1)
    assert 0 < few < norms / 2 < many <= norms


@cpu
@pytest.mark.usefixtures('with_onednn')
@pytest.mark.parametrize('kind', ['resnext', 'res2net'])
@pytest.mark.parametrize('changed', [layers.Conv, layers.BatchNorm])
def test_what_is_changed_on_the_way_to_a_batch_norm_counts(kind: str, changed: type[nn.Module]) -> None:
    """The convolution is not computed again of its own input: it may have been replaced, or its result."""
    model = build(ARCHS[kind], num_classes=7)
    variables = random_variables(model)
    images = jnp.ones((32, 32, 32, 3))

    def zeroed(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        inside = isinstance(context.module, changed) and 'layer1' in context.module.path
        if not inside or context.method_name != '__call__':
            return call(*args, **kwargs)
        if changed is layers.Conv:
            return jnp.zeros_like(call(*args, **kwargs))
        return call(jnp.zeros_like(args[0]), *args[1:], **kwargs)

    def run(variables: Any) -> Array:
        with nn.intercept_methods(zeroed):
            return model.apply(variables, images)

    found, expected = jax.jit(run)(variables), run(variables)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert jnp.abs(found - model.apply(variables, images)).max() > 1e-3


def grouped_gradient(stride: int) -> str:
    """The program of the gradient of a grouped convolution's map."""

    def run(x: Array) -> Array:
        return convolution.conv2d(x, kernel, stride=stride, padding=1, groups=32).sum()

    kernel = jnp.ones((3, 3, 2, 64))
    return jax.jit(jax.grad(run)).lower(jnp.ones((1, 8, 8, 64))).as_text()


@cpu
@pytest.mark.usefixtures('with_onednn')
def test_no_gradient_of_a_map_is_grouped_where_the_kernel_moves_by_two() -> None:
    """Of those oneDNN gets none, and XLA's own take three times as long as packs."""
    assert 'lhs_dilate = [2, 2]' in grouped_gradient(2)
    assert 'feature_group_count = 32' in grouped_gradient(1)
    lines = grouped_gradient(2).splitlines()
    assert not any('lhs_dilate = [2, 2]' in line and 'feature_group_count = 32' in line for line in lines)


@cpu
def test_a_mesh_that_is_set_is_none_of_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for one device, whatever devices the caller's mesh has."""
    monkeypatch.setenv('XLA_FLAGS', onednn.FLAGS)
    platforms._has_onednn.cache_clear()
    with jax.set_mesh(jax.make_mesh((2,), ('data',), devices=jax.local_devices()[:2])):
        assert platforms.by_onednn('float32') in (True, False)
    platforms._has_onednn.cache_clear()


@pytest.mark.parametrize(
    'flags, expected',
    [
        (f'{onednn.ASKED}=true', True),
        (f'--xla_cpu_enable_fast_math=false {onednn.ASKED}', True),
        (f'{onednn.ASKED}=1', True),
        (f'{onednn.ASKED}=true {onednn.ASKED}=False', False),
        (f'{onednn.ASKED}s=true', False),
        ('', False),
    ],
)
def test_asked_for_however_it_is_written(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XLA_FLAGS', flags)
    assert onednn.asked_for_onednn() == expected


def asked(
    monkeypatch: pytest.MonkeyPatch, jaxlib: str, there: tuple[str, ...] = (), **environment: str
) -> str:
    """XLA_FLAGS after the flags were asked for, with that jaxlib, plug-ins and environment."""
    monkeypatch.setattr(onednn.util, 'find_spec', lambda name: name if name in there else None)
    monkeypatch.setattr(onednn.metadata, 'entry_points', lambda group: ())
    monkeypatch.setattr(onednn.metadata, 'version', lambda name: jaxlib)
    monkeypatch.setattr(onednn.platform, 'machine', lambda: 'x86_64')
    monkeypatch.setattr(onednn.sys, 'platform', 'linux')
    for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'JAX_COMPILATION_CACHE_DIR'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    onednn.ask_for_onednn()
    return os.environ.get('XLA_FLAGS', '')


@pytest.mark.parametrize('jaxlib, expected', [('0.10.2', ''), ('0.11.0', onednn.FLAGS), ('0.13.0', '')])
def test_flags_are_for_versions_that_are_known(
    jaxlib: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(monkeypatch, jaxlib, JAX_PLATFORMS='cpu') == expected


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = '--xla_cpu_experimental_ynn_fusion_type='
    assert asked(monkeypatch, '0.12.0', JAX_PLATFORMS='cpu', XLA_FLAGS=own) == own
    kept = asked(monkeypatch, '0.12.0', JAX_PLATFORMS='cpu', JAX_COMPILATION_CACHE_DIR='compiled')
    assert kept == ''
    assert asked(monkeypatch, '0.12.0', JAX_PLATFORMS='cpu', XLA_FLAGS='flags.txt') == 'flags.txt'  # a file
    other = '--xla_force_host_platform_device_count=2'
    expected = f'{other} {onednn.FLAGS}'
    assert asked(monkeypatch, '0.12.0', JAX_PLATFORMS='cpu', XLA_FLAGS=other) == expected


def test_another_xla_is_not_given_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in's version may not know them; where only the CPU is used, that of GPUs is not loaded."""
    assert asked(monkeypatch, '0.12.0') == onednn.FLAGS
    assert asked(monkeypatch, '0.12.0', ('jax_plugins',)) == ''
    assert asked(monkeypatch, '0.12.0', ('jax_plugins',), JAX_PLATFORMS='cpu') == onednn.FLAGS
    # `--plan` loads it on any machine.
    assert asked(monkeypatch, '0.12.0', ('libtpu',), JAX_PLATFORMS='cpu') == ''


@cpu
def test_flags_alone_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA read its flags long ago: a program of this process has what it had before."""
    if onednn.asked_for_onednn():
        pytest.skip('this process was started with the flags')
    assert not platforms.by_onednn('float32')
    monkeypatch.setenv('XLA_FLAGS', onednn.FLAGS)
    platforms._has_onednn.cache_clear()
    assert not platforms.by_onednn('float32')
    platforms._has_onednn.cache_clear()


@cpu
@pytest.mark.parametrize('flags', ['', onednn.FLAGS])
def test_programs_with_onednn_are_not_kept(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA fails to write them."""
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    monkeypatch.setenv('FLAXNETS_HOME', str(tmp_path))
    monkeypatch.setenv('XLA_FLAGS', flags)
    chosen: list[str] = []
    monkeypatch.setattr(jax.config, 'update', lambda name, value: chosen.append(name))
    keep_compiled(on_cpus=True)
    assert chosen == ([] if flags else ['jax_compilation_cache_dir'])


@pytest.mark.parametrize(
    'module, arguments, asks',
    [
        ('flaxnets', ['predict', 'nowhere.jpg', '--model', 'nowhere'], 1),
        ('flaxnets', ['recipes'], 0),  # needs no JAX
        ('flaxnets', ['export', 'nowhere', '--out', 'x.onnx'], 0),  # runs elsewhere
        ('train', ['eval', '--model', 'nowhere', '--data', 'digits'], 1),
    ],
)
def test_commands_that_compute_ask(module: str, arguments: list[str], asks: int) -> None:
    code = f"""
import contextlib, runpy, sys
from flaxnets import command_line, onednn
command_line.start_with_huge_pages = lambda: None
onednn.ask_for_onednn = lambda: print('asked')
sys.argv = ['', *{arguments!r}]
with contextlib.suppress(SystemExit):
    runpy.run_module({module!r}, run_name='__main__')
"""
    command = [sys.executable, '-c', code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines().count('asked') == asks


@cpu
def test_commands_get_onednn_where_jaxlib_has_it(tmp_path: Path) -> None:
    """In a process of their own: the flags are known to this jaxlib, and heeded where that is expected."""
    code = """
import sys
import flaxnets.__main__
sys.argv = ['flaxnets', 'predict', 'nowhere.jpg', '--model', 'nowhere']
assert flaxnets.__main__.command() == 1
from flaxnets.nets import platforms
import jax.numpy as jnp
print(platforms.by_onednn(jnp.float32), platforms.by_onednn(jnp.float64))
"""
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f'{HERE} False'


@cpu
@pytest.mark.skipif(not HERE, reason='jaxlib has no oneDNN, or is not known')
def test_kinds_of_blocks_with_onednn(tmp_path: Path) -> None:
    """As `test_modes` tries other modes of the environment: forward, gradient and step of each kind."""
    kinds = ['resnext', 'res2net', 'resnest']
    environment: dict[str, str] = {'XLA_FLAGS': onednn.FLAGS}
    test_modes.test_modes_of_the_environment(tmp_path, environment, kinds)

"""conv2d against torch's: values and both gradients, every form, every platform's program."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export, lax

from flaxnets.nets import convolution
from flaxnets.nets.convolution import conv2d
from flaxnets.nets.pooling import max_pool_3x3

# height, width, input channels per group, output channels per group, groups, kernel, stride, dilation. Mostly
# few groups, since each pack of them is compiled on its own: two packs or three, or packs of one.
SHAPES = [
    (14, 14, 4, 4, 8, 3, 1, 1),  # ResNeXt 32x4d, its four stages
    (15, 13, 8, 8, 6, 3, 2, 1),
    (14, 14, 16, 16, 3, 3, 1, 1),
    (7, 7, 32, 32, 2, 3, 2, 1),
    (9, 11, 4, 4, 12, 3, 1, 2),  # dilated, as output_stride 16 and 8 make them
    (9, 11, 6, 6, 4, 3, 1, 4),
    (13, 13, 4, 4, 8, 3, 2, 1),  # Res2NeXt
    (8, 8, 32, 64, 2, 3, 1, 1),  # ResNeSt: radix 2
    (7, 9, 20, 40, 4, 3, 1, 1),  # radix 4
    (7, 7, 24, 24, 3, 3, 1, 1),
    (10, 10, 1, 1, 32, 3, 1, 1),  # depthwise
    (10, 10, 5, 3, 6, 5, 1, 1),  # no power of two
    (8, 7, 4, 4, 32, 3, 1, 1),  # as many packs as are differentiated in a loop
    (7, 9, 16, 24, 9, 3, 2, 1),
    (5, 5, 32, 32, 8, 3, 1, 2),
    (9, 9, 16, 8, 1, 1, 1, 1),  # pointwise
    (9, 8, 16, 8, 1, 1, 2, 1),
    (1, 1, 20, 40, 2, 1, 1, 1),  # pointwise, grouped: the gate of split attention
    (5, 5, 7, 3, 4, 1, 2, 1),
    (31, 29, 3, 16, 1, 7, 2, 1),  # the stem
    (9, 11, 24, 32, 1, 3, 1, 2),  # wide enough for gradients as products: a single one
    (8, 9, 20, 40, 1, 5, 1, 1),
    (7, 8, 72, 24, 1, 3, 1, 1),  # one for each pixel of the kernel
    (10, 9, 32, 24, 1, 3, 2, 1),
    (9, 8, 3, 8, 1, 3, 2, 2),  # few inputs: gradients row by row
]


@pytest.mark.parametrize('case', range(len(SHAPES)))
def test_values_and_gradients_are_torchs(case: int) -> None:
    height, width, inputs, outputs, groups, k, stride, dilation = SHAPES[case]
    batch = (3, 1)[case % 2]
    padding = dilation * (k - 1) // 2
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, height, width, inputs * groups)).astype(np.float32)
    kernel = rng.normal(size=(k, k, inputs, outputs * groups)).astype(np.float32)
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    a = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    b = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))).requires_grad_()
    expected = torch.nn.functional.conv2d(a, b, **geometry)
    dy = torch.from_numpy(rng.normal(size=expected.shape).astype(np.float32))
    expected.backward(dy)

    y, dx, dkernel = with_gradients(partial(conv2d, **geometry))(x, kernel, dy.numpy().transpose(0, 2, 3, 1))
    near(y, expected.detach().numpy().transpose(0, 2, 3, 1))
    near(dx, a.grad.numpy().transpose(0, 2, 3, 1))
    near(dkernel, b.grad.numpy().transpose(2, 3, 1, 0))


def with_gradients(function: Any) -> Any:
    """(x, kernel, dy) -> y, dx, dkernel in one program: run one by one, each operation is compiled alone."""

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(function, x, kernel)
        return y, *pullback(dy)

    return run


def near(ours: Any, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours, np.float32) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize(
    'shape', [(8, 8, 4, 4, 8, 3, 1, 1), (8, 8, 16, 8, 1, 1, 1, 1)], ids=['packed', 'pointwise']
)
def test_half_precision(shape: tuple[int, ...], dtype: str) -> None:
    height, width, inputs, outputs, groups, k, _, _ = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, inputs * groups)), dtype)
    kernel = jnp.asarray(rng.normal(size=(k, k, inputs, outputs * groups)), dtype)
    geometry = dict(padding=(k - 1) // 2, groups=groups)
    y = conv2d(x, kernel, **geometry)
    assert y.dtype == dtype
    maps, weights = (torch.from_numpy(np.asarray(t, np.float32)) for t in (x, kernel))
    expected = torch.nn.functional.conv2d(maps.permute(0, 3, 1, 2), weights.permute(3, 2, 0, 1), **geometry)
    near(y, expected.permute(0, 2, 3, 1).numpy(), 2e-2)


GROUPED = partial(conv2d, padding=1, groups=8)


def grouped_arguments() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 6, 6, 32)), 'float32'), jnp.asarray(
        rng.normal(size=(3, 3, 4, 32)), 'float32'
    )


def test_vmap_and_remat() -> None:
    x, kernel = grouped_arguments()
    xs = np.stack([x, 2 * x, -x])
    mapped = jax.jit(jax.vmap(GROUPED, (0, None)))(xs, kernel)
    np.testing.assert_allclose(mapped[1], GROUPED(xs[1], kernel), rtol=1e-4, atol=1e-4)

    def loss(f: Any) -> Any:
        return jax.jit(jax.grad(lambda x, kernel: (f(x, kernel) ** 2).sum(), (0, 1)))

    for a, b in zip(loss(GROUPED)(x, kernel), loss(jax.checkpoint(GROUPED))(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_each_platform_has_its_own_form() -> None:
    def program(platform: str) -> str:
        return str(export.export(jax.jit(GROUPED), platforms=[platform])(*grouped_arguments()).mlir_module())

    assert 'feature_group_count = 8' in program('cuda')
    for platform, convolutions in (('tpu', 1), ('cpu', 2)):  # all eight groups in a pack; four of them
        assert 'feature_group_count = 8' not in program(platform)
        assert program(platform).count('stablehlo.convolution') == convolutions


@pytest.mark.parametrize('width, convolutions', [(64, 1), (128, 2)])
def test_wide_groups_are_no_groups_on_tpus(width: int, convolutions: int) -> None:
    """Two groups as one convolution where that fills the matrix unit, else as two."""
    shapes = [jax.ShapeDtypeStruct(shape, 'bfloat16') for shape in ((2, 8, 8, 2 * width), (3, 3, width, 256))]
    program = str(export.export(jax.jit(partial(conv2d, groups=2)), platforms=['tpu'])(*shapes).mlir_module())
    assert program.count('stablehlo.convolution') == convolutions
    assert 'feature_group_count = 2' not in program


@pytest.mark.parametrize(
    'inputs, outputs, groups', [(4, 4, 32), (4, 6, 64), (32, 64, 2), (48, 8, 6), (256, 3, 2)]
)
def test_the_form_of_tpus_is_the_same(
    inputs: int, outputs: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on this platform: one pack, several, packs of one group; narrow groups and wide ones."""
    monkeypatch.setattr(convolution, 'by_platform', lambda default, **forms: forms['tpu'])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, inputs * groups)), 'float32')
    kernel = jnp.asarray(rng.normal(size=(3, 3, inputs, outputs * groups)), 'float32')
    native = partial(convolution._native, geometry=convolution.Geometry(2, 1, 1), groups=groups)
    y = native(x, kernel)
    expected = with_gradients(native)(x, kernel, y)
    form = partial(conv2d.__wrapped__, stride=2, padding=1, dilation=1, groups=groups)
    found = with_gradients(form)(x, kernel, y)
    for ours, theirs in zip(found, expected, strict=True):
        near(ours, np.asarray(theirs))


def test_one_export_serves_every_platform() -> None:
    x, kernel = grouped_arguments()
    exported = export.export(jax.jit(GROUPED), platforms=['cpu', 'tpu', 'cuda'])(x, kernel)
    expected = lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=8
    )
    near(exported.call(x, kernel), np.asarray(expected))


@pytest.mark.parametrize('height, width', [(1, 1), (2, 3), (7, 8), (12, 12)])
def test_max_pool_and_its_gradient_are_torchs(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, (5, height, width, 5)).astype(np.float32)  # ties everywhere
    odd = rng.random((3, height, width, 5))
    x[2:][odd < 0.2] = np.nan
    x[2:][odd > 0.5] = -np.inf
    x[2:][odd > 0.9] = np.inf
    x[3], x[4] = -np.inf, np.nan
    a = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    expected = torch.nn.functional.max_pool2d(a, 3, 2, 1)
    dy = torch.from_numpy(rng.normal(size=expected.shape).astype(np.float32))
    expected.backward(dy)

    @jax.jit
    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(max_pool_3x3, x)
        return y, *pullback(dy)

    y, dx = run(x, dy.numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
    near(dx, a.grad.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize('groups, channels', [(1, 24), (8, 128)])
@pytest.mark.parametrize('vmaps', [0, 1, 2])
def test_tangents_of_pools_wide_kernels_and_many_packs(vmaps: int, groups: int, channels: int) -> None:
    """A convolution is linear in both arguments; a maximum's tangent along its argument is the maximum."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*(2,) * vmaps, 2, 5, 6, channels)), 'float32')
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels // groups, 32)), 'float32')

    def maxima(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(max_pool_3x3, (x,), (x,))

    def products(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, tangent = jax.jvp(partial(conv2d, padding=1, groups=groups), (x, kernel), (x, kernel))
        return y, tangent / 2

    for function in (maxima, products):
        for _ in range(vmaps):
            function = jax.vmap(function)
        y, tangent = jax.jit(function)(x)
        near(tangent, np.asarray(y))


def test_the_other_form_of_the_max_pool_is_the_same() -> None:
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 9, 8, 5)), 'float32')
    exported = export.export(jax.jit(max_pool_3x3), platforms=['tpu'])(x)
    assert 'reduce_window' in str(exported.mlir_module())
    expected = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    np.testing.assert_array_equal(max_pool_3x3(x), expected)


@pytest.mark.parametrize('nest', [lambda f: f, jax.jit, jax.checkpoint], ids=['plain', 'jit', 'remat'])
@pytest.mark.parametrize('groups, twice', [(8, False), (8, True), (32, False)])
def test_gradients_are_compiled_to_convolutions_that_a_cpu_runs_fast(
    nest: Any, groups: int, twice: bool
) -> None:
    """All in the one layout that has a fast form, none grouped (see `by_platform`), also in a loop."""

    def net(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return max_pool_3x3(conv2d(x, kernel, padding=1, groups=groups))

    def gradients(x: jax.Array, kernel: jax.Array) -> Any:
        return jax.grad(lambda x, kernel: nest(net)(x, kernel).sum(), (0, 1))(x, kernel)

    def descent(x: jax.Array, kernel: jax.Array) -> Any:
        def step(both: Any, _: None) -> Any:
            return jax.tree.map(jnp.subtract, both, gradients(*both)), None

        return lax.scan(step, (x, kernel), length=3)

    shapes = [
        jax.ShapeDtypeStruct(shape, 'float32') for shape in ((2, 6, 6, 4 * groups), (3, 3, 4, 4 * groups))
    ]
    program = jax.jit(descent if twice else gradients).lower(*shapes).compile().as_text()
    layouts = re.findall(r' convolution\(.*dim_labels=(\S+?),', program)
    assert layouts and set(layouts) == {'b01f_01io->b01f'}
    assert 'feature_group_count' not in program


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='reads a program for CPUs')
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('inputs, outputs, groups', [(3, 32, 1), (24, 24, 1), (24, 48, 2), (32, 32, 8)])
def test_no_convolution_of_a_cpu_is_left_to_one_core(
    inputs: int, outputs: int, groups: int, stride: int
) -> None:
    """XLA wraps those that go to YNNPACK into fusions; those for Eigen stand by themselves."""
    shapes = [(2, 12, 12, inputs * groups), (3, 3, inputs, outputs * groups)]

    def convolutions(function: Any) -> list[str]:
        program = jax.jit(function).lower(*[jnp.ones(shape) for shape in shapes]).compile().as_text()
        fused = re.findall(r'^%fused_computation\S* \(.*?^}', program, re.M | re.S)
        return [text for text in fused if ' convolution(' in text]

    def gradient(x: jax.Array, kernel: jax.Array) -> Any:
        return jax.grad(lambda x: (ours(x, kernel) ** 2).sum())(x)

    ours = partial(conv2d, stride=stride, padding=1, groups=groups)
    assert not convolutions(ours) and not convolutions(gradient)
    native = partial(convolution._native, geometry=convolution.Geometry(stride, 1, 1), groups=groups)
    assert convolutions(native)  # else there is nothing to prevent


@pytest.mark.parametrize(
    'rows, kernel, stride, dilation',
    [
        (28, (3, 3, 8, 17), 1, 2),
        (29, (3, 3, 8, 17), 1, 1),  # more rows than Eigen is faster with
        (56, (3, 3, 8, 17), 2, 2),  # of the result
        (28, (3, 3, 16, 16), 1, 1),  # Eigen's anyhow
        (28, (7, 7, 3, 64), 2, 1),  # the stem
        (28, (3, 3, 3, 64), 2, 2),  # a deep stem
    ],
)
def test_which_convolutions_eigen_gets_since_jaxlib_0_11(
    rows: int, kernel: tuple[int, ...], stride: int, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, 'CPU_EIGEN', 28)
    dense = partial(convolution._dense, geometry=convolution.Geometry(stride, kernel[0] // 2, 1))
    jaxpr = jax.make_jaxpr(dense)(jnp.zeros((1, rows, 9, kernel[2])), jnp.zeros(kernel))
    assert jaxpr.eqns[-1].params['lhs_dilation'] == (dilation, 1)


def test_a_narrow_kernels_gradient_is_one_product() -> None:
    def products(channels: int) -> int:
        shapes = [jax.ShapeDtypeStruct(shape, 'float32') for shape in ((2, 9, 9, 24), (3, 3, 24, channels))]

        def gradient(x: jax.Array, kernel: jax.Array) -> Any:
            return jax.grad(lambda kernel: conv2d(x, kernel, padding=1).sum())(kernel)

        exported = export.export(jax.jit(gradient), platforms=['cpu'])(*shapes)
        return str(exported.mlir_module()).count('stablehlo.dot_general')

    assert products(64) == 1
    assert products(65) == 9


def test_forward_mode() -> None:
    x, kernel = grouped_arguments()
    _, tangent = jax.jit(lambda x, kernel: jax.jvp(lambda x: GROUPED(x, kernel), (x,), (x,)))(x, kernel)
    np.testing.assert_allclose(tangent, GROUPED(x, kernel), rtol=1e-5, atol=1e-5)

"""What a program for CPUs keeps and what it computes again, by the compiled program itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from jax import Array, export

from benchmarks.forms import form
from benchmarks.measure import as_numbers
from flaxnets.nets import layers
from flaxnets.nets.arch import Arch
from flaxnets.nets.convolution import Packs
from flaxnets.nets.layers import BatchNorm, Span, relu
from flaxnets.nets.platforms import computed_once, linear_once
from flaxnets.nets.resnet import abstract_variables, build

cpu = pytest.mark.skipif(jax.default_backend() != 'cpu', reason='reads a program for CPUs')
MAP = (2, 8, 8, 32)


def chain(keep: bool, x: Array) -> Array:
    """Three sums, each of which is used twice, with a product behind each."""
    y = x
    for i in range(3):
        y = jnp.maximum(x * (i + 2.0) + y, 0)
        y = computed_once(y) if keep else y
    return y.reshape(-1, 32) @ jnp.ones((32, 8)) + jnp.maximum(y - 1, 0).reshape(-1, 32) @ jnp.ones((32, 8))


def maxima(keep: bool) -> int:
    x = jnp.ones(MAP)
    return jax.jit(chain, static_argnums=0).lower(keep, x).compile().as_text().count(' maximum(')


@cpu
def test_a_map_is_computed_once_however_many_use_it() -> None:
    assert maxima(keep=True) == 4  # one for each line of the code
    assert maxima(keep=False) > 4  # else there is nothing to prevent


def test_keeping_changes_no_value_and_no_derivative() -> None:
    x = jax.random.normal(jax.random.key(0), MAP)
    plain, kept = (jax.value_and_grad(lambda x, k=k: chain(k, x).sum())(x) for k in (False, True))
    assert jnp.allclose(plain[0], kept[0], rtol=1e-6)
    assert jnp.allclose(plain[1], kept[1], rtol=1e-6)
    assert jax.jvp(computed_once, (x,), (2 * x,))[1].tolist() == (2 * x).tolist()
    assert (jax.vmap(computed_once)(x) == x).all()


@cpu
@pytest.mark.parametrize('keep, calls', [(computed_once, 0), (linear_once, 1)])
def test_of_linear_once_the_gradient_is_kept_too(keep: Callable[[Array], Array], calls: int) -> None:
    gradient = jax.jit(jax.grad(lambda x: (keep(x) * x.shape[0]).sum()))
    assert gradient.lower(jnp.ones(MAP)).as_text().count('inlineable = "false"') == calls
    assert (gradient(jnp.ones(MAP)) == MAP[0]).all()


@cpu
def test_a_batch_norm_keeps_no_map_beside_its_own_for_the_gradient() -> None:
    """The map minus its mean, once for the statistics and once for the gradient, would be two more."""
    norm = BatchNorm()
    x = jnp.ones((4, 32, 32, 64))
    variables = norm.init(jax.random.key(0), x, train=False)

    def loss(params: FrozenDict, x: Array, w: Array) -> Array:
        maps = (x.reshape(-1, 64) @ w).reshape(x.shape)
        y, _ = norm.apply({**variables, 'params': params}, maps, train=True, mutable=['batch_stats'])
        for _ in range(2):  # what comes after has a peak of its own, while the maps are kept
            y = (jax.nn.gelu(relu(y)).reshape(-1, 64) @ w).reshape(x.shape)
        return (y**2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    memory = gradient.lower(variables['params'], x, jnp.ones((64, 64))).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 6.5 * x.nbytes


@pytest.mark.parametrize(
    'train, parts, dtype',
    [(False, 1, 'float32'), (True, 1, 'float32'), (True, 2, 'float32'), (True, 1, 'bfloat16')],
)
def test_batch_norm_by_shares_and_packs_is_the_same(
    train: bool, parts: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of TPUs, run on this platform, beside a BatchNorm with a ReLU behind it."""
    jax.clear_caches()  # of what was traced in another form
    monkeypatch.setattr(layers, 'by_platform', lambda default, **forms: forms.get('tpu', default))
    keys = list(jax.random.split(jax.random.key(0), 5))
    names = {'params': ('scale', 'bias'), 'batch_stats': ('mean', 'var')}
    variables = {
        kind: {name: jax.random.uniform(keys.pop(), (12,)) for name in some} for kind, some in names.items()
    }
    x = jax.random.normal(keys.pop(), (4, 5, 6, 12), dtype)
    settings = {'span': Span(parts=parts), 'dtype': dtype}
    near = {'float32': 1e-5, 'bfloat16': 1e-2}[dtype]

    def differentiated(norm: BatchNorm) -> object:
        def loss(params: dict[str, Array], x: Array) -> tuple[Array, tuple[Array, FrozenDict]]:
            y, new = norm.apply({**variables, 'params': params}, x, train, mutable=['batch_stats'])
            y = y if norm.relu else relu(y)
            return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables['params'], x)

    expected = differentiated(BatchNorm(**settings))
    for shares, packs in ((1, 1), (3, 2)):
        parted = {'shares': Packs(tpu=shares), 'packs': Packs(tpu=packs)}
        found = differentiated(BatchNorm(relu=True, **parted, **settings))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(as_numbers(one), as_numbers(other), rtol=near, atol=near)
    jax.clear_caches()


def test_accelerators_take_statistics_pack_by_pack() -> None:
    x = jax.ShapeDtypeStruct((4, 8, 8, 12), jnp.bfloat16)

    norm = BatchNorm(packs=Packs(tpu=3, gpu=2))
    variables = jax.eval_shape(lambda x: norm.init(jax.random.key(0), x, False), x)

    def program(platform: str) -> str:
        call = jax.jit(partial(norm.apply, train=True, mutable=['batch_stats']))
        return str(export.export(call, platforms=[platform])(variables, x).mlir_module())

    for platform, packs, channels in (('tpu', 3, 4), ('cuda', 2, 6), ('rocm', 2, 6), ('cpu', 1, 12)):
        sums = re.findall(rf'stablehlo.reduce.*tensor<4x8x8x{channels}xf32>', program(platform))
        assert len(sums) == 2 * packs  # of values and of squares


@pytest.mark.parametrize(
    'arch, whole, shares',
    [
        # The groups of the 3x3 convolutions are packed to 80 channels, at most 128.
        (Arch('resnext', (1, 1, 1, 1), cardinality=32, base_width=5), set(), {80}),
        (Arch('res2net', (1, 1, 1, 1), base_width=26, scale=3), {78, 156, 312, 624}, set()),
        # Three splits of 192 and of 384 channels, and three packs of 128. Other maps have the smaller sizes.
        (Arch('resnest', (1, 1, 1, 1), radix=3, base_width=48), {576, 1152}, {128}),
    ],
)
def test_tpus_normalise_no_map_whole_that_is_split(arch: Arch, whole: set[int], shares: set[int]) -> None:
    """`whole` are the channels of the ReLUs that TPUs do not have, `shares` of those that they alone have."""
    ours = {platform: widths(arch, platform) for platform in ('cpu', 'tpu')}
    assert ours['cpu'] - ours['tpu'] == whole
    assert ours['tpu'] - ours['cpu'] == shares
    with form('plain'):  # of the benchmarks, whatever was traced before
        assert widths(arch, 'tpu') == ours['cpu']


def widths(arch: Arch, platform: str) -> set[int]:
    """The numbers of channels of a net's ReLUs."""
    model = build(arch)
    shapes = abstract_variables(model), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    run = jax.jit(lambda variables, images: model.apply(variables, images))
    program = str(export.export(run, platforms=[platform])(*shapes).mlir_module())
    return set(map(int, re.findall(r'stablehlo.maximum .*x(\d+)xf32>', program)))

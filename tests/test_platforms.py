"""What a program for CPUs keeps and what it computes again, by the compiled program itself."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict
from jax import Array

from flaxnets.nets.layers import BatchNorm, relu
from flaxnets.nets.platforms import computed_once, linear_once

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

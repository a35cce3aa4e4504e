"""The benchmarks' GPU kernel, interpreted: the same values as XLA's programs, and Triton's code for GPUs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels

TILES = (2 * kernels.ROWS, 2 * kernels.INPUTS, 2 * kernels.OUTPUTS)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_kernel_computes_what_three_operations_do(dtype: str) -> None:
    layer = kernels.random_layer(*TILES, dtype)
    y, sums, squares = kernels.fused(layer, interpret=True)
    wide = [np.asarray(v, np.float64) for v in layer]
    normalised = np.maximum((wide[0] - wide[1]) * wide[2] + wide[3], 0)
    near = {'float32': 1e-5, 'bfloat16': 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), normalised @ wide[4], rtol=near, atol=near)
    assert y.dtype == dtype and sums.dtype == squares.dtype == jnp.float32
    # The statistics are those of the rounded result.
    apart = np.asarray(y, np.float64) - wide[5]
    np.testing.assert_allclose(sums, apart.sum(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(squares, (apart**2).sum(0), rtol=1e-4)


def test_both_forms_for_xla_compute_the_same() -> None:
    layer = kernels.random_layer(*TILES, 'float32')
    product = kernels.plain(layer)
    convolution = kernels.plain(layer, product=partial(kernels.convolved, side=8))
    for one, other in zip(product, convolution, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_map_that_is_not_in_tiles_is_refused(axis: int) -> None:
    sizes = [size + 8 * (i == axis) for i, size in enumerate(TILES)]
    with pytest.raises(ValueError, match=f'{sizes[axis]} .*pad the map'):
        kernels.fused(kernels.random_layer(*sizes, 'float32'))


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason='JAX lowers for Triton only where there is a GPU, from 0.11 on'
)
@pytest.mark.parametrize('shape', kernels.SHAPES)
def test_every_size_is_lowered_to_triton(shape: str) -> None:
    side, inputs, outputs = kernels.SHAPES[shape]
    layer = jax.eval_shape(partial(kernels.random_layer, 128 * side**2, inputs, outputs, jnp.bfloat16))
    text = jax.jit(kernels.fused).trace(layer).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('__gpu$xla.gpu.triton') == 1

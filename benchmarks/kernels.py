"""A kernel for GPUs: normalise, ReLU, 1x1 convolution, and its statistics, in one pass (Pallas, Triton).

Between two convolutions of a training step there is a BatchNorm. XLA on GPUs writes the normalised map to
memory for the 1x1 convolution, whose result it then reads once more for the next BatchNorm's sums. This
kernel normalises what it has just read, and sums what it is about to write. The map is read from memory once
if the cache holds its rows for all tiles of outputs, and the result is written once.

`benchmarks/gpu.py` times it beside XLA's own program. On an H200 that also compiled other things it was the
slower one at every size, so that the nets do not use it. Without a GPU `interpret=True` runs it, and JAX up
to 0.10 lowers it to Triton's code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float

from flaxnets.nets.convolution import conv2d

ROWS, OUTPUTS, INPUTS = 128, 128, 32  # of the tiles of the result and of the sum over inputs
# Side in pixels, input and output channels of the last 1x1 convolution in each stage of ResNeXt-50.
SHAPES = {
    '56x56, 128 -> 256': (56, 128, 256),
    '28x28, 256 -> 512': (28, 256, 512),
    '14x14, 512 -> 1024': (14, 512, 1024),
    '7x7, 1024 -> 2048': (7, 1024, 2048),
}

Result = tuple[Float[Array, 'm o'], Float[Array, ' o'], Float[Array, ' o']]


class Layer(NamedTuple):
    """A map and what is done to it.

    Attributes:
      x: the map, of the net's dtype, its pixels in rows.
      mean, factor, offset: of the BatchNorm before the convolution, float32.
      kernel: of the 1x1 convolution, of the dtype of x.
      shift: near the mean of the result, float32. Of the sums with it the variance loses no digits
        (`BatchNorm._batch_statistics`).
    """

    x: Float[Array, 'm c']
    mean: Float[Array, ' c']
    factor: Float[Array, ' c']
    offset: Float[Array, ' c']
    kernel: Float[Array, 'c o']
    shift: Float[Array, ' o']


def plain(layer: Layer, *, product: Callable[[Array, Array], Array] = jnp.dot) -> Result:
    """y = relu((x - mean) * factor + offset) @ kernel, and the sums of y - shift and of its square.

    Args:
      product: of the normalised map and the kernel, `jnp.dot` or `convolved`.

    Returns:
      The product in the dtype of x, and the two sums over its rows in float32.
    """
    x, mean, factor, offset, kernel, shift = layer
    normalised = jnp.maximum((x.astype(jnp.float32) - mean) * factor + offset, 0).astype(x.dtype)
    y = product(normalised, kernel)
    apart = y.astype(jnp.float32) - shift
    return y, apart.sum(0), (apart * apart).sum(0)


def convolved(x: Float[Array, 'm c'], kernel: Float[Array, 'c o'], *, side: int) -> Float[Array, 'm o']:
    """x @ kernel as the nets compute it: a convolution of maps of `side` times `side` pixels."""
    return conv2d(x.reshape(-1, side, side, x.shape[1]), kernel[None, None]).reshape(x.shape[0], -1)


def fused(layer: Layer, *, warps: int = 4, interpret: bool = False) -> Result:
    """As `plain`, in one kernel.

    Args:
      warps: groups of 32 threads that compute a tile.
      interpret: run it on any platform, slowly.

    Raises:
      ValueError: the rows are no multiple of `ROWS`, the inputs none of `INPUTS` or the outputs of `OUTPUTS`.
    """
    (rows, inputs), outputs = layer.x.shape, layer.kernel.shape[1]
    if rows % ROWS or inputs % INPUTS or outputs % OUTPUTS:
        raise ValueError(
            f'{rows} x {inputs} x {outputs} is not in tiles of {ROWS} x {INPUTS} x {OUTPUTS}: pad the map'
        )
    across, down = outputs // OUTPUTS, rows // ROWS
    vector = pl.BlockSpec((inputs,), lambda j, i: (0,))
    y, sums, squares = pl.pallas_call(
        _tile,
        # The first number runs fastest on a GPU. So tiles of the same rows follow each other, and all but the
        # first of them find their rows in the cache.
        grid=(across, down),
        in_specs=[
            pl.BlockSpec((ROWS, inputs), lambda j, i: (i, 0)),
            *[vector] * 3,
            pl.BlockSpec((inputs, OUTPUTS), lambda j, i: (0, j)),
            pl.BlockSpec((OUTPUTS,), lambda j, i: (j,)),
        ],
        out_specs=[
            pl.BlockSpec((ROWS, OUTPUTS), lambda j, i: (i, j)),
            *[pl.BlockSpec((None, OUTPUTS), lambda j, i: (i, j))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, outputs), layer.x.dtype),
            # Each row of tiles has its own sums: added in one order, they are the same in every run.
            *[jax.ShapeDtypeStruct((down, outputs), jnp.float32)] * 2,
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
    )(*layer)
    return y, sums.sum(0), squares.sum(0)


def _tile(
    x: Any, mean: Any, factor: Any, offset: Any, kernel: Any, shift: Any, y: Any, sums: Any, squares: Any
) -> None:
    """One tile of the result; the arguments are references to memory."""

    def add(k: Array, total: Array) -> Array:
        part = pl.ds(k * INPUTS, INPUTS)
        normalised = (x[:, part].astype(jnp.float32) - mean[part]) * factor[part] + offset[part]
        normalised = jnp.maximum(normalised, 0).astype(x.dtype)
        return total + jnp.dot(normalised, kernel[part, :], preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, x.shape[1] // INPUTS, add, jnp.zeros((ROWS, OUTPUTS), jnp.float32))
    # The sums are those of what is written, as the next BatchNorm reads it.
    written = total.astype(y.dtype)
    y[...] = written
    apart = written.astype(jnp.float32) - shift[...]
    sums[...] = apart.sum(0)
    squares[...] = (apart * apart).sum(0)


def random_layer(rows: int, inputs: int, outputs: int, dtype: Any, seed: int = 0) -> Layer:
    """Random numbers, whose normalised map has a deviation of about 1."""
    keys = jax.random.split(jax.random.key(seed), 6)
    x = 3 * jax.random.normal(keys[0], (rows, inputs)) + 1
    mean = 1 + 0.1 * jax.random.normal(keys[1], (inputs,))
    offset = 0.5 * jax.random.normal(keys[2], (inputs,))
    factor = jax.random.uniform(keys[3], (inputs,), minval=0.2, maxval=0.5)
    kernel = jax.random.normal(keys[4], (inputs, outputs)) / inputs**0.5
    shift = 0.1 * jax.random.normal(keys[5], (outputs,))
    return Layer(x.astype(dtype), mean, factor, offset, kernel.astype(dtype), shift)

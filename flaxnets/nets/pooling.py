"""Pooling layers, equal to torch's in values and gradients. Maps are [N, H, W, C].

XLA's windowed reductions (`lax.reduce_window`) are fast on TPUs, and on GPUs for averages. On CPUs their
gradients are five to ten times as slow as the forms below, which add or compare maps that are shifted against
each other. On GPUs the gradient of the maximum would be a scatter with atomic additions, and need six more
maps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32

from .platforms import by_platform

GLOBAL_POOLS = ('avg', 'max', 'avgmax', 'catavgmax', '')


@jax.jit
def max_pool_3x3(x: Float[Array, 'n h w c']) -> Float[Array, 'n rows columns c']:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)`: [N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C].

    As in torch, the gradient goes to the first of several equal maxima in row-major order, and a window
    with a NaN gives NaN.
    """
    return by_platform(_shifted_maxima, tpu=_reduced_maxima)(x)


@partial(jax.jit, static_argnames='stride')
def avg_pool_3x3(x: Float[Array, 'n h w c'], stride: int) -> Float[Array, 'n rows columns c']:
    """`torch.nn.AvgPool2d(3, stride, padding=1)`: the zeros of the border count in the average."""
    window = ((3, 3), (stride, stride), ((1, 1), (1, 1)))
    sums, shifted_sums = (partial(form, window=window) for form in (_window_sums, _shifted_sums))
    return (by_platform(sums, cpu=shifted_sums)(_summable(x)) / 9).astype(x.dtype)


def avg_pool_shortcut(x: Float[Array, 'n h w c'], stride: int) -> Float[Array, 'n rows columns c']:
    """The 2x2 average pool of an `avg_down` shortcut.

    Stride 2 is `torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`: the last windows of an
    odd map average the pixels that exist. Stride 1, used where dilation replaces a stride, is timm's
    `AvgPool2dSame(2, 1)`: a row and a column of zeros are added at the end, and they count.
    """
    if stride == 1:
        sums = _window_sums(_summable(x), ((2, 2), (1, 1), ((0, 1), (0, 1))))
        return (sums / 4).astype(x.dtype)
    _, h, w, _ = x.shape
    # A side of one pixel is left as it is: XLA's fusions for CPUs (jaxlib 0.10.2) compute wrong sums of
    # windows that reach beyond it, if the images are few.
    size = (1 if h == 1 else 2, 1 if w == 1 else 2)
    window = (size, size, tuple((0, side - 1) for side in size))  # an even map's padding is in no window
    counts = _window_sums(jnp.ones((1, h, w, 1), jnp.float32), window)
    return (_window_sums(_summable(x), window) / counts).astype(x.dtype)


def _summable(x: Array) -> Array:
    """Half precision as float32, as torch sums it: it would round each sum, and float16 ends at 65504."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _window_sums(x: Array, window: Any) -> Array:
    """Sums over windows; `window` is (size, strides, padding with zeros), each for height and width."""
    size, strides, padding = window
    zero = np.zeros((), x.dtype)
    return lax.reduce_window(x, zero, lax.add, (1, *size, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0)))


def _shifted_sums(x: Array, window: Any) -> Array:
    """`_window_sums` as a sum of shifted maps."""
    (high, wide), strides, padding = window
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*sides, 0) for sides in padding), (0, 0, 0)))
    parts = [shifted(x, (i, j), (high, wide), strides) for i in range(high) for j in range(wide)]
    return sum(parts[1:], parts[0])


def shifted(
    x: Float[Array, 'n h w c'], place: tuple[int, int], size: tuple[int, int], strides: tuple[int, int]
) -> Float[Array, 'n rows columns c']:
    """The pixel at `place` of every window of that size, [N, rows, columns, C]; `x` is already padded."""
    n, h, w, channels = x.shape
    # With symbolic h and w the size must be the same expression as that of a convolution's output.
    (i, j), (high, wide), (down, across) = place, size, strides
    stop = (n, i + (h - high) // down * down + 1, j + (w - wide) // across * across + 1, channels)
    return lax.slice(x, (0, i, j, 0), stop, (1, down, across, 1))


def _even(x: Array) -> Array:
    """The map with an even number of rows and columns: a row or column of zeros is added at the end."""
    ends = [(0, 2 * ((side - 1) // 2 + 1) - side, 0) for side in x.shape[1:3]]
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def _reduced_maxima(x: Array) -> Array:
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


@jax.custom_jvp
def _shifted_maxima(x: Array) -> Array:
    """The maximum of nine shifted maps: 2 ms on a CPU, where `reduce_window` takes 9 (112x112x64)."""
    return _maxima(x)[0]


@_shifted_maxima.defjvp
def _shifted_maxima_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The tangent of a maximum is that of the pixel at its place.

    It is computed for blocks of 2x2 pixels, each of which lies in up to four windows. The gradient then is
    one pass over the map, without strides, and takes a tenth of the time of the gradient of nine maxima.
    """
    (x,), (dx,) = primals, tangents
    y, place = _maxima(x)
    # XLA would compute the places anew wherever they are used. It never repeats a division of integers,
    # since that is expensive.
    place = lax.div(3 * place, jnp.full_like(place, 3))
    n, rows, columns, channels = y.shape
    # One side after the other: with explicit sharding a reshape may split only one axis.
    blocks = _even(dx).reshape(n, rows, 2, 2 * columns, channels).reshape(n, rows, 2, columns, 2, channels)
    zero = jnp.zeros((), dx.dtype)
    dy = jnp.zeros_like(y)
    for down, across in np.ndindex(2, 2):  # the window of block (r + down, c + across)
        ahead = ((0, 0, 0), (-down, down, 0), (-across, across, 0), (0, 0, 0))
        met = lax.pad(place, jnp.full((), -1, place.dtype), ahead)
        # Where the block's pixels lie in that window. Row 0 of a block is row 1 of its own window; row 1 is
        # row 2 of its own window and row 0 of the next one.
        i, j = (np.arange(2) + 1 - 2 * step for step in (down, across))
        inside = (i[:, None] >= 0) & (j >= 0)
        expected = np.where(inside, 3 * i[:, None] + j, 9).astype(np.int32)[:, None, :, None]
        met = met[:, :, None, :, None] == expected[None, None]
        part = jnp.where(met, blocks, zero).sum((2, 4))
        dy += lax.pad(part, zero, ((0, 0, 0), (down, -down, 0), (across, -across, 0), (0, 0, 0)))
    return y, dy


def _maxima(
    x: Float[Array, 'n h w c'],
) -> tuple[Float[Array, 'n rows columns c'], Int32[Array, 'n rows columns c']]:
    """The maximum of each window, and its place in the window, 0 to 8 in row-major order."""
    _, h, w, _ = x.shape
    rows, columns = (h - 1) // 2 + 1, (w - 1) // 2 + 1  # `reduce_window`'s own expression, for symbolic h
    padding = ((0, 0, 0), (1, 2 * rows - h, 0), (1, 2 * columns - w, 0), (0, 0, 0))
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)
    shape = (1, rows, columns, 1)
    top, left = (lax.broadcasted_iota(jnp.int32, shape, axis) == 0 for axis in (1, 2))
    outside = {1: left, 3: top, 4: top & left}  # windows whose earlier places all lie in the padding
    y = shifted(x, (0, 0), (3, 3), (2, 2))
    where = jnp.zeros(y.shape, jnp.int32)
    for place in range(1, 9):
        z = shifted(x, divmod(place, 3), (3, 3), (2, 2))
        better = (z > y) | jnp.isnan(z)
        if place in outside:
            better = better | outside[place]
        y, where = jnp.where(better, z, y), jnp.where(better, place, where)
    return y, where


def global_pool(
    x: Float[Array, 'n h w c'], kind: str
) -> Float[Array, 'n features'] | Float[Array, 'n h w c']:
    """Pools a map to a vector, as timm's `SelectAdaptivePool2d` does.

    Args:
      x: the map [N, H, W, C].
      kind: 'avg', 'max', 'avgmax' (the mean of both), 'catavgmax' (both, one after the other) or ''.

    Returns:
      [N, C]; [N, 2C] for 'catavgmax', the map itself for ''.
    """
    if kind == '':
        return x
    if kind == 'avg':
        return x.mean((1, 2))
    if kind == 'max':
        return _maximum(x)
    average, maximum = x.mean((1, 2)), _maximum(x)
    if kind == 'avgmax':
        return 0.5 * (average + maximum)
    return jnp.concatenate([average, maximum], axis=-1)


def _maximum(x: Float[Array, 'n h w c']) -> Float[Array, 'n c']:
    """`torch.nn.AdaptiveMaxPool2d(1)`: the first of several equal maxima gets the gradient."""
    n, h, w, channels = x.shape
    x = x.reshape(n, h * w, channels)
    place = x.argmax(1, keepdims=True)
    return jnp.where(lax.broadcasted_iota(place.dtype, x.shape, 1) == place, x, 0).sum(1)

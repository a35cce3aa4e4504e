"""Convolution, grouped or not: equal to torch's, and fast on every platform.

GPUs run XLA's grouped convolution (`feature_group_count`), which is fast there. On CPUs it is slow, and the
gradient of its kernel slower still: a training step of ResNeXt-50 takes about thirty times as long as with
the forms below. The kernel's gradient of a dense convolution is two to three times too slow there as well.
On TPUs narrow groups leave most of the matrix unit idle, and grouping costs copies of whole maps.

`lax.platform_dependent` chooses the form within one program, exported ones included, at no cost at run time.
Where only the gradient of XLA's convolution is slow, the form computes XLA's convolution and has a derivative
of its own (`jax.custom_jvp`), which JAX transposes to the fast gradient and which works in every mode of
differentiation. `benchmarks/nets.py` measures CPUs and `benchmarks/gpu.py` GPUs; `benchmarks/tpu.py` reads
the estimates of the TPU's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from .platforms import by_platform
from .pooling import shifted

# Groups are packed into one dense convolution until it has this many input channels. Fewer channels leave
# the vector or matrix units idle; more are multiplications by zero. On a CPU, groups of 4 channels take 10 ms
# packed by four, 34 ms one by one and 105 ms as XLA's grouped convolution. A TPU's matrix unit is 128 wide.
CPU_CHANNELS, TPU_CHANNELS = 16, 128
# On a CPU, a kernel with more than so many weights per pixel gets its gradient as products of matrices. That
# takes half of XLA's time on maps of 28x28 and 56x56, and a third on 112x112.
CPU_TAP = 512


@partial(jax.jit, static_argnames=('stride', 'padding', 'dilation', 'groups'))  # equal layers are traced once
def conv2d(
    x: Float[Array, 'n h w c'],
    kernel: Float[Array, 'kh kw i o'],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, 'n rows columns o']:
    """`torch.nn.functional.conv2d` without a bias, with channels last and equal height and width settings.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C / groups, O], of the same dtype as `x`.
      stride, padding, dilation: in pixels, the same for height and width. So many zeros are added on
        each side.
      groups: number of contiguous groups of input channels, each of which makes O / groups output channels.

    Returns:
      [N, H', W', O] with H' = floor((H + 2 * padding - dilation * (kh - 1) - 1) / stride) + 1.
    """
    native = partial(_native, stride=stride, padding=padding, dilation=dilation, groups=groups)
    geometry: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    if kernel.shape[:2] == (1, 1) and padding == 0:
        forms = {'cpu': partial(_pointwise, stride=stride, groups=groups)}
    else:
        forms = {'cpu': partial(_dense, convolve=_convolution, channels=CPU_CHANNELS, **geometry)}
        if groups > 1:
            forms['tpu'] = partial(_dense, convolve=_undivided, channels=TPU_CHANNELS, **geometry)
    return by_platform(native, **forms)(x, kernel)


def _native(x: Array, kernel: Array, *, stride: int, padding: int, dilation: int, groups: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def _pointwise(x: Array, kernel: Array, *, stride: int, groups: int) -> Array:
    """A 1x1 convolution as a matrix product, which runs two to three times as fast on a CPU."""
    if stride > 1:
        n, h, w, channels = x.shape
        # As `x[:, ::stride, ::stride]`, but with symbolic h its size is the expression of a convolution.
        stop = (n, (h - 1) // stride * stride + 1, (w - 1) // stride * stride + 1, channels)
        x = lax.slice(x, (0, 0, 0, 0), stop, (1, stride, stride, 1))
    if groups == 1:
        # With flattened maps the kernel's gradient contracts one dimension. For three, XLA would transpose
        # copies of whole maps, which takes a quarter of a training step.
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
    n, h, w, channels = x.shape
    x = x.reshape(n, h, w, groups, channels // groups)
    kernel = kernel.reshape(channels // groups, groups, -1)
    return jnp.einsum('nhwgc,cgo->nhwgo', x, kernel).reshape(n, h, w, -1)


def _dense(
    x: Array,
    kernel: Array,
    *,
    convolve: Callable[[Array, Array, int, int, int], Array],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    channels: int,
) -> Array:
    """A grouped convolution as dense ones, each of several groups, with block-diagonal kernels."""
    geometry = (stride, padding, dilation)
    if groups == 1:
        return convolve(x, kernel, *geometry)
    packs = groups // _groups_in_pack(kernel.shape[2], groups, channels)
    kernels = jnp.split(_block_diagonal(kernel, groups, packs), packs, axis=-1)
    pairs = zip(jnp.split(x, packs, -1), kernels, strict=True)
    return jnp.concatenate([convolve(maps, part, *geometry) for maps, part in pairs], -1)


def _block_diagonal(
    kernel: Float[Array, 'kh kw i o'], groups: int, packs: int
) -> Float[Array, 'kh kw wider fewer']:
    """[kh, kw, C / groups, O] -> [kh, kw, C / packs, O], zero where input and output groups differ."""
    in_pack = groups // packs
    blocks = kernel.reshape(*kernel.shape[:3], packs, in_pack, -1)
    wide = jnp.einsum('hwipgo,gk->hwkipgo', blocks, jnp.eye(in_pack, dtype=kernel.dtype))
    return wide.reshape(*kernel.shape[:2], in_pack * kernel.shape[2], -1)


def _undivided(x: Array, kernel: Array, stride: int, padding: int, dilation: int) -> Array:
    return _native(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolution(x: Array, kernel: Array, stride: int, padding: int, dilation: int) -> Array:
    """A dense convolution. Its kernel's gradient is computed as one matrix product per kernel pixel."""
    return _undivided(x, kernel, stride, padding, dilation)


@partial(_convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(
    stride: int, padding: int, dilation: int, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    native = partial(_undivided, stride=stride, padding=padding, dilation=dilation)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(native(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        narrow = kernel.shape[2] * kernel.shape[3] <= CPU_TAP
        terms.append(native(x, dkernel) if narrow else _tap_by_tap(x, dkernel, stride, padding, dilation))
    return native(x, kernel), _sum(terms)


def _tap_by_tap(x: Array, kernel: Array, stride: int, padding: int, dilation: int) -> Array:
    """A dense convolution as a sum of matrix products, one for each pixel of the kernel."""
    high, wide, inputs, _ = kernel.shape
    sides = (padding, padding, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), sides, sides, (0, 0, 0)))
    size, strides = (dilation * (high - 1) + 1, dilation * (wide - 1) + 1), (stride, stride)
    places = [(dilation * i, dilation * j) for i in range(high) for j in range(wide)]
    maps = [shifted(x, place, size, strides) for place in places]
    taps = jnp.split(kernel.reshape(high * wide, inputs, -1), high * wide)
    products = [part.reshape(-1, inputs) @ tap[0] for part, tap in zip(maps, taps, strict=True)]
    return _sum(products).reshape(*maps[0].shape[:-1], -1)


def _sum(terms: list[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _groups_in_pack(inputs: int, groups: int, channels: int) -> int:
    """How many groups to pack: the largest divisor of `groups` whose inputs fit in `channels`.

    Args:
      inputs: input channels of one group.
    """
    fitting = max(1, channels // inputs)
    return max(n for n in range(1, min(fitting, groups) + 1) if groups % n == 0)

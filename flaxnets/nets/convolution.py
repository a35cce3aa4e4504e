"""Convolution, grouped or not, and the stem's max pool: equal to torch's, and fast on every platform.

XLA's grouped convolution (`feature_group_count`) is fast on GPUs, which keep it. On CPUs it is slow forward
and has no fast weight gradient at all: a training step of ResNeXt-50 takes about thirty times as long as
with the forms below. Nor has it a fast gradient of a max pool. On TPUs narrow groups leave most of the matrix
unit idle. `lax.platform_dependent` chooses within one program, exports included, at no cost at run time.
`benchmarks/nets.py` measures CPUs and GPUs; `python -m train --plan` asks the compiler for TPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Groups are packed until they have this many input channels: fewer starve the vector or matrix units, more
# are multiplied by zeros. On a CPU, with 4 channels a group: 10 ms packed by four, 34 by one, 105 as XLA
# does it. A TPU's matrix unit is 128 wide; groups wider than TPU_NARROW gain nothing there. Its compiler
# estimates down to a third of the time for a layer, and two thirds for a whole step of ResNeXt-50.
CPU_CHANNELS = 16
TPU_CHANNELS, TPU_NARROW = 128, 16


@partial(jax.jit, static_argnames=('stride', 'padding', 'dilation', 'groups'))  # equal layers are traced once
def conv2d(
    x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Array:
    """`torch.nn.functional.conv2d` without a bias, for square geometry and channels last.

    Args:
      x: [N, H, W, C].
      kernel: [kh, kw, C / groups, O], of the dtype of `x`.
      stride, padding, dilation: in pixels, the same for height and width; the padding is of zeros and
        symmetric.
      groups: contiguous groups of the input channels, each of which makes O / groups output channels.

    Returns:
      [N, H', W', O] with H' = floor((H + 2 * padding - dilation * (kh - 1) - 1) / stride) + 1.
    """
    native = partial(_native, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if kernel.shape[:2] == (1, 1) and padding == 0:
        forms = {'cpu': partial(_pointwise, stride=stride, groups=groups)}
    elif groups > 1:
        geometry: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        forms = {'cpu': partial(_dense, channels=CPU_CHANNELS, **geometry)}
        if kernel.shape[2] <= TPU_NARROW:
            forms['tpu'] = partial(_packed, channels=TPU_CHANNELS, **geometry)
    else:
        return native(x, kernel)
    return _by_platform(native, **forms)(x, kernel)


@jax.jit
def max_pool_3x3(x: Array) -> Array:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)`: [N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C].

    As in torch, the gradient of a maximum that is met several times goes to the first in row-major order;
    where a window has NaN the result is NaN.
    """
    return _by_platform(_reduced_maxima, cpu=_shifted_maxima)(x)


def _by_platform(default: Callable[..., Array], **forms: Callable[..., Array]) -> Callable[..., Array]:
    """A function that has other forms on some platforms, all of which need only their arguments' gradients.

    The checkpoint keeps the choice of platform within the gradient. Without it, where the function stands
    in a jit, the choice made going forward is carried over as a value. The gradient is then a conditional
    on it, which XLA resolves only after it has brought convolutions into the one layout that it runs fast
    on a CPU: those inside miss that and run ten times as slowly. Nothing is computed twice, since gradients
    of convolutions and maxima start from the arguments.
    """
    return jax.checkpoint(partial(lax.platform_dependent, default=default, **forms), prevent_cse=False)


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
        # `x[:, ::stride, ::stride]`, whose size has another form than the convolution's where h is free.
        stop = (n, (h - 1) // stride * stride + 1, (w - 1) // stride * stride + 1, channels)
        x = lax.slice(x, (0, 0, 0, 0), stop, (1, stride, stride, 1))
    if groups == 1:
        # Flattened, the gradient of the kernel contracts one dimension rather than three, for which XLA
        # would transpose copies of whole maps: a quarter of a training step.
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
    n, h, w, channels = x.shape
    x = x.reshape(n, h, w, groups, channels // groups)
    kernel = kernel.reshape(channels // groups, groups, -1)
    return jnp.einsum('nhwgc,cgo->nhwgo', x, kernel).reshape(n, h, w, -1)


def _packed(
    x: Array, kernel: Array, *, stride: int, padding: int, dilation: int, groups: int, channels: int
) -> Array:
    """A grouped convolution with fewer and wider groups, whose kernels are block-diagonal."""
    packs = groups // _groups_in_pack(kernel.shape[2], groups, channels)
    kernel = _block_diagonal(kernel, groups, packs)
    return _native(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=packs)


def _dense(
    x: Array, kernel: Array, *, stride: int, padding: int, dilation: int, groups: int, channels: int
) -> Array:
    """One dense convolution for each pack of groups.

    Its automatic gradients are those of dense convolutions, which XLA has fast forms for on a CPU.
    """
    packs = groups // _groups_in_pack(kernel.shape[2], groups, channels)
    kernels = jnp.split(_block_diagonal(kernel, groups, packs), packs, axis=-1)
    conv = partial(_native, stride=stride, padding=padding, dilation=dilation, groups=1)
    return jnp.concatenate([conv(*pair) for pair in zip(jnp.split(x, packs, -1), kernels, strict=True)], -1)


def _block_diagonal(kernel: Array, groups: int, packs: int) -> Array:
    """[kh, kw, C / groups, O] -> [kh, kw, C / packs, O], zero where input and output groups differ."""
    in_pack = groups // packs
    blocks = kernel.reshape(*kernel.shape[:3], packs, in_pack, -1)
    wide = jnp.einsum('hwipgo,gk->hwkipgo', blocks, jnp.eye(in_pack, dtype=kernel.dtype))
    return wide.reshape(*kernel.shape[:2], in_pack * kernel.shape[2], -1)


def _reduced_maxima(x: Array) -> Array:
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def _shifted_maxima(x: Array) -> Array:
    """The maximum of nine shifted maps: 2 ms against 9, and 10 against 94 for the gradient (112x112x64)."""
    n, h, w, channels = x.shape
    rows, columns = (h - 1) // 2 + 1, (w - 1) // 2 + 1  # in the form that `reduce_window` has where h is free
    padding = ((0, 0, 0), (1, 2 * rows - h, 0), (1, 2 * columns - w, 0), (0, 0, 0))
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)

    def shifted(place: int) -> Array:
        i, j = divmod(place, 3)
        stop = (n, i + 2 * rows - 1, j + 2 * columns - 1, channels)
        return lax.slice(x, (0, i, j, 0), stop, (1, 2, 2, 1))

    shape = (1, rows, columns, 1)
    top, left = (lax.broadcasted_iota(jnp.int32, shape, axis) == 0 for axis in (1, 2))
    outside = {1: left, 3: top, 4: top & left}  # all that came before lies in the padding
    y = shifted(0)
    for place in range(1, 9):
        z = shifted(place)
        better = (z > y) | jnp.isnan(z)
        y = jnp.where(better | outside[place] if place in outside else better, z, y)
    return y


def _groups_in_pack(inputs: int, groups: int, channels: int) -> int:
    """How many groups of so many inputs to pack: the most that divide `groups` and fit in `channels`."""
    fitting = max(1, channels // inputs)
    return max(n for n in range(1, min(fitting, groups) + 1) if groups % n == 0)

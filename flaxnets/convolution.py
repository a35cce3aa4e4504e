"""Convolution, grouped or not, and the stem's max pool: equal to torch's, and fast on every platform.

XLA's grouped convolution (`feature_group_count`) is fast on GPUs and TPUs, which keep it. On CPUs it is
slow forward and has no fast weight gradient at all: a training step of ResNeXt-50 takes about thirty
times as long as with the forms below. Nor has it a fast gradient of a max pool. `lax.platform_dependent`
chooses within one program, exports included, at no cost at run time. `benchmarks/nets.py` measures both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import Array, lax

# Groups are packed until a dense convolution has this many input channels: fewer starve the vector units,
# more are multiplied by zeros. With 4 channels a group: 10 ms packed by four, 34 by one, 105 as XLA does it.
PACKED_CHANNELS = 16


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
        on_cpu = partial(_pointwise, stride=stride, groups=groups)
    elif groups > 1:
        on_cpu = partial(_packed, stride=stride, padding=padding, dilation=dilation, groups=groups)
    else:
        return native(x, kernel)
    return _by_platform(on_cpu, native)(x, kernel)


@jax.jit
def max_pool_3x3(x: Array) -> Array:
    """`torch.nn.MaxPool2d(3, stride=2, padding=1)`: [N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C].

    As in torch, the gradient of a maximum that is met several times goes to the first in row-major order.
    """
    return _by_platform(_shifted_maxima, _reduced_maxima)(x)


def _by_platform(cpu: Callable[..., Array], default: Callable[..., Array]) -> Callable[..., Array]:
    """One function on CPUs and another elsewhere, for functions that need only their arguments' gradients.

    The checkpoint keeps the choice of platform within the gradient. Without it, where the function stands
    in a jit, the choice made going forward is carried over as a value. The gradient is then a conditional
    on it, which XLA resolves only after it has brought convolutions into the one layout that it runs fast
    on a CPU: those inside miss that and run ten times as slowly. Nothing is computed twice, since gradients
    of convolutions and maxima start from the arguments.
    """
    return jax.checkpoint(partial(lax.platform_dependent, cpu=cpu, default=default), prevent_cse=False)


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
        x = x[:, ::stride, ::stride]
    if groups == 1:
        # Flattened, the gradient of the kernel contracts one dimension rather than three, for which XLA
        # would transpose copies of whole maps: a quarter of a training step.
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
    n, h, w, channels = x.shape
    x = x.reshape(n, h, w, groups, channels // groups)
    kernel = kernel.reshape(channels // groups, groups, -1)
    return jnp.einsum('nhwgc,cgo->nhwgo', x, kernel).reshape(n, h, w, -1)


def _packed(x: Array, kernel: Array, *, stride: int, padding: int, dilation: int, groups: int) -> Array:
    """One dense convolution for each pack of groups; within a pack, the kernel is block-diagonal.

    Its automatic gradients are those of dense convolutions, which XLA has fast forms for on a CPU.
    """
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    in_pack = _groups_in_pack(inputs, groups)
    packs = groups // in_pack
    blocks = kernel.reshape(*kernel.shape[:3], packs, in_pack, outputs)
    diagonal = jnp.eye(in_pack, dtype=kernel.dtype)
    # [kh, kw, packs, in_pack * inputs, in_pack * outputs], zero where input and output groups differ
    dense = jnp.einsum('hwipgo,gk->hwpkigo', blocks, diagonal)
    dense = dense.reshape(*kernel.shape[:2], packs, in_pack * inputs, in_pack * outputs)
    conv = partial(_native, stride=stride, padding=padding, dilation=dilation, groups=1)
    parts = jnp.split(x, packs, axis=-1)
    return jnp.concatenate([conv(part, dense[:, :, i]) for i, part in enumerate(parts)], axis=-1)


def _reduced_maxima(x: Array) -> Array:
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def _shifted_maxima(x: Array) -> Array:
    """The maximum of nine shifted maps: 2 ms against 9, and 10 against 94 for the gradient (112x112x64)."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, h % 2), (1, w % 2), (0, 0)), constant_values=-jnp.inf)
    shifted = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return reduce(lambda y, z: jnp.where(z > y, z, y), shifted)


def _groups_in_pack(channels: int, groups: int) -> int:
    """How many groups of so many channels to pack: the most that divide `groups` and fit PACKED_CHANNELS."""
    fitting = max(1, PACKED_CHANNELS // channels)
    return max(n for n in range(1, min(fitting, groups) + 1) if groups % n == 0)

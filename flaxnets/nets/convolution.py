"""Convolution, grouped or not: equal to torch's, and fast on every platform.

GPUs run XLA's grouped convolution (`feature_group_count`), but two groups are convolved apart, and the 7x7
stem in blocks of pixels. On CPUs the grouped convolution is slow, and the gradient of its kernel slower
still: a training step of ResNeXt-50 takes about thirty times as long as with the forms below. The kernel's
gradient of a dense convolution is two to three times too slow there as well, and one core may compute all of
a narrow one.
Where XLA leaves convolutions to oneDNN (`platforms.by_onednn`), values are its own, and most
gradients of maps.
On TPUs narrow groups leave most of the matrix unit idle, and grouping costs copies of whole maps.

`lax.platform_dependent` chooses the form within one program, exported ones included, at no cost at run time.
On CPUs the form of the values has a derivative of its own (`jax.custom_jvp`), which JAX transposes to the
fast gradient and which works in every mode of differentiation. Many packs of groups are differentiated in a
loop, so that XLA compiles one convolution and not one for each: a training step of ResNeXt-50 is compiled in
a third of the time. `benchmarks/nets.py` measures CPUs and `benchmarks/gpu.py` GPUs; `benchmarks/gpu_plan.py`
and `benchmarks/tpu.py` read programs for GPUs and TPUs that are not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from .platforms import by_onednn, by_platform, computed_once, linear_once
from .pooling import shifted

# Groups are packed into one dense convolution until it has this many input channels. Fewer channels leave
# the vector or matrix units idle; more are multiplications by zero. On a CPU, groups of 4 channels take 10 ms
# packed by four, 34 ms one by one and 105 ms as XLA's grouped convolution. A TPU's matrix unit is 128 wide.
CPU_CHANNELS, TPU_CHANNELS = 16, 128
# So few groups, cuDNN convolves one by one, and first copies the channels of each to a map of its own. Those
# copies take 3 ms of the 35 ms of a training step of ResNeSt-50 on an H200. Convolutions of parts of a map
# need none where it was normalised in parts.
GPU_FEW_GROUPS = 2
# A GPU's matrix units take channels in multiples of this. The 7x7 stem with its three channels takes 6 % of a
# training step of ResNeXt-50 on an H200, ten times what its bytes need.
GPU_ALIGNED = 8
# On a CPU, a kernel with more than so many weights per pixel gets its gradient as products of matrices. That
# takes half of XLA's time on maps of 28x28 and 56x56, and a third on 112x112. So does a kernel with few input
# channels, the stem's: half of XLA's time.
CPU_TAP, FEW_INPUTS = 512, 4
# Up to so many channels, and where the kernel moves by one pixel, that is one product: a training step of
# ResNeSt-50 needs a quarter less memory than with one for each pixel, since few parts of maps are copied.
CPU_ONE_PRODUCT = 64
# On a CPU, XLA gives convolutions of more channels than this to YNNPACK. Eigen is faster where the result has
# up to so many rows. Up to jaxlib 0.10, whose YNNPACK leaves most convolutions to one core, it always is.
CPU_NARROW = 16
CPU_EIGEN = 28 if tuple(map(int, jaxlib.version.__version__.split('.')[:2])) > (0, 10) else sys.maxsize
# On a CPU, the gradients of so many packs or more are loops, and so many packs are computed in one turn. A
# training step is 3 % slower for it.
CPU_LOOP, CPU_UNROLL = 8, 4
# XLA computes convolutions fast on a CPU only if maps are [N, H, W, C] and kernels [kh, kw, C, O]. It changes
# other orders to these, but not within a loop. So each derivative is written in the order that JAX's
# transposition turns into these.
ORDER = ('NHWC', 'HWIO', 'NHWC')
TRANSPOSED_IN_MAP, TRANSPOSED_IN_KERNEL = ('NHWC', 'HWOI', 'NHWC'), ('CHWN', 'IHWO', 'HWNC')


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
    geometry = Geometry(stride, padding, dilation)
    native = partial(_native, geometry=geometry, groups=groups)
    if _is_pointwise(kernel, geometry):
        forms = {'cpu': partial(_pointwise, stride=stride, groups=groups)}
    else:
        forms = {'cpu': partial(_on_cpu, geometry=geometry, groups=groups)}
        if groups > 1:
            forms['tpu'] = partial(_on_tpu, geometry=geometry, groups=groups)
        elif _is_stem(kernel) and stride == 2 and dilation == 1:
            forms['gpu'] = partial(_in_blocks, geometry=geometry)
    if groups > 1 and dense_on_gpu(groups):
        forms['gpu'] = partial(_side_by_side, partial(_native, geometry=geometry), packs=groups)
    if by_onednn(x.dtype):
        forms['cpu'] = partial(_onednn_convolution, groups=groups, geometry=geometry)
    return by_platform(native, **forms)(x, kernel)


class Geometry(NamedTuple):
    """How a kernel moves over a map, in pixels, the same for height and width."""

    stride: int
    padding: int
    dilation: int


def _native(
    x: Array,
    kernel: Array,
    geometry: Geometry,
    groups: int = 1,
    order: tuple[str, str, str] = ORDER,
    sharding: NamedSharding | None = None,
    apart: int = 1,
) -> Array:
    """XLA's convolution; `order` names the dimensions of the map, the kernel and the result.

    The rows of the map and those of the kernel are put `apart` pixels from each other, with zeros between
    them, and the kernel moves by so many rows in place of one. That changes no product and no sum.
    """
    stride, padding, dilation = geometry
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(apart * stride, stride),
        padding=((apart * padding,) * 2, (padding,) * 2),
        lhs_dilation=(apart, 1),
        rhs_dilation=(apart * dilation, dilation),
        dimension_numbers=order,
        feature_group_count=groups,
        out_sharding=sharding,
    )


def _is_pointwise(kernel: Array, geometry: Geometry) -> bool:
    return kernel.shape[:2] == (1, 1) and geometry.padding == 0


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
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[3])
    n, h, w, channels = x.shape
    x = x.reshape(n, h, w, groups, channels // groups)
    parts = kernel.reshape(channels // groups, groups, -1)
    return jnp.einsum('nhwgc,cgo->nhwgo', x, parts).reshape(n, h, w, kernel.shape[3])


def _on_cpu(x: Array, kernel: Array, geometry: Geometry, groups: int) -> Array:
    packs, kernel = _packed(kernel, groups, CPU_CHANNELS)
    return _convolution(x, kernel, packs, geometry)


def _on_tpu(x: Array, kernel: Array, geometry: Geometry, groups: int) -> Array:
    packs, kernel = _packed(kernel, groups, TPU_CHANNELS)
    return _side_by_side(partial(_native, geometry=geometry), x, kernel, packs)


def dense_on_gpu(groups: int) -> bool:
    """Whether a GPU convolves each group by itself."""
    return groups <= GPU_FEW_GROUPS


def _is_stem(kernel: Array) -> bool:
    high, wide, inputs, _ = kernel.shape
    return high == wide > 3 and inputs <= FEW_INPUTS


def _in_blocks(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """A convolution whose kernel moves by two pixels as one of blocks of two by two pixels.

    The kernel gets a last row and column of zeros if its size is odd; so do the channels of the blocks, up to
    a multiple of `GPU_ALIGNED`.
    """
    padding, (_, h, w, inputs), size = geometry.padding, x.shape, kernel.shape[0]
    taps, zero = -(-size // 2), jnp.zeros((), x.dtype)
    more = (0, -4 * inputs % GPU_ALIGNED, 0)
    # Up to the last pixel of the last block that the kernel reaches.
    ends = [2 * ((side + 2 * padding - size) // 2 + taps) - side - padding for side in (h, w)]
    x = lax.pad(x, zero, ((0, 0, 0), *((padding, end, 0) for end in ends), (0, 0, 0)))
    kernel = lax.pad(kernel, zero, (*[(0, 2 * taps - size, 0)] * 2, (0, 0, 0), (0, 0, 0)))
    places = list(np.ndindex(2, 2))
    blocks = jnp.concatenate([shifted(x, place, (2, 2), (2, 2)) for place in places], -1)
    weights = jnp.concatenate([kernel[i::2, j::2] for i, j in places], 2)
    return _native(
        lax.pad(blocks, zero, (*[(0, 0, 0)] * 3, more)),
        lax.pad(weights, zero, (*[(0, 0, 0)] * 2, more, (0, 0, 0))),
        Geometry(stride=1, padding=0, dilation=1),
    )


class Packs(NamedTuple):
    """In how many packs of channels a map is convolved, each by itself, on TPUs and on GPUs."""

    tpu: int = 1
    gpu: int = 1


def packs_of(channels: int, groups: int) -> Packs:
    """The packs of a grouped convolution of a map with that many channels."""
    if channels % groups:
        return Packs()  # `Conv` refuses it
    in_pack = _groups_in_pack(channels // groups, groups, TPU_CHANNELS)
    return Packs(groups // in_pack, groups if dense_on_gpu(groups) else 1)


def _dense(x: Array, kernel: Array, geometry: Geometry, order: tuple[str, str, str] = ORDER) -> Array:
    """A dense convolution, which XLA computes on a CPU with Eigen where that is faster than YNNPACK.

    YNNPACK is XLA's first choice. That of jaxlib 0.10 is as fast on one core, but one core computes all of a
    map of 56x56 with 64 channels, and two all of one with 128. It takes none whose map is dilated, and Eigen
    leaves out the zeros between the rows. Eigen has no kernels for float64, and is slow where few input
    channels meet a wide kernel, as in the stem.
    """
    fewest, most = sorted(kernel.shape[2:])
    stem = kernel.shape[0] > 3 and fewest <= FEW_INPUTS
    # Of a symbolic height JAX could not tell that the result has the height that it has otherwise.
    short = isinstance(x.shape[1], int) and x.shape[1] <= CPU_EIGEN * geometry.stride
    dilated = short and most > CPU_NARROW and not stem and x.dtype != jnp.float64
    return _native(x, kernel, geometry, order=order, apart=2 if dilated else 1)


def _packed(kernel: Array, groups: int, channels: int) -> tuple[int, Array]:
    """Puts groups together up to `channels` input channels: how many packs, and [kh, kw, C / packs, O]."""
    packs = groups // _groups_in_pack(kernel.shape[2], groups, channels)
    return packs, _block_diagonal(kernel, groups, packs)


def _block_diagonal(
    kernel: Float[Array, 'kh kw i o'], groups: int, packs: int
) -> Float[Array, 'kh kw wider fewer']:
    """[kh, kw, C / groups, O] -> [kh, kw, C / packs, O], zero where input and output groups differ."""
    in_pack = groups // packs
    if in_pack == 1:
        return kernel
    blocks = kernel.reshape(*kernel.shape[:3], packs, in_pack, -1)
    wide = jnp.einsum('hwipgo,gk->hwkipgo', blocks, jnp.eye(in_pack, dtype=kernel.dtype))
    return wide.reshape(*kernel.shape[:2], in_pack * kernel.shape[2], -1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolution(x: Array, kernel: Array, packs: int, geometry: Geometry) -> Array:
    """A convolution of `packs` groups, with gradients that a CPU computes fast and that compile soon.

    The values alone are never a loop, since that would make a forward 5 % slower.
    """
    return _side_by_side(partial(_dense, geometry=geometry), x, kernel, packs)


@partial(_convolution.defjvp, symbolic_zeros=True)
def _convolution_jvp(
    packs: int, geometry: Geometry, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    x, kernel = primals
    x = computed_once(x)  # packs, rows and columns are parts of it
    each = partial(_each_pack, packs=packs, geometry=geometry)
    in_kernel = partial(_packs_linear_in_kernel, packs=packs, geometry=geometry)
    dy = _tangent(partial(each, _linear_in_map), in_kernel, (x, kernel), tangents)
    return each(_dense, x, kernel), linear_once(dy)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _onednn_convolution(x: Array, kernel: Array, groups: int, geometry: Geometry) -> Array:
    """For `by_onednn` alone, with gradients that a CPU computes fast."""
    return _for_onednn(x, kernel, groups, geometry)


def _for_onednn(x: Array, kernel: Array, groups: int, geometry: Geometry) -> Array:
    """XLA's convolution, which it leaves to oneDNN, grouped or not."""
    convolve = partial(_native, geometry=geometry)
    if groups == 1 or x.dtype != jnp.bfloat16:
        return convolve(x, kernel, groups=groups)
    # Of bfloat16 XLA leaves to oneDNN dense convolutions alone, and is slow at others.
    if groups < CPU_LOOP:
        return _side_by_side(convolve, x, kernel, groups)
    return convolve(x.astype('float32'), kernel.astype('float32'), groups=groups).astype(x.dtype)


@partial(_onednn_convolution.defjvp, symbolic_zeros=True)
def _onednn_jvp(
    groups: int, geometry: Geometry, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    """In training, 1x1 convolutions are products of matrices: of those, oneDNN has the gradients too.

    The gradient of the map is oneDNN's, but not where a grouped kernel moves by more than one pixel. Packs
    are three times as fast there as XLA's own.
    """
    x, kernel = primals
    if _is_pointwise(kernel, geometry):
        product = partial(_pointwise, stride=geometry.stride, groups=groups)
        return product(x, kernel), _tangent(product, product, primals, tangents)
    x = computed_once(x)  # as in `_convolution_jvp`
    convolve = partial(_for_onednn, geometry=geometry, groups=groups)

    def in_packs(linear: Callable[..., Array], x: Array, kernel: Array) -> Array:
        packs, kernel = _packed(kernel, groups, CPU_CHANNELS)
        return linear(x, kernel, packs, geometry)

    in_kernel = partial(in_packs, _packs_linear_in_kernel)
    of_packs = groups > 1 and geometry.stride > 1
    in_map = partial(in_packs, partial(_each_pack, _linear_in_map)) if of_packs else convolve
    return convolve(x, kernel), linear_once(_tangent(in_map, in_kernel, (x, kernel), tangents))


def _tangent(
    in_map: Callable[[Array, Array], Array],
    in_kernel: Callable[[Array, Array], Array],
    primals: tuple[Array, Array],
    tangents: tuple[Any, Any],
) -> Array:
    """The tangent of a convolution whose map or kernel may be constant, from the form for each of them."""
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(in_map(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(in_kernel(x, dkernel))
    return sum(terms[1:], terms[0])


def _packs_linear_in_kernel(x: Array, kernel: Array, packs: int, geometry: Geometry) -> Array:
    """A convolution of packs, in the form that is transposed to the kernel's gradient."""
    inputs, outputs = kernel.shape[2], kernel.shape[3] // packs
    products = packs < CPU_LOOP and (inputs * outputs > CPU_TAP or inputs <= FEW_INPUTS)
    return _each_pack(_as_products if products else _linear_in_kernel, x, kernel, packs, geometry)


def _each_pack(
    function: Callable[..., Array], x: Array, kernel: Array, packs: int, geometry: Geometry
) -> Array:
    """Convolves each pack's channels by itself, many of them in a loop."""
    convolve = partial(function, geometry=geometry)
    return (_one_by_one if packs >= CPU_LOOP else _side_by_side)(convolve, x, kernel, packs)


def _side_by_side(convolve: Callable[[Array, Array], Array], x: Array, kernel: Array, packs: int) -> Array:
    """Convolves each pack's channels by itself, all of them at once."""
    if packs == 1:
        return convolve(x, kernel)
    pairs = zip(jnp.split(x, packs, -1), jnp.split(kernel, packs, -1), strict=True)
    return jnp.concatenate([convolve(maps, part) for maps, part in pairs], -1)


def _one_by_one(convolve: Callable[[Array, Array], Array], x: Array, kernel: Array, packs: int) -> Array:
    """Convolves each pack's channels by itself, in a loop."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-1], packs, -1), -2, 0)

    def turn(_: None, pair: tuple[Array, Array]) -> tuple[None, Array]:
        return None, convolve(*pair)

    _, y = lax.scan(turn, None, (split(x), split(kernel)), unroll=CPU_UNROLL)
    y = jnp.moveaxis(y, 0, -2)
    # Else each of BatchNorm's passes over the result would bring the packs together anew.
    return computed_once(y.reshape(*y.shape[:-2], -1))


def _linear_in_map(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """A dense convolution, in the form that is transposed to the map's gradient."""
    kernel = kernel.swapaxes(2, 3)
    if geometry.stride > 1:
        return _native(x, kernel, geometry, order=TRANSPOSED_IN_MAP)  # the gradient's map is dilated as it is
    return _dense(x, kernel, geometry, order=TRANSPOSED_IN_MAP)


def _linear_in_kernel(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """A dense convolution, in the form that is transposed to the kernel's gradient."""
    x, kernel = x.transpose(3, 1, 2, 0), kernel.transpose(2, 0, 1, 3)
    y = _native(x, kernel, geometry, order=TRANSPOSED_IN_KERNEL, sharding=_batch_third(x))
    return y.transpose(2, 0, 1, 3)


def _batch_third(x: Array) -> NamedSharding | None:
    """Of [C, H, W, N] whose N is sharded over an explicit axis, the sharding of [H, W, N, C].

    JAX (0.10) would give the result of a convolution the sharding of its map, whatever the orders of the two.
    """
    sharding = jax.typeof(x).sharding
    batch = sharding.spec[3]
    return None if batch is None else NamedSharding(sharding.mesh, PartitionSpec(None, None, batch, None))


def _as_products(x: Array, kernel: Array, geometry: Geometry) -> Array:
    """A dense convolution as a sum of matrix products, one for each pixel of the kernel.

    With few input channels, it is one for each row of the kernel, over its columns side by side. Where the
    kernel moves by one pixel, narrow channels make one product of all: columns side by side times rows side
    by side.
    """
    stride, padding, dilation = geometry
    high, wide, inputs, outputs = kernel.shape
    one = stride == 1 and max(inputs, outputs) <= CPU_ONE_PRODUCT
    sides = (padding, padding, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), sides, sides, (0, 0, 0)))
    size, strides = (dilation * (high - 1) + 1, dilation * (wide - 1) + 1), (stride, stride)
    if one or inputs <= FEW_INPUTS:
        columns = [shifted(x, (0, dilation * j), (1, size[1]), (1, stride)) for j in range(wide)]
        x = jnp.concatenate(columns, -1)
        size, strides, inputs, wide = (size[0], 1), (stride, 1), wide * inputs, 1
    if one:
        rows = kernel.reshape(high, inputs, outputs).swapaxes(0, 1).reshape(inputs, -1)
        y = (x.reshape(-1, inputs) @ rows).reshape(*x.shape[:-1], -1)
        parts = [shifted(y, (dilation * i, 0), size, strides) for i in range(high)]
        parts = [part[..., i * outputs : (i + 1) * outputs] for i, part in enumerate(parts)]
        return sum(parts[1:], parts[0])
    places = [(dilation * i, dilation * j) for i in range(high) for j in range(wide)]
    maps = [shifted(x, place, size, strides) for place in places]
    taps = jnp.split(kernel.reshape(len(maps), inputs, outputs), len(maps))
    products = [part.reshape(-1, inputs) @ tap[0] for part, tap in zip(maps, taps, strict=True)]
    return sum(products[1:], products[0]).reshape(*maps[0].shape[:-1], outputs)


def _groups_in_pack(inputs: int, groups: int, channels: int) -> int:
    """How many groups to pack: the largest divisor of `groups` whose inputs fit in `channels`.

    Args:
      inputs: input channels of one group.
    """
    fitting = max(1, channels // inputs)
    return max(n for n in range(1, min(fitting, groups) + 1) if groups % n == 0)

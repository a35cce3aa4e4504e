"""The layers that the blocks are made of, equal to PyTorch's in padding, initialisation and statistics.

All maps are [N, H, W, C]. Each docstring names the torch call that it equals. A layer that behaves
differently in training takes `train` as an argument of its call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, PRNGKeyArray

from ..errors import FlaxnetsError
from .convolution import Packs, conv2d, dense_on_gpu
from .platforms import Result, by_onednn, by_platform, computed_again, on_accelerator

MakeConv = Callable[..., 'Conv']
MakeNorm = Callable[..., 'BatchNorm | FoldedNorm']
Vector = Float[Array | np.ndarray, ' c']  # variables that were loaded are NumPy's until a program takes them

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1  # as torch counts it: the weight of the new batch in the running statistics


@jax.custom_jvp
@jax.jit
def relu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """`torch.nn.functional.relu`: the gradient at x = 0 is 0, and at x = NaN it is passed on."""
    return jnp.maximum(x, 0)


relu.defjvps(lambda g, y, x: lax.select(y <= 0, lax.full_like(g, 0), g))


def torch_uniform(fan_in: int) -> jax.nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for linear weights and for every bias."""
    bound = fan_in**-0.5

    def init(
        key: PRNGKeyArray, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Float[Array, '*_shape']:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Conv(nn.Module):
    """`torch.nn.Conv2d(C, features, kernel_size, stride, padding, dilation, groups, use_bias)`.

    The padding on each side, dilation * (kernel_size - 1) / 2, keeps a map's size at stride 1. The kernel,
    [kernel_size, kernel_size, C / groups, features], starts with Kaiming's normal distribution (fan out).

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel, in pixels; odd.
      stride, dilation: in pixels, the same for height and width.
      groups: number of contiguous groups of channels that are convolved separately.
      use_bias: adds a bias, which starts as in torch: `torch_uniform(fan_in)`.
      dtype: type of the computation and the result.
      param_dtype: type of the parameters.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'n h w c'], origins: list[Origin] | None = None
    ) -> Float[Array, 'n rows columns {self.features}']:
        """Convolves `x`; where the result comes from is added to `origins`, for a `BatchNorm`."""
        k = self.kernel_size
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise FlaxnetsError(
                f'{x.shape[-1]} input and features={self.features} channels must both be divisible by '
                f'groups={self.groups}'
            )
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param(
            'kernel', nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'), shape, self.param_dtype
        )
        params = {'kernel': kernel}
        if self.use_bias:
            fan_in = k * k * shape[2]
            params['bias'] = self.param('bias', torch_uniform(fan_in), (self.features,), self.param_dtype)
        padding = self.dilation * (k - 1) // 2
        convolution = Convolution(self.stride, padding, self.dilation, self.groups, jnp.dtype(self.dtype))
        y = convolution(params, x)
        if origins is not None:
            origins.append(Origin(y, convolution, params, x))
        return y


class Convolution(NamedTuple):
    """What a `Conv` computes, as a function of its parameters and a map. Attributes as in `Conv`."""

    stride: int
    padding: int
    dilation: int
    groups: int
    dtype: np.dtype[Any]

    def __call__(self, params: Any, x: Float[Array, 'n h w c']) -> Float[Array, 'n rows columns o']:
        y = conv2d(
            x.astype(self.dtype),
            params['kernel'].astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y + channels(params['bias'].astype(self.dtype)) if 'bias' in params else y


class Origin(NamedTuple):
    """Where a map comes from: `y` is convolution(params, x)."""

    y: Float[Array, 'n rows columns o']
    convolution: Convolution
    params: Any
    x: Float[Array, 'n h w c']


@dataclass(frozen=True)
class Span:
    """The images that share a BatchNorm's statistics in training: by default, those of one device.

    Training with "32 images per GPU" means statistics over 32 images. Where a device holds more images or
    fewer, these fields restore that number; the running statistics then take the mean over all spans.

    Attributes:
      axis_name: mapped axis whose devices share their statistics; None if each device has its own.
      device_groups: which devices of that axis share: groups of indices, all of the same size. None if all
        share.
      parts: number of equal parts of a device's images that are normalised separately.
    """

    axis_name: str | None = None
    device_groups: tuple[tuple[int, ...], ...] | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        groups = self.device_groups
        if self.parts < 1 or (self.parts > 1 and self.axis_name is not None):
            raise FlaxnetsError(f'parts={self.parts!r} must be 1, or more within one device (no axis_name)')
        if groups is not None and (self.axis_name is None or len({len(g) for g in groups}) != 1):
            raise FlaxnetsError(f'device_groups={groups!r} must be of one size, on an axis with a name')


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d(C, eps=1e-5, momentum=0.1)`; with `span.axis_name`, `torch.nn.SyncBatchNorm`.

    As in torch, the batch is normalised with its biased variance, but the running variance is updated with
    the unbiased one. Flax's own layer stores the biased one, so that a net trained with it drifts from
    torch's. Statistics are computed and kept in float32 at least, whatever `dtype` is. They are computed in
    the map's type if that is wider.

    Attributes:
      zero_scale: the scale starts at 0 instead of 1 (last BatchNorm of a residual branch).
      span: the images that share statistics in training.
      relu: the result has gone through a ReLU.
      shares: into how many parts of equal channels such a result will be split. It is computed so
        (`_normalise_and_relu`).
      packs: of how many maps that were convolved separately `x` consists (`_moments`).
      frozen: training uses the running statistics and does not change them, as after torch's `.eval()`;
        scale and bias still learn.
      dtype: type of the result.
      param_dtype: type of scale and bias.
    """

    zero_scale: bool = False
    span: Span = Span()
    relu: bool = False
    shares: Packs = Packs()
    packs: Packs = Packs()
    frozen: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'n h w c'], train: bool, origins: Sequence[Origin] = ()
    ) -> Float[Array, 'n h w c']:
        """Normalises `x`; in inference, if its origin is given, it may be done within the convolution."""
        shape = (x.shape[-1],)
        start = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param('scale', start, shape, self.param_dtype)
        bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
        exact = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, exact)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape, exact)

        wide = jnp.promote_types(x.dtype, exact)

        if not train or self.frozen or self.is_initializing():
            mean, var = (channels(v.value.astype(wide), x.ndim) for v in (running_mean, running_var))
            factor, offset = _factor_and_offset(var, scale, bias)
            # Not if somebody has changed the map on its way here, such as by `nn.intercept_methods`.
            origin = next((origin for origin in origins if origin.y is x), None)
            traced = isinstance(x, jax.core.Tracer)  # else the convolution has been computed by now
            if origin is None or train or not traced or self.is_initializing():
                return _result(self._how, x, mean, factor, offset)
            _, convolution, params, pixels = origin
            return _within_convolution(self._how, convolution, x, pixels, params, mean, factor, offset)
        parts = self.span.parts
        if x.shape[0] % parts:
            raise FlaxnetsError(f'{x.shape[0]} images cannot be normalised in {parts} equal parts')
        split = x if parts == 1 else x.reshape(parts, -1, *x.shape[1:])
        mean, var, count = self._batch_statistics(split, running_mean.value.astype(wide))
        factor, offset = _factor_and_offset(var, scale, bias)
        # The mean's derivative goes through the offset, one number per channel. Through the map it would cost
        # a CPU one more pass over the map.
        near = lax.stop_gradient(mean)
        y = _result(self._how, split, near, factor, offset - (mean - near) * factor)
        mean, unbiased = (v.reshape(parts, -1).mean(0) for v in (mean, var * (count / (count - 1))))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            running.value += (BN_MOMENTUM * (new - running.value)).astype(exact)
        return y.reshape(x.shape)

    @property
    def _how(self) -> Normalisation:
        return Normalisation(self.relu, self.shares, self.packs, jnp.dtype(self.dtype))

    def _batch_statistics(
        self, x: Float[Array, '*parts n h w c'], running_mean: Vector
    ) -> tuple[Float[Array, '*parts 1 1 1 c'], Float[Array, '*parts 1 1 1 c'], int]:
        """Mean and biased variance over N, H, W (and devices), and how many values they are taken over.

        For any constant s, var(x) = mean((x - s)^2) - mean(x - s)^2, and so are all its derivatives. With
        s = 0 rounding destroys the difference where the mean is many times the standard deviation. Here s is
        the mean of the middle row of all maps, at most sqrt(H) standard deviations away from their mean.

        Args:
          x: the maps, perhaps in equal parts that are normalised separately.
          running_mean: of the net so far.

        Returns:
          Mean and variance of each part, and the count.
        """
        span, exact = self.span, running_mean.dtype
        count = math.prod(x.shape[-4:-1])

        if span.axis_name is not None:
            count *= len(span.device_groups[0]) if span.device_groups else lax.psum(1, span.axis_name)
        if count == 1:
            where = '/'.join(self.path)
            raise FlaxnetsError(
                f'{where}: one value per channel in training (input {x.shape}): its variance is 0. Split '
                'attention pools a map to one pixel, so that a batch of 1 per device cannot train; use at '
                'least 2 images per device, or axis_name to take the statistics over all devices'
            )
        middle = x.shape[-3] // 2
        shift = _over_devices(span, _mean(x[..., middle : middle + 1, :, :].astype(exact)))
        if x.dtype == jnp.bfloat16:
            # A TPU computes the statistics within the convolution if the shift does not depend on its result:
            # the compiler's estimate is a fifth of a training step. A GPU starts two kernels fewer. The
            # running mean is near enough: rounding to 8 bits itself spreads values whose mean is more than
            # some hundred standard deviations from 0. Those of float16 may lie ten times as far.
            shift = jnp.where(on_accelerator(), channels(running_mean, x.ndim), shift)
        shift = lax.stop_gradient(jnp.where(jnp.isfinite(shift), shift, 0))
        mean, square = _over_devices(span, _moments(x, shift, self.packs))
        return shift + mean, jnp.maximum(square - lax.square(mean), 0), count


class Normalisation(NamedTuple):
    """What a BatchNorm makes of a map and its vectors; attributes as in `BatchNorm`."""

    relu: bool
    shares: Packs
    packs: Packs
    dtype: np.dtype[Any]


def _result(how: Normalisation, *map_and_vectors: Array) -> Float[Array, '*parts n h w c']:
    if how.relu:
        return _normalise_and_relu(*map_and_vectors, dtype=how.dtype, shares=how.shares)
    return _normalise(*map_and_vectors).astype(how.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1))  # equal layers are traced once
def _within_convolution(
    how: Normalisation,
    convolution: Convolution,
    y: Float[Array, 'n rows columns o'],
    x: Float[Array, 'n h w c'],
    params: Any,
    *vectors: Float[Array, '1 1 1 o'],
) -> Float[Array, 'n rows columns o']:
    """_result(how, y, *vectors) of y = convolution(params, x).

    Where cuDNN and oneDNN convolve it is no pass over the map: the factor is in the kernel, and they add the
    rest. The passes of BatchNorm took a third of a forward of ResNeXt-50 on an H200. Both fuse a bias and a
    ReLU of the net's dtype only, and directly behind a convolution: so each pack has its own. No card has
    shown how fast cuDNN is with the bias of a grouped one. On a CPU, kernels are not small beside maps:
    there only those are multiplied that have fewer weights than the map has pixels, for each channel.
    """

    def apart(y: Array, _x: Array, _params: Any, *vectors: Array) -> Array:
        return _result(how, y, *vectors)

    def within(
        _y: Array, x: Array, params: Any, mean: Array, factor: Array, offset: Array, number: int
    ) -> Array:
        vector = factor.ravel()
        params = jax.tree.map(lambda p: p.astype(vector.dtype) * channels(vector, p.ndim), params)
        whole = convolution(params, x), (offset - mean * factor).astype(how.dtype)
        pairs = zip(*(jnp.split(v, number, -1) for v in whole), strict=True)
        packs = [pack + bias for pack, bias in pairs]
        return jnp.concatenate([relu(pack) if how.relu else pack for pack in packs], -1)

    forms = {}
    if dense_on_gpu(convolution.groups):
        forms['gpu'] = partial(within, number=how.packs.gpu)
    pixels, weights = y.shape[:3], params['kernel'].shape[:3]  # of an output channel
    known = all(isinstance(size, int) for size in pixels)
    if by_onednn(convolution.dtype) and known and math.prod(pixels) > math.prod(weights):
        forms['cpu'] = partial(within, number=1)
    return by_platform(apart, **forms)(y, x, params, *vectors)


@_within_convolution.defjvp
def _within_convolution_jvp(
    how: Normalisation, _: Convolution, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """That of `_result`: y has the derivatives of x and the parameters."""
    (y, _x, _params, *vectors), (dy, _dx, _dparams, *dvectors) = primals, tangents
    return jax.jvp(partial(_result, how), (y, *vectors), (dy, *dvectors))


def _factor_and_offset(
    var: Float[Array, '*parts 1 1 1 c'], scale: Vector, bias: Vector
) -> tuple[Float[Array, '*parts 1 1 1 c'], Float[Array, '*ones c']]:
    """What a map minus its mean is multiplied by, and what is added to it then."""
    factor = channels(scale, var.ndim).astype(var.dtype) * lax.rsqrt(var + BN_EPSILON)
    return factor, channels(bias, var.ndim).astype(var.dtype)


@partial(jax.jit, static_argnames=('dtype', 'shares'))  # equal layers are traced once
def _normalise_and_relu(
    x: Float[Array, '*parts n h w c'], *vectors: Array, dtype: DTypeLike, shares: Packs
) -> Float[Array, '*parts n h w c']:
    """relu(_normalise(x, *vectors)) in a dtype, one share of the channels after the other.

    On TPUs, a map that is split for several convolutions is computed within each of them, if it was put
    together from such shares: XLA removes the concatenation and the split. Else a TPU writes the whole map
    and reads it again, and its gradient too. By the compiler's estimate that is 6 to 8 % of a training step.
    A GPU would copy the shares.
    """

    def whole(*part: Array) -> Array:
        return relu(_normalise(*part).astype(dtype))

    def in_shares(*whole_map: Array, number: int) -> Array:
        parts = zip(*(jnp.split(v, number, -1) for v in whole_map), strict=True)
        return jnp.concatenate([whole(*part) for part in parts], -1)

    return _by_packs(whole, in_shares, shares)(x, *vectors)


def _by_packs(
    whole: Callable[..., Result], in_parts: Callable[..., Result], packs: Packs
) -> Callable[..., Result]:
    """`whole`, or on TPUs and GPUs `in_parts` with the number of packs there, if there are several."""
    forms = {k: partial(in_parts, number=n) for k, n in packs._asdict().items() if n > 1}
    return by_platform(whole, **forms) if forms else whole


@jax.custom_jvp
def _normalise(
    x: Float[Array, '*parts n h w c'],
    mean: Float[Array, '*parts 1 1 1 c'],
    factor: Float[Array, '*parts 1 1 1 c'],
    offset: Float[Array, '*parts 1 1 1 c'],
) -> Float[Array, '*parts n h w c']:
    return (x.astype(mean.dtype) - mean) * factor + offset


@_normalise.defjvp
def _normalise_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The derivative, which subtracts the mean anew: kept, those maps are a quarter of a step's memory."""
    x, mean, factor, _ = primals
    dx, dmean, dfactor, doffset = tangents
    centred = x.astype(mean.dtype) - computed_again(mean)
    dy = (dx.astype(mean.dtype) - dmean) * factor + centred * dfactor + doffset
    return _normalise(*primals), dy


@partial(jax.custom_jvp, nondiff_argnums=(2,))
@partial(jax.jit, static_argnums=2)
def _moments(
    x: Float[Array, '*parts n h w c'], shift: Float[Array, '*parts 1 1 1 c'], packs: Packs
) -> tuple[Float[Array, '*parts 1 1 1 c'], Float[Array, '*parts 1 1 1 c']]:
    """The means of x - shift and of its square over N, H and W; `shift` counts as a constant.

    They are taken of one pack of channels after the other. Where each is the result of a convolution of its
    own, a TPU computes them within that, and not in one more pass over the whole map: 3 % of a training step
    of a shortened ResNeXt-50 by the compiler's estimate. A GPU need not put the packs together.
    """

    def whole(x: Array, shift: Array) -> tuple[Array, Array]:
        x = x.astype(shift.dtype) - shift
        return _mean(x), _mean(lax.square(x))

    def by_pack(x: Array, shift: Array, number: int) -> tuple[Array, Array]:
        parts = zip(*(jnp.split(v, number, -1) for v in (x, shift)), strict=True)
        means, squares = zip(*(whole(*part) for part in parts), strict=True)
        return jnp.concatenate(means, -1), jnp.concatenate(squares, -1)

    return _by_packs(whole, by_pack, packs)(x, shift)


@_moments.defjvp
def _moments_jvp(
    packs: Packs, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """The derivative of whole maps: those of packs would be added in one more pass."""
    x, shift = primals
    dx = tangents[0].astype(shift.dtype)
    centred = x.astype(shift.dtype) - computed_again(shift)
    return _moments(x, shift, packs), (_mean(dx), _mean(2 * centred * dx))


def _mean(x: Float[Array, '*parts n _h w c']) -> Float[Array, '*parts 1 1 1 c']:
    return x.mean((-4, -3, -2), keepdims=True)


def _over_devices(span: Span, means: Any) -> Any:
    """The means over the devices of a span."""
    if span.axis_name is None:
        return means
    return lax.pmean(means, span.axis_name, axis_index_groups=span.device_groups)


def channels(x: Vector, ndim: int = 4) -> Float[Array, '*ones c']:
    """[C] reshaped to [1, ..., C], with `ndim` dimensions, so that no implicit broadcast is needed."""
    return jnp.asarray(x).reshape((1,) * (ndim - 1) + (-1,))


def normalised(
    norm: Callable[..., Array], train: bool, conv: Callable[..., Array], x: Float[Array, 'n h w c']
) -> Float[Array, 'n rows columns o']:
    """norm(conv(x), train), in inference as one operation where that is faster."""
    origins: list[Origin] = []
    y = conv(x, origins)
    return norm(y, train, origins)


class FoldedNorm(nn.Module):
    """The identity, or a ReLU, in place of a BatchNorm that was folded into the convolution before it."""

    relu: bool = False
    zero_scale: bool = False  # this and what follows is accepted like `BatchNorm`'s, without effect
    shares: Packs = Packs()
    packs: Packs = Packs()

    def __call__(
        self, x: Float[Array, 'n h w c'], train: bool, origins: Sequence[Origin] = ()
    ) -> Float[Array, 'n h w c']:
        if train:
            raise FlaxnetsError('a net with folded BatchNorm is for inference: it cannot run with train=True')
        return relu(x) if self.relu else x


def conv_and_norm(
    folded: bool, span: Span, frozen: bool, dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[MakeConv, MakeNorm]:
    """`Conv` and `BatchNorm` with these settings bound.

    If `folded`, the convolutions have a bias and `FoldedNorm` takes the place of `BatchNorm`.
    """
    conv = partial(Conv, use_bias=folded, dtype=dtype, param_dtype=param_dtype)
    if folded:
        return conv, FoldedNorm
    return conv, partial(BatchNorm, span=span, frozen=frozen, dtype=dtype, param_dtype=param_dtype)


class Dropout(nn.Module):
    """`torch.nn.Dropout(rate)`. Draws from the 'dropout' random numbers in training.

    Flax's own layer refuses a batch that is sharded over an explicit mesh axis.

    Attributes:
      rate: probability to drop a value, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, '*shape'], train: bool) -> Float[Array, '*shape']:
        if not train or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape)
        return x * (mask.astype(x.dtype) / keep)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): the residual branch of some samples becomes 0.

    The others are divided by the probability to keep them. Draws from the 'dropout' random numbers in
    training.

    Attributes:
      rate: probability to drop a sample's branch, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n h w c']:
        if not train or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(self.make_rng('dropout'), keep, (x.shape[0], 1, 1, 1))
        return jnp.where(mask, x / keep, 0)


class DropBlock(nn.Module):
    """DropBlock (Ghiasi et al., arXiv 1810.12890) as the ResNeSt authors trained with it.

    Squares of `block_size` pixels become 0, and the rest is scaled so that the mean of the mask is 1. Each
    channel has a mask of its own, which all images of a group share. Reference:
    `resnest/gluon/dropblock.py` of zhanghang1989/ResNeSt. Draws from the 'dropout' random numbers in
    training.

    Attributes:
      rate: share of the map to drop, in [0, 1); may be a traced scalar, for a rate that a schedule changes.
      block_size: side of the squares, in pixels; at most the map's own size.
      groups: number of equal parts of the batch, each with its own mask, as each GPU of the authors had one.
    """

    rate: float | Float[Array, '']
    block_size: int = 3
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n h w c']:
        if not train or (isinstance(self.rate, int | float) and self.rate == 0):
            return x
        n, h, w, channels = x.shape
        if n % self.groups:
            raise FlaxnetsError(f'{n} images cannot be dropped from in {self.groups} equal parts')
        size = min(self.block_size, h, w)
        # The rate of squares' centres at which they cover `rate` of the map, if none overlapped.
        seeds = self.rate * h * w / size**2 / ((h - size + 1) * (w - size + 1))
        mask = jax.random.bernoulli(self.make_rng('dropout'), seeds, (self.groups, h, w, channels))
        low = (size - 1) // 2
        pad = (low, size - 1 - low)
        dropped = nn.max_pool(mask.astype(jnp.float32), (size, size), padding=(pad, pad))
        keep = 1.0 - dropped
        mask_size, kept = h * w * channels, keep.sum((1, 2, 3), keepdims=True)
        masks = (keep * (mask_size / jnp.maximum(kept, 1.0))).astype(x.dtype)
        # Each image selects its group's mask. To reshape the batch into groups costs a TPU a copy of the map.
        group = lax.broadcasted_iota(jnp.int32, (n, 1, 1, 1), 0) // (n // self.groups)
        mask = masks[:1]
        for i in range(1, self.groups):
            mask = jnp.where(group == i, masks[i], mask)
        return x * mask

"""The residual blocks of ResNeXt, Res2Net and ResNeSt.

A block maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), 4 * planes]. Its layers carry PyTorch's
names (`conv1`, `bn1`, `downsample/0`, ...), so that a checkpoint's key is the path of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .arch import Arch
from .convolution import Packs, dense_on_gpu, packs_of
from .layers import (
    BatchNorm,
    Conv,
    DropBlock,
    DropPath,
    MakeConv,
    MakeNorm,
    normalised,
    relu,
)
from .platforms import computed_once
from .pooling import avg_pool_3x3, avg_pool_shortcut

EXPANSION = 4
SE_REDUCTION = 16

BlockMap = Float[Array, 'n rows columns {4*self.planes}']


class Block(nn.Module):
    """The base of the three bottleneck blocks: their settings, first and last convolution, and shortcut.

    Attributes:
      arch: the architecture.
      planes: planes of the block's stage (`Arch.stage_planes`); the block makes 4 * planes channels.
      stride: 2 in the first block of a stage that shrinks the map, else 1.
      dilation: dilation of the 3x3 convolutions, in pixels.
      pooled_shortcut: the shortcut has an average pool (`avg_down` nets, where the stage shrinks the map or
        is dilated instead).
      has_downsample: the shortcut changes channels or size (first block of every stage).
      drop_path_rate: probability to drop the residual branch of a sample in training.
      drop_block_rate: share of the branch's maps that DropBlock drops in training.
      drop_block_groups: number of equal parts of the batch, each with a DropBlock mask of its own.
      zero_init_last: the branch's last BatchNorm starts with scale 0, and the block as its shortcut alone.
      conv: `Conv` with the net's settings bound.
      norm: the layer after each convolution, with the net's settings bound.
    """

    arch: Arch
    planes: int
    stride: int = 1
    dilation: int = 1
    pooled_shortcut: bool = False
    has_downsample: bool = False
    drop_path_rate: float = 0.0
    drop_block_rate: float | Float[Array, ''] = 0.0
    drop_block_groups: int = 1
    zero_init_last: bool = True
    conv: MakeConv = Conv
    norm: MakeNorm = BatchNorm

    @property
    def width(self) -> int:
        """Channels of the 3x3 convolution; in Res2Net, of the one of each scale."""
        return self.planes * self.arch.base_width // 64 * self.arch.cardinality

    def drop_block(self, y: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n h w c']:
        return DropBlock(self.drop_block_rate, groups=self.drop_block_groups)(y, train)

    def first_layers(
        self, x: Float[Array, 'n h w c'], channels: int, shares: Packs, train: bool
    ) -> Float[Array, 'n h w {channels}']:
        """The start of the branch: 1x1 convolution, BatchNorm, ReLU.

        Args:
          channels: of the result.
          shares: parts into which the result is split for convolutions, on TPUs at least.
        """
        conv, norm = self.conv(channels, 1, name='conv1'), self.norm(relu=True, shares=shares, name='bn1')
        # DropBlock multiplies by numbers that are not negative: it may as well come after the ReLU.
        return self.drop_block(normalised(norm, train, conv, x), train)

    def last_layers(self, y: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n h w {4*self.planes}']:
        """The end of the branch: 1x1 convolution and BatchNorm."""
        conv = self.conv(EXPANSION * self.planes, 1, name='conv3')
        norm = self.norm(zero_scale=self.zero_init_last, name='bn3')
        return self.drop_block(normalised(norm, train, conv, y), train)

    def add_shortcut(
        self, y: Float[Array, 'n rows columns features'], x: Float[Array, 'n h w c'], train: bool
    ) -> Float[Array, 'n rows columns features']:
        """The block's result, relu(branch + shortcut). In training some samples lose the branch.

        Args:
          y: the branch's result.
          x: the block's input.
        """
        if self.has_downsample:
            x = Downsample(
                EXPANSION * self.planes,
                self.stride,
                self.pooled_shortcut,
                first_index=1 if self.arch.avg_down else 0,
                conv=self.conv,
                norm=self.norm,
                name='downsample',
            )(x, train)
        return computed_once(relu(DropPath(self.drop_path_rate)(y, train) + x))


class Downsample(nn.Module):
    """The shortcut of a block that changes channels or size: [pool,] 1x1 convolution, BatchNorm.

    Attributes:
      features: output channels.
      stride: stride of the pool if there is one, else of the convolution.
      pool: whether there is an average pool.
      first_index: the number that names the convolution. It is 1 in `avg_down` nets: in timm and in the
        authors' files 0 is the pool, also in stages where it does nothing.
      conv, norm: as in `Block`.
    """

    features: int
    stride: int
    pool: bool
    first_index: int
    conv: MakeConv
    norm: MakeNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, 'n h w c'], train: bool
    ) -> Float[Array, 'n rows columns {self.features}']:
        stride = self.stride
        if self.pool:
            x, stride = avg_pool_shortcut(x, stride), 1
        conv = self.conv(self.features, 1, stride=stride, name=str(self.first_index))
        return normalised(self.norm(name=str(self.first_index + 1)), train, conv, x)


class Bottleneck(Block):
    """ResNeXt's block (Xie et al., arXiv 1611.05431, figure 3c), with an optional SE gate.

    The stride is in the 3x3 convolution. Reference: `Bottleneck` of torchvision and timm.
    """

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> BlockMap:
        groups = self.arch.cardinality
        packs = packs_of(self.width, groups)
        y = self.first_layers(x, self.width, packs, train)
        conv2 = self.conv(
            self.width, 3, stride=self.stride, dilation=self.dilation, groups=groups, name='conv2'
        )
        y = normalised(self.norm(packs=packs, name='bn2'), train, conv2, y)
        y = relu(self.drop_block(y, train))
        y = self.last_layers(y, train)
        if self.arch.se:
            y = SqueezeExcite(self.conv, name='se')(y)
        return self.add_shortcut(y, x, train)


class SqueezeExcite(nn.Module):
    """Squeeze and excitation (Hu et al., arXiv 1709.01507): channels scaled by a gate of their means."""

    conv: MakeConv

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c']) -> Float[Array, 'n h w c']:
        channels = x.shape[-1]
        gate = x.mean((1, 2), keepdims=True)
        gate = relu(self.conv(channels // SE_REDUCTION, 1, use_bias=True, name='fc1')(gate))
        gate = self.conv(channels, 1, use_bias=True, name='fc2')(gate)
        return x * jax.nn.sigmoid(gate)


class Res2Bottleneck(Block):
    """Res2Net's and Res2NeXt's block (Gao et al., arXiv 1904.01169, figure 2b).

    The channels are split in `scale` parts. The result of each part is added to the next part, which is then
    convolved; the last part passes as it is. In the first block of a stage nothing is added, and the last
    part is average-pooled (the authors' `stype='stage'`). Reference: `Bottle2neck` in
    Res2Net/Res2Net-PretrainedModels, `res2net.py`.
    """

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> BlockMap:
        scale, groups = self.arch.scale, self.arch.cardinality
        make_conv = partial(
            self.conv, self.width, 3, stride=self.stride, dilation=self.dilation, groups=groups
        )
        packs = packs_of(self.width, groups)
        convs = ModuleList(make_conv, name='convs')
        bns = ModuleList(partial(self.norm, packs=packs), name='bns')

        y = self.first_layers(x, self.width * scale, Packs(scale * packs.tpu), train)
        parts = jnp.split(y, scale, axis=-1)
        outputs: list[Array] = []
        for i, part in enumerate(parts[: max(1, scale - 1)]):
            if outputs and not self.has_downsample:
                part = part + outputs[-1]
            outputs.append(relu(normalised(partial(bns, i), train, partial(convs, i), part)))
        if scale > 1:
            last = parts[-1]
            outputs.append(avg_pool_3x3(last, self.stride) if self.has_downsample else last)
        y = self.drop_block(jnp.concatenate(outputs, axis=-1), train)
        return self.add_shortcut(self.last_layers(y, train), x, train)


class ModuleList(nn.Module):
    """Layers named '0', '1', ... as in `torch.nn.ModuleList`; `layers(i, x)` applies the i-th to x.

    Attributes:
      make: makes a layer, given its `name`.
    """

    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, i: int, *args: object) -> Float[Array, 'n h w c']:
        return self.make(name=str(i))(*args)


class SplitAttentionBottleneck(Block):
    """ResNeSt's block (Zhang et al., arXiv 2004.08955, figure 2, right).

    A block that shrinks its map does so by a 3x3 average pool after the split attention, or before it
    (`avd_first`). Reference: `Bottleneck` in zhanghang1989/ResNeSt, `resnest/torch/models/resnet.py`.
    """

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> BlockMap:
        packs = packs_of(self.width, self.arch.cardinality * self.arch.radix)
        y = self.first_layers(x, self.width, packs, train)
        if self.stride > 1 and self.arch.avd_first:
            y = avg_pool_3x3(y, self.stride)
        attention = SplitAttention(
            self.width,
            self.dilation,
            cardinality=self.arch.cardinality,
            radix=self.arch.radix,
            conv=self.conv,
            norm=self.norm,
            name='conv2',
        )
        y = self.drop_block(attention(y, train), train)
        if self.stride > 1 and not self.arch.avd_first:
            y = avg_pool_3x3(y, self.stride)
        return self.add_shortcut(self.last_layers(y, train), x, train)


class SplitAttention(nn.Module):
    """Split attention (Zhang et al., arXiv 2004.08955, section 3.1): [N, H, W, C] -> [N, H, W, features].

    The 3x3 convolution makes `radix` splits of the map. The result is their weighted sum; the weights of each
    channel are a softmax over the splits (a sigmoid if radix is 1). The convolution's channels are in
    radix-major order, [radix, cardinality, c], those of the attention logits in cardinality-major order,
    [cardinality, radix, c]. Reference: `SplAtConv2d` in zhanghang1989/ResNeSt,
    `resnest/torch/models/splat.py`.

    Attributes:
      features: output channels.
      dilation: dilation of the 3x3 convolution, in pixels.
      cardinality: number of groups of each split.
      radix: number of splits.
      conv, norm: as in `Block`.
    """

    features: int
    dilation: int
    cardinality: int
    radix: int
    conv: MakeConv
    norm: MakeNorm

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n h w {self.features}']:
        features, cardinality, radix = self.features, self.cardinality, self.radix
        conv = self.conv(features * radix, 3, dilation=self.dilation, groups=cardinality * radix, name='conv')
        inner = max(32, x.shape[-1] * radix // 4)
        fc1 = self.conv(inner, 1, groups=cardinality, use_bias=True, name='fc1')
        fc2 = self.conv(features * radix, 1, groups=cardinality, use_bias=True, name='fc2')

        packs = packs_of(x.shape[-1], cardinality * radix)
        shares = Packs(tpu=radix, gpu=radix if dense_on_gpu(cardinality * radix) else 1)
        norm = self.norm(relu=True, shares=shares, packs=packs, name='bn0')
        splits = normalised(norm, train, conv, x)
        # Splits are kept apart, not in one more dimension: XLA's fusions for CPUs (jaxlib 0.10.2) hang at
        # seven dimensions, which vmaps of vmaps would reach.
        parts = jnp.split(splits, radix, axis=-1)
        y = sum(parts[1:], parts[0]).mean((1, 2), keepdims=True)
        logits = fc2(relu(normalised(self.norm(name='bn1'), train, fc1, y)))[:, 0, 0]
        if radix == 1:
            weights = jax.nn.sigmoid(logits)
        else:
            logits = logits.reshape(-1, cardinality, radix, features // cardinality)
            weights = jax.nn.softmax(logits, axis=2).swapaxes(1, 2)
        weights = weights.reshape(-1, radix, features)[:, None, None]
        weighed = [part * weights[:, :, :, i] for i, part in enumerate(parts)]
        return sum(weighed[1:], weighed[0])

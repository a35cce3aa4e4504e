"""One net for all four families: a stem, four stages of residual blocks, a head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from .arch import Arch
from .blocks import EXPANSION, Block, Bottleneck, Res2Bottleneck, SplitAttentionBottleneck
from .layers import (
    Conv,
    Dropout,
    MakeConv,
    MakeNorm,
    Span,
    conv_and_norm,
    normalised,
    relu,
    torch_uniform,
)
from .pooling import GLOBAL_POOLS, global_pool, max_pool_3x3

BLOCKS: dict[str, type[Block]] = {
    'resnext': Bottleneck,
    'res2net': Res2Bottleneck,
    'resnest': SplitAttentionBottleneck,
}
Images = Float[Array | np.ndarray, 'n h w c']
Head = Float[Array, 'n features'] | Float[Array, 'n rows columns features']  # the latter unpooled
DROP_BLOCK_STAGES = (2, 3)  # the last two of four, as the ResNeSt authors use it


@dataclass(frozen=True)
class FeatureInfo:
    """One of the five feature maps of a net.

    Attributes:
      name: 'act1' for the stem's map, else the stage's name, 'layer1' to 'layer4'.
      channels: number of channels.
      reduction: how many times smaller than the image it is, in height and in width.
    """

    name: str
    channels: int
    reduction: int


class ResNet(nn.Module):
    """A ResNeXt, Res2Net or ResNeSt. `flaxnets.create` makes one by name and checks the values.

    `model.apply(variables, images, train=False)` takes images [N, H, W, in_chans] and gives logits
    [N, num_classes]. In training, `mutable=['batch_stats']` returns the new running statistics, and any
    drop rate above 0 needs `rngs={'dropout': key}`.

    Attributes:
      arch: the architecture.
      num_classes: outputs of the classifier; 0 leaves it out, so that the net gives pooled features
        [N, num_features].
      in_chans: channels of the images.
      global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for an unpooled map (num_classes=0 only).
      output_stride: how many times smaller than the image the last map is: 32, or 16 or 8, where dilation
        takes the place of the last stages' strides.
      features_only: the call gives a tuple of the maps chosen by `out_indices`, in place of logits.
      out_indices: which of the five maps to give, the stem's (0) and those of the stages (1 to 4); negative
        numbers count from the end.
      drop_rate: rate of the dropout before the classifier.
      drop_path_rate: rate of stochastic depth at the last block; it grows linearly from 0 at the first one.
      drop_block_rate: rate of DropBlock in the last two stages; may be a traced scalar. Images of a device
        that share BatchNorm's statistics share its masks.
      frozen_stages: 1 keeps the stem from learning, 2 also layer1, and so on to 5, all but the classifier.
        Frozen stages compute as in inference even in training, and keep their running statistics. mmpretrain
        and mmdetection count one lower: their 0 is 1 here, their 1 (stem and layer1) is 2.
      freeze_bn: every BatchNorm uses its running statistics in training and does not change them, while all
        kernels, scales and biases learn. For batches too small for statistics (mmdetection's `norm_eval`).
      zero_init_last: each residual branch's last BatchNorm starts with scale 0.
      bn_span: the images over which BatchNorm takes its statistics in training.
      remat: recompute each block's inner values in the backward pass instead of keeping them in memory.
      folded: every BatchNorm is folded into its convolution, for inference only (`convert --fold-bn`).
      dtype: type of the computation and the result. BatchNorm's statistics stay float32.
      param_dtype: type of the parameters.
    """

    arch: Arch
    num_classes: int = 1000
    in_chans: int = 3
    global_pool: str = 'avg'
    output_stride: int = 32
    features_only: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3, 4)
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_block_rate: float | Float[Array, ''] = 0.0
    frozen_stages: int = 0
    freeze_bn: bool = False
    zero_init_last: bool = True
    bn_span: Span = Span()
    remat: bool = False
    folded: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        arch = self.arch
        conv, norm = conv_and_norm(self.folded, self.bn_span, self.freeze_bn, self.dtype, self.param_dtype)
        self.conv1: Any = (
            DeepStem(arch.stem_width, conv, norm) if arch.deep_stem else conv(arch.stem_width, 7, stride=2)
        )
        self.bn1 = norm()
        self.layer1, self.layer2, self.layer3, self.layer4 = (self._stage(i, conv, norm) for i in range(4))
        self.drop = Dropout(self.drop_rate)
        if self.num_classes:
            self.fc = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
                bias_init=torch_uniform(self.num_features),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )

    def _stage(self, index: int, conv: MakeConv, norm: MakeNorm) -> Stage:
        strides, dilations = stage_geometry(self.output_stride)
        return Stage(
            self.arch,
            index,
            stride=strides[index],
            dilation=dilations[index],
            first_dilation=dilations[index - 1] if index else 1,
            drop_path_rate=self.drop_path_rate,
            drop_block_rate=self.drop_block_rate if index in DROP_BLOCK_STAGES else 0.0,
            drop_block_groups=self.bn_span.parts,
            zero_init_last=self.zero_init_last,
            remat=self.remat,
            conv=conv,
            norm=norm,
        )

    @property
    def num_features(self) -> int:
        """Features that enter the classifier: 32 * planes (2048), twice as many with 'catavgmax' pooling."""
        return EXPANSION * self.arch.stage_planes[-1] * (2 if self.global_pool == 'catavgmax' else 1)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """A description of each map that a net with `features_only` gives, in the order of `out_indices`."""
        strides, _ = stage_geometry(self.output_stride)
        maps = [FeatureInfo('act1', self.arch.stem_channels, 2)]
        reduction = 4
        for i, (planes, stride) in enumerate(zip(self.arch.stage_planes, strides, strict=True)):
            reduction *= stride
            maps.append(FeatureInfo(f'layer{i + 1}', EXPANSION * planes, reduction))
        return tuple(maps[i] for i in self.out_indices)

    def forward_maps(
        self, x: Images, train: bool = False, upto: int = 4
    ) -> list[Float[Array, 'n _rows _columns _features']]:
        """The maps of the stem and of the stages, up to stage `upto` (0 is the stem).

        Args:
          x: images [N, H, W, in_chans].
          train: whether BatchNorm and the drop layers work as in training.
          upto: number of the last stage, 0 to 4.

        Returns:
          A list of upto + 1 maps [N, h, w, channels].

        Raises:
          FlaxnetsError: `x` has another shape.
        """
        if x.ndim != 4 or x.shape[-1] != self.in_chans:
            raise FlaxnetsError(f'images must be [N, H, W, in_chans={self.in_chans}], got {x.shape}')
        y = jnp.asarray(x, self.dtype)
        learns = train and self.frozen_stages < 1
        if self.arch.deep_stem:
            y = self.bn1(self.conv1(y, learns), learns)
        else:
            y = normalised(self.bn1, learns, self.conv1, y)
        maps = [self._frozen(relu(y), 0)]
        y = max_pool_3x3(maps[0]) if upto else y
        for i, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)[:upto], start=1):
            y = self._frozen(stage(y, train and self.frozen_stages <= i), i)
            maps.append(y)
        return maps

    def forward_from(self, x: Float[Array, 'n h w c'], stage: int) -> Head:
        """Logits in inference from a map of `forward_maps`: the stem's (stage 0) or a stage's, 1 to 4."""
        x = x if stage else max_pool_3x3(x)
        for following in (self.layer1, self.layer2, self.layer3, self.layer4)[stage:]:
            x = following(x, False)
        return self.forward_head(x)

    def _frozen(self, x: Float[Array, 'n h w c'], stage: int) -> Float[Array, 'n h w c']:
        """A stage's map; no gradient goes back through it if the stage is frozen (0 is the stem)."""
        return lax.stop_gradient(x) if stage < self.frozen_stages else x

    def forward_features(self, x: Images, train: bool = False) -> Float[Array, 'n rows columns features']:
        """The last map, unpooled: [N, H/32, W/32, 2048] at output_stride 32."""
        return self.forward_maps(x, train)[-1]

    def forward_head(self, x: Float[Array, 'n h w c'], train: bool = False, pre_logits: bool = False) -> Head:
        """Logits [N, num_classes] from the last map; pooled features [N, num_features] if `pre_logits`."""
        x = global_pool(x, self.global_pool)
        x = self.drop(x, train)
        return self.fc(x) if self.num_classes and not pre_logits else x

    def __call__(
        self, x: Images, train: bool = False
    ) -> Head | tuple[Float[Array, 'n _rows _columns _features'], ...]:
        """Images [N, H, W, in_chans] to logits, or to the tuple of maps of a `features_only` net."""
        if self.features_only:
            wanted = [i % 5 for i in self.out_indices]
            maps = self.forward_maps(x, train, upto=max(wanted))
            return tuple(maps[i] for i in wanted)
        return self.forward_head(self.forward_features(x, train), train)


class DeepStem(nn.Module):
    """Three 3x3 convolutions in place of the 7x7 (He et al., arXiv 1812.01187, figure 2b, "ResNet-C").

    BatchNorm and ReLU follow the first two. Those after the third are the net's own `bn1`, as in PyTorch.

    Attributes:
      width: channels of the first two convolutions; the third makes twice as many.
      conv, norm: as in `Block`.
    """

    width: int
    conv: MakeConv
    norm: MakeNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, 'n h w c'], train: bool
    ) -> Float[Array, 'n rows columns {2*self.width}']:
        x = relu(normalised(self.norm(name='1'), train, self.conv(self.width, 3, stride=2, name='0'), x))
        x = relu(normalised(self.norm(name='4'), train, self.conv(self.width, 3, name='3'), x))
        return self.conv(2 * self.width, 3, name='6')(x)


class Stage(nn.Module):
    """The blocks of one stage, named '0', '1', ...; the first changes channels and size.

    Attributes:
      arch: the architecture.
      index: number of the stage, from 0.
      stride: stride of the first block.
      dilation: dilation of all blocks after the first.
      first_dilation: dilation of the first block.
      drop_path_rate: rate of stochastic depth at the last block of the net.
      drop_block_rate, drop_block_groups, zero_init_last, conv, norm: as in `Block`.
      remat: recompute each block's inner values in the backward pass.
    """

    arch: Arch
    index: int
    stride: int
    dilation: int
    first_dilation: int
    drop_path_rate: float
    drop_block_rate: float | Float[Array, '']
    drop_block_groups: int
    zero_init_last: bool
    remat: bool
    conv: MakeConv
    norm: MakeNorm

    @nn.compact
    def __call__(self, x: Float[Array, 'n h w c'], train: bool) -> Float[Array, 'n rows columns features']:
        arch = self.arch
        make = BLOCKS[arch.block]
        if self.remat:
            make = nn.remat(make, static_argnums=(2,))  # of (self, x, train)
        before, last = sum(arch.layers[: self.index]), sum(arch.layers) - 1
        for i in range(arch.layers[self.index]):
            first = i == 0
            block = make(
                arch,
                arch.stage_planes[self.index],
                stride=self.stride if first else 1,
                dilation=self.first_dilation if first else self.dilation,
                pooled_shortcut=arch.avg_down and (self.stride > 1 or self.dilation > 1),
                has_downsample=first,
                drop_path_rate=self.drop_path_rate * (before + i) / last,
                drop_block_rate=self.drop_block_rate,
                drop_block_groups=self.drop_block_groups,
                zero_init_last=self.zero_init_last,
                conv=self.conv,
                norm=self.norm,
                name=str(i),
            )
            x = block(x, train)
        return x


def stage_geometry(output_stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and dilations of the four stages.

    Once the map is `output_stride` (8, 16 or 32) times smaller than the image, dilation replaces strides.
    """
    strides, dilations, total, dilation = [], [], 4, 1
    for stride in (1, 2, 2, 2):
        if total >= output_stride:
            dilation, stride = dilation * stride, 1
        total *= stride
        strides.append(stride)
        dilations.append(dilation)
    return tuple(strides), tuple(dilations)


def build(
    arch: Arch,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    global_pool: str = 'avg',
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    drop_block_rate: float = 0.0,
    output_stride: int = 32,
    frozen_stages: int = 0,
    freeze_bn: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | int = (0, 1, 2, 3, 4),
    axis_name: str | None = None,
    remat: bool = False,
    zero_init_last: bool = True,
    folded: bool = False,
) -> ResNet:
    """Makes a `ResNet` after checking every value.

    All arguments but one are attributes of `ResNet`. `axis_name` is the mapped axis whose devices share
    BatchNorm's statistics in training (SyncBatchNorm); for other sharing use `model.clone(bn_span=...)`.

    Raises:
      FlaxnetsError: all bad values in one message.
    """
    problems = []
    if not _is_int(num_classes) or num_classes < 0:
        problems.append(f'num_classes={num_classes!r} must be a whole number, 0 or more')
    if not _is_int(in_chans) or in_chans < 1:
        problems.append(f'in_chans={in_chans!r} must be a whole number, 1 or more')
    if global_pool not in GLOBAL_POOLS:
        problems.append(f'global_pool={global_pool!r} is not one of {", ".join(map(repr, GLOBAL_POOLS))}')
    if global_pool == '' and num_classes != 0 and not features_only:
        problems.append(
            f"global_pool='' gives an unpooled map and needs num_classes=0, got num_classes={num_classes!r}"
        )
    if not _is_int(frozen_stages) or not 0 <= frozen_stages <= 5:
        problems.append(f'frozen_stages={frozen_stages!r} must be a whole number from 0 to 5')
    switches = dict(
        freeze_bn=freeze_bn,
        features_only=features_only,
        remat=remat,
        zero_init_last=zero_init_last,
        folded=folded,
    )
    for field, switch in switches.items():
        if not isinstance(switch, bool):
            problems.append(f'{field}={switch!r} must be True or False')
    if output_stride not in (8, 16, 32):
        problems.append(f'output_stride={output_stride!r} is not one of 8, 16, 32')
    rates = dict(drop_rate=drop_rate, drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate)
    for field, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 <= rate < 1:
            problems.append(f'{field}={rate!r} must be a number, at least 0 and below 1')
    for field, kind in dict(dtype=dtype, param_dtype=param_dtype).items():
        if not _is_floating(kind):
            problems.append(f'{field}={kind!r} is not a floating-point type')
    listed = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    indices = tuple(listed) if isinstance(listed, Iterable) else ()
    if not indices or not all(_is_int(i) and -5 <= i < 5 for i in indices):
        problems.append(f'out_indices={out_indices!r} must name maps 0 to 4 (or -5 to -1), at least one')
    if axis_name is not None and not isinstance(axis_name, str):
        problems.append(f'axis_name={axis_name!r} must be a string or None')
    if problems:
        raise FlaxnetsError('cannot create the net: ' + '; '.join(problems))
    return ResNet(
        arch,
        num_classes=num_classes,
        in_chans=in_chans,
        global_pool=global_pool,
        output_stride=output_stride,
        features_only=features_only,
        out_indices=indices,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        drop_block_rate=drop_block_rate,
        frozen_stages=frozen_stages,
        freeze_bn=freeze_bn,
        zero_init_last=zero_init_last,
        bn_span=Span(axis_name),
        remat=remat,
        folded=folded,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_floating(kind: DTypeLike) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(kind), jnp.floating)
    except TypeError:
        return False


def abstract_variables(model: ResNet, size: int = 64) -> Any:
    """The net's variables as `jax.ShapeDtypeStruct`s, without making any array.

    Args:
      model: the net.
      size: side of the images in pixels, which changes no variable.
    """
    layers = model.arch.layers
    # The net is a static argument, which must be hashable: a traced rate or a list is not. None of the
    # replaced fields changes a variable.
    fields: dict[str, Any] = dict(drop_block_rate=0.0, bn_span=Span(), out_indices=tuple(model.out_indices))
    short = _two_of_each(model).clone(**fields)
    variables = _init.eval_shape(short, jax.random.key(0), _abstract_image(model, size))
    for collection in variables.values():
        for stage, count in enumerate(layers, start=1):
            blocks = collection.get(f'layer{stage}', {})
            for i in range(2, count if blocks else 0):
                blocks[str(i)] = jax.tree.map(lambda leaf: leaf, blocks['1'])
    return variables


@partial(jax.jit, static_argnums=0)
def _init(model: ResNet, key: PRNGKeyArray, images: Float[Array, 'n h w c']) -> Any:
    """`model.init`; jit traces it once for equal nets."""
    return model.init(key, images)


def _abstract_image(model: ResNet, size: int | tuple[int, int]) -> jax.ShapeDtypeStruct:
    sides = (size, size) if isinstance(size, int) else size
    return jax.ShapeDtypeStruct((1, *sides, model.in_chans), jnp.float32)


def _two_of_each(model: ResNet) -> ResNet:
    """The net with at most two blocks in a stage.

    All blocks from the second on are alike, and to trace the 89 blocks of resnest269e takes seconds.
    """
    layers = tuple(min(n, 2) for n in model.arch.layers)
    return model.clone(arch=replace(model.arch, layers=layers))  # type: ignore[arg-type]


def initial_head(model: ResNet, seed: int) -> dict[str, Float[Array, '*_shape']]:
    """A new random classifier of the net: {'kernel': [num_features, num_classes], 'bias': [num_classes]}."""

    def init(key: PRNGKeyArray) -> Any:
        images = jnp.zeros((1, 64, 64, model.in_chans))
        return model.init(key, images)['params']['fc']

    return jax.jit(init)(jax.random.key(seed))  # jit drops all that the classifier does not need


class Cost(NamedTuple):
    """The cost of one part of a net for one image.

    Attributes:
      output: shape of its output, (height, width, channels) or (channels,).
      parameters: number of trainable parameters.
      macs: multiply-accumulates of its convolutions, or of the classifier.
    """

    output: tuple[int, ...]
    parameters: int
    macs: int


def costs(model: ResNet, size: int | tuple[int, int]) -> dict[str, Cost]:
    """The cost of each part of a net: conv1, bn1, layer1 to layer4, fc.

    Args:
      model: the net.
      size: image size in pixels: the side of a square, or (height, width).
    """
    macs: dict[str, int] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    layers = model.arch.layers

    def count(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        path = context.module.path
        if path and context.method_name == '__call__':
            if isinstance(context.module, Conv | nn.Dense):
                kernel = context.module.variables['params']['kernel']
                # The second block of a stage stands for all that follow it.
                second = path[0].startswith('layer') and path[1] == '1'
                alike = layers[int(path[0][-1]) - 1] - 1 if second else 1
                macs[path[0]] = macs.get(path[0], 0) + alike * math.prod(out.shape[:-1]) * kernel.size
            if len(path) == 1:
                outputs[path[0]] = out.shape[1:]
        return out

    short = _two_of_each(model)
    variables = abstract_variables(short)
    with nn.intercept_methods(count):
        jax.eval_shape(short.apply, variables, _abstract_image(model, size))
    tree = abstract_variables(model)['params']
    parameters = {part: count_parameters({'params': leaves}) for part, leaves in tree.items()}
    return {
        part: Cost(shape, parameters.get(part, 0), macs.get(part, 0))
        for part, shape in outputs.items()
        if part in parameters or part in macs
    }


def count_macs(model: ResNet, size: int | tuple[int, int]) -> int:
    """Multiply-accumulates of all convolutions and of the classifier for one image.

    Args:
      model: the net.
      size: image size in pixels: the side of a square, or (height, width).
    """
    return sum(cost.macs for cost in costs(model, size).values())


def count_parameters(variables: Any) -> int:
    """The number of trainable parameters, as torch counts them: without running statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables['params']))

"""Builds a net as an ONNX graph, layer by layer, from its architecture and variables.

The graph computes what `flaxnets.nets` computes in inference, with channels first as ONNX's operators want
them. It has one node for each layer, so that people can read it in a viewer and runtimes can fuse
convolution, BatchNorm and ReLU. A trace of the Flax net would instead have thousands of transpositions,
broadcasts and constants. The operators are those of opset 17 (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from ..nets.arch import Arch
from ..nets.layers import BN_EPSILON

OPSET, IR_VERSION = 17, 8


@dataclass(frozen=True)
class Node:
    """One operator of a graph.

    Attributes:
      kind: ONNX's name of the operator.
      inputs, outputs: names of the values that it takes and gives.
      attributes: ONNX's attributes of the operator.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Graph:
    """The nodes and constant tensors of a net, added one by one. Each value has a name.

    Attributes:
      nodes: in the order of computation.
      tensors: weights and other constants by name, in ONNX's layouts.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._weights = {
            name.partition('/')[2]: np.asarray(array, np.float32)
            for name, array in traverse_util.flatten_dict(dict(variables), sep='/').items()
        }
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node and returns the name of its output, or a list of names if it has several."""
        names = [name] if outputs == 1 else [f'{name}/{i}' for i in range(outputs)]
        self.nodes.append(Node(kind, tuple(inputs), tuple(names), attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = array
        return name

    def has(self, name: str) -> bool:
        """Whether the net has this weight."""
        return name in self._weights

    def weight(self, name: str) -> np.ndarray:
        return self._weights[name]

    # Layers.

    def conv(self, x: str, layer: str, stride: int = 1, groups: int = 1) -> str:
        kernel = self.weight(f'{layer}/kernel')
        size = kernel.shape[0]
        inputs = [x, self.constant(f'{layer}/kernel', kernel.transpose(3, 2, 0, 1))]
        if self.has(f'{layer}/bias'):
            inputs.append(self.constant(f'{layer}/bias', self.weight(f'{layer}/bias')))
        return self.add(
            'Conv',
            inputs,
            layer,
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[size // 2] * 4,
            group=groups,
        )

    def norm(self, x: str, layer: str) -> str:
        """BatchNorm; adds nothing where it was folded into the convolution before it."""
        if not self.has(f'{layer}/scale'):
            return x
        leaves = ('scale', 'bias', 'mean', 'var')
        inputs = [self.constant(f'{layer}/{leaf}', self.weight(f'{layer}/{leaf}')) for leaf in leaves]
        return self.add('BatchNormalization', [x, *inputs], layer, epsilon=BN_EPSILON)

    def relu(self, x: str) -> str:
        return self.add('Relu', [x], f'{x}/relu')

    def average(self, x: str, stride: int, name: str) -> str:
        """`nets.pooling.avg_pool_3x3`."""
        return self.add(
            'AveragePool',
            [x],
            name,
            kernel_shape=[3, 3],
            strides=[stride, stride],
            pads=[1, 1, 1, 1],
            count_include_pad=1,
        )

    def split(self, x: str, parts: int, channels: int) -> list[str]:
        """Splits the channels into equal parts."""
        if parts == 1:
            return [x]
        lengths = self.constant(f'{x}/lengths', np.full(parts, channels // parts, np.int64))
        found: list[str] = self.add('Split', [x, lengths], f'{x}/part', parts, axis=1)
        return found

    def sum(self, parts: Sequence[str], name: str) -> str:
        for i, part in enumerate(parts[1:], start=1):
            last = i == len(parts) - 1
            parts = (self.add('Add', [parts[0], part], name if last else f'{name}/{i}'), *parts[1:])
        return parts[0]


def net_graph(arch: Arch, variables: Mapping[str, Any], images: str, output: str) -> Graph:
    """The graph of a net.

    Args:
      arch: the architecture.
      variables: the variables of its net. Without a classifier in them the graph gives features; BatchNorm
        may be folded.
      images: name of the input [N, C, H, W].
      output: name of the result, [N, num_classes] or [N, features].
    """
    g = Graph(variables)
    x = _stem(g, arch, images)
    x = g.add('MaxPool', [x], 'maxpool', kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, planes in enumerate(arch.stage_planes, start=1):
        for i in range(arch.layers[stage - 1]):
            stride = 2 if stage > 1 and i == 0 else 1
            x = _block(g, arch, x, f'layer{stage}/{i}', planes, stride, is_first=i == 0)
    x = g.add('GlobalAveragePool', [x], 'global_pool')
    if not g.has('fc/kernel'):
        g.add('Flatten', [x], output, axis=1)
        return g
    x = g.add('Flatten', [x], 'features', axis=1)
    kernel = g.constant('fc/kernel', g.weight('fc/kernel'))
    g.add('Gemm', [x, kernel, g.constant('fc/bias', g.weight('fc/bias'))], output)
    return g


def _stem(g: Graph, arch: Arch, x: str) -> str:
    if not arch.deep_stem:
        return g.relu(g.norm(g.conv(x, 'conv1', stride=2), 'bn1'))
    x = g.relu(g.norm(g.conv(x, 'conv1/0', stride=2), 'conv1/1'))
    x = g.relu(g.norm(g.conv(x, 'conv1/3'), 'conv1/4'))
    return g.relu(g.norm(g.conv(x, 'conv1/6'), 'bn1'))


def _block(g: Graph, arch: Arch, x: str, path: str, planes: int, stride: int, is_first: bool) -> str:
    width = planes * arch.base_width // 64 * arch.cardinality
    y = g.relu(g.norm(g.conv(x, f'{path}/conv1'), f'{path}/bn1'))
    if arch.block == 'resnext':
        y = g.relu(g.norm(g.conv(y, f'{path}/conv2', stride, arch.cardinality), f'{path}/bn2'))
    elif arch.block == 'res2net':
        y = _scales(g, arch, y, path, width, stride, is_first)
    else:
        y = _split_attention(g, arch, y, path, width, stride)
    y = g.norm(g.conv(y, f'{path}/conv3'), f'{path}/bn3')
    if arch.se:
        y = _squeeze_excite(g, y, f'{path}/se')
    if is_first:
        x = _shortcut(g, arch, x, f'{path}/downsample', stride)
    return g.relu(g.add('Add', [y, x], f'{path}/sum'))


def _scales(g: Graph, arch: Arch, y: str, path: str, width: int, stride: int, is_first: bool) -> str:
    """`nets.blocks.Res2Bottleneck`."""
    scale = arch.scale
    parts = g.split(y, scale, width * scale)
    outputs: list[str] = []
    for i, part in enumerate(parts[: max(1, scale - 1)]):
        if outputs and not is_first:
            part = g.add('Add', [part, outputs[-1]], f'{path}/convs/{i}/input')
        part = g.conv(part, f'{path}/convs/{i}', stride, arch.cardinality)
        outputs.append(g.relu(g.norm(part, f'{path}/bns/{i}')))
    if scale == 1:
        return outputs[0]
    last = parts[-1]
    outputs.append(g.average(last, stride, f'{path}/pool') if is_first else last)
    joined: str = g.add('Concat', outputs, f'{path}/scales', axis=1)
    return joined


def _split_attention(g: Graph, arch: Arch, y: str, path: str, width: int, stride: int) -> str:
    """`nets.blocks.SplitAttentionBottleneck`, between its 1x1 convolutions."""
    if stride > 1 and arch.avd_first:
        y = g.average(y, stride, f'{path}/avd')
    y = _weighed(g, arch, y, f'{path}/conv2', width)
    return g.average(y, stride, f'{path}/avd') if stride > 1 and not arch.avd_first else y


def _weighed(g: Graph, arch: Arch, x: str, path: str, features: int) -> str:
    """`nets.blocks.SplitAttention`."""
    radix, cardinality = arch.radix, arch.cardinality
    splits = g.relu(g.norm(g.conv(x, f'{path}/conv', groups=cardinality * radix), f'{path}/bn0'))
    parts = g.split(splits, radix, features * radix)
    y = g.add('GlobalAveragePool', [g.sum(parts, f'{path}/sum')], f'{path}/mean')
    y = g.relu(g.norm(g.conv(y, f'{path}/fc1', groups=cardinality), f'{path}/bn1'))
    logits = g.conv(y, f'{path}/fc2', groups=cardinality)
    if radix == 1:
        weighed: str = g.add('Mul', [parts[0], g.add('Sigmoid', [logits], f'{path}/gate')], f'{path}/weighed')
        return weighed
    # 0 keeps the batch. Logits are cardinality-major, the splits radix-major.
    shape = g.constant(f'{path}/by_cardinality', np.array([0, cardinality, radix, features // cardinality]))
    y = g.add('Reshape', [logits, shape], f'{path}/logits')
    y = g.add('Transpose', [y], f'{path}/by_radix', perm=[0, 2, 1, 3])
    y = g.add('Softmax', [y], f'{path}/attention', axis=1)
    flat = g.constant(f'{path}/flat', np.array([0, radix * features, 1, 1]))
    weights = g.split(g.add('Reshape', [y, flat], f'{path}/weights'), radix, features * radix)
    pairs = enumerate(zip(parts, weights, strict=True))
    return g.sum([g.add('Mul', pair, f'{path}/weighed/{i}') for i, pair in pairs], f'{path}/joined')


def _squeeze_excite(g: Graph, x: str, path: str) -> str:
    """`nets.blocks.SqueezeExcite`."""
    y = g.relu(g.conv(g.add('GlobalAveragePool', [x], f'{path}/mean'), f'{path}/fc1'))
    gate = g.add('Sigmoid', [g.conv(y, f'{path}/fc2')], f'{path}/gate')
    gated: str = g.add('Mul', [x, gate], f'{path}/gated')
    return gated


def _shortcut(g: Graph, arch: Arch, x: str, path: str, stride: int) -> str:
    """`nets.blocks.Downsample`; its pool is `nets.pooling.avg_pool_shortcut` of stride 2."""
    first = 1 if arch.avg_down else 0
    if arch.avg_down and stride > 1:
        # The padding at the end is not counted, so that the last windows of an odd map are smaller.
        x = g.add(
            'AveragePool',
            [x],
            f'{path}/pool',
            kernel_shape=[2, 2],
            strides=[2, 2],
            pads=[0, 0, 1, 1],
            count_include_pad=0,
        )
        stride = 1
    return g.norm(g.conv(x, f'{path}/{first}', stride), f'{path}/{first + 1}')

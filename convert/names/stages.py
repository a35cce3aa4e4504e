"""What publishers call the four stages of a net, and how such names become timm's.

Nearly all publishers call the stages `layer1` to `layer4`, as timm does: `LAYERS`. They may still call other
layers otherwise, which `convert.names.layouts` translates. A publisher that calls the stages otherwise is a
record of `STAGE_NAMES`; finding its nets, reading the width of their features and judging the layers of a
pickled model all follow from the record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass

LAYER = 'layer{}'.format  # timm's name of a stage, by its number from 1


@dataclass(frozen=True)
class StageNames:
    """The names by which a publisher's nets are found, and how its layers are called by timm.

    Attributes:
      layout: what `Found.layout` says of a net with these names.
      stages: the four stages, in order.
      stem: the other first parts of names within the net.
      to_timm: takes the names of all layers of a net and gives timm's name of each that differs.
      whole: whether the last stage must be there, so that tensors of other nets are not taken for these.
      stem_tensors: one of these must be there; empty if none need be.
      activations: matches the names of layers in the stem that must be no `nn.Identity` in a pickled model.
      pools_in_layer: whether the stem's max pool is a layer, or else a function that the stem calls.
    """

    layout: str
    stages: tuple[str, str, str, str]
    stem: tuple[str, ...]
    to_timm: Callable[[set[str]], dict[str, str]]
    whole: bool = True
    stem_tensors: tuple[str, ...] = ()
    activations: str = r'(?:conv1|stem|layer0)\.\d+'
    pools_in_layer: bool = True

    @property
    def anchor(self) -> str:
        """A tensor that each net has once: what stands before it in a name is the net's prefix."""
        return f'{self.stages[0]}.0.conv1.weight'

    @property
    def last_anchor(self) -> str:
        """The same of the last stage."""
        return f'{self.stages[-1]}.0.conv1.weight'

    def has_in_body(self, name: str) -> bool:
        """Whether a tensor of this name, without the net's prefix, is in the stem or a stage."""
        return name.partition('.')[0] in (*self.stem, *self.stages)

    def has_in_stage(self, name: str) -> bool:
        """Whether a layer of this name, without the net's prefix, is a stage or in one."""
        return name.partition('.')[0] in self.stages

    def is_complete(self, prefix: str, names: Container[str]) -> bool:
        """Whether what a net must have beside its anchor is among the names of a state dict."""
        last = not self.whole or prefix + self.last_anchor in names
        return last and (not self.stem_tensors or any(prefix + name in names for name in self.stem_tensors))

    def block_of(self, layer: str) -> tuple[int, str] | None:
        """Of a layer in a block of the net: its stage, from 0, and the block's number; None of any other."""
        match = re.match(rf'({"|".join(self.stages)})\.(\d+)\.', layer)
        return (self.stages.index(match[1]), match[2]) if match else None


def _children(layers: set[str]) -> dict[str, str]:
    """Layers of `nn.Sequential(*net.children())` as timm calls them."""
    first_parts = {'0': 'conv1', '1': 'bn1'}
    first_parts |= {stage: LAYER(i) for i, stage in enumerate(CHILDREN.stages, 1)}
    out = {}
    for layer in layers:
        first, dot, rest = layer.partition('.')
        if first in first_parts:
            out[layer] = first_parts[first] + dot + rest
    return out


_DETECTRON2_STEM = {
    'stem.conv1': 'conv1',
    'stem.conv1.norm': 'bn1',
    'stem.conv1_1': 'conv1.0',
    'stem.conv1_1.norm': 'conv1.1',
    'stem.conv1_2': 'conv1.3',
    'stem.conv1_2.norm': 'conv1.4',
    'stem.conv1_3': 'conv1.6',
    'stem.conv1_3.norm': 'bn1',
    'stem.fc': 'fc',  # as tools/convert-torchvision-to-d2.py leaves it
}


def _detectron2(layers: set[str]) -> dict[str, str]:
    """Layers of detectron2's ResNeSts (and ResNeXts) as timm calls them."""
    out = {}
    pooled = any(layer.endswith('.conv2.bn0') for layer in layers)  # the ResNeSts' shortcuts pool
    shortcut = ('downsample.1', 'downsample.2') if pooled else ('downsample.0', 'downsample.1')
    inner = {'conv1.norm': 'bn1', 'conv2.norm': 'bn2', 'conv3.norm': 'bn3'}
    inner |= {'shortcut': shortcut[0], 'shortcut.norm': shortcut[1]}
    for layer in layers:
        if match := re.fullmatch(r'(res[2-5])\.(\d+)\.(.+)', layer):
            stage = LAYER(DETECTRON2.stages.index(match[1]) + 1)
            out[layer] = f'{stage}.{match[2]}.{inner.get(match[3], match[3])}'
        elif layer in _DETECTRON2_STEM:
            out[layer] = _DETECTRON2_STEM[layer]
    return out


LAYERS = StageNames(
    'canonical',
    ('layer1', 'layer2', 'layer3', 'layer4'),
    stem=('conv1', 'bn1', 'stem', 'layer0'),
    to_timm=lambda layers: {},
    whole=False,
)
# A list of children, `nn.Sequential(*net.children())`: its stem is 0 to 3.
CHILDREN = StageNames(
    'children',
    ('4', '5', '6', '7'),
    stem=('0', '1'),
    to_timm=_children,
    stem_tensors=('0.weight', '0.0.weight'),
    activations=r'2|0\.\d+',
)
DETECTRON2 = StageNames(
    'detectron2',
    ('res2', 'res3', 'res4', 'res5'),
    stem=('stem',),
    to_timm=_detectron2,
    pools_in_layer=False,
)
STAGE_NAMES = (LAYERS, CHILDREN, DETECTRON2)

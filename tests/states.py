"""State dicts for the tests of names: of every net of the zoo as shapes, of small nets with numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nets import numpy_state, randomise, timm_net
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import Bottleneck, ResNet

from flaxnets.config import Arch

State = dict[str, np.ndarray]

BLOCKS: dict[str, Any] = {'resnext': Bottleneck, 'res2net': Bottle2neck, 'resnest': ResNestBottleneck}

SMALL = {
    'resnext': Arch('resnext', (1, 1, 1, 2), 4, 4),
    'seresnext': Arch('resnext', (1, 1, 1, 2), 4, 4, se=True),
    'resnextd': Arch('resnext', (1, 1, 1, 2), 4, 4, deep_stem=True, stem_width=8, avg_down=True),
    'res2net': Arch('res2net', (1, 1, 1, 2), 1, 8, scale=4),
    'res2netd': Arch('res2net', (1, 1, 1, 2), 1, 8, scale=4, deep_stem=True, stem_width=8, avg_down=True),
    'resnest': Arch('resnest', (1, 1, 1, 2), 2, 8, radix=2, deep_stem=True, stem_width=8, avg_down=True),
}


@functools.cache
def shapes(name: str) -> Mapping[str, np.ndarray]:
    """timm's net of the zoo, each tensor one zero seen from everywhere: nothing is allocated."""
    with torch.device('meta'):
        state = timm_net(name).state_dict()
    return as_shapes(state)


def as_shapes(state: Mapping[str, torch.Tensor]) -> State:
    return {name: np.broadcast_to(np.float32(0), tuple(t.shape)) for name, t in state.items()}


def small_net(kind: str) -> torch.nn.Module:
    """timm's net of `SMALL[kind]` with 5 classes and random numbers everywhere."""
    arch = SMALL[kind]
    block_args: dict[str, Any] = {}
    if arch.block == 'resnest':
        block_args = dict(radix=arch.radix, avd=True, avd_first=arch.avd_first)
    if arch.se:
        block_args = dict(attn_layer='se')
    net = ResNet(
        BLOCKS[arch.block],
        arch.layers,
        num_classes=5,
        cardinality=arch.cardinality,
        base_width=arch.base_width,
        stem_type='deep' if arch.deep_stem else '',
        stem_width=arch.stem_width,
        avg_down=arch.avg_down,
        block_args=block_args,
    )
    return randomise(net)


@functools.cache
def small(kind: str) -> Mapping[str, np.ndarray]:
    """The tensors of `small_net(kind)`; not to be changed."""
    return numpy_state(small_net(kind))

"""State dicts for the tests of names: nets of the zoo as shapes, small nets with numbers, other layouts."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nets import numpy_state, randomise, timm_net

from convert.names.found import Found
from convert.verification import of_timms_blocks
from flaxnets.nets.arch import Arch

State = dict[str, np.ndarray]
Saved = dict[str, Any]

SMALL = {
    'resnext': Arch('resnext', (1, 1, 1, 2), 4, 4),
    'seresnext': Arch('resnext', (1, 1, 1, 2), 4, 4, se=True),
    'resnextd': Arch('resnext', (1, 1, 1, 2), 4, 4, deep_stem=True, stem_width=8, avg_down=True),
    'res2net': Arch('res2net', (1, 1, 1, 2), 1, 8, scale=4),
    'res2netd': Arch('res2net', (1, 1, 1, 2), 1, 8, scale=4, deep_stem=True, stem_width=8, avg_down=True),
    'resnest': Arch('resnest', (1, 1, 1, 2), 2, 8, radix=2, deep_stem=True, stem_width=8, avg_down=True),
}

# Each block kind, each form of split attention, both stems and both shortcuts.
KINDS = {
    **SMALL,
    'res2next': Arch('res2net', (1, 1, 1, 2), 8, 4, scale=4),
    'resnest4s2x': dataclasses.replace(SMALL['resnest'], radix=4, cardinality=2, avd_first=True),
    'resnest1s4x': dataclasses.replace(SMALL['resnest'], radix=1, cardinality=4, base_width=24),
}


@functools.cache
def shapes(name: str) -> Mapping[str, np.ndarray]:
    """timm's net of the zoo, each tensor one zero seen from everywhere: nothing is allocated."""
    with torch.device('meta'):
        state = timm_net(name).state_dict()
    return as_shapes(state)


def as_shapes(state: Mapping[str, torch.Tensor]) -> State:
    return {name: np.broadcast_to(np.float32(0), tuple(t.shape)) for name, t in state.items()}


def small_net(kind: str, num_classes: int = 5, **options: Any) -> torch.nn.Module:
    """timm's net of `KINDS[kind]`, or with other `layers`, with random numbers everywhere."""
    arch = KINDS[kind]
    arch = dataclasses.replace(arch, layers=options.pop('layers', arch.layers))
    return randomise(of_timms_blocks(arch, num_classes=num_classes, **options))


@functools.cache
def small(kind: str) -> Mapping[str, np.ndarray]:
    """The tensors of `small_net(kind)`; not to be changed."""
    return numpy_state(small_net(kind))


def assert_is(found: Found, state: Mapping[str, np.ndarray]) -> None:
    """The same names, and behind each the very same array: not a byte can have changed."""
    assert set(found.state) == set(state)
    assert all(found.state[name] is tensor for name, tensor in state.items())


def prefixed(state: Mapping[str, np.ndarray], prefix: str) -> Saved:
    return {prefix + name: tensor for name, tensor in state.items()}


def added(state: Mapping[str, np.ndarray], number: int) -> Saved:
    """Other numbers in as many new arrays."""
    return {name: np.asarray(tensor + number) for name, tensor in state.items()}


def renamed(state: Mapping[str, np.ndarray], *rules: tuple[str, str]) -> Saved:
    def name(old: str) -> str:
        for pattern, new in rules:
            old, done = re.subn(pattern, new, old)
            if done:
                break
        return old

    return {name(old): tensor for old, tensor in state.items()}


# What timm calls conv1.0, conv1.1, conv1.3, conv1.4, conv1.6, bn1 where the stem is deep.
STEM = ['conv1.0', 'conv1.1', 'conv1.3', 'conv1.4', 'conv1.6', 'bn1']
MMPRETRAIN_STEM = ['stem.0.conv', 'stem.0.bn', 'stem.1.conv', 'stem.1.bn', 'stem.2.conv', 'stem.2.bn']
MMDETECTION_STEM = ['stem.0', 'stem.1', 'stem.3', 'stem.4', 'stem.6', 'stem.7']


def as_mmpretrain(kind: str, state: Mapping[str, np.ndarray]) -> Saved:
    rules = [(r'^fc\.', 'head.fc.')]
    if SMALL[kind].deep_stem:
        rules += [
            (f'^{re.escape(a)}\\.', f'backbone.{b}.') for a, b in zip(STEM, MMPRETRAIN_STEM, strict=True)
        ]
    if kind in ('resnextd', 'resnest'):
        rules += [
            (rf'^layer1\.0\.downsample\.{i}\.', f'backbone.layer1.0.downsample.{i - 1}.') for i in (1, 2)
        ]
    rules += [(r'^(layer\d\.\d)\.se\.fc([12])\.', r'backbone.\1.se_layer.conv\2.conv.'), ('^', 'backbone.')]
    return renamed(state, *rules)


def as_mmdetection(kind: str, state: Mapping[str, np.ndarray]) -> Saved:
    rules = []
    if SMALL[kind].deep_stem:
        rules = [(f'^{re.escape(a)}\\.', f'{b}.') for a, b in zip(STEM, MMDETECTION_STEM, strict=True)]
    return {name: t for name, t in renamed(state, *rules).items() if not name.startswith('fc.')}

"""Our nets against timm's with the same random weights: every stage's map and the logits."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
import pytest
import torch
from nets import randomise, timm_net, to_flax
from states import KINDS, small_net

import flaxnets
from flaxnets import zoo
from flaxnets.nets.arch import BLOCKS
from flaxnets.nets.resnet import ResNet, abstract_variables, build, count_parameters

TOLERANCE = 1e-4  # of the largest magnitude

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
# Names, shapes and counts of all nets are compared in test_nets.py; these are the structures among them.
# One of each kind of block is whole, as the tiny nets are. Of the others one block of each stage is
# compared, at its own width.
WHOLE = ('resnext50_32x4d', 'res2net50d', 'resnest50d', *zoo.TINY_ARCHS)
STRUCTURES = [
    'resnext50_32x4d',
    'resnext50d_32x4d',
    'seresnext50_32x4d',
    'res2net50d',
    'res2next50',
    'resnest50d',
]
STRUCTURES += ['resnest50d_4s2x40d', 'resnest50d_1s4x24d', *zoo.TINY_ARCHS]
UP_TO_60_MILLION = [
    name for name in zoo.NETS if count_parameters(abstract_variables(flaxnets.create(name))) <= 60e6
]


def compare_small(kind: str, height: int, width: int, **options: Any) -> None:
    options = {'num_classes': 5, **options}
    compare(small_net(kind, **options), build(KINDS[kind], **options), height, width)


def compare(reference: torch.nn.Module, model: ResNet, height: int, width: int) -> None:
    variables = to_flax(reference, model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, model.in_chans, height, width, generator=generator)
    with torch.no_grad():
        last, maps = reference.forward_intermediates(images)
        expected = [
            t.permute(0, 2, 3, 1) if t.ndim == 4 else t for t in (*maps, reference.forward_head(last))
        ]
    found = jax.jit(lambda v, x: _outputs(model, v, x))(variables, images.permute(0, 2, 3, 1).numpy())
    assert len(found) == len(expected) == 6
    for what, ours, theirs in zip(['stem', *'1234', 'head'], found, expected, strict=True):
        theirs = theirs.numpy()
        assert ours.shape == theirs.shape, what
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= TOLERANCE, f'{what} differs by {error:.1e} of its largest magnitude'


def _outputs(model: ResNet, variables: Any, images: jax.Array) -> list[jax.Array]:
    maps = model.apply(variables, images, method='forward_maps')
    return [*maps, model.apply(variables, maps[-1], method='forward_head')]


@pytest.mark.parametrize('name', UP_TO_60_MILLION if FULL else STRUCTURES)
def test_nets_of_up_to_60_million_parameters(name: str) -> None:
    if FULL or name in WHOLE:
        compare(randomise(timm_net(name)), flaxnets.create(name), 64, 64)
    else:
        layers = (1, 1, 1, 1)
        model = build(dataclasses.replace(zoo.ARCHS[name], layers=layers))
        compare(randomise(timm_net(name, layers=layers)), model, 64, 64)


# Each compilation tries several options at once, which touch the stem, the stages or the classifier alone.


@pytest.mark.parametrize('kind', KINDS)
def test_odd_sizes(kind: str) -> None:
    compare_small(kind, 97, 131)


# Each convolution that is dilated, and each pool beside one.
@pytest.mark.parametrize('kind', ['resnext', 'resnextd', 'res2net', 'resnest', 'resnest4s2x'])
def test_output_stride_8_and_one_channel(kind: str) -> None:
    compare_small(kind, 97, 64, output_stride=8, in_chans=1, num_classes=7)


@pytest.mark.parametrize('kind', BLOCKS)
def test_output_stride_16_and_four_channels(kind: str) -> None:
    compare_small(kind, 65, 65, output_stride=16, in_chans=4, num_classes=0)


def test_unpooled_map() -> None:
    compare_small('resnext', 64, 97, global_pool='', num_classes=0)


def test_global_pools() -> None:
    """Of one map, which needs no net before it."""
    features = np.random.default_rng(0).normal(size=(2, 3, 4, 2048)).astype(np.float32)
    for global_pool in ('avg', 'max', 'avgmax', 'catavgmax'):
        reference = small_net('resnext', global_pool=global_pool)
        model = build(KINDS['resnext'], num_classes=5, global_pool=global_pool)
        with torch.no_grad():
            expected = reference.forward_head(torch.from_numpy(features.transpose(0, 3, 1, 2))).numpy()
        head = jax.jit(functools.partial(model.apply, method='forward_head'))
        found = head(to_flax(reference, model), features)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())

"""Our nets against timm's with the same random weights: every stage's map and the logits."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import pytest
import torch
from nets import randomise, timm_net, to_flax
from states import BLOCKS, KINDS, small_net

import flaxnets
from flaxnets import zoo
from flaxnets.nets.resnet import ResNet, abstract_variables, build, count_parameters

TOLERANCE = 1e-4  # of the largest magnitude

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
# Names, shapes and counts of all nets are compared in test_nets.py; these are the structures among them.
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
    compare(randomise(timm_net(name)), flaxnets.create(name), 64, 64)


ODD_SIZES = [(kind, *size) for kind in KINDS for size in ((193, 193), (97, 131))]
ODD_SIZES += [(kind, 225, 225) for kind in BLOCKS]


@pytest.mark.parametrize(('kind', 'height', 'width'), ODD_SIZES)
def test_odd_sizes(kind: str, height: int, width: int) -> None:
    compare_small(kind, height, width)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride(kind: str, output_stride: int) -> None:
    compare_small(kind, 97, 64, output_stride=output_stride)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'options', [dict(in_chans=1, num_classes=7), dict(in_chans=4, num_classes=0)], ids=str
)
def test_channels_and_classes(kind: str, options: dict[str, int]) -> None:
    compare_small(kind, 64, 64, **options)


@pytest.mark.parametrize('global_pool', ['max', 'avgmax', 'catavgmax'])
def test_global_pools(global_pool: str) -> None:
    compare_small('resnest', 64, 64, global_pool=global_pool)


def test_unpooled_map() -> None:
    compare_small('resnest', 64, 97, global_pool='', num_classes=0)

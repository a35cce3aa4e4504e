"""Our nets against timm's with the same random weights: every stage's map and the logits."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from nets import randomise, timm_net, to_flax

import flaxnets
from flaxnets import zoo
from flaxnets.nets.resnet import ResNet, abstract_variables, count_parameters

TOLERANCE = 1e-4  # of the largest magnitude

# One net of each block kind, each form of split attention, both stems and both shortcuts.
KINDS = [
    'resnext50_32x4d',
    'resnext50d_32x4d',
    'seresnext50_32x4d',
    'res2net50_26w_4s',
    'res2net50d',
    'res2next50',
    'resnest14d',
    'resnest50d_4s2x40d',
    'resnest50d_1s4x24d',
]
SMALL = [name for name in zoo.NETS if count_parameters(abstract_variables(flaxnets.create(name))) <= 60e6]


def compare(name: str, height: int, width: int, **options: Any) -> None:
    timm_options = {k: v for k, v in options.items() if k != 'batch'}
    reference = randomise(timm_net(name, **timm_options))
    model = flaxnets.create(name, **timm_options)
    variables = to_flax(reference, model)
    images = torch.randn(
        options.get('batch', 2),
        options.get('in_chans', 3),
        height,
        width,
        generator=torch.Generator().manual_seed(1),
    )
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
        assert error <= TOLERANCE, f'{name}: {what} differs by {error:.1e} of its largest magnitude'


def _outputs(model: ResNet, variables: Any, images: jax.Array) -> list[jax.Array]:
    maps = model.apply(variables, images, method='forward_maps')
    return [*maps, model.apply(variables, maps[-1], method='forward_head')]


@pytest.mark.parametrize('name', SMALL)
def test_every_net_of_up_to_60_million_parameters(name: str) -> None:
    compare(name, 64, 64)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('height, width', [(193, 193), (225, 225), (97, 131)])
def test_odd_sizes(name: str, height: int, width: int) -> None:
    compare(name, height, width, batch=1)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride(name: str, output_stride: int) -> None:
    compare(name, 97, 64, output_stride=output_stride, batch=1)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize(
    'options', [dict(in_chans=1, num_classes=7), dict(in_chans=4, num_classes=0)], ids=str
)
def test_channels_and_classes(name: str, options: dict[str, int]) -> None:
    compare(name, 64, 64, **options)


@pytest.mark.parametrize('global_pool', ['max', 'avgmax', 'catavgmax'])
def test_global_pools(global_pool: str) -> None:
    compare('resnest14d', 64, 64, global_pool=global_pool)


def test_unpooled_map() -> None:
    compare('resnest14d', 64, 97, global_pool='', num_classes=0)

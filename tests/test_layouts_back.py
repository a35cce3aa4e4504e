"""The way back to other libraries' names: those that torchvision and mmpretrain themselves have."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
import torchvision
from states import (
    SMALL,
    as_mmpretrain,
    assert_is,
    shapes,
    small,
)

from convert.names.layouts import to_canonical
from convert.names.layouts_back import LAYOUTS, difference, from_canonical
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError

# First digits of SHA-256 over the sorted lines "name shape" of what mmpretrain 1.2.0 itself builds, its
# ResNeXt, SEResNeXt, Res2Net or ResNeSt as backbone with a LinearClsHead.
MMPRETRAIN = {
    'res2net50_26w_4s': '9bba5d6a8e0502ce',
    'res2net50_48w_2s': 'e06b2cae13152b23',
    'res2net50_14w_8s': '16a00fa13e6054c3',
    'res2net50_26w_6s': 'aa47f3b2f804535a',
    'res2net50_26w_8s': '091f1188e4ff32ec',
    'res2net101_26w_4s': '5c7c12ee0f2908b7',
    'res2net50d': '090035ad661b2058',
    'res2net101d': '5d77d60d73cc615d',
    'resnext50_32x4d': 'f17c0978fedf54ac',
    'resnext50d_32x4d': '9a63735973799507',
    'resnext101_32x4d': '38489f2bfbab006e',
    'resnext101_32x8d': '224a6dd83dc1aa73',
    'resnext101_64x4d': '78200b7f610a669d',
    'resnext101_32x16d': 'd469b9192eef0c73',
    'resnext101_32x32d': '56ed80660f2feacc',
    'resnext101_32x48d': 'd25c260edd008673',
    'resnext152_32x4d': '1e3ea5f962c9dd84',
    'seresnext50_32x4d': '94c390d15fc7bac0',
    'seresnext101_32x4d': 'ea76c1a807235ec4',
    'seresnext101_64x4d': 'd9de36f0a9396c6d',
    'resnest50d': 'fc162037f3cbdb4e',
    'resnest101e': '4aa962924aef630d',
    'resnest200e': '9a0300bce9f102d3',
    'resnest269e': 'efd453c1092014fd',
    'resnest50d_4s2x40d': '5cf6d9087d4b51a1',
    'resnest50d_1s4x24d': 'c968ae43e5945fa5',
    'resnest50_fast_1s1x64d': '6b316ca692e788c4',
    'resnest50_fast_2s1x64d': 'fc162037f3cbdb4e',
    'resnest50_fast_4s1x64d': '321cec5f7dd7ed68',
    'resnest50_fast_1s2x40d': 'b16201275922aa0e',
    'resnest50_fast_2s2x40d': 'c27611bf73a37a9b',
}


def test_mmpretrain_has_nets_of_all_but_these() -> None:
    assert set(zoo.ARCHS) - set(MMPRETRAIN) == {'res2next50', 'resnest14d', 'resnest26d'}


@pytest.mark.parametrize('name', MMPRETRAIN)
def test_mmpretrains_own_names(name: str) -> None:
    tensors = from_canonical(shapes(name), 'mmpretrain', zoo.ARCHS[name])
    lines = sorted(f'{key} {tensor.shape}' for key, tensor in tensors.items())
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == MMPRETRAIN[name]


@pytest.mark.parametrize('kind', SMALL)
def test_from_canonical_to_mmpretrain(kind: str) -> None:
    found = from_canonical(small(kind), 'mmpretrain', SMALL[kind])
    expected = as_mmpretrain(kind, small(kind))
    assert set(found) == set(expected)
    assert all(found[name] is tensor for name, tensor in expected.items())


@pytest.mark.parametrize('name', zoo.ARCHS)
@pytest.mark.parametrize('layout', ['timm', 'mmpretrain'])
def test_there_and_back(name: str, layout: str) -> None:
    state = shapes(name)
    there = from_canonical(state, layout, zoo.ARCHS[name])
    back = to_canonical(there)
    assert_is(back, state)
    assert back.layout == {'timm': 'canonical'}.get(layout, layout)


IN_TORCHVISION = ['resnext50_32x4d', 'resnext101_32x8d', 'resnext101_64x4d']


@pytest.mark.parametrize('name', IN_TORCHVISION)
def test_torchvision_has_the_same_names(name: str) -> None:
    with torch.device('meta'):
        expected = getattr(torchvision.models, name)().state_dict()
    found = from_canonical(shapes(name), 'torchvision', zoo.ARCHS[name])
    assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    assert_is(to_canonical(found), shapes(name))


@pytest.mark.parametrize('name', [name for name in zoo.ARCHS if not re.match(r'resnext\d+_', name)])
def test_torchvision_has_no_other_nets(name: str) -> None:
    with pytest.raises(FlaxnetsError, match='torchvision has plain ResNeXts only'):
        from_canonical(shapes(name), 'torchvision', zoo.ARCHS[name])


def test_unknown_layout() -> None:
    with pytest.raises(FlaxnetsError, match=f"'keras' is not one of {', '.join(LAYOUTS)}"):
        from_canonical(small('resnext'), 'keras', SMALL['resnext'])


def test_nets_that_compute_something_else() -> None:
    warned = {name for name, arch in zoo.ARCHS.items() if difference('mmpretrain', arch)}
    fast = {name for name in zoo.ARCHS if name.startswith('resnest50_fast')}
    assert warned == {*fast, 'resnest50d_4s2x40d', 'resnest50d_1s4x24d', 'res2next50'}
    assert not any(
        difference(layout, arch) for layout in ('timm', 'torchvision') for arch in zoo.ARCHS.values()
    )

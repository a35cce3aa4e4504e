"""Recognition of nets by their tensors: every net of the zoo as timm builds it, others, and damaged ones."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from states import as_shapes, shapes

from convert.names.identification import contradiction, identify
from flaxnets import zoo
from flaxnets.errors import CheckpointError, FlaxnetsError

TWINS = {'resnest50d', 'resnest50_fast_2s1x64d'}
SINGLE = [name for name in zoo.ARCHS if name not in TWINS]


def test_the_only_nets_with_the_same_names_and_shapes() -> None:
    forms = {name: {key: tensor.shape for key, tensor in shapes(name).items()} for name in zoo.ARCHS}
    alike = [{a, b} for a, b in itertools.combinations(forms, 2) if forms[a] == forms[b]]
    assert alike == [TWINS]


@pytest.mark.parametrize('name', SINGLE)
def test_every_net_is_found(name: str) -> None:
    assert identify(shapes(name)) == name
    assert contradiction(shapes(name), name) is None


@pytest.mark.parametrize('name', ['resnext50_32x4d', 'res2net50_14w_8s', 'resnest101e'])
def test_other_heads_inputs_and_missing_counters_do_not_matter(name: str) -> None:
    stem = 'conv1.0.weight' if zoo.ARCHS[name].deep_stem else 'conv1.weight'
    out, _, *kernel = shapes(name)[stem].shape
    other = {
        **{key: tensor for key, tensor in shapes(name).items() if not key.endswith('num_batches_tracked')},
        stem: np.zeros((out, 1, *kernel), np.float16),
        'fc.weight': np.zeros((7, 2048)),
        'fc.bias': np.zeros(7),
    }
    assert identify(other) == name
    del other['fc.weight'], other['fc.bias']
    assert identify(other) == name
    assert contradiction(other, name) is None


def test_a_hint_decides_nothing_that_the_tensors_decide() -> None:
    assert identify(shapes('resnext50_32x4d'), 'resnest101e.pth') == 'resnext50_32x4d'
    assert identify(shapes('resnest101e'), 'resnest50-528c19ca.pth') == 'resnest101e'


HINTS = [
    ('resnest50-528c19ca.pth', 'resnest50d'),
    ('downloads/resnest50-528c19ca.pth', 'resnest50d'),
    ('resnest50_fast_2s1x64d-44938639.pth', 'resnest50_fast_2s1x64d'),
    ('ResNeSt50_imagenet_converted-1ebf0afe.pth', 'resnest50d'),
    ('resnest50_imagenet_converted-1ebf0afe.pth', 'resnest50d'),
    ('timm/resnest50d.in1k', 'resnest50d'),
    ('my-resnest50-fast-2s1x64d-flowers.pth.tar', 'resnest50_fast_2s1x64d'),
    ('resnest50_32xb64_in1k.pth', 'resnest50d'),
    ('resnest50d', 'resnest50d'),
    # Names that tell nothing, or something that the tensors deny, or that may be meant either way.
    (None, None),
    ('', None),
    ('model_best.pth.tar', None),
    ('resnest.pth', None),
    ('resnest101.pth', None),
    ('resnest50_fast_1s1x64d-d8fbf808.pth', None),
    ('resnest50d_4s2x40d.pth', None),
    ('resnest50_2s1x64d.pth', None),
    ('resnest50_fast.pth', None),
    ('resnest50_avd_first.pth', None),
    ('resnet50-0676ba61.pth', None),
]


@pytest.mark.parametrize('twin', sorted(TWINS))
@pytest.mark.parametrize(('hint', 'expected'), HINTS)
def test_twins_are_settled_by_name_or_asked_for(twin: str, hint: str | None, expected: str | None) -> None:
    assert contradiction(shapes(twin), 'resnest50d') is None
    assert contradiction(shapes(twin), 'resnest50_fast_2s1x64d') is None
    if expected:
        assert identify(shapes(twin), hint) == expected
    else:
        question = 'resnest50d or resnest50_fast_2s1x64d: .* compute different.*model=.resnest50d'
        with pytest.raises(FlaxnetsError, match=question):
            identify(shapes(twin), hint)


def test_openmmlabs_resnests_pool_last() -> None:
    state = shapes('resnest50d')
    for layout in ('mmpretrain', 'mmdetection'):
        assert identify(state, 'epoch_100.pth', layout=layout) == 'resnest50d'
        assert identify(state, 'resnest50.pth', layout=layout) == 'resnest50d'
        with pytest.raises(FlaxnetsError, match=f'resnest50_fast_2s1x64d, .*{layout}.*pool after'):
            identify(state, 'resnest50_fast_2s1x64d.pth', layout=layout)
        for hint in (None, 'epoch_100.pth', 'resnest50d_4s2x40d.pth'):
            with pytest.raises(FlaxnetsError, match="model='resnest50d_4s2x40d'"):
                identify(shapes('resnest50d_4s2x40d'), hint, layout=layout)
        assert identify(shapes('resnest101e'), layout=layout) == 'resnest101e'
        assert identify(shapes('res2net50d'), layout=layout) == 'res2net50d'
    with pytest.raises(FlaxnetsError):
        identify(state, 'epoch_100.pth', layout='canonical')


# Refusals, in words.

DIFFERENCES = [
    ('resnest101e', 'resnest50d', ['layer3 has 23 blocks, not 6', '64 channels wide, not 32', 'resnest101e']),
    ('resnest14d', 'resnest26d', ['layer1 has 1 block, not 2', 'layer4 has 1 block, not 2', 'resnest14d']),
    ('resnest50_fast_4s1x64d', 'resnest50d', ['radix is 4, not 2']),
    ('res2net50_26w_8s', 'res2net50_26w_4s', ['scale is 8, not 4', 'looks like res2net50_26w_8s']),
    ('res2net50_14w_8s', 'res2net50_26w_8s', ['14 channels wide, not 26']),
    ('res2net50d', 'res2net50_26w_4s', ['three 3x3 convolutions, not one 7x7', 'shortcuts pool']),
    ('res2net50_26w_4s', 'res2net50d', ['one 7x7 convolution, not three 3x3', 'shortcuts do not pool']),
    ('seresnext50_32x4d', 'resnext50_32x4d', ['have SE gates', 'looks like seresnext50_32x4d']),
    ('resnext50_32x4d', 'seresnext50_32x4d', ['have no SE gates']),
    ('resnext101_64x4d', 'resnext101_32x4d', ['64 groups, not 32']),
    ('resnext101_32x8d', 'resnext101_32x4d.gluon_in1k', ['8 channels wide, not 4']),
    ('resnext50_32x4d', 'resnest50', ["blocks are ResNeXt's, not ResNeSt's", 'looks like resnext50_32x4d']),
    ('resnest50d', 'resnext50_32x4d', ['looks like resnest50d or resnest50_fast_2s1x64d']),
]


@pytest.mark.parametrize(('tensors', 'name', 'words'), DIFFERENCES)
def test_a_wrong_name_is_refused_with_the_difference(tensors: str, name: str, words: list[str]) -> None:
    text = contradiction(shapes(tensors), name)
    assert text and all(word in text for word in words), text
    assert len(text) < 300 and '\n' not in text


def test_a_difference_is_not_said_twice() -> None:
    assert contradiction(shapes('res2net50d'), 'res2net50_26w_4s') == (
        'its stem is three 3x3 convolutions, not one 7x7 convolution; its shortcuts pool; '
        'it looks like res2net50d'
    )


def test_every_wrong_name_is_refused() -> None:
    for tensors, name in itertools.permutations(zoo.ARCHS, 2):
        text = contradiction(shapes(tensors), name)
        if {tensors, name} == TWINS:
            assert text is None
        else:
            assert text and f'looks like {"resnest50d or " if tensors in TWINS else tensors}' in text


def test_an_unknown_name_is_zoos_own_error() -> None:
    with pytest.raises(FlaxnetsError, match='did you mean resnest50d'):
        contradiction(shapes('resnest50d'), 'resnest50dd')


OTHERS = {
    'resnet50': 'nearest is resnext50_32x4d, but its 3x3 convolutions have 1 group, not 32',
    'resnet18': 'blocks are made of bn1, bn2, conv1, conv2 and downsample',
    'wide_resnet50_2': 'nearest is resnext50_32x4d.*128 channels wide',
    'senet154': 'nearest is resnext.*widths that no such net has',
    'seresnext26d_32x4d': 'nearest is .*resnext.*layer3 has 2 blocks, not',
    'ecaresnext50t_32x4d': 'nearest is resnext50d_32x4d, but its blocks have also se',
    'skresnext50_32x4d': 'blocks are made of conv1, conv2, conv3 and downsample',
    'convnext_atto': r'starts with stem.0.weight, .* and \d+ more$',
    'dla60_res2net': 'starts with base_layer.0.weight',
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_nets_are_refused_with_the_nearest(name: str) -> None:
    with torch.device('meta'):
        state = as_shapes(timm.create_model(name).state_dict())
    with pytest.raises(CheckpointError, match=f'none of these nets.*{OTHERS[name]}'):
        identify(state)
    assert 'none of these nets' in (contradiction(state, 'resnext50_32x4d') or '')


def test_nothing_at_all() -> None:
    with pytest.raises(CheckpointError, match='is empty'):
        identify({})
    assert contradiction({}, 'resnest50d')


# Damaged tensors: the right name, or an error of ours, never another net's name.


@pytest.mark.parametrize('name', ['resnext50_32x4d', 'seresnext50_32x4d', 'res2next50', 'resnest50d_1s4x24d'])
def test_missing_tensors(name: str) -> None:
    rng = random.Random(0)
    state, keys = shapes(name), sorted(shapes(name))
    for _ in range(100):
        gone = set(rng.sample(keys, 4))
        try:
            found = identify({key: tensor for key, tensor in state.items() if key not in gone})
        except FlaxnetsError:
            continue
        assert found == name, gone


def test_so_much_missing_that_it_must_ask() -> None:
    state = {k: t for k, t in shapes('resnext101_64x4d').items() if not re.search(r'\.0\.conv[12]\.', k)}
    with pytest.raises(FlaxnetsError, match='resnext101_32x4d, .*: tensors are missing'):
        identify(state)


BROKEN: list[Any] = [
    np.zeros(()),
    np.zeros(0),
    np.zeros((0, 4, 3, 3)),
    np.zeros((3, 5)),
    np.zeros((7, 3, 3, 3)),
    np.zeros((128, 5, 3, 3)),
    np.zeros((1, 1, 1, 1)),
    np.broadcast_to(np.float32(0), (2**20, 2**20, 3, 3)),
]


@pytest.mark.parametrize('shape', BROKEN, ids=lambda tensor: str(tensor.shape))
@pytest.mark.parametrize('name', ['resnext50_32x4d', 'res2next50', 'resnest50d_1s4x24d'])
def test_shapes_that_no_net_has(name: str, shape: np.ndarray) -> None:
    for key, tensor in shapes(name).items():
        if tensor.ndim == 4 and re.match(r'conv1|layer[14]\.0', key):
            try:
                found = identify({**shapes(name), key: shape})
            except FlaxnetsError as error:
                assert len(str(error)) < 600
            else:
                assert found == name, key


def test_stages_that_do_not_go_together() -> None:
    mixed = {
        **shapes('resnext101_32x4d'),
        **{key: tensor for key, tensor in shapes('resnext101_64x4d').items() if key.startswith('layer4')},
    }
    with pytest.raises(CheckpointError, match='widths that no such net has'):
        identify(mixed)


def test_names_that_are_made_to_hurt() -> None:
    junk = {f'layer{i % 9}.{10**i % 977}.{"x" * i}.\x1b[2J{i}': np.zeros(1) for i in range(2000)}
    elsewhere = {f'\x1b[2J{"x" * 9999}{i}': np.zeros(1) for i in range(9)}
    for state in (junk, elsewhere, {**shapes('resnext50_32x4d'), **junk}):
        with pytest.raises(CheckpointError) as caught:
            identify(state)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 2000

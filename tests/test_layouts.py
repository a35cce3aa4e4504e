"""Names of every publisher: torch's and timm's own, Cadene's, and OpenMMLab's by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import timm
import timm.models
import torch
from states import (
    SMALL,
    as_mmdetection,
    as_mmpretrain,
    as_shapes,
    assert_is,
    prefixed,
    renamed,
    small,
    small_net,
)
from timm.models.senet import SENet, SEResNeXtBottleneck

from convert.names.identification import identify
from convert.names.layouts import to_canonical
from convert.verification import of_timms_blocks
from flaxnets.errors import CheckpointError
from flaxnets.nets.arch import Arch

# Bare and prefixed.


@pytest.mark.parametrize('kind', SMALL)
def test_canonical_names_stay(kind: str) -> None:
    found = to_canonical(small(kind))
    assert_is(found, small(kind))
    assert list(found.state) == list(small(kind))
    assert (found.layout, found.notes, found.classes, found.named) == ('canonical', (), None, None)


PREFIXES = [
    ('module.', ["stripped 'module.' from N names"]),
    ('_orig_mod.', ["stripped '_orig_mod.' from N names"]),
    ('module._orig_mod.', ["stripped 'module._orig_mod.' from N names"]),
    ('_orig_mod.module.', ["stripped '_orig_mod.module.' from N names"]),
    ('model.', ["stripped 'model.' from N names"]),
    ('model._orig_mod.', ["stripped '_orig_mod.' from N names", "stripped 'model.' from N names"]),
    ('module.encoder.', ["stripped 'module.' from N names", "stripped 'encoder.' from N names"]),
    ('net.module.0.', ["stripped 'net.module.0.' from N names"]),
]


@pytest.mark.parametrize(('prefix', 'notes'), PREFIXES)
def test_prefixes_are_stripped(prefix: str, notes: list[str]) -> None:
    state = small('res2net')
    found = to_canonical(prefixed(state, prefix))
    assert_is(found, state)
    assert found.layout == 'canonical'
    assert found.notes == tuple(note.replace('N', str(len(state))) for note in notes)


def test_one_tensor_with_and_without_a_wrapper() -> None:
    anchor = 'layer1.0.conv1.weight'  # twice, but not for that two nets
    saved = {**small('resnext'), f'module.{anchor}': small('resnext')[anchor]}
    with pytest.raises(CheckpointError, match=f'both {anchor}: {anchor} and module.{anchor}; keep only one'):
        to_canonical(saved)


def test_blocks_compiled_on_their_own() -> None:
    state = small('resnext')
    found = to_canonical(renamed(state, (r'^(layer\d)\.', r'\1._orig_mod.')))
    assert_is(found, state)
    assert len(found.notes) == 1 and "'_orig_mod.'" in found.notes[0]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # torch.compile's own
def test_compiled_and_parallel_nets_of_torch() -> None:
    net, compiled = small_net('resnext'), cast(Any, torch.compile)
    for wrapped in (
        torch.nn.DataParallel(net),
        compiled(net),
        compiled(torch.nn.DataParallel(net)),
    ):
        saved = {name: tensor.numpy() for name, tensor in wrapped.state_dict().items()}
        assert next(iter(saved)).startswith(('module.', '_orig_mod.'))
        assert list(to_canonical(saved).state) == list(net.state_dict())


@pytest.mark.parametrize('classifier', ['fc', 'head.fc'])
def test_a_classifier_beside_the_backbone(classifier: str) -> None:
    state = small('resnest')
    saved = renamed(state, (r'^fc\.', f'{classifier}.'), ('^', 'encoder.'))
    found = to_canonical({**saved, 'criterion.weight': np.ones(5), 'metric.total': np.ones(())})
    assert_is(found, state)
    assert found.layout == 'canonical'
    assert f'took {classifier} as the classifier' in found.notes
    assert 'left out 2 tensors beside the net: criterion, metric' in found.notes


def test_a_classifier_of_another_kind_is_left_out_and_said() -> None:
    state = {name: t for name, t in small('resnext').items() if not name.startswith('fc.')}
    heads = {'head.fc.weight': np.ones((5, 8, 1, 1)), 'head.layers.0.weight': np.ones((5, 8))}
    found = to_canonical({**prefixed(state, 'backbone.'), **heads})
    assert_is(found, state)
    assert found.notes[-2:] == (
        'left out 2 tensors beside the net: head (2)',
        'it has no classifier (fc.weight)',
    )


@pytest.mark.parametrize('dtype', ['float16', 'float64', ml_dtypes.bfloat16, 'int8'])
def test_dtypes_and_strides_pass(dtype: Any) -> None:
    state = {name: np.asfortranarray(t.astype(dtype)) for name, t in small('seresnext').items()}
    for tensor in state.values():
        tensor.flags.writeable = False
    assert_is(to_canonical({'state_dict': prefixed(state, 'module.')}), state)
    assert_is(to_canonical(as_mmpretrain('seresnext', state)), state)


def test_files_without_counters() -> None:
    state = {name: t for name, t in small('resnext').items() if not name.endswith('num_batches_tracked')}
    assert_is(to_canonical(state), state)
    assert_is(to_canonical(as_mmpretrain('resnext', state)), state)


# OpenMMLab.


@pytest.mark.parametrize('kind', SMALL)
def test_mmpretrain(kind: str) -> None:
    state = small(kind)
    mm = as_mmpretrain(kind, state)
    found = to_canonical({'meta': {'mmcls_version': '0.15.0'}, 'state_dict': mm})
    assert_is(found, state)
    assert found.layout == 'mmpretrain'
    assert f"renamed {len(state)} names from mmpretrain's" in found.notes
    assert_is(to_canonical(prefixed(mm, 'module.')), state)


def test_buffers_of_the_data_preprocessor_are_left_out_and_said() -> None:
    buffers = {f'data_preprocessor.{name}': np.ones((3, 1, 1)) for name in ('mean', 'std')}
    found = to_canonical({**buffers, **as_mmpretrain('resnext', small('resnext'))})
    assert_is(found, small('resnext'))
    assert 'left out 2 tensors beside the net: data_preprocessor (2)' in found.notes


@pytest.mark.parametrize('kind', SMALL)
def test_mmpretrains_backbone_alone(kind: str) -> None:
    mm = as_mmpretrain(kind, small(kind))
    bare = {name.removeprefix('backbone.'): t for name, t in mm.items() if name.startswith('backbone.')}
    found = to_canonical(bare)
    assert_is(found, {name: t for name, t in small(kind).items() if not name.startswith('fc.')})
    assert found.layout == ('canonical' if kind in ('resnext', 'res2net') else 'mmpretrain')


@pytest.mark.parametrize('kind', ['resnext', 'res2netd', 'resnest'])
def test_mmdetection(kind: str) -> None:
    state = {name: t for name, t in small(kind).items() if not name.startswith('fc.')}
    mm = as_mmdetection(kind, state)
    if kind == 'res2netd':  # its first block lacks a pool that mmpretrain's and the authors' has
        with pytest.raises(CheckpointError, match="mmdetection's Res2Net.*average pool.*other numbers"):
            to_canonical(mm)
    found = to_canonical(mm, approximate=True)
    assert (kind == 'res2netd') is any('average pool' in note for note in found.notes)
    assert_is(found, state)
    assert found.layout == ('mmdetection' if SMALL[kind].deep_stem else 'canonical')
    assert 'it has no classifier (fc.weight)' in found.notes

    extras = ['neck.fpn_convs.0.conv.weight', 'rpn_head.rpn_cls.bias', 'rpn_head.rpn_reg.bias']
    detector = {**prefixed(mm, 'backbone.'), **{name: np.ones(3) for name in extras}}
    found = to_canonical({'meta': {'CLASSES': ['cat', 'dog']}, 'state_dict': detector}, approximate=True)
    assert_is(found, state)
    assert (found.layout, found.classes) == ('mmdetection', None)
    assert 'left out 3 tensors beside the net: neck, rpn_head (2)' in found.notes


# Cadene.


@pytest.fixture(scope='module')
def cadene() -> Any:
    torch.manual_seed(0)
    theirs = SENet(SEResNeXtBottleneck, (1, 1, 1, 1), groups=32, reduction=16, num_classes=5).eval()
    ours = of_timms_blocks(Arch('resnext', (1, 1, 1, 1), 32, 4, se=True), num_classes=5).eval()
    return SimpleNamespace(
        theirs=theirs, ours=ours, state={n: t.numpy() for n, t in theirs.state_dict().items()}
    )


def test_cadenes_nets_are_refused_for_their_pool(cadene: Any) -> None:
    for saved in (cadene.state, {'state_dict': prefixed(cadene.state, 'module.')}):
        with pytest.raises(CheckpointError, match=r"Cadene's.*ceil_mode=True.*other numbers"):
            to_canonical(saved)


def test_cadenes_names(cadene: Any) -> None:
    found = to_canonical(cadene.state, approximate=True)
    assert found.layout == 'cadene'
    assert any('ceil_mode' in note for note in found.notes)
    cadene.ours.load_state_dict({n: torch.from_numpy(t) for n, t in found.state.items()})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = cadene.theirs(images)
        # The reason for the refusal: nothing but the pool differs, and it does.
        assert (cadene.ours(images) - expected).abs().max() > 1e-3 * expected.abs().max()
        cadene.ours.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
        torch.testing.assert_close(cadene.ours(images), expected)


def test_cadenes_names_of_the_zoo() -> None:
    with torch.device('meta'):
        state = as_shapes(timm.create_model('legacy_seresnext50_32x4d').state_dict())
    assert identify(to_canonical(state, approximate=True).state) == 'seresnext50_32x4d'
    with torch.device('meta'):
        state = as_shapes(timm.create_model('legacy_senet154').state_dict())
    with pytest.raises(CheckpointError, match='none of these nets'):
        identify(to_canonical(state, approximate=True).state)


def test_what_no_rule_explains_stays_for_the_net_to_refuse() -> None:
    extra = {'conv9.weight': np.ones(3), 'aux.fc.weight': np.ones(3)}
    assert_is(to_canonical({**small('resnext'), **extra}), {**small('resnext'), **extra})

"""The state dict in training files, as timm, torch and OpenMMLab write them, and in files made to mislead."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models
import torch
from states import (
    Saved,
    added,
    as_mmpretrain,
    assert_is,
    prefixed,
    small,
    small_net,
)
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from convert.formats.pth import read_pth
from convert.names.layouts import to_canonical
from flaxnets.errors import CheckpointError

# Training files.


@pytest.fixture(scope='module')
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm's own saver writes, with averaged weights that differ from the trained ones."""
    folder = tmp_path_factory.mktemp('timm')
    net = small_net('resnext')
    average = ModelEmaV3(torch.nn.DataParallel(net), decay=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model='resnext50_32x4d', lr=0.1, mean=None)
    saver = CheckpointSaver(
        torch.nn.DataParallel(net),
        optimizer,
        args=args,
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        unwrap_fn=lambda wrapped: getattr(wrapped, 'module', wrapped),
    )
    saver.save_checkpoint(3, metric=71.5)
    return folder / 'checkpoint-3.pth.tar'


@pytest.mark.parametrize('ema', [True, False])
def test_timms_training_file(timm_file: Path, ema: bool) -> None:
    expected = timm.models.load_state_dict(str(timm_file), use_ema=ema)
    found = to_canonical(read_pth(timm_file), ema=ema)
    assert list(found.state) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found.state[name], tensor.numpy(), name)
    taken, other = ('state_dict_ema', 'state_dict') if ema else ('state_dict', 'state_dict_ema')
    assert found.notes[0] == f'took {taken} (its other choice: {other}; ema={not ema} takes that)'
    assert 'optimizer' in found.notes[1] and 'args' in found.notes[1]
    assert found.named == 'resnext50_32x4d'


def test_averaged_and_trained_weights_do_differ(timm_file: Path) -> None:
    saved = read_pth(timm_file)
    average, trained = (to_canonical(saved, ema=ema).state['fc.weight'] for ema in (True, False))
    assert np.abs(average - trained).min() > 0.1


ORDER = [
    (['state_dict_ema', 'model_ema', 'state_dict', 'model'], True, 'state_dict_ema'),
    (['model', 'state_dict', 'model_ema'], True, 'model_ema'),
    (['model', 'state_dict', 'ema_state_dict'], True, 'ema_state_dict'),
    (['model', 'state_dict'], True, 'state_dict'),
    (['model', 'state_dict', 'state_dict_ema'], False, 'state_dict'),
    (['model', 'model_ema'], False, 'model'),
    (['model', 'optimizer'], True, 'model'),
    (['net', 'epoch'], True, 'net'),
    (['net', 'epoch'], False, 'net'),
]


@pytest.mark.parametrize(('keys', 'ema', 'taken'), ORDER)
def test_which_state_dict_is_taken(keys: list[str], ema: bool, taken: str) -> None:
    others: Saved = {'optimizer': {'state': {0: {'momentum': np.ones(3)}}, 'param_groups': [{}]}, 'epoch': 3}
    saved: Saved = {key: others.get(key) or added(small('resnext'), 1) for key in keys}
    found = to_canonical(saved, ema=ema)
    assert_is(found, saved[taken])
    assert found.notes[0].startswith(f'took {taken}')
    assert all(any(key in note for note in found.notes) for key in keys if key in others)


def test_an_empty_average_is_passed_over() -> None:
    state = small('resnext')
    empty: list[Any] = [None, {}, False]
    for nothing in empty:
        assert_is(to_canonical({'state_dict_ema': nothing, 'model_ema': nothing, 'model': state}), state)


def test_no_ema_where_there_is_nothing_else() -> None:
    with pytest.raises(CheckpointError, match=r'averaged weights only \(state_dict_ema\).*ema=False'):
        to_canonical({'state_dict_ema': small('resnext'), 'epoch': 1}, ema=False)


def test_torchvisions_average() -> None:
    net = small_net('resnext')
    average = {name: t.numpy() for name, t in AveragedModel(net).state_dict().items()}
    assert 'n_averaged' in average
    found = to_canonical({'model': small('resnext'), 'model_ema': average, 'epoch': 1})
    assert list(found.state) == list(net.state_dict())
    assert any('n_averaged' in note for note in found.notes)


@pytest.mark.parametrize('zipped', [True, False])
def test_the_res2net_authors_training_file(tmp_path: Path, zipped: bool) -> None:
    net = small_net('res2net')
    saved = {
        'epoch': 90,
        'arch': 'res2net50',
        'state_dict': torch.nn.DataParallel(net).state_dict(),
        'best_prec1': torch.tensor(77.9),
        'optimizer': torch.optim.SGD(net.parameters(), 0.1).state_dict(),
    }
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    found = to_canonical(read_pth(path))
    assert list(found.state) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(found.state[name], tensor.numpy(), name)
    assert found.named == 'res2net50'
    assert found.notes == (
        'took state_dict',
        'left out what stands beside state_dict: epoch, arch, best_prec1, optimizer',
        f"stripped 'module.' from {len(net.state_dict())} names",
    )


# OpenMMLab.


def mmengine_file(**more: Any) -> Saved:
    """mmengine exchanges the two when saving: the averaged weights are in state_dict."""
    average, trained = (added(small('resnest'), i) for i in (0, 1))
    return {
        'meta': {'epoch': 100, 'dataset_meta': {'classes': ('a', 'b', 'c', 'd', 'e')}, **more},
        'state_dict': as_mmpretrain('resnest', average),
        'message_hub': {'log_scalars': {}},
        'optimizer': {'state': {}, 'param_groups': []},
        'ema_state_dict': {
            'steps': np.array(1000),
            **prefixed(as_mmpretrain('resnest', trained), 'module.'),
        },
    }


@pytest.mark.parametrize('ema', [True, False])
def test_mmengines_average(ema: bool) -> None:
    found = to_canonical(mmengine_file(), ema=ema)
    np.testing.assert_array_equal(found.state['fc.weight'], small('resnest')['fc.weight'] + (0 if ema else 1))
    assert set(found.state) == set(small('resnest'))
    assert found.classes == ('a', 'b', 'c', 'd', 'e')
    assert found.layout == 'mmpretrain'
    assert f'mmengine puts the {"averaged" if ema else "trained"} weights' in found.notes[0]
    assert ema or 'left out 1 tensor beside the net: steps' in found.notes


@pytest.mark.parametrize('ema', [True, False])
def test_mmcvs_average(ema: bool) -> None:
    mm = as_mmpretrain('resnext', small('resnext'))
    state = small('resnext')
    twins = {name: state[name] + 1 for name in state if name.endswith(('weight', 'bias'))}
    mm_twins = {'ema_' + n.replace('.', '_'): t for n, t in as_mmpretrain('resnext', twins).items()}
    found = to_canonical({'meta': {}, 'state_dict': {**mm, **mm_twins}}, ema=ema)
    assert_is(found, state if ema else {**state, **twins})
    word = 'averaged' if ema else 'trained'
    assert any(f'{word} of two values' in note and f'{len(twins)} parameters' in note for note in found.notes)


CLASSES = [
    ({'dataset_meta': {'classes': ('a', 'b', 'c', 'd', 'e')}}, True),
    ({'dataset_meta': {'CLASSES': ['a', 'b', 'c', 'd', 'e']}}, True),
    ({'CLASSES': ['a', 'b', 'c', 'd', 'e']}, True),
    ({'dataset_meta': None, 'CLASSES': ('a', 'b', 'c', 'd', 'e')}, True),
    ({'CLASSES': ('a', 'b', 'c', 'd')}, False),
    ({'CLASSES': 'abcde'}, False),
    ({'CLASSES': [1, 2, 3, 4, 5]}, False),
    ({'CLASSES': {'a', 'b', 'c', 'd', 'e'}}, False),
]


@pytest.mark.parametrize(('meta', 'good'), CLASSES)
def test_class_names(meta: Saved, good: bool) -> None:
    found = to_canonical({'meta': meta, 'state_dict': as_mmpretrain('resnext', small('resnext'))})
    assert found.classes == (('a', 'b', 'c', 'd', 'e') if good else None)
    if isinstance(meta.get('CLASSES'), tuple | set):
        assert good is not any("left out the file's class names" in note for note in found.notes)


GEOMETRY = [
    ("backbone=dict(type='ResNeXt', depth=50, style='caffe')", "style='caffe'"),
    ('{"backbone": {"style": "caffe"}}', "style='caffe'"),
    ("dict(type='ResNeSt', avg_down_stride=False)", 'avg_down_stride=False'),
    ('backbone = dict(\n    strides=(\n        1,\n        2,\n        1,\n        1,\n    ))', 'strides'),
    ('{"backbone": {"strides": [1, 2, 1, 1]}}', 'strides'),
    ("dict(type='ResNeXt', dilations=(1, 1, 2, 4))", 'dilations'),
    ("model=dict(backbone=dict(norm_cfg=dict(type='SyncBN', eps=0.001, momentum=0.01)))", 'epsilon'),
    ("dict(conv_cfg=dict(type='ConvWS'))", 'ConvWS'),
    ("backbone=dict(type='ResNeXt', depth=50, style='pytorch', avg_down_stride=True)", None),
    (
        "model=dict(backbone=dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), norm_cfg=dict(type='BN', "
        'eps=1e-05)), rpn_head=dict(strides=[4, 8, 16, 32, 64]), decode_head=dict(dilations=(1, 12, 24, 36)))'
        "\noptimizer=dict(type='Adam', eps=1e-8)",
        None,
    ),
]


@pytest.mark.parametrize('key', ['cfg', 'config'])
@pytest.mark.parametrize(('config', 'option'), GEOMETRY)
def test_a_configuration_of_another_net_is_refused(key: str, config: str, option: str | None) -> None:
    saved = {'meta': {key: config}, 'state_dict': as_mmpretrain('resnext', small('resnext'))}
    if option is None:
        to_canonical(saved)
    else:
        with pytest.raises(CheckpointError, match=f'{option}.*none of the nets here'):
            to_canonical(saved)
        found = to_canonical(saved, approximate=True)
        assert any(option in note for note in found.notes)


# Refusals.


def refused(change: Callable[[Saved], Any]) -> Any:
    return change(dict(small('resnext')))


HOSTILE: list[tuple[str, Callable[[Saved], Any], str]] = [
    ('a tensor', lambda s: s['fc.weight'], 'holds a ndarray, not a state dict'),
    ('None', lambda s: None, 'holds a NoneType'),
    ('an empty dict', lambda s: {}, 'holds no state dict.*nothing'),
    (
        'empty state dict',
        lambda s: {'state_dict': {}, 'epoch': 3},
        r'state_dict \(dict of 0\), epoch \(int\)',
    ),
    ('no tensors', lambda s: {'epoch': 1, 'arch': 'x'}, r'no state dict.*epoch \(int\), arch \(str\)'),
    ('unknown two', lambda s: {'a': s, 'b': added(s, 1)}, "no telling.*key='a', key='b'"),
    ('bare and nested', lambda s: {**s, 'copy': added(s, 1)}, 'no telling which net'),
    ('list for a tensor', lambda s: {'model': {**s, 'fc.bias': [1.0]}}, r'model holds .*fc.bias \(list\)'),
    ('None for a tensor', lambda s: {'model': {**s, 'fc.bias': None}}, r'fc.bias \(NoneType\)'),
    ('scalar for a tensor', lambda s: {'model': {**s, 'fc.bias': np.float32(1)}}, r'fc.bias \(float32\)'),
    (
        'two of one',
        lambda s: {**s, 'module.fc.bias': s['fc.bias']},
        'both fc.bias: fc.bias and module.fc.bias',
    ),
    (
        'two of one after a prefix',
        lambda s: {**prefixed(s, 'net.'), 'conv1.weight': s['conv1.weight']},
        'both conv1.weight: net.conv1.weight and conv1.weight',
    ),
    (
        'two classifiers',
        lambda s: {**prefixed(s, 'backbone.'), **{f'head.{n}': s[n] for n in ('fc.weight', 'fc.bias')}},
        'several classifiers: backbone.fc, head.*drop_head=True',
    ),
    (
        'two stems',
        lambda s: {**s, 'stem.2.bn.bias': np.ones(64), 'stem.0.conv.weight': np.ones(3)},
        'both bn1.bias: (bn1.bias and stem.2.bn.bias|stem.2.bn.bias and bn1.bias)',
    ),
    (
        'two nets',
        lambda s: {**prefixed(s, 'a.'), **prefixed(added(s, 1), 'b.')},
        "it holds 2 nets.*prefix='a.', prefix='b.'",
    ),
]


@pytest.mark.parametrize(('change', 'message'), [case[1:] for case in HOSTILE], ids=[c[0] for c in HOSTILE])
def test_refused(change: Callable[[Saved], Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        to_canonical(refused(change))
    assert len(str(caught.value)) < 1000


def test_junk_ends_in_our_error_or_leaves_each_tensor_alone() -> None:
    rng = random.Random(0)
    words = [
        'module',
        '_orig_mod',
        'backbone',
        'head',
        'fc',
        'stem',
        '0',
        '7',
        'layer1',
        'conv1',
        'weight',
        '',
    ]
    words += [
        'steps',
        'state_dict',
        'model',
        'ema_state_dict',
        'se_module',
        'meta',
        '\x1b[2J',
        'layer1.0.conv1.weight',
    ]
    tensors = [np.full((2,) * n, n, np.float32) for n in range(5)]

    def junk(depth: int) -> Any:
        if depth and rng.random() < 0.4:
            keys: list[Any] = [
                '.'.join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 6))
            ]
            return {rng.choice([key, key, key, 3]): junk(depth - 1) for key in keys}
        return rng.choice([*tensors, *tensors, *tensors, *tensors, None, 'layer1', 3.0, [tensors[0]]])

    accepted = 0
    for _ in range(5000):
        saved = {word: junk(3) for word in rng.sample(words, rng.randint(1, 6))}
        try:
            found = to_canonical(saved, ema=rng.random() < 0.5, approximate=rng.random() < 0.5)
        except CheckpointError as error:
            assert str(error).isprintable()
        else:
            accepted += 1
            assert all(note.isprintable() for note in found.notes)
            assert all(any(tensor is one for one in tensors) for tensor in found.state.values())
    assert accepted > 100

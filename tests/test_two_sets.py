"""Files of whole models, of averages and of several nets: what is taken, and what is asked for."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import added, assert_is, prefixed, small, small_net
from torch import nn

from convert.conversion import open_checkpoint
from convert.formats.pth import read_pth
from convert.names.layouts import to_canonical
from convert.names.roles import AmbiguousError
from flaxnets.errors import CheckpointError


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrapper', [None, nn.DataParallel, nn.Sequential])
def test_a_whole_model(tmp_path: Path, zipped: bool, wrapper: Any) -> None:
    net = small_net('resnest')
    saved = wrapper(net) if wrapper else net
    path = tmp_path / 'a.pth'
    torch.save({'model': saved, 'epoch': 1}, path, _use_new_zipfile_serialization=zipped)
    found = to_canonical(read_pth(path))
    assert list(found.state) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(found.state[name], tensor.numpy(), name)
    assert 'nothing of it was called' in found.notes[0] and type(saved).__name__ in found.notes[0]


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda net: setattr(net.layer2[0], 'act1', nn.SiLU()), 'layer2.0.act1 is SiLU'),
        (lambda net: setattr(net.bn1, 'eps', 1e-3), 'bn1 is BatchNorm2d with eps=0.001'),
        (lambda net: setattr(net.layer4[0].conv2, 'dilation', (2, 2)), 'dilation=(2, 2)'),
    ],
)
def test_a_whole_model_of_other_layers(tmp_path: Path, change: Any, told: str) -> None:
    net = small_net('resnext')
    change(net)
    torch.save(net, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError) as error:
        to_canonical(read_pth(tmp_path / 'a.pth'))
    assert told in str(error.value)
    found = to_canonical(read_pth(tmp_path / 'a.pth'), approximate=True)
    assert any(told in note for note in found.notes)


def test_a_whole_model_says_what_is_in_its_head(tmp_path: Path) -> None:
    net: Any = small_net('resnext')
    first, last = nn.Linear(2048, 8), nn.Linear(8, 5)
    net.fc = nn.Sequential(first, nn.Dropout(), last)
    torch.save(net, tmp_path / 'a.pth')
    found = to_canonical(read_pth(tmp_path / 'a.pth'))
    x = torch.randn(3, 2048)
    expected = last.double()(first.double()(x.double())).detach().numpy()
    got = x.numpy() @ found.state['fc.weight'].T + found.state['fc.bias']
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    net.fc[1] = nn.ReLU()
    torch.save(net, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='ReLU'):
        to_canonical(read_pth(tmp_path / 'b.pth'))


def test_an_average_of_parameters_takes_the_trained_statistics() -> None:
    trained = dict(small('resnext'))
    average = {n: t + 1 for n, t in trained.items() if n.endswith(('weight', 'bias'))}
    found = to_canonical({'model': trained, 'ema': {'shadow': average}})
    assert_is(found, {**trained, **average})
    assert any('statistics of BatchNorm from model' in note for note in found.notes)


def test_an_average_without_names_is_refused() -> None:
    saved = {'model': dict(small('resnext')), 'ema': {'shadow_params': [np.ones(3)] * 100, 'decay': 0.9}}
    with pytest.raises(CheckpointError, match=r'ema\.shadow_params.*ema=False'):
        to_canonical(saved)
    assert_is(to_canonical(saved, ema=False), small('resnext'))


def test_a_teacher_of_another_architecture_is_no_average() -> None:
    saved = {'student': dict(small('resnext')), 'teacher': dict(small('resnest'))}
    with pytest.raises(AmbiguousError, match="key='student', key='teacher'") as error:
        to_canonical(saved)
    assert error.value.choices == ({'key': 'student'}, {'key': 'teacher'})
    assert_is(to_canonical(saved, key='student'), small('resnext'))


def test_keys_and_prefixes() -> None:
    first, second = small('resnext'), added(small('resnext'), 1)
    nested = {'state': {'best.pt': dict(first), 'last': second}}
    assert_is(to_canonical(nested, key='state.best.pt'), first)
    assert_is(to_canonical(nested, key='last'), second)
    both = {'state_dict': {**prefixed(first, 'module.a.'), **prefixed(second, 'module.b.')}}
    for prefix in ('b.', 'b', 'module.b', 'module.b.'):
        assert_is(to_canonical(both, prefix=prefix), second)
    for wrong in ({'key': 'x'}, {'prefix': 'x'}, {'key': 'state_dict', 'prefix': 'c'}):
        with pytest.raises(AmbiguousError, match="no net at .*prefix='a.', prefix='b.'"):
            to_canonical(both, **wrong)


def test_only_averaged_weights() -> None:
    for saved in ({'model_ema': dict(small('resnext'))}, prefixed(small('resnext'), 'ema_model.')):
        with pytest.raises(CheckpointError, match='averaged weights only'):
            to_canonical(saved, ema=False)


OPTIONS = [
    ({'act_layer': 'silu'}, "act_layer='silu'"),
    ({'act_layer': nn.SiLU}, 'torch.nn.modules.activation.SiLU'),
    ({'output_stride': 16}, 'give output_stride=16 to flaxnets.load'),
    ({'global_pool': 'max'}, "global_pool='max'"),
    ({'aa_layer': 'blurpool'}, 'aa_layer'),
    ({'act_layer': 'relu', 'drop_rate': 0.2, 'num_classes': 5, 'output_stride': 32}, None),
    ({'act_layer': nn.ReLU, 'norm_layer': nn.BatchNorm2d, 'zero_init_last': False}, None),
]


@pytest.mark.parametrize(('options', 'told'), OPTIONS)
def test_options_of_timms_training(tmp_path: Path, options: dict[str, Any], told: str | None) -> None:
    args = argparse.Namespace(model='resnext50_32x4d', model_kwargs=options, gp=None, bn_eps=None)
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': small_net('resnext').state_dict(), 'args': args}, path)
    if told is None:
        to_canonical(read_pth(path))
        return
    with pytest.raises(CheckpointError) as error:
        to_canonical(read_pth(path))
    assert told in str(error.value)
    assert any(told in note for note in to_canonical(read_pth(path), approximate=True).notes)


@pytest.mark.parametrize(('name', 'value'), [('bn_eps', 1e-3), ('gp', 'avgmax')])
def test_other_options_of_timms_training(name: str, value: object) -> None:
    saved = {'state_dict': dict(small('resnext')), 'args': {name: value}}
    with pytest.raises(CheckpointError, match=str(value)):
        to_canonical(saved)


DETECTRON2 = [
    (r'^conv1\.0\.', 'stem.conv1_1.'),
    (r'^conv1\.1\.', 'stem.conv1_1.norm.'),
    (r'^conv1\.3\.', 'stem.conv1_2.'),
    (r'^conv1\.4\.', 'stem.conv1_2.norm.'),
    (r'^conv1\.6\.', 'stem.conv1_3.'),
    (r'^bn1\.', 'stem.conv1_3.norm.'),
    (r'^layer(\d)\.(\d+)\.bn([13])\.', r'layer\1.\2.conv\3.norm.'),
    (r'\.downsample\.1\.', '.shortcut.'),
    (r'\.downsample\.2\.', '.shortcut.norm.'),
]


def test_the_resnest_authors_detectors() -> None:
    """detectron2's names, as its ResNeSt fork builds them (`BasicStem`, `BottleneckBlock`)."""
    import re

    state = {n: t for n, t in small('resnest').items() if not n.startswith('fc.')}
    saved = {}
    for name, tensor in state.items():
        if name.endswith('num_batches_tracked'):
            continue
        for pattern, new in DETECTRON2:
            name = re.sub(pattern, new, name)
        stage = re.match(r'layer(\d)', name)
        if stage:
            name = f'res{int(stage[1]) + 1}{name[6:]}'
        saved[f'backbone.bottom_up.{name}'] = tensor
    rest = {
        'backbone.fpn_lateral2.weight': np.ones((256, 256, 1, 1)),
        'roi_heads.box_head.fc1.weight': np.ones(3),
    }
    found = to_canonical({'model': {**saved, **rest}, 'iteration': 9})
    assert_is(found, {n: t for n, t in state.items() if not n.endswith('num_batches_tracked')})
    assert found.layout == 'detectron2'


def test_torchvisions_nets_for_detectron2() -> None:
    """As its tools/convert-torchvision-to-d2.py names them; others may be nets with strides elsewhere."""
    saved = {}
    for name, tensor in small('resnext').items():
        new = name if 'layer' in name else f'stem.{name}'
        for stage in (1, 2, 3, 4):
            new = new.replace(f'layer{stage}', f'res{stage + 1}')
        for i in (1, 2, 3):
            new = new.replace(f'bn{i}', f'conv{i}.norm')
        new = new.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        saved[new] = tensor
    file = {'model': saved, '__author__': 'torchvision', 'matching_heuristics': True}
    assert_is(to_canonical(file), small('resnext'))
    with pytest.raises(CheckpointError, match='BGR'):
        to_canonical({'model': saved})
    assert_is(to_canonical({'model': saved}, approximate=True), small('resnext'))


def test_torchvisions_detectors() -> None:
    state = {n: t for n, t in small('resnext').items() if not n.startswith('fc.')}
    rest = {
        'backbone.fpn.inner_blocks.0.0.weight': np.ones((8, 256, 1, 1)),
        'rpn.head.cls_logits.weight': np.ones((3, 8, 1, 1)),
        'roi_heads.box_predictor.cls_score.weight': np.ones((5, 8)),
    }
    found = to_canonical({'model': {**prefixed(state, 'backbone.body.'), **rest}})
    assert_is(found, state)
    assert any(all(part in note for part in ('backbone', 'rpn', 'roi_heads')) for note in found.notes)


def test_names_of_sharding_and_of_recomputing() -> None:
    """FSDP and activation checkpointing put parts into names at any level."""
    state = small('resnext')
    wrapped = {
        '_fsdp_wrapped_module.'
        + name.replace('layer2.0.', 'layer2.0._checkpoint_wrapped_module.').replace(
            'layer3.0.', 'layer3.0._fsdp_wrapped_module._checkpoint_wrapped_module.'
        ): tensor
        for name, tensor in state.items()
    }
    assert_is(to_canonical({'state_dict': wrapped}), state)


def test_counters_of_every_kind(tmp_path: Path) -> None:
    """timm's averaging script writes them as float32, `.half()` as float16."""
    net = small_net('resnext')
    state = {n: torch.tensor(7) if n.endswith('tracked') else t for n, t in net.state_dict().items()}

    def opened(change: Any) -> Any:
        saved = {n: change(t) if n.endswith('tracked') else t for n, t in state.items()}
        torch.save(saved, tmp_path / 'a.pth')
        from convert.names.counters import take_counters

        return take_counters(read_pth(tmp_path / 'a.pth'))

    names = [n for n in state if n.endswith('tracked')]
    for change in (torch.Tensor.half, torch.Tensor.double, torch.Tensor.float, torch.Tensor.int):
        kept, counters, note = opened(change)
        assert counters is not None and set(counters.values()) == {7} and len(counters) == len(names)
        assert all(kept[n].dtype == np.int64 and kept[n].shape == () for n in names)
        assert len(note) == 1 and 'int64' in note[0]
    for change in (
        lambda t: torch.tensor(1e6).half(),
        lambda t: torch.tensor(0.5),
        lambda t: torch.tensor(float('nan')),
        lambda t: torch.ones(2),
    ):
        kept, counters, note = opened(change)
        assert counters is None and not set(names) & set(kept)
        assert len(note) == 1 and 'left out' in note[0]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_pth(tmp_path / 'a.pt')


def test_objects_without_weights(tmp_path: Path) -> None:
    torch.save(functools.partial(torch.optim.Adam), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='functools.partial'):
        open_checkpoint(tmp_path / 'a.pth')


def test_a_layer_after_the_classifier() -> None:
    """`nn.Sequential(net, nn.Linear(5, 3))` is one linear layer; with something between, no telling."""
    state, after = small('resnext'), nn.Linear(5, 3)
    for place, folds in (('1', True), ('2', False)):
        saved = {**prefixed(state, '0.'), f'{place}.weight': after.weight.detach().numpy()}
        saved[f'{place}.bias'] = after.bias.detach().numpy()
        if not folds:
            with pytest.raises(CheckpointError, match='several classifiers'):
                to_canonical(saved)
            continue
        found = to_canonical(saved)
        assert any('nn.Sequential' in note for note in found.notes)
        x = np.random.default_rng(0).random((4, 2048))
        inner = torch.from_numpy(x @ state['fc.weight'].T.astype(np.float64) + state['fc.bias'])
        expected = after.double()(inner).detach().numpy()
        got = x @ found.state['fc.weight'].T.astype(np.float64) + found.state['fc.bias']
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
        after = after.float()

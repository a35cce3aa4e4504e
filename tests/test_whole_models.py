"""Pickled whole models: those of the libraries open, and a layer that computes something else is refused."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from nets import timm_net
from states import small_net
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from convert.formats.pth import read_pth
from convert.names.found import Found
from convert.names.layouts import to_canonical
from convert.names.stages import STAGE_NAMES, StageNames
from flaxnets.errors import CheckpointError


def hollow(net: nn.Module) -> nn.Module:
    """The same with one number for each tensor, so that its file is small."""
    zero = torch.zeros(())
    for module in net.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None and (value.is_floating_point() or value.is_meta):
                    zeros = zero.expand(value.shape)
                    values[name] = nn.Parameter(zeros) if isinstance(value, nn.Parameter) else zeros
    return net


SMALL = {kind: hollow(small_net(kind)) for kind in ('resnext', 'seresnext', 'resnextd', 'res2net', 'resnest')}


def net(kind: str = 'resnext', **attributes: Any) -> Any:
    tensors = [*SMALL[kind].parameters(), *SMALL[kind].buffers()]
    made = copy.deepcopy(SMALL[kind], {id(tensor): tensor for tensor in tensors})
    for path, value in attributes.items():
        parent, _, name = path.replace('__', '.').rpartition('.')
        setattr(made.get_submodule(parent), name, value)
    return made


def opened(saved: nn.Module, path: Path, **options: Any) -> Found:
    torch.save(saved, path / 'a.pth')
    return to_canonical(read_pth(path / 'a.pth'), **options)


class Around(nn.Module):
    """A net as a part of another model."""

    def __init__(self, inner: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.backbone = inner
        for name, module in more.items():
            self.add_module(name, module)


def test_the_libraries_models_open(tmp_path: Path) -> None:
    names = ['res2net50_26w_4s', 'res2net50d', 'res2next50', 'resnext50_32x4d', 'resnext50d_32x4d']
    names += ['seresnext50_32x4d', 'resnest14d', 'resnest50d_4s2x40d', 'resnest50d_1s4x24d']
    few: dict[str, Any] = dict(layers=(1, 1, 1, 2))
    with torch.device('meta'):
        nets = {name: timm_net(name, **few) for name in names}
        nets['torchvision'] = torchvision.models.resnext50_32x4d()
        nets['pools nothing'] = timm.create_model('resnext50_32x4d', num_classes=0, global_pool='', **few)
        nets['gives features'] = timm.create_model('resnest14d', features_only=True)
    for name, made in nets.items():
        found = opened(hollow(made), tmp_path)
        expected = {key for key in made.state_dict() if not key.startswith('fc.')}
        assert {key for key in found.state if not key.startswith('fc.')} == expected, name


def test_models_around_a_net_open(tmp_path: Path) -> None:
    linear, drop, soft = nn.Linear(2048, 3), nn.Dropout(), nn.Softmax(1)
    with torch.device('meta'):
        children = [*torchvision.models.resnext50_32x4d().children()]
        frozen = torchvision.models.resnext50_32x4d(norm_layer=torchvision.ops.FrozenBatchNorm2d)
        stages = IntermediateLayerGetter(torchvision.models.resnext50_32x4d(), {'layer4': 'out'})
        segmenting = torchvision.models.segmentation.DeepLabV3(stages, DeepLabHead(2048, 3))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    for saved, classes in (
        (nn.Sequential(net(), soft), 5),
        (net('resnest', layer1__0__conv2__rsoftmax=RSoftmax()), 5),
        (Around(net(fc=nn.Identity()), neck=Pooling(nn.AdaptiveAvgPool2d), fc=linear), 3),
        (nn.Sequential(net(fc=nn.Identity()), drop, linear, soft), 3),
        (net(fc=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2048), nn.ReLU(), drop, linear)[:2]), 0),
        (net(fc=nn.Sequential(nn.BatchNorm1d(2048), drop, linear, nn.LogSoftmax(1))), 3),
        (Around(net(), criterion=nn.CrossEntropyLoss(), softmax=soft, dropout=drop), 5),
        (Around(net(fc=nn.Identity()), pool=nn.AdaptiveAvgPool2d((1, 1)), relu=nn.ReLU(), fc=linear), 3),
        (nn.SyncBatchNorm.convert_sync_batchnorm(net()), 5),
        (nn.Sequential(*children), 1000),
        (nn.Sequential(nn.Sequential(*children[:-2]), pooled), 3),
        (frozen, 1000),
        (segmenting, 0),
    ):
        found = opened(hollow(saved), tmp_path)
        assert len(found.state.get('fc.weight', ())) == classes, saved


class Pooling(nn.Module):
    def __init__(self, pool: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.pool = pool(1)


class RSoftmax(nn.Module):
    """OpenMMLab's name for what timm calls RadixSoftmax."""


class Cosine(nn.Linear):
    pass


class Standardised(nn.Conv2d):
    pass


def other_stride(made: Any) -> Any:
    made.layer2[0].conv1.stride, made.layer2[0].conv2.stride = (2, 2), (1, 1)  # style='caffe'
    return made


def other_pool(made: Any, **settings: Any) -> Any:
    for name, value in settings.items():
        setattr(made.layer2[0].downsample[0], name, value)
    return made


def with_pool(kind: str) -> Any:
    made = net()
    made.reset_classifier(5, kind)
    return made


CHANGES: list[tuple[str, Callable[[], nn.Module]]] = [
    ('the stem', lambda: net(maxpool=nn.Identity())),
    ('maxpool', lambda: net(maxpool=nn.MaxPool2d(3, 2, 0, ceil_mode=True))),
    ('the stem', lambda: net(maxpool=nn.AvgPool2d(3, 2, 1))),
    ('act1', lambda: net(act1=nn.SiLU())),
    ('act1', lambda: net(act1=nn.Identity())),
    ('conv1.2', lambda: net('resnest', conv1__2=nn.Identity())),
    ('layer2.0.act2', lambda: net(layer2__0__act2=nn.Identity())),
    ('layer2.0.act2', lambda: net(layer2__0__act2=nn.Hardswish())),
    ('conv1', lambda: net(conv1__stride=(1, 1))),
    ('layer3.0.conv2', lambda: net(layer3__0__conv2__padding_mode='reflect')),
    ('layer3.0.conv2', lambda: net(layer3__0__conv2__padding=(0, 0))),
    ('layer2.0.conv1', lambda: other_stride(net())),
    ('layer2.0.downsample.0', lambda: net(layer2__0__downsample__0__stride=(1, 1))),
    ('layer2.0.downsample.1', lambda: net('resnextd', layer2__0__downsample__0=nn.Identity())),
    ('layer2.0.downsample.0', lambda: other_pool(net('resnextd'), ceil_mode=False)),
    ('layer2.0.downsample.0', lambda: other_pool(net('resnextd'), kernel_size=3, padding=1)),
    ('layer2.0.conv2.conv', lambda: net('resnest', layer2__0__avd_last=nn.Identity())),
    ('layer1.0.convs.0', lambda: net('res2net', layer1__0__pool=None)),
    ('layer2.0.pool', lambda: net('res2net', layer2__0__pool=nn.AvgPool2d(3, 1, 1))),
    ('layer2.0.convs.0', lambda: net('res2net', layer2__0__pool=nn.MaxPool2d(3, 2, 1))),
    ('layer2.0.drop_block', lambda: net(layer2__0__drop_block=nn.MaxPool2d(3, 2, 1))),
    ('layer1.0.se.gate', lambda: net('seresnext', layer1__0__se__gate=nn.Hardsigmoid())),
    ('conv1', lambda: net(conv1=Standardised(3, 64, 7, 2, 3, bias=False))),
    ('layer1.0.bn1', lambda: net(layer1__0__bn1__eps=1e-3)),
    ('0.2', lambda: nn.Sequential(*net('resnest', conv1__2=nn.Identity()).children())),
    ('2', lambda: nn.Sequential(*net(act1=nn.Identity()).children())),
    ('5.0.conv1', lambda: nn.Sequential(*other_stride(net()).children())),
    ('1', lambda: nn.Sequential(net(), nn.Tanh())),
    ('0', lambda: nn.Sequential(nn.Upsample(scale_factor=2), net())),
]
HEADS: list[tuple[str, Callable[[], nn.Module]]] = [
    ('global_pool.pool', lambda: with_pool('max')),
    ('global_pool.pool', lambda: with_pool('avgmax')),
    ('global_pool', lambda: net(global_pool=nn.AdaptiveMaxPool2d(1))),
    ('global_pool', lambda: net(global_pool=nn.LPPool2d(2, 7))),
    ('fc.0', lambda: net(fc=nn.Sequential(nn.BatchNorm1d(2048, eps=1e-3), nn.Linear(2048, 2)))),
    ('fc.0', lambda: net(fc=nn.Sequential(nn.Tanh(), nn.Linear(2048, 2)))),
    ('fc.1', lambda: net(fc=nn.Sequential(nn.Linear(2048, 2), nn.ReLU()))),
    ('fc', lambda: net(fc=Cosine(2048, 2))),
    ('1', lambda: nn.Sequential(net(fc=nn.Identity()), nn.Tanh(), nn.Linear(2048, 2))),
    ('pool', lambda: Around(net(fc=nn.Identity()), pool=nn.AdaptiveMaxPool2d(1), fc=nn.Linear(2048, 2))),
    (
        'neck.pool',
        lambda: Around(net(fc=nn.Identity()), neck=Pooling(nn.AdaptiveMaxPool2d), fc=nn.Linear(2048, 2)),
    ),
    ('act', lambda: Around(net(fc=nn.Identity()), act=nn.GELU(), fc=nn.Linear(2048, 2))),
]


def test_other_layers_are_refused_by_name(tmp_path: Path) -> None:
    for layer, change in CHANGES + HEADS:
        torch.save(change(), tmp_path / 'a.pth')
        saved = read_pth(tmp_path / 'a.pth')
        with pytest.raises(CheckpointError) as error:
            to_canonical(saved)
        assert f' {layer} ' in str(error.value), (layer, str(error.value))
        found = to_canonical(saved, approximate=True)
        assert any(f' {layer} ' in note for note in found.notes), layer


def test_a_record_of_stages_is_all_that_a_publisher_with_other_stages_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_timm(layers: set[str]) -> dict[str, str]:
        return {layer: re.sub(r'^stage_(\d)', r'layer\1', layer) for layer in layers}

    def renamed(made: nn.Module) -> nn.Module:
        children = {name.replace('layer', 'stage_'): child for name, child in made.named_children()}
        return nn.Sequential(OrderedDict(children))

    names = ('stage_1', 'stage_2', 'stage_3', 'stage_4')
    record = StageNames('mine', names, stem=('conv1', 'bn1'), to_timm=to_timm)
    assert opened(renamed(net('resnest')), tmp_path).place is None
    monkeypatch.setattr('convert.names.anchors.STAGE_NAMES', (*STAGE_NAMES, record))
    found = opened(renamed(net('resnest')), tmp_path)
    assert found.layout == 'mine' and set(found.state) == set(net('resnest').state_dict())
    with pytest.raises(CheckpointError, match=r'stage_2\.0\.conv1 '):
        opened(renamed(other_stride(net())), tmp_path)
    with pytest.raises(CheckpointError, match='takes 2047 features, and the net gives 2048'):
        opened(renamed(net(fc=nn.Linear(2047, 5))), tmp_path)


def test_a_head_that_is_dropped_may_be_anything(tmp_path: Path) -> None:
    for layer, change in HEADS:
        assert 'layer1.0.conv1.weight' in opened(change(), tmp_path, drop_head=True).state, layer
    with pytest.raises(CheckpointError, match='stem'):
        opened(net(maxpool=nn.Identity()), tmp_path, drop_head=True)


def test_shared_modules_do_not_multiply_a_file(tmp_path: Path) -> None:
    inner: nn.Module = nn.BatchNorm1d(1)
    for _ in range(40):
        inner = nn.Sequential(inner, inner)  # a trillion layers by their names
    torch.save(inner, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='layers and tensors'):
        read_pth(tmp_path / 'a.pth')
    deep: nn.Module = nn.BatchNorm1d(1)
    for _ in range(100):
        deep = nn.Sequential(deep)
    torch.save(deep, tmp_path / 'b.pth')
    with pytest.raises(CheckpointError, match='deep'):
        read_pth(tmp_path / 'b.pth')


def test_a_module_that_is_used_twice_is_there_twice(tmp_path: Path) -> None:
    shared = nn.BatchNorm1d(3)
    saved = nn.Sequential(shared, nn.ReLU(), shared)
    torch.save(saved, tmp_path / 'a.pth')
    found = read_pth(tmp_path / 'a.pth')
    expected = saved.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())

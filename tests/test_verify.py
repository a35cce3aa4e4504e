"""--verify: what it proves, and that it sees what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from nets import numpy_state, randomise, timm_net
from PIL import Image
from skimage import data as photographs
from torchvision.models.resnet import Bottleneck

import flaxnets
from convert.arithmetic import fold_batch_norm
from convert.names.tree import to_variables
from convert.verification import TOLERANCE, of_timms_blocks, verify
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.zoo.records import Config

NET = 'resnest_tiny'


def prepared(name: str, **kwargs: Any) -> tuple[dict[str, Any], Any, Config]:
    state = numpy_state(randomise(timm_net(name, **kwargs)))
    config = Config(name, zoo.NETS[name], Preprocess(64), **kwargs)
    return state, to_variables(state, flaxnets.create(name, **kwargs)), config


def blocks(name: str) -> list[str]:
    return [f'layer{s}.{i}' for s, n in enumerate(zoo.NETS[name].layers, 1) for i in range(n)]


def test_a_right_conversion_is_proven() -> None:
    result = verify(*prepared(NET))
    assert [layer.layer for layer in result.layers] == ['bn1', *blocks(NET), 'fc']
    assert result.first_outside is None
    assert 0 < max(layer.relative for layer in result.layers) < TOLERANCE / 10
    assert result.to_json()['within'] is True


def test_other_heads_channels_and_images(tmp_path: Path) -> None:
    photo = tmp_path / 'coffee.png'
    Image.fromarray(photographs.coffee()).save(photo)
    for options in (dict(num_classes=7, in_chans=1), dict(num_classes=0, in_chans=4)):
        state, variables, config = prepared(NET, **options)
        images = Preprocess(96, mean=(0.5,) * config.in_chans, std=(0.5,), unsupported=('ten crops',))
        result = verify(state, variables, dataclasses.replace(config, preprocess=images), image=str(photo))
        assert result.first_outside is None and result.image == str(photo)


def test_every_net_of_the_zoo_can_be_built_of_timms_blocks() -> None:
    for name, arch in zoo.NETS.items():
        with torch.device('meta'):
            built, timms = of_timms_blocks(arch), timm_net(name)
        ours, theirs = ({key: t.shape for key, t in net.state_dict().items()} for net in (built, timms))
        assert ours == theirs, name


def test_folded_variables_are_proven_against_the_net_as_it_was() -> None:
    state, _, config = prepared(NET)
    folded = to_variables(fold_batch_norm(state), flaxnets.create(NET, folded=True))
    config = Config(config.name, config.arch, config.preprocess, folded=True)
    assert verify(state, folded, config).first_outside is None


def test_the_first_wrong_block_is_found() -> None:
    state, variables, config = prepared(NET)
    block = variables['params']['layer3']['0']
    block['conv3']['kernel'] = block['conv3']['kernel'] * np.float32(1.01)
    result = verify(state, variables, config)
    assert result.first_outside is not None and result.first_outside.layer == 'layer3.0'
    assert result.to_json()['within'] is False


def test_nan_is_outside() -> None:
    state, variables, config = prepared(NET)
    variables['params']['bn1']['scale'] = variables['params']['bn1']['scale'] * np.nan
    outside = verify(state, variables, config).first_outside
    assert outside is not None and outside.layer == 'bn1'


def test_torchvision_takes_timms_place(monkeypatch: pytest.MonkeyPatch) -> None:
    name, layers = 'resnext50_32x4d', (1, 2, 1, 1)
    monkeypatch.setitem(zoo.NETS, name, dataclasses.replace(zoo.NETS[name], layers=layers))
    theirs = functools.partial(torchvision.models.ResNet, Bottleneck, layers, groups=32, width_per_group=4)
    monkeypatch.setattr(torchvision.models, name, theirs)
    net = randomise(theirs())
    state = numpy_state(net)
    variables = to_variables(state, flaxnets.create(name))
    monkeypatch.setitem(sys.modules, 'timm', None)
    result = verify(state, variables, Config(name, zoo.NETS[name], Preprocess(64)))
    assert result.reference.startswith('torchvision') and result.first_outside is None
    assert [layer.layer for layer in result.layers] == ['bn1', *blocks(name), 'fc']
    with pytest.raises(FlaxnetsError, match='torchvision has no net equal to resnest14d'):
        verify({}, {}, Config('resnest14d', zoo.ARCHS['resnest14d']))


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('torch', 'timm', 'torchvision'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FlaxnetsError, match=r'pip install torch timm'):
        verify({}, {}, Config('resnest14d', zoo.ARCHS['resnest14d']))

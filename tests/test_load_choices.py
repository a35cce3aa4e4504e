"""`load`, `config` and `transform` take what errors advise: key, prefix, ema, approximate, drop_head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import numpy_state, timm_net

import flaxnets
from convert import conversion
from flaxnets.api import load_with_config
from flaxnets.store import runs
from flaxnets.zoo.records import Config

NET = timm_net('resnext_tiny', num_classes=5)
STATE = NET.state_dict()
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def bias(source: Any, **asked: Any) -> np.ndarray:
    _, variables = flaxnets.load(source, model='resnext_tiny', **asked)
    return np.asarray(variables['params']['bn1']['bias'])


def test_what_a_file_holds_several_of(tmp_path: Path) -> None:
    first, second = (state['bn1.bias'].numpy() for state in (STATE, OTHER))
    path = tmp_path / 'a.pth'
    torch.save({'one': STATE, 'two': OTHER}, path)
    for function in (flaxnets.load, flaxnets.config, flaxnets.transform):
        with pytest.raises(flaxnets.CheckpointError, match="key='one'"):
            function(path, model='resnext_tiny')
    np.testing.assert_array_equal(bias(path, key='two'), second)
    assert flaxnets.config(path, model='resnext_tiny', key='two').num_classes == 5
    assert flaxnets.transform(path, model='resnext_tiny', key='one').preprocess.size == 32
    torch.save({f'{p}.{name}': t for p, s in (('a', STATE), ('b', OTHER)) for name, t in s.items()}, path)
    np.testing.assert_array_equal(bias(path, prefix='b'), second)
    torch.save({'state_dict': STATE, 'state_dict_ema': OTHER}, path)
    np.testing.assert_array_equal(bias(path), second)
    np.testing.assert_array_equal(bias(path, ema=False), first)


def test_a_head_or_a_net_that_is_refused_without_them(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    net = timm_net('resnext_tiny', num_classes=5)
    net.act1 = torch.nn.SiLU()
    torch.save(net, path)
    with pytest.raises(flaxnets.CheckpointError, match='SiLU'):
        flaxnets.config(path, model='resnext_tiny')
    conf, _, _ = load_with_config(path, model='resnext_tiny', approximate=True)
    assert conf.num_classes == 5
    torch.save({**STATE, 'fc.0.weight': STATE['fc.weight'], 'fc.3.weight': torch.ones(2, 5)}, path)
    with pytest.raises(flaxnets.CheckpointError, match='drop_head=True'):
        flaxnets.load(path, model='resnext_tiny')
    model, variables = flaxnets.load(path, model='resnext_tiny', drop_head=True)
    assert model.num_classes == 0 and 'fc' not in variables['params']


def test_sources_with_one_net_take_none_of_them(tmp_path: Path) -> None:
    torch.save(numpy_state(NET), tmp_path / 'a.pth')
    conversion.write(conversion.open_checkpoint(tmp_path / 'a.pth', 'resnext_tiny'), tmp_path / 'net')
    for source, kind in ((tmp_path / 'net', 'directory'), ('resnest50d', 'published')):
        for asked in (
            {'key': 'a'},
            {'prefix': 'a.'},
            {'ema': False},
            {'drop_head': True},
            {'approximate': True},
        ):
            for function in (flaxnets.load, flaxnets.config, flaxnets.transform):
                with pytest.raises(flaxnets.FlaxnetsError, match=f'{kind}.*{next(iter(asked))}='):
                    function(source, **asked)
    assert isinstance(flaxnets.config(tmp_path / 'net', ema=True), Config)


def test_a_run_gives_either_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = flaxnets.config('resnext_tiny')
    seen = []
    monkeypatch.setattr(runs, 'is_checkpoint', lambda path: True)
    monkeypatch.setattr(runs, 'read_config', lambda path: conf)
    monkeypatch.setattr(runs, 'read', lambda path, ema: seen.append(ema) or 1 / 0)
    for ema in (True, False):
        with pytest.raises(ZeroDivisionError):
            flaxnets.load(tmp_path, ema=ema)
    assert seen == [True, False]
    with pytest.raises(flaxnets.FlaxnetsError, match='training run.*key='):
        flaxnets.load(tmp_path, key='a')

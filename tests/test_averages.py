"""Averages of parameters: how they move, beside torch-ema's and timm's, and what is said of long ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch_ema import ExponentialMovingAverage

from train import recipes
from train.notes import without_effect
from train.settings import Settings, from_json, to_json
from train.step.schedule import ema_decay
from train.step.step import moved

DIGITS = recipes.get('digits')
STEPS = 60


def sequence() -> list[np.ndarray]:
    """Parameters that drift, as in training."""
    rng = np.random.default_rng(0)
    return list(np.cumsum(rng.normal(size=(STEPS + 1, 5)), 0).astype(np.float32))


def averages(settings: Settings) -> list[np.ndarray]:
    first, *rest = sequence()
    decay = ema_decay(settings)
    tree: Any = {'a': first}
    found = []
    for update, values in enumerate(rest, 1):
        tree = moved(tree, {'a': values}, decay(jax.numpy.asarray(update)))
        assert float(decay(jax.numpy.asarray(update))) == pytest.approx(decay(update), rel=1e-6)
        found.append(np.asarray(tree['a']))
    return found


@pytest.mark.parametrize('decay', [0.5, 0.8, 0.9999])
def test_averages_that_warm_up_are_those_of_torch_ema(decay: float) -> None:
    first, *rest = (torch.from_numpy(values) for values in sequence())
    parameter = torch.nn.Parameter(first)
    theirs = ExponentialMovingAverage([parameter], decay, use_num_updates=True)
    for values, ours in zip(rest, averages(Settings('', ema_decay=decay)), strict=True):
        parameter.data = values
        theirs.update()
        np.testing.assert_allclose(ours, theirs.shadow_params[0].numpy(), rtol=2e-5, atol=1e-6)


def test_and_without_a_warm_up_those_of_timm() -> None:
    first, *rest = sequence()
    net = torch.nn.BatchNorm1d(5)  # a parameter and a statistic alike
    net.weight.data, net.running_mean = torch.from_numpy(first), torch.from_numpy(first.copy())
    theirs = ModelEmaV3(net, decay=0.8)
    settings = Settings('', ema_decay=0.8, ema_warmup=False)
    for values, ours in zip(rest, averages(settings), strict=True):
        net.weight.data, net.running_mean = torch.from_numpy(values), torch.from_numpy(values.copy())
        theirs.update(net)
        for tensor in (theirs.module.weight, theirs.module.running_mean):
            np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_what_does_not_change_stays_to_the_bit() -> None:
    values = {'a': np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    assert (np.asarray(moved(values, values, 0.9)['a']) == values['a']).all()


@pytest.mark.parametrize(
    ('changes', 'steps', 'words'),
    [
        (dict(ema_decay=0.9999), 550, ['10000 steps', '550', '0.9839', '62 steps']),
        (dict(ema_decay=0.9999, ema_warmup=False), 550, ['94.6 %', 'ema_warmup=True']),
        (dict(ema_decay=0.99), 550, []),
        (dict(ema_decay=0.99, ema_warmup=False), 550, []),  # 0.4 % are left
        (dict(ema_decay=0.99, ema_warmup=False), 400, ['1.8 %']),
        (dict(ema_decay=0.9999), 250_000, []),  # a recipe on ImageNet
        (dict(), 550, []),
    ],
)
def test_a_decay_longer_than_the_run_is_said(changes: dict[str, Any], steps: int, words: list[str]) -> None:
    notes = list(without_effect(dataclasses.replace(DIGITS, **changes), steps // 25, steps))
    warnings = [note.message for note in notes if note.kind == 'warning']
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] for word in words)


def test_a_run_from_before_the_warm_up_goes_on_without() -> None:
    data = to_json(dataclasses.replace(DIGITS, ema_decay=0.9))
    del data['ema_warmup']
    assert not from_json(data).ema_warmup
    assert from_json({**data, 'ema_decay': 0.0}).ema_warmup  # it has none: nothing to tell apart

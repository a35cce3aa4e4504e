"""Learning rates against the published logs, PyTorch's schedulers and hand calculation."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flaxnets.errors import FlaxnetsError
from train import recipes
from train.settings import Settings
from train.step.schedule import count_steps, drop_block, learning_rate

IMAGENET = 1281167
LAST_DIGIT = 5.1e-7  # the logs have six decimals

# dmlc/web-data, gluoncv/logs/classification/imagenet/resnext50_32x4d.log: epoch, batch, lr.
RESNEXT50 = [
    (0, 49, 0.003133),
    (0, 99, 0.006331),
    (0, 1249, 0.079872),
    (1, 49, 0.083133),
    (2, 649, 0.201503),
    (4, 1249, 0.399872),
    (5, 49, 0.400000),
    (5, 549, 0.399995),
    (5, 1249, 0.399974),
    (6, 1249, 0.399896),
    (7, 249, 0.399874),
    (199, 699, 0.000005),
    (199, 1249, 0.000000),
]
# resnext101_64x4d.log, beside it.
RESNEXT101 = [
    (193, 549, 0.001116),
    (194, 49, 0.000922),
    (195, 49, 0.000638),
    (196, 999, 0.000266),
    (197, 499, 0.000176),
    (198, 49, 0.000100),
    (199, 49, 0.000024),
]
# resnest14.log: epoch, batches done, lr.
RESNEST14 = [
    (0, 100, 0.006390),
    (0, 1200, 0.076677),
    (1, 100, 0.086326),
    (131, 1100, 0.213566),
    (132, 100, 0.213092),
    (134, 1200, 0.206279),
    (137, 700, 0.200119),
    (139, 1200, 0.194435),
    (269, 200, 0.000016),
    (269, 800, 0.000005),
    (269, 1200, 0.000001),
]


@pytest.mark.parametrize(
    ('name', 'log'), [('resnext50_32x4d', RESNEXT50), ('resnext101_64x4d', RESNEXT101)], ids=['50', '101']
)
def test_gluon_resnext_has_the_learning_rates_of_its_log(
    name: str, log: list[tuple[int, int, float]]
) -> None:
    settings = recipes.get(name)
    epoch_steps, total = count_steps(settings, IMAGENET)
    assert (epoch_steps, total) == (1251, 200 * 1251)
    rate = learning_rate(settings, epoch_steps)
    for epoch, batch, lr in log:
        assert rate(epoch * 1251 + batch) == pytest.approx(lr, abs=LAST_DIGIT), (epoch, batch)


def test_gluon_resnest_has_the_learning_rates_of_its_log() -> None:
    # Its scheduler was told of 1252 steps an epoch, ceil((1281167 // 8) / 128), of which 1251 were run.
    rate = learning_rate(recipes.get('resnest14d'), 1252)
    for epoch, done, lr in RESNEST14:
        assert rate(epoch * 1251 + done) == pytest.approx(lr, abs=LAST_DIGIT), (epoch, done)


@pytest.mark.parametrize(
    ('name', 'epoch_steps', 'total', 'highest'),
    [
        ('res2net50_26w_4s', 5004, 500_400, 0.1),
        ('resnest50d', 156, 42_120, 3.2),
        ('resnest101e', 312, 84_240, 1.6),
        ('resnest200e', 625, 168_750, 0.8),
        ('resnest50d-torch', 625, 168_750, 0.8),
    ],
)
def test_steps_and_highest_rate(name: str, epoch_steps: int, total: int, highest: float) -> None:
    settings = recipes.get(name)
    assert count_steps(settings, IMAGENET) == (epoch_steps, total)
    rate = learning_rate(settings, epoch_steps)
    peak = settings.warmup_epochs * epoch_steps
    assert rate(peak) == highest
    if peak:
        assert rate(0) == 0
        assert rate(peak // 5) == pytest.approx(highest / 5)
        assert rate((peak + total) // 2) == pytest.approx(highest / 2, rel=1e-4)
        assert rate(total) == rate(total + 99) == 0


@pytest.mark.parametrize(
    ('epoch', 'lr'), [(0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 0.001), (90, 1e-4), (99, 1e-4)]
)
def test_res2net_steps_down_every_30_epochs(epoch: int, lr: float) -> None:
    rate = learning_rate(recipes.get('res2net50_26w_4s'), 5004)
    assert rate(epoch * 5004) == pytest.approx(lr, rel=1e-15)
    assert rate(epoch * 5004 + 5003) == pytest.approx(lr, rel=1e-15)


def test_cosine_and_steps_equal_torch() -> None:
    epoch_steps, epochs = 3, 8
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * epoch_steps)
    ours = learning_rate(Settings('resnest50d', lr=0.3, epochs=epochs), epoch_steps)
    for step in range(epochs * epoch_steps):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-12)
        optimizer.step()
        cosine.step()

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.2)
    settings = Settings('resnest50d', lr=0.3, epochs=epochs, schedule='step', step_epochs=3, step_rate=0.2)
    ours = learning_rate(settings, epoch_steps)
    for step in range(epochs * epoch_steps):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-12)
        optimizer.step()
        if step % epoch_steps == epoch_steps - 1:
            steps.step()


def test_constant_after_warm_up() -> None:
    settings = Settings('resnest50d', lr=0.3, epochs=4, schedule='constant', warmup_epochs=2)
    rate = learning_rate(settings, 5)
    expected = [0.3 * step / 10 for step in range(10)] + [0.3] * 10
    assert [rate(step) for step in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize('schedule', ['cosine', 'step', 'constant'])
def test_a_traced_step_is_as_exact_as_float32_can_be(schedule: str) -> None:
    settings = dataclasses.replace(recipes.get('resnest269e'), schedule=schedule)
    epoch_steps, total = count_steps(settings, IMAGENET)
    steps = np.unique(np.concatenate([np.arange(0, total, 997), np.arange(total - 50, total)]))
    rate = learning_rate(settings, epoch_steps)
    device = jax.jit(jax.vmap(rate))(jnp.asarray(steps, jnp.int32))
    assert device.dtype == jnp.float32
    host = rate(steps)
    assert host.dtype == np.float64
    np.testing.assert_allclose(device, host, rtol=5e-7)
    np.testing.assert_array_equal(host, [rate(int(step)) for step in steps])
    if schedule == 'cosine':
        warmup = 5 * epoch_steps
        naive = [
            0.4 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) for t in steps if t >= warmup
        ]
        np.testing.assert_allclose(host[steps >= warmup], naive, rtol=1e-6)


def test_drop_block_grows_by_epoch() -> None:
    rate = drop_block(recipes.get('resnest50d'), 156)
    assert rate(0) == rate(155) == pytest.approx(0.1 / 270)
    assert rate(156) == pytest.approx(0.2 / 270)
    assert rate(134 * 156 + 7) == pytest.approx(0.05)
    assert rate(269 * 156) == rate(10**6) == pytest.approx(0.1)
    traced = jax.jit(rate)(jnp.asarray(156, jnp.int32))
    assert float(traced) == pytest.approx(0.2 / 270)
    assert drop_block(recipes.get('resnest14d'), 1251)(10_000) == 0


def test_steps_are_whole_batches_and_may_be_cut_short() -> None:
    settings = Settings('resnest50d', batch_size=64, epochs=3)
    assert count_steps(settings, 1437) == (22, 66)
    assert count_steps(dataclasses.replace(settings, max_steps=40), 1437) == (22, 40)
    assert count_steps(dataclasses.replace(settings, max_steps=400), 1437) == (22, 66)
    with pytest.raises(FlaxnetsError, match='batch_size=64 is more than the 63 images'):
        count_steps(settings, 63)

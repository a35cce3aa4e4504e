"""Mixup and CutMix, against their definitions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.step.mixing import mix

CLASSES = 8


def batch(count: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, size, size, 3)).astype(np.float32)
    return images, np.eye(CLASSES, dtype=np.float32)[np.arange(count) % CLASSES]


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


def mixed_in(images: np.ndarray, targets: np.ndarray, *others: Any, **options: Any) -> Any:
    return mix(jnp.asarray(images), jnp.asarray(targets), *others, **options)


def test_mixup_mixes_each_group_with_itself_reversed() -> None:
    images, targets = batch(8)
    mixed, both = mixed_in(images, targets, keys(2), mixup=0.2, cutmix=0)
    shares = []
    for group in (slice(0, 4), slice(4, 8)):
        share = float(both[group][0, group.start])  # what image 0 of the group keeps of its own class
        shares.append(share)
        x, t = images[group], targets[group]
        np.testing.assert_allclose(mixed[group], share * x + (1 - share) * x[::-1], atol=1e-6)
        np.testing.assert_allclose(both[group], share * t + (1 - share) * t[::-1], atol=1e-6)
    assert shares[0] != shares[1]


def test_the_ratio_is_betas_and_not_folded() -> None:
    images, targets = batch(8000, 1)
    _, both = mixed_in(images, targets, keys(4000), mixup=0.2, cutmix=0)
    shares = np.asarray(both)[::2][np.arange(4000), np.arange(4000) * 2 % CLASSES]
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(0.25 / 1.4, rel=0.03)  # 1 / (4 (2 alpha + 1))


def test_cutmix_pastes_a_box_and_weighs_the_classes_by_its_area() -> None:
    images, targets = batch(400)
    mixed, both = (np.asarray(x) for x in mixed_in(images, targets, keys(200), mixup=0, cutmix=1.0))
    own = (mixed == images).all(-1)
    partner = (mixed == images.reshape(200, 2, 16, 16, 3)[:, ::-1].reshape(images.shape)).all(-1)
    assert (own ^ partner).all()
    shares = own.mean((1, 2))
    for i, share in enumerate(shares):
        assert both[i, i % CLASSES] == pytest.approx(share, abs=1e-6)
        rows, columns = np.flatnonzero(partner[i].any(1)), np.flatnonzero(partner[i].any(0))
        if rows.size:
            assert partner[i].sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    np.testing.assert_allclose(both.sum(1), 1, atol=1e-6)
    # A box of area 1 - U(0, 1) around a pixel anywhere loses what the border cuts off: by integration,
    # E[w] for w = sqrt(u): 1 - (5/8 of the mean box area 1/2, to first order) lies in (0.6, 0.75).
    assert 0.6 < shares.mean() < 0.75


def test_with_both_a_group_takes_either() -> None:
    images, targets = batch(400)
    mixed, _ = mixed_in(images, targets, keys(200), mixup=1.0, cutmix=1.0)
    pasted = (np.asarray(mixed) == images).all(-1).any((1, 2))
    assert 0.3 < pasted.mean() < 0.65  # a CutMix keeps some pixels as they were, a mixup none


@pytest.mark.parametrize('on', [False, np.bool_(False)])
def test_off_leaves_all_as_it_is(on: bool) -> None:
    images, targets = batch(8)
    mixed, both = jax.jit(lambda on: mixed_in(images, targets, keys(2), mixup=0.2, cutmix=1.0, on=on))(on)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(both, targets)

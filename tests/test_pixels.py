"""What the device does to single images."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.images.transforms import Transform
from train.step.pixels import COLOUR_EIGENVALUES, COLOUR_EIGENVECTORS, augment, normalise

STD = np.array([0.229, 0.224, 0.225])


def images(count: int, size: int = 12, channels: int = 3) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


OTHERS = Preprocess(224, 1.0, mean=(0.1, 0.2, 0.9), std=(0.5, 0.6, 0.7), channel_order='bgr')


@pytest.mark.parametrize('preprocess', [Preprocess(224, 1.0), OTHERS, Preprocess(224, 1.0, mean=(0.5,))])
@pytest.mark.parametrize('channels', [1, 3])
def test_normalises_as_the_transform_of_the_weights(channels: int, preprocess: Preprocess) -> None:
    pixels = images(3, 224, channels)
    expected = Transform(preprocess, channels).batch(list(pixels))
    np.testing.assert_allclose(normalise(jnp.asarray(pixels), preprocess), expected, atol=2e-6)


def test_any_number_of_channels() -> None:
    pixels = images(2, 4, 5)
    five = Preprocess(mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.5,))
    expected = (pixels / 255 - np.array(five.mean)) / 0.5
    np.testing.assert_allclose(normalise(jnp.asarray(pixels), five), expected, atol=2e-6)
    with pytest.raises(FlaxnetsError, match='5 channels'):
        normalise(jnp.asarray(pixels), Preprocess())


def test_the_order_of_channels_changes_nothing_else() -> None:
    pixels = jnp.asarray(images(6))
    rgb = dataclasses.replace(OTHERS, mean=OTHERS.mean[::-1], std=OTHERS.std[::-1], channel_order='rgb')
    options = {'flip': 0.5, 'lighting': 0.1}
    other = np.asarray(augment(pixels, keys(6), OTHERS, **options))
    np.testing.assert_allclose(other, augment(pixels, keys(6), rgb, **options)[..., ::-1], atol=1e-5)


def test_no_rank_is_promoted() -> None:
    with jax.numpy_rank_promotion('raise'):
        jax.eval_shape(
            lambda x, k: augment(x, k, OTHERS, flip=0.5, lighting=0.1, erasing=0.5), images(4), keys(4)
        )


def test_floats_are_taken_as_they_are() -> None:
    x = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    assert normalise(x, Preprocess()) is x


def test_flips_the_share_that_it_is_told() -> None:
    pixels = images(2000, 4)
    flipped = np.asarray(augment(jnp.asarray(pixels), keys(2000), Preprocess(), flip=0.3))
    straight = np.asarray(normalise(jnp.asarray(pixels), Preprocess()))
    mirrored = np.isclose(flipped, straight[:, :, ::-1], atol=1e-5).all((1, 2, 3))
    assert (np.isclose(flipped, straight, atol=1e-5).all((1, 2, 3)) ^ mirrored).all()
    assert mirrored.mean() == pytest.approx(0.3, abs=0.03)


def test_lighting_moves_an_image_along_the_components_of_colour() -> None:
    pixels = images(4000, 4)
    shift = (
        np.asarray(augment(jnp.asarray(pixels), keys(4000), Preprocess(), lighting=0.1))
        - np.asarray(normalise(jnp.asarray(pixels), Preprocess()))
    ) * STD
    assert np.ptp(shift, axis=(1, 2)).max() < 1e-5  # one colour for all pixels of an image
    colours = shift.mean((1, 2))
    # rgb = V diag(values) alpha with alpha ~ N(0, 0.1): its covariance.
    scaled = COLOUR_EIGENVECTORS * (0.1 * COLOUR_EIGENVALUES)
    np.testing.assert_allclose(np.cov(colours.T), scaled @ scaled.T, atol=3e-5)
    assert np.abs(colours.mean(0)).max() < 1e-3


def test_erases_rectangles_of_the_published_sizes() -> None:
    count, size = 1000, 32
    pixels = images(count, size)
    before = np.asarray(normalise(jnp.asarray(pixels), Preprocess()))
    after = np.asarray(augment(jnp.asarray(pixels), keys(count), Preprocess(), erasing=0.25))
    changed = ~np.isclose(before, after, atol=1e-5).all(-1)
    areas, heights, widths = [], [], []
    for mask in changed[changed.any((1, 2))]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask[rows[0] : rows[0] + h, columns[0] : columns[0] + w].all()
        assert mask.sum() == h * w
        areas.append(h * w / size**2), heights.append(h), widths.append(w)
    assert len(areas) / count == pytest.approx(0.25, abs=0.05)
    assert 0.015 < min(areas) < 0.06
    assert 0.37 < max(areas) < 0.42
    ratios = np.array(heights) / np.array(widths)
    assert 0.25 < ratios.min() < 0.5 and 2 < ratios.max() < 4
    noise = after[changed]
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)


def test_an_image_fares_the_same_in_any_batch() -> None:
    pixels, own = jnp.asarray(images(6)), keys(6)
    options = dict(flip=0.5, lighting=0.1, erasing=0.5)
    together = augment(pixels, own, Preprocess(), **options)
    apart = [augment(pixels[i : i + 2], own[i : i + 2], Preprocess(), **options) for i in (0, 2, 4)]
    np.testing.assert_array_equal(together, np.concatenate(apart))

"""Scaled decoding of JPEG files: the exact pixels where nothing is scaled, and near ones elsewhere."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from flaxnets.errors import ImageError
from train.data.augment import PadCrop, RandomResizedCrop, train_transform
from train.data.jpeg import JpegPart, decoded_late
from train.data.planes import decoded
from train.notes import without_effect
from train.settings import Settings


def jpeg(width: int, height: int, mode: str = 'RGB', quality: int = 90) -> bytes:
    """A picture with structure at all scales, as photographs have it."""
    rng = np.random.default_rng(width)
    pixels = np.zeros((height, width, 3))
    for grain in (4, 16, 64):
        coarse = rng.integers(0, 256, (height // grain + 1, width // grain + 1, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, 'jpeg', quality=quality)
    return file.getvalue()


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[0, seed]))


def test_pixels_differ_only_where_the_crop_is_twice_as_large() -> None:
    data = jpeg(403, 301)
    crop = RandomResizedCrop(96, (0.08, 1), (3 / 4, 4 / 3), Image.Resampling.BILINEAR)
    scaled = []
    for seed in range(40):
        _, _, width, height = crop.box(403, 301, generator(seed))
        exact = np.asarray(crop(decoded(data, 3, 'x'), generator(seed))).astype(int)
        ours = np.asarray(crop(decoded_late(data, 3, 'x'), generator(seed)))
        assert ours.shape == exact.shape == (96, 96, 3)
        if min(width, height) < 192:
            np.testing.assert_array_equal(ours, exact)
        else:
            scaled.append(np.abs(ours - exact))
    assert len(scaled) > 10
    assert 0 < np.mean(scaled) < 2 and np.max(scaled) < 40


@pytest.mark.parametrize('scale', [1, 2, 4, 8])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_the_whole_picture_at_each_scale(mode: str, scale: int) -> None:
    data = jpeg(40 * scale + 5, 32 * scale + 3, mode)
    part = decoded_late(data, 1 if mode == 'L' else 3, 'x')
    assert isinstance(part, JpegPart) and part.size == (40 * scale + 5, 32 * scale + 3)
    resize = PadCrop((32, 40), 0, Image.Resampling.BILINEAR)
    ours = np.asarray(resize(part, generator(0))).astype(int)
    exact = np.asarray(resize(decoded(data, 1 if mode == 'L' else 3, 'x'), generator(0)))
    assert ours.shape == exact.shape and np.abs(ours - exact).mean() < (4 if scale > 1 else 1e-9)


def test_other_files_and_damage_are_as_ever() -> None:
    file = io.BytesIO()
    Image.new('RGB', (9, 9)).save(file, 'png')
    assert isinstance(decoded_late(file.getvalue(), 3, 'x'), Image.Image)
    data = jpeg(600, 400)
    with pytest.raises(ImageError, match='damaged'):
        decoded_late(data[: len(data) // 2], 3, 'x').crop((0, 0, 500, 100)).resize(
            (8, 8), Image.Resampling.BOX
        )
    with pytest.raises(ImageError, match='begins with'):
        decoded_late(b'no image at all, but text', 3, 'x')
    transform = train_transform(Settings('resnext_tiny', image_size=32, jitter=0.4))
    assert transform(decoded_late(data, 3, 'x'), generator(0)).shape == (32, 32, 3)


def test_a_policy_takes_whole_pictures() -> None:
    settings = Settings('resnext_tiny', decoding='scaled')
    assert not list(without_effect(settings, 10, 100))
    (note,) = without_effect(Settings('resnext_tiny', decoding='scaled', policy='autoaugment'), 10, 100)
    assert 'decoding' in note.message

"""Augmentation, pixel by pixel against torchvision and Pillow."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, ColorJitter, RandomResizedCrop
from torchvision.transforms import RandAugment as TorchRandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

from flaxnets.images.preprocess import Preprocess
from train.data import augment, autoaugment
from train.data.augment import eval_transform, jitter, shift_hue, train_transform
from train.data.autoaugment import apply_op, level, opposite
from train.settings import CROPS, POLICIES, Settings

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((213, 142))
SETTINGS = Settings('resnext50_32x4d', image_size=64, crop_padding=3)


class Scripted:
    """Random numbers that are decided beforehand: U(0, 1) draws, in order."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.draws.pop(0)

    def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        return low + int((high - low) * self.draws.pop(0))


def equal(ours: Image.Image, theirs: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize('name', [n for n in autoaugment._RANDAUGMENT] + ['Invert'])
@pytest.mark.parametrize('number', [0, 12, 30])
@pytest.mark.parametrize('sign', [1, -1])
def test_operations_at_torchvisions_levels(name: str, number: int, sign: int) -> None:
    space = TorchRandAugment()._augmentation_space(31, (PHOTO.height, PHOTO.width))
    space['Invert'] = (torch.tensor(0.0), False)
    magnitudes, signed = space[name]
    magnitude = float(magnitudes[number]) if magnitudes.ndim else 0.0
    value = level(name, number, 31, PHOTO.size)
    if sign < 0:
        magnitude = -magnitude if signed else magnitude
        value = opposite(name, value)
    if name.startswith('Translate'):  # theirs says where the picture goes, Pillow's where it comes from
        value = -value
    expected = _apply_op(PHOTO, name, magnitude, InterpolationMode.NEAREST, None)
    equal(apply_op(PHOTO, name, value), expected)


def test_the_papers_policy_is_torchvisions() -> None:
    theirs = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
    ours = [tuple((name, p, number) for name, number, p in pair) for pair in autoaugment._PAPER]
    assert len(ours) == len(theirs) == 25
    for a, b in zip(ours, theirs, strict=True):
        for (name, p, number), (name_b, p_b, number_b) in zip(a, b, strict=True):
            assert (name, p) == (name_b, p_b) and number == (number_b or 0)


def test_the_resnest_policy_differs_from_the_papers_where_its_authors_did() -> None:
    """The published list has 25 entries of which 20 are distinct; see training recipes, AutoAugment."""
    resnest = autoaugment._RESNEST
    assert len(resnest) == 25 and len(set(resnest)) == 20
    for ours, paper in zip(resnest, autoaugment._PAPER, strict=True):
        assert [(name, p) for name, _, p in ours] == [(name, p) for name, _, p in paper]
    bits = {value for pair in resnest for name, value, _ in pair if name == 'Posterize'}
    assert bits == {1, 2}
    assert resnest[15][1] == ('Color', 0.1, 1.0)


def test_a_sub_policy_by_hand() -> None:
    policy = autoaugment.make_policy('resnest_autoaugment', 0, 0)
    assert policy is not None
    # Sub-policy 5 of 25; Equalize above its 0.4: left out; Rotate within its 0.8; then the sign.
    found = policy(PHOTO, Scripted(5.5 / 25, 0.41, 0.79, 0.3))  # type: ignore[arg-type]
    equal(found, PHOTO.rotate(-24))
    found = policy(PHOTO, Scripted(18.5 / 25, 0.59, 0.6, 0.99))  # type: ignore[arg-type]
    sheared = PHOTO.transform(PHOTO.size, Image.Transform.AFFINE, (1, 0.15, 0, 0, 1, 0), Image.BICUBIC)
    equal(found, F.equalize(sheared))


def test_sub_policies_are_drawn_alike_and_operations_as_often_as_they_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: Counter[tuple[str, float]] = Counter()

    def count(image: Image.Image, name: str, value: float, resample: Any = None) -> Image.Image:
        applied[name, abs(value)] += 1
        return image

    monkeypatch.setattr(autoaugment, 'apply_op', count)
    policy = autoaugment.make_policy('resnest_autoaugment', 0, 0)
    assert policy is not None
    rng, draws = np.random.default_rng(0), 20000
    for _ in range(draws):
        policy(PHOTO, rng)
    expected: Counter[tuple[str, float]] = Counter()
    for pair in autoaugment._RESNEST:
        for name, value, p in pair:
            expected[name, value] += draws * p / 25  # type: ignore[assignment]
    for key, mean in expected.items():
        assert applied[key] == pytest.approx(mean, abs=5 * math.sqrt(mean + 1)), key


def test_the_port_leaves_out_half_of_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = Counter[str]()

    def count(image: Image.Image, name: str, value: float, resample: Any = None) -> Image.Image:
        applied[name] += 1
        return image

    monkeypatch.setattr(autoaugment, 'apply_op', count)
    monkeypatch.setattr(autoaugment, 'cutout', lambda image, *_: count(image, 'Cutout', 0))
    policy = autoaugment.make_policy('resnest_randaugment', 2, 12)
    assert policy is not None
    rng = np.random.default_rng(0)
    for _ in range(8000):
        policy(PHOTO, rng)
    assert sum(applied.values()) == pytest.approx(8000, rel=0.03)  # 2 of them, each half of the time
    assert len(applied) == 16
    for name, times in applied.items():
        assert times == pytest.approx(500, abs=120), name


def test_cutout_and_solarize_add_by_hand() -> None:
    grey = Image.new('L', (30, 20), 100)
    expected = grey.copy()
    ImageDraw.Draw(expected).rectangle((10, 5, 20, 15), autoaugment.CUTOUT_COLOUR[1])
    equal(autoaugment.cutout(grey, 10, 0.5, 0.5), expected)
    pixels = np.arange(256, dtype=np.uint8)[None]
    found = np.asarray(apply_op(Image.fromarray(pixels), 'SolarizeAdd', 44))
    lifted = np.minimum(pixels.astype(int) + 44, 255)
    np.testing.assert_array_equal(found, np.where(lifted < 128, lifted, 255 - lifted))


def test_a_random_resized_crop_is_torchvisions_of_the_same_box() -> None:
    crop = augment.RandomResizedCrop(64, (0.08, 1.0), (3 / 4, 4 / 3), Image.Resampling.BILINEAR)
    rng = np.random.default_rng(0)
    for _ in range(20):
        left, top, w, h = crop.box(*PHOTO.size, np.random.default_rng(state := int(rng.integers(1 << 30))))
        expected = F.resized_crop(PHOTO, top, left, h, w, [64, 64], InterpolationMode.BILINEAR)
        equal(crop(PHOTO, np.random.default_rng(state)), expected)


def test_boxes_are_distributed_as_torchvisions() -> None:
    crop = augment.RandomResizedCrop(64, (0.08, 1.0), (3 / 4, 4 / 3), Image.Resampling.BILINEAR)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    ours = np.array([crop.box(*PHOTO.size, rng) for _ in range(6000)])
    theirs = np.array([RandomResizedCrop.get_params(PHOTO, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)])
    top, left, h, w = theirs.T
    for a, b in zip(ours.T, (left, top, w, h), strict=True):
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert np.quantile(a, quantile) == pytest.approx(np.quantile(b, quantile), abs=5)


@pytest.mark.parametrize('size', [(500, 33), (33, 500), (1, 1)])
def test_where_no_box_fits_the_centre_is_taken(size: tuple[int, int]) -> None:
    crop = augment.RandomResizedCrop(8, (1.0, 1.0), (3 / 4, 4 / 3), Image.Resampling.BILINEAR)
    width, height = size
    left, top, w, h = crop.box(width, height, np.random.default_rng(0))
    assert 0 < w <= width and 0 < h <= height
    assert (left, top) == ((width - w) // 2, (height - h) // 2)
    expected = {(500, 33): (44, 33), (33, 500): (33, 44), (1, 1): (1, 1)}[size]
    assert (w, h) == expected


def test_the_resnest_crop_stays_within_its_limits() -> None:
    crop = augment.ResNeStCrop(320, (0.1, 1.0), (3 / 4, 4 / 3), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(0)
    width, height = PHOTO.size
    boxes = np.array([crop.box(width, height, rng) for _ in range(3000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    share = w * h / (width * height)
    assert share.min() >= 0.1 and share.max() > 0.8
    ratios = w / h
    assert ratios.min() > 0.7 and ratios.max() < 1.4
    assert crop(PHOTO, rng).size == (320, 320)


@pytest.mark.parametrize('strength, hue', [(0.4, 0.0), (0.0, 0.3)])
def test_jitter_is_torchvisions_with_the_same_draws(strength: float, hue: float) -> None:
    rng = np.random.default_rng(1)
    found = jitter(PHOTO, rng, strength, hue)
    again = np.random.default_rng(1)
    expected = PHOTO
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for kind in again.permutation(4):
        if kind < 3 and strength:
            expected = changes[kind](expected, again.uniform(1 - strength, 1 + strength))
        elif kind == 3 and hue:
            expected = F.adjust_hue(expected, again.uniform(-hue, hue))
    equal(found, expected)
    assert (np.asarray(found) != np.asarray(PHOTO)).any()
    assert ColorJitter(strength, strength, strength, hue).brightness in (None, (1 - strength, 1 + strength))


@pytest.mark.parametrize('shift', [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_is_torchvisions(shift: float) -> None:
    equal(shift_hue(PHOTO, shift), F.adjust_hue(PHOTO, shift))


def test_a_padded_window_moves_by_at_most_the_padding() -> None:
    transform = train_transform(dataclasses.replace(SETTINGS, crop='pad', crop_padding=2))
    whole = np.pad(np.asarray(PHOTO.resize((64, 64), Image.Resampling.BILINEAR)), ((2, 2), (2, 2), (0, 0)))
    windows = {(i, j): whole[i : i + 64, j : j + 64].tobytes() for i in range(5) for j in range(5)}
    rng = np.random.default_rng(0)
    found = {transform(PHOTO, rng).tobytes() for _ in range(300)}
    assert found == set(windows.values())


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('crop', CROPS)
def test_every_policy_and_crop_makes_an_image_and_the_same_from_the_same_numbers(
    mode: str, policy: str, crop: str
) -> None:
    settings = dataclasses.replace(SETTINGS, policy=policy, crop=crop, jitter=0.4, hue=0.1)
    transform = train_transform(settings)
    picture = PHOTO.convert(mode)
    first, second = (transform(picture, np.random.default_rng(5)) for _ in range(2))
    assert first.shape == (64, 64, 3 if mode == 'RGB' else 1) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)


def test_evaluation_prepares_images_as_the_weights_do() -> None:
    preprocess = Preprocess(size=48, crop_pct=0.8, interpolation='bicubic')
    from flaxnets.api import transform

    np.testing.assert_array_equal(eval_transform(preprocess, 3)(PHOTO), transform(preprocess).pixels(PHOTO))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_the_resize_crop_is_pillows(interpolation: str) -> None:
    transform = train_transform(dataclasses.replace(SETTINGS, crop='resize', interpolation=interpolation))
    expected = PHOTO.resize((64, 64), augment.FILTERS[interpolation])
    np.testing.assert_array_equal(transform(PHOTO, np.random.default_rng(0)), np.asarray(expected))


def test_boxes_are_torchvisions_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a panorama, where many tries fail, and on a photograph; torchvision computes them in float32."""
    area, ratio, rng, off = (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0), []
    crop = augment.RandomResizedCrop(64, area, ratio, Image.Resampling.BILINEAR)
    draws: list[float] = []

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return tensor.fill_(low + (high - low) * draws.pop(0))

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0] if high - low == 1 else [low + (high - low) // 2])  # the middle

    class Middle(Scripted):
        def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
            assert high is not None
            return low + (high - low) // 2 if high - low > 1 else 0

    monkeypatch.setattr(torch.Tensor, 'uniform_', uniform)
    monkeypatch.setattr(torch, 'randint', randint)
    for width, height in [(500, 375)] * 300 + [(500, 120)] * 300 + [(60, 500)] * 300:
        values = rng.random(20).tolist()
        draws[:] = values
        top, left, h, w = RandomResizedCrop.get_params(Image.new('L', (width, height)), area, ratio)
        ours = crop.box(width, height, Middle(*values))  # type: ignore[arg-type]
        off.append(np.abs(np.subtract(ours, (left, top, w, h))).max())
    assert max(off) <= 1 and np.count_nonzero(off) <= 2


# Worked by hand. A ratio of 1 is drawn as 3/7 of the way from 3/4 to 4/3.
@pytest.mark.parametrize(
    ('size', 'area', 'draws', 'box'),
    [
        # Heights 20 (a tenth of the area) to 64; the tallest is the whole picture, so the centre: a square
        # of 64 * 320 / 352 = 58.18 from round(2.91) to round(3 + 58.18).
        ((64, 64), (0.1, 1.0), (3 / 7, 1.0), (3, 3, 58, 58)),
        # Ratio 4/3: sqrt(1320 / (4/3)) = 31 high would be 41 wide; 33.5 / (4/3) = 25 still 33.3: 24.
        ((33, 40), (0.1, 1.0), (1.0, 1.0, 0.5, 0.5), (1, 8, 32, 24)),
        # 25 x 25 of 100 x 100 is above `area` but below a tenth: the next draw, half way from 22 to 100.
        ((100, 100), (0.05, 1.0), (3 / 7, 3 / 78, 3 / 7, 0.5, 0.0, 0.999), (0, 39, 61, 61)),
        # At most half of the area: 71 of 100 high is 5041 pixels, too many; 22 + 49 / 2 = 46.5 is 46.
        ((100, 100), (0.05, 0.5), (3 / 7, 1.0, 3 / 7, 0.5, 0.0, 0.0), (0, 0, 46, 46)),
    ],
)
def test_resnest_boxes_by_hand(
    size: tuple[int, int], area: tuple[float, float], draws: tuple[float, ...], box: tuple[int, ...]
) -> None:
    crop = augment.ResNeStCrop(320, area, (3 / 4, 4 / 3), Image.Resampling.BICUBIC)
    assert crop.box(*size, Scripted(*draws)) == box  # type: ignore[arg-type]


@pytest.mark.parametrize('size', [(213, 14), (211, 15), (10, 142), (9, 141), (1, 100)])
def test_a_resnest_crop_of_a_line_is_what_the_authors_evaluate(size: tuple[int, int]) -> None:
    # Sides more than 40 / 3 apart: no box within the ratios has a tenth of the area.
    picture = PHOTO.crop((0, 0, *size))
    crop = augment.ResNeStCrop(320, (0.1, 1.0), (3 / 4, 4 / 3), Image.Resampling.BICUBIC)
    preprocess = Preprocess(320, 320 / 352, 'center_first', 'bicubic')
    expected = eval_transform(preprocess, 3)(picture)
    np.testing.assert_array_equal(np.asarray(crop(picture, np.random.default_rng(0))), expected)


def test_the_centre_of_a_line_by_hand() -> None:
    """Its side is 11 * 32 / 64 = 5.5; from round(247.25) to round(252.5), from round(2.75) to round(8.5)."""
    crop = augment.ResNeStCrop(32, (0.1, 1.0), (3 / 4, 4 / 3), Image.Resampling.BICUBIC)
    assert crop.box(500, 11, np.random.default_rng(0)) == (247, 3, 5, 5)


@pytest.mark.parametrize(('strength', 'low', 'high'), [(0.4, 60, 140), (1.5, 0, 250)])
def test_jitter_factors_are_uniform(strength: float, low: int, high: int) -> None:
    """On flat grey only the brightness shows: 100 times the factor."""
    grey, rng = Image.new('L', (2, 2), 100), np.random.default_rng(0)
    found = np.array([np.asarray(jitter(grey, rng, strength, 0.0))[0, 0] for _ in range(4000)])
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):  # of 4000, a quartile is off by 1 % of the range
        assert np.quantile(found, share) == pytest.approx(low + share * (high - low), abs=0.03 * (high - low))


def test_policy_then_crop_then_jitter() -> None:
    settings = dataclasses.replace(SETTINGS, policy='resnest_autoaugment', jitter=0.4, hue=0.1)
    transform = train_transform(settings)
    for seed in range(10):
        found = transform(PHOTO, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        policy = autoaugment.make_policy('resnest_autoaugment', 0, 0)
        assert policy is not None
        cropped = augment.RandomResizedCrop(64, (0.08, 1.0), (3 / 4, 4 / 3), Image.Resampling.BILINEAR)(
            policy(PHOTO, rng), rng
        )
        np.testing.assert_array_equal(found, np.asarray(jitter(cropped, rng, 0.4, 0.1)))


@pytest.mark.parametrize('policy', POLICIES)
def test_a_transform_travels_and_is_shared_by_threads(policy: str) -> None:
    transform = train_transform(dataclasses.replace(SETTINGS, policy=policy, jitter=0.4, hue=0.1))
    before = np.asarray(PHOTO).copy()
    alone = [transform(PHOTO, np.random.default_rng(seed)) for seed in range(24)]
    copy = pickle.loads(pickle.dumps(transform))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: copy(PHOTO, np.random.default_rng(seed)), range(24)))
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(np.asarray(PHOTO), before)
    assert len({pixels.tobytes() for pixels in alone}) == 24


def test_evaluation_of_grey_nets_and_in_other_processes() -> None:
    transform = pickle.loads(pickle.dumps(eval_transform(Preprocess(size=48, crop_pct=1.0), 1)))
    expected = PHOTO.convert('L').resize((72, 48), Image.Resampling.BILINEAR).crop((12, 0, 60, 48))
    np.testing.assert_array_equal(transform(PHOTO)[..., 0], np.asarray(expected))

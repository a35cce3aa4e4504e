"""Automatic augmentation: whole policies against torchvision's, and the authors' from their own levels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from test_augment import PHOTO, Scripted, equal
from timm.data import auto_augment as timm_ops
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import InterpolationMode

from train.data import autoaugment
from train.data.autoaugment import apply_op, level, make_policy, opposite

# 331 pixels: there translations fall on whole pixels, and float32 decides which one.
ASTRONAUT = Image.fromarray(skimage.data.astronaut()).crop((0, 0, 331, 250))
PICTURES = {'rgb': PHOTO, 'grey': PHOTO.convert('L'), 'whole-pixels': ASTRONAUT}
PAPER = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
BICUBIC = Image.Resampling.BICUBIC

Reference = Callable[[Image.Image, float], Image.Image]


def policy(name: str, ops: int = 2, magnitude: int = 12) -> Callable[[Image.Image, Any], Image.Image]:
    found = make_policy(name, ops, magnitude)
    assert found is not None
    return found


def test_no_policy() -> None:
    assert make_policy('', 2, 12) is None


@pytest.mark.parametrize('picture', PICTURES)
@pytest.mark.parametrize('bins', [10, 31])
def test_every_level_is_torchvisions_to_the_pixel(bins: int, picture: str) -> None:
    image = PICTURES[picture]
    reference = AutoAugment() if bins == 10 else RandAugment()
    space = reference._augmentation_space(bins, (image.height, image.width))
    for name, (magnitudes, signed) in space.items():
        for number in range(bins if magnitudes.ndim else 1):
            for sign in (1, -1) if signed else (1,):
                magnitude = sign * float(magnitudes[number]) if magnitudes.ndim else 0.0
                value = level(name, number, bins, image.size)
                value = value if sign > 0 else opposite(name, value)
                # Theirs says where the picture goes, Pillow's where it comes from.
                found = apply_op(image, name, -value if name.startswith('Translate') else value)
                expected = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
                assert found.tobytes() == expected.tobytes(), (name, number, sign)


@pytest.mark.parametrize('picture', ['rgb', 'grey'])
@pytest.mark.parametrize('index', range(25))
def test_autoaugment_is_torchvisions_with_the_same_draws(
    index: int, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = PICTURES[picture]
    # Both operations in either direction, the first one alone at its very probability, neither.
    (_, p, _), (_, q, _) = PAPER[index]
    for probabilities, directions in [
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0)),
        ((p, 1.5), (1, 1)),
        ((1.5, q), (0, 0)),
    ]:
        decided = (index, torch.tensor(probabilities, dtype=torch.float64), torch.tensor(directions))
        monkeypatch.setattr(AutoAugment, 'get_params', lambda *_, decided=decided: decided)
        draws = [(index + 0.5) / 25]
        for probability, drawn, direction in zip((p, q), probabilities, directions, strict=True):
            draws += [drawn, 0.75 if direction else 0.25] if drawn <= probability else [drawn]
        rng = Scripted(*draws)
        equal(policy('autoaugment')(image, rng), AutoAugment(AutoAugmentPolicy.IMAGENET)(image))
        assert not rng.draws


# zhanghang1989/ResNeSt: `autoaug2fastaa` in resnest/gluon/transforms.py, what a level of 0..10 comes to.
RESNEST_SCALE: dict[str, Callable[[int], float]] = {
    'Posterize': lambda n: 4 - int(n * 4 / 10),
    'Solarize': lambda n: 256 - int(n * 256 / 10),
    'Rotate': lambda n: int(n * 30 / 10),
    'ShearX': lambda n: n * 0.3 / 10,
    'Color': lambda n: n * 1.8 / 10 + 0.1,
    'Contrast': lambda n: n * 1.8 / 10 + 0.1,
    'Sharpness': lambda n: n * 1.8 / 10 + 0.1,
}
PLAIN: dict[str, Reference] = {
    # Pillow of 2020 kept 0 bits without complaint: all black.
    'Posterize': lambda image, v: (
        ImageOps.posterize(image, int(v)) if v >= 1 else Image.new(image.mode, image.size)
    ),
    'Solarize': lambda image, v: ImageOps.solarize(image, v),  # type: ignore[arg-type]
    'AutoContrast': lambda image, _: F.autocontrast(image),
    'Equalize': lambda image, _: F.equalize(image),
    'Invert': lambda image, _: F.invert(image),
    'Color': F.adjust_saturation,
    'Contrast': F.adjust_contrast,
    'Brightness': F.adjust_brightness,
    'Sharpness': F.adjust_sharpness,
    'Rotate': lambda image, v: F.rotate(image, v, InterpolationMode.NEAREST),
    'ShearX': lambda image, v: timm_ops.shear_x(image, v, resample=BICUBIC),
    'ShearY': lambda image, v: timm_ops.shear_y(image, v, resample=BICUBIC),
    'TranslateX': lambda image, v: timm_ops.translate_x_abs(image, v, resample=BICUBIC),
    'TranslateY': lambda image, v: timm_ops.translate_y_abs(image, v, resample=BICUBIC),
}
DIRECTED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')


def resnest_pair(index: int) -> list[tuple[str, float, float]]:
    """Operations of a sub-policy with the value that the authors' scale gives, and their probabilities."""
    pair = []
    for place, (name, probability, number) in enumerate(PAPER[index]):
        if (index, place) == (15, 1):
            number = 0  # the authors' only other level: Color 0, not 2
        pair.append((name, RESNEST_SCALE[name](number) if name in RESNEST_SCALE else 0.0, probability))
    return pair


@pytest.mark.parametrize('picture', ['rgb', 'grey'])
@pytest.mark.parametrize('index', range(25))
def test_the_resnest_policy_from_its_authors_levels(index: int, picture: str) -> None:
    for applied in [(True, True), (True, False), (False, True)]:
        for sign in (1, -1):
            draws, expected = [(index + 0.5) / 25], PICTURES[picture]
            for (name, value, probability), wanted in zip(resnest_pair(index), applied, strict=True):
                draws.append(probability if wanted else probability + 1e-6)
                if not wanted:
                    continue
                if name in DIRECTED:
                    draws.append(0.25 if sign < 0 else 0.75)
                    value *= sign
                expected = PLAIN[name](expected, value)
            rng = Scripted(*draws)
            equal(policy('resnest_autoaugment')(PICTURES[picture], rng), expected)
            assert not rng.draws


def rectangle(image: Image.Image, side: float, x: float, y: float) -> Image.Image:
    """The authors' `CutoutAbs`, drawn as theirs; their np.random.uniform(w) is in 1..w."""
    left, top = (
        max(0.0, 1 + at * (size - 1) - side / 2) for at, size in zip((x, y), image.size, strict=True)
    )
    left, top = int(left), int(top)
    image = image.copy()
    right, bottom = min(image.width, left + side), min(image.height, top + side)
    ImageDraw.Draw(image).rectangle(
        (left, top, right, bottom), (125, 123, 114) if image.mode == 'RGB' else 123
    )
    return image


@pytest.mark.parametrize('side', [0, 1.3333, 13.3333, 16, 40])
@pytest.mark.parametrize('at', [(0.0, 0.0), (0.031, 0.977), (0.5, 0.5), (0.999, 0.02), (0.999, 0.999)])
def test_cutout_is_the_rectangle_that_pillow_draws(side: float, at: tuple[float, float]) -> None:
    for picture in ('rgb', 'grey'):
        equal(autoaugment.cutout(PICTURES[picture], side, *at), rectangle(PICTURES[picture], side, *at))


def solarize_add(image: Image.Image, amount: float) -> Image.Image:
    """In numpy, as the authors: added, clipped, cut to whole numbers, then solarised at 128."""
    lifted = np.clip(np.asarray(image).astype(int) + amount, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(lifted), 128)


class Chosen(Scripted):
    """Random numbers that choose one operation, then those given."""

    def __init__(self, index: int, *draws: float) -> None:
        super().__init__(*draws)
        self.index = index

    def integers(self, low: int, high: int | None = None, size: Any = None) -> list[int]:
        assert (low, high, size) == (16, None, 1)
        return [self.index]


@pytest.mark.parametrize('magnitude', [0, 10, 12, 23, 30])
@pytest.mark.parametrize('sign', [1, -1])
def test_operations_of_the_resnest_randaugment(magnitude: int, sign: int) -> None:
    """`rand_augment_list` of resnest/torch/transforms/autoaug.py, in its order."""
    ranges: Sequence[tuple[str, float, float]] = (
        *(('AutoContrast', 0, 1), ('Equalize', 0, 1), ('Invert', 0, 1), ('Rotate', 0, 30)),
        *(('Posterize', 0, 4), ('Solarize', 0, 256), ('SolarizeAdd', 0, 110), ('Color', 0.1, 1.9)),
        *(('Contrast', 0.1, 1.9), ('Brightness', 0.1, 1.9), ('Sharpness', 0.1, 1.9), ('ShearX', 0, 0.3)),
        *(('ShearY', 0, 0.3), ('Cutout', 0, 40), ('TranslateX', 0, 100), ('TranslateY', 0, 100)),
    )
    for picture in ('rgb', 'grey'):
        image = PICTURES[picture]
        for index, (name, low, high) in enumerate(ranges):
            value = magnitude / 30 * (high - low) + low
            tail = {'Cutout': (0.3, 0.8)}.get(name, (0.25 if sign < 0 else 0.75,) if name in DIRECTED else ())
            rng = Chosen(index, 0.49, 0.5, *tail)  # applied: 0.49 <= 0.2 + 0.6 * 0.5
            found = policy('resnest_randaugment', 1, magnitude)(image, rng)
            if name == 'Cutout':
                expected = rectangle(image, value, 0.3, 0.8)
            elif name == 'SolarizeAdd':
                expected = solarize_add(image, value)
            else:
                expected = PLAIN[name](image, sign * value if name in DIRECTED else value)
            assert found.tobytes() == expected.tobytes(), name
            assert not rng.draws


class Recorder:
    """Stands for `apply_op` and counts what it is asked to do."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, float]] = Counter()

    def __call__(self, image: Image.Image, name: str, value: float, *_: Any) -> Image.Image:
        self.counts[name, round(value, 4)] += 1
        return image


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(autoaugment, 'apply_op', recorder)
    return recorder


def spread(mean: float) -> float:
    """Four and a half standard deviations of a count: one in 150,000 is further off."""
    return 4.5 * math.sqrt(mean)


def test_randaugment_draws_alike_and_repeats(recorder: Recorder) -> None:
    transform, rng = policy('randaugment', 3, 10), np.random.default_rng(0)
    for _ in range(5000):
        transform(PHOTO, rng)
    assert sum(recorder.counts.values()) == 15000
    space = RandAugment()._augmentation_space(31, (PHOTO.height, PHOTO.width))
    for name, (magnitudes, signed) in space.items():
        values = {value: n for (found, value), n in recorder.counts.items() if found == name}
        mean = 15000 / len(space)
        assert sum(values.values()) == pytest.approx(mean, abs=spread(mean)), name
        expected = float(magnitudes[10]) if magnitudes.ndim else 0.0
        both = {expected, -expected} if signed else {expected}
        if name in ('Brightness', 'Color', 'Contrast', 'Sharpness'):
            both = {1 + value for value in both}
        elif name.startswith('Translate'):
            both = {int(value) for value in both}
        assert values.keys() == {round(value, 4) for value in both}, name
        for value, n in values.items():
            assert n == pytest.approx(mean / len(values), abs=spread(mean)), (name, value)


@pytest.mark.parametrize('name', ['autoaugment', 'resnest_autoaugment'])
def test_autoaugment_draws_with_the_published_probabilities(name: str, recorder: Recorder) -> None:
    draws, rng, expected = 10000, np.random.default_rng(0), Counter[str]()
    for _ in range(draws):
        policy(name)(PHOTO, rng)
    for pair in PAPER:
        for op, probability, _ in pair:
            expected[op] += probability * draws / 25
    found: Counter[str] = Counter()
    for (op, _), n in recorder.counts.items():
        found[op] += n
    for op, mean in expected.items():
        assert found[op] == pytest.approx(mean, abs=spread(mean)), op
    both = [n for (op, _), n in recorder.counts.items() if op == 'ShearX']
    assert len(both) == 2 and min(both) > 0.35 * sum(both)  # either direction, of some 240


@pytest.mark.parametrize(('draw', 'threshold', 'applied'), [(0.19, 0.0, 1), (0.21, 0.0, 0), (0.81, 0.999, 0)])
def test_the_resnest_randaugment_leaves_out_by_a_drawn_probability(
    draw: float, threshold: float, applied: int, recorder: Recorder
) -> None:
    policy('resnest_randaugment', 1)(PHOTO, Chosen(1, draw, threshold))
    assert recorder.counts['Equalize', round(12 / 30, 4)] == applied


def test_an_unknown_operation_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no operation is called 'Blur'"):
        apply_op(PHOTO, 'Blur', 1)


def test_enhancements_leave_the_picture_itself_alone() -> None:
    before = PHOTO.tobytes()
    for name in (*autoaugment._RANDAUGMENT, 'Invert', 'SolarizeAdd'):
        apply_op(PHOTO, name, level(name, 20, 31, PHOTO.size))
    assert PHOTO.tobytes() == before
    equal(apply_op(PHOTO, 'Color', 0.0), ImageEnhance.Color(PHOTO).enhance(0.0))

"""Automatic augmentation policies, as sequences of Pillow's operations on the whole picture.

`apply_op` takes the values that Pillow takes; `level` makes them of the levels of torchvision's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Policy = Callable[[Image.Image, np.random.Generator], Image.Image]
Op = tuple[str, float, float]  # operation, its value, the probability to apply it

NEAREST, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC
SIGNED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
ENHANCE = {
    'Brightness': ImageEnhance.Brightness,
    'Color': ImageEnhance.Color,
    'Contrast': ImageEnhance.Contrast,
    'Sharpness': ImageEnhance.Sharpness,
}


def apply_op(
    image: Image.Image, name: str, value: float, resample: Image.Resampling = NEAREST
) -> Image.Image:
    """Applies one operation.

    Args:
      image: 'RGB' or 'L'.
      name: Posterize (bits to keep; none is black), Solarize (threshold), Rotate (degrees), ShearX, ShearY
        (slope), TranslateX, TranslateY (pixels), Brightness, Color, Contrast, Sharpness (factor),
        SolarizeAdd (added before a threshold of 128), AutoContrast, Equalize, Invert, Identity (no value).
      value: its value.
      resample: filter of Rotate, ShearX, ShearY, TranslateX, TranslateY; pixels from outside are black.

    Raises:
      ValueError: there is no such operation.
    """
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(value)
    size, affine = image.size, Image.Transform.AFFINE
    match name:
        case 'Identity':
            return image
        case 'Posterize':
            if value < 1:  # the ResNeSt authors' RandAugment below magnitude 8; Pillow then allowed it
                return Image.new(image.mode, size)
            return ImageOps.posterize(image, int(value))
        case 'Solarize':
            return ImageOps.solarize(image, value)  # type: ignore[arg-type]  # a fraction counts
        case 'AutoContrast':
            return ImageOps.autocontrast(image)
        case 'Equalize':
            return ImageOps.equalize(image)
        case 'Invert':
            return ImageOps.invert(image)
        case 'Rotate':
            return image.rotate(value, resample)
        case 'ShearX':
            return image.transform(size, affine, (1, value, 0, 0, 1, 0), resample)
        case 'ShearY':
            return image.transform(size, affine, (1, 0, 0, value, 1, 0), resample)
        case 'TranslateX':
            return image.transform(size, affine, (1, 0, value, 0, 1, 0), resample)
        case 'TranslateY':
            return image.transform(size, affine, (1, 0, 0, 0, 1, value), resample)
        case 'SolarizeAdd':
            lifted = image.point(
                [min(level + int(value), 255) for level in range(256)] * len(image.getbands())
            )
            return ImageOps.solarize(lifted, 128)
    raise ValueError(f'no operation is called {name!r}')


# The 25 sub-policies of Cubuk et al. (arXiv 1805.09501, appendix A, table 9) as zhanghang1989/ResNeSt ran
# them (`resnest/gluon/transforms.py`, after kakaobrain/fast-autoaugment): posterising keeps 1 or 2 bits,
# where others keep 4 to 8, and sub-policy 15 takes level 0 of Color.
_EQ6, _EQ4 = ('Equalize', 0, 0.6), ('Equalize', 0, 0.4)
_RESNEST: tuple[tuple[Op, ...], ...] = (
    (('Posterize', 1, 0.4), ('Rotate', 27, 0.6)),
    (('Solarize', 128, 0.6), ('AutoContrast', 0, 0.6)),
    (('Equalize', 0, 0.8), _EQ6),
    (('Posterize', 2, 0.6), ('Posterize', 2, 0.6)),
    (_EQ4, ('Solarize', 154, 0.2)),
    (_EQ4, ('Rotate', 24, 0.8)),
    (('Solarize', 180, 0.6), _EQ6),
    (('Posterize', 2, 0.8), ('Equalize', 0, 1.0)),
    (('Rotate', 9, 0.2), ('Solarize', 52, 0.6)),
    (_EQ6, ('Posterize', 2, 0.4)),
    (('Rotate', 24, 0.8), ('Color', 0.1, 0.4)),
    (('Rotate', 27, 0.4), _EQ6),
    (('Equalize', 0, 0.0), ('Equalize', 0, 0.8)),
    (('Invert', 0, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 0.82, 0.6), ('Contrast', 1.54, 1.0)),
    (('Rotate', 24, 0.8), ('Color', 0.1, 1.0)),
    (('Color', 1.54, 0.8), ('Solarize', 77, 0.8)),
    (('Sharpness', 1.36, 0.4), ('Invert', 0, 0.6)),
    (('ShearX', 0.15, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 0.1, 0.4), _EQ6),
    (_EQ4, ('Solarize', 154, 0.2)),
    (('Solarize', 128, 0.6), ('AutoContrast', 0, 0.6)),
    (('Invert', 0, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 0.82, 0.6), ('Contrast', 1.54, 1.0)),
    (('Equalize', 0, 0.8), _EQ6),
)


def resnest_autoaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the 25 sub-policies, with shears that are bicubic and rotations that take the nearest pixel."""
    for name, value, probability in _RESNEST[rng.integers(len(_RESNEST))]:
        if rng.random() > probability:
            continue
        signed = -value if name in SIGNED and rng.random() < 0.5 else value
        image = apply_op(image, name, signed, BICUBIC if name.startswith('Shear') else NEAREST)
    return image


def linspace(start: float, end: float, number: int, bins: int) -> float:
    """`torch.linspace(start, end, bins)[number]` in its float32: a step up from `start`, or down from `end`.

    The last bit matters: it decides whether a picture moves by 5 pixels or 4, and how a factor's products are
    rounded.
    """
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(bins - 1))
    # Products and sums of doubles, rounded once, are the fused ones that torch computes.
    up = number < bins // 2
    return float(np.float32(first + step * number if up else float(last) - step * (bins - 1 - number)))


def level(name: str, number: int, bins: int, size: tuple[int, int]) -> float:
    """An operation's value at a level of torchvision's scale.

    Args:
      name: the operation.
      number: the level, in 0..bins - 1.
      bins: 10 for AutoAugment, 31 for RandAugment.
      size: width and height of the picture.
    """
    if name in ENHANCE:
        return 1 + linspace(0, 0.9, number, bins)
    match name:
        case 'ShearX' | 'ShearY':
            return linspace(0, 0.3, number, bins)
        case 'TranslateX' | 'TranslateY':
            return int(linspace(0, 150 / 331 * size[name == 'TranslateY'], number, bins))
        case 'Rotate':
            return linspace(0, 30, number, bins)
        case 'Posterize':
            return 8 - round(4 * number / (bins - 1))
        case 'Solarize':
            return linspace(255, 0, number, bins)
    return 0


def opposite(name: str, value: float) -> float:
    """The value of the same strength in the other direction, of a movement or of a factor around 1."""
    return 2 - value if name in ENHANCE else -value if name in SIGNED else value


# The same table 9, by levels of 0..9: operation, level, probability; torchvision's `IMAGENET` policy.
_PAPER: tuple[tuple[tuple[str, int, float], ...], ...] = (
    (('Posterize', 8, 0.4), ('Rotate', 9, 0.6)),
    (('Solarize', 5, 0.6), ('AutoContrast', 0, 0.6)),
    (('Equalize', 0, 0.8), _EQ6),
    (('Posterize', 7, 0.6), ('Posterize', 6, 0.6)),
    (_EQ4, ('Solarize', 4, 0.2)),
    (_EQ4, ('Rotate', 8, 0.8)),
    (('Solarize', 3, 0.6), _EQ6),
    (('Posterize', 5, 0.8), ('Equalize', 0, 1.0)),
    (('Rotate', 3, 0.2), ('Solarize', 8, 0.6)),
    (_EQ6, ('Posterize', 6, 0.4)),
    (('Rotate', 8, 0.8), ('Color', 0, 0.4)),
    (('Rotate', 9, 0.4), _EQ6),
    (('Equalize', 0, 0.0), ('Equalize', 0, 0.8)),
    (('Invert', 0, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 4, 0.6), ('Contrast', 8, 1.0)),
    (('Rotate', 8, 0.8), ('Color', 2, 1.0)),
    (('Color', 8, 0.8), ('Solarize', 7, 0.8)),
    (('Sharpness', 7, 0.4), ('Invert', 0, 0.6)),
    (('ShearX', 5, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 0, 0.4), _EQ6),
    (_EQ4, ('Solarize', 4, 0.2)),
    (('Solarize', 5, 0.6), ('AutoContrast', 0, 0.6)),
    (('Invert', 0, 0.6), ('Equalize', 0, 1.0)),
    (('Color', 4, 0.6), ('Contrast', 8, 1.0)),
    (('Equalize', 0, 0.8), _EQ6),
)


def paper_autoaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """torchvision's `AutoAugment` for ImageNet: one of 25 pairs of operations, either direction by chance."""
    for name, number, probability in _PAPER[rng.integers(len(_PAPER))]:
        if rng.random() > probability:
            continue
        value = level(name, number, 10, image.size)
        image = apply_op(image, name, opposite(name, value) if rng.random() < 0.5 else value)
    return image


_RANDAUGMENT = (
    *('Identity', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate', 'Brightness', 'Color'),
    *('Contrast', 'Sharpness', 'Posterize', 'Solarize', 'AutoContrast', 'Equalize'),
)


@dataclass(frozen=True)
class RandAugment:
    """torchvision's `RandAugment` (Cubuk et al., arXiv 1909.13719).

    Attributes:
      ops: how many operations a picture gets, drawn with repetition.
      magnitude: their strength, in 0..30.
    """

    ops: int
    magnitude: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for _ in range(self.ops):
            name = _RANDAUGMENT[rng.integers(len(_RANDAUGMENT))]
            value = level(name, self.magnitude, 31, image.size)
            image = apply_op(image, name, opposite(name, value) if rng.random() < 0.5 else value)
        return image


# Operation -> its value at magnitude 0 and at 30.
_RESNEST_RANGES: dict[str, tuple[float, float]] = {
    'AutoContrast': (0, 1),
    'Equalize': (0, 1),
    'Invert': (0, 1),
    'Rotate': (0, 30),
    'Posterize': (0, 4),
    'Solarize': (0, 256),
    'SolarizeAdd': (0, 110),
    'Color': (0.1, 1.9),
    'Contrast': (0.1, 1.9),
    'Brightness': (0.1, 1.9),
    'Sharpness': (0.1, 1.9),
    'ShearX': (0.0, 0.3),
    'ShearY': (0.0, 0.3),
    'Cutout': (0, 40),
    'TranslateX': (0.0, 100),
    'TranslateY': (0.0, 100),
}
CUTOUT_COLOUR = (125, 123, 114)


@dataclass(frozen=True)
class ResNeStRandAugment:
    """The RandAugment of zhanghang1989/ResNeSt (`resnest/torch/transforms/autoaug.py`).

    Each drawn operation is left out with a probability that is itself drawn, from U(0.2, 0.8), so half of
    the time; shears and translations are bicubic, rotations take the nearest pixel.

    Attributes:
      ops: how many operations are drawn for a picture.
      magnitude: their strength, in 0..30.
    """

    ops: int
    magnitude: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        names = tuple(_RESNEST_RANGES)
        for name in (names[i] for i in rng.integers(len(names), size=self.ops)):
            if rng.random() > rng.uniform(0.2, 0.8):
                continue
            low, high = _RESNEST_RANGES[name]
            value = self.magnitude / 30 * (high - low) + low
            if name == 'Cutout':
                image = cutout(image, value, rng.random(), rng.random())
                continue
            signed = -value if name in SIGNED and rng.random() < 0.5 else value
            image = apply_op(image, name, signed, NEAREST if name == 'Rotate' else BICUBIC)
        return image


def cutout(image: Image.Image, side: float, x: float, y: float) -> Image.Image:
    """Paints a grey square around a point.

    At the left and the top border it is moved into the picture, at the others it is cut off.

    Args:
      image: the picture.
      side: pixels from the first to the last one of a side, both grey.
      x, y: 0..1, from the picture's pixel 1 (the authors' `np.random.uniform(w)`) to its end.
    """
    width, height = image.size
    left = int(max(0.0, 1 + x * (width - 1) - side / 2))
    top = int(max(0.0, 1 + y * (height - 1) - side / 2))
    box = (left, top, min(width, int(left + side) + 1), min(height, int(top + side) + 1))
    image = image.copy()
    image.paste(CUTOUT_COLOUR if image.mode == 'RGB' else CUTOUT_COLOUR[1], box)
    return image


def make_policy(name: str, ops: int, magnitude: int) -> Policy | None:
    """The policy that `Settings.policy` names; None for ''."""
    policies: dict[str, Policy] = {
        'resnest_autoaugment': resnest_autoaugment,
        'autoaugment': paper_autoaugment,
        'randaugment': RandAugment(ops, magnitude),
        'resnest_randaugment': ResNeStRandAugment(ops, magnitude),
    }
    return policies[name] if name else None

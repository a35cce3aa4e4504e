"""Augments single training images on the host, with Pillow, in bytes: policy, crop, colour jitter.

Mirroring, colour noise ("lighting"), erasing and mixing come later, on the device (`train.step.pixels`,
`train.step.mixing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.images.transforms import FILTERS, Transform

from ..fields import Size, sides
from ..settings import Settings, complete
from .autoaugment import Policy, make_policy
from .planes import PILLOWS, plane_pixels

TRIES = 10  # random boxes, before the centre is taken
COVERED = 0.1  # share of the picture that a 'resnest' crop covers at least, whatever its `area`

Box = tuple[int, int, int, int]
Crop = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class TrainTransform:
    """A function from a picture and random numbers to uint8 [H, W, C]; `train_transform` makes one.

    Attributes:
      policy: applied before the crop; None for none.
      crop: gives a picture of the training size.
      jitter, hue: as in `Settings`.
    """

    policy: Policy | None
    crop: Crop
    jitter: float
    hue: float

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        if self.policy:
            image = self.policy(image, rng)
        image = self.crop(image, rng)
        if self.jitter or self.hue:
            image = jitter(image, rng, self.jitter, self.hue)
        pixels = np.array(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]


def train_transform(settings: Settings) -> TrainTransform:
    """The augmentation of a recipe, as far as the host does it.

    Returns:
      A function from a picture ('RGB', 'L' where `in_chans` is 1, `Planes` where it is neither 3 nor 1) and a
      NumPy generator to uint8 [*image_size, in_chans].
    """
    s = complete(settings)
    resample = FILTERS[s.interpolation]
    crops: dict[str, Crop] = {
        'random_resized': RandomResizedCrop(s.image_size, s.crop_area, s.crop_ratio, resample),
        'resnest': ResNeStCrop(s.image_size, s.crop_area, s.crop_ratio, resample),
        'pad': PadCrop(s.image_size, s.crop_padding, resample),
        'resize': PadCrop(s.image_size, 0, resample),
    }
    policy = make_policy(s.policy, s.policy_ops, s.policy_magnitude)
    return TrainTransform(policy, crops[s.crop], s.jitter, s.hue)


def eval_transform(
    preprocess: Preprocess, in_chans: int, *, crops: int = 1
) -> Callable[[Any], npt.NDArray[np.uint8]]:
    """A function from a picture to uint8 [H, W, in_chans]: `flaxnets.transform`, but for the normalising.

    Args:
      preprocess: what the weights expect.
      in_chans: input channels of the net.
      crops: 1 gives the centre; 5 gives the corners and the centre, [5, H, W, in_chans].

    Raises:
      FlaxnetsError: there are no such crops.
    """
    if crops not in (1, 5):
        raise FlaxnetsError(f'crops={crops!r} must be 1 (the centre) or 5 (the corners and the centre)')
    if crops == 5:
        if in_chans not in PILLOWS:
            raise FlaxnetsError(f'crops=5 is for images of 1 or 3 channels, not of {in_chans}')
        transform = Transform(preprocess, in_chans)
        transform.check_corners()
        return transform.five_crops
    if in_chans in PILLOWS:
        return Transform(preprocess, in_chans).pixels
    return plane_pixels(preprocess, in_chans)


@dataclass(frozen=True)
class RandomResizedCrop:
    """torchvision's `RandomResizedCrop` (Szegedy et al., arXiv 1409.4842): cuts a random box and resizes it.

    The box's share of the area is uniform, and so is the logarithm of its width / height. If no box fits in
    ten tries, the largest one in the centre is taken whose ratio is within the limits.

    Attributes:
      size: pixels of the result: its side, or (height, width).
      area: smallest and largest share of the picture's area.
      ratio: smallest and largest width / height.
      resample: Pillow's filter.
    """

    size: Size
    area: tuple[float, float]
    ratio: tuple[float, float]
    resample: Image.Resampling

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """(left, top, width, height) of a random box, in pixels."""
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(TRIES):
            area = width * height * rng.uniform(*self.area)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (width - w) // 2, (height - h) // 2, w, h

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return _cut(image, self.box(*image.size, rng), self.size, self.resample)


@dataclass(frozen=True)
class ResNeStCrop(RandomResizedCrop):
    """`ERandomCrop` of zhanghang1989/ResNeSt (`resnest/gluon/transforms.py`; `resnest/torch` has it too).

    It samples as TensorFlow does for a distorted box that must cover at least a tenth of the picture: the
    ratio is uniform, and then the height, between those that the limits of area allow. If no box fits in ten
    tries, or the box is the whole picture, it takes the centre crop of the authors' evaluation at this size.
    """

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        smallest, largest = (share * width * height for share in self.area)
        for _ in range(TRIES):
            ratio = rng.uniform(*self.ratio)
            h = round(math.sqrt(smallest / ratio))
            highest = round(math.sqrt(largest / ratio))
            if highest * ratio > width:
                highest = int((width + 0.5 - 1e-7) / ratio)
                highest -= highest * ratio > width
            highest = min(highest, height)
            h = round(rng.uniform(min(h, highest), highest))
            w = round(h * ratio)
            fits = 0 < w <= width and 0 < h <= height
            if fits and max(smallest, COVERED * width * height) <= w * h <= largest:
                if (w, h) == (width, height):
                    break
                return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
        high, wide = sides(self.size)
        longer = max(high, wide)
        across = min(width, height * wide / high) * longer / (longer + 32)
        down = min(height, width * high / wide) * longer / (longer + 32)
        left, top = round((width - across) / 2), round((height - down) / 2)
        w, h = round(left + across) - left, round(top + down) - top  # may differ by a pixel, as theirs do
        return left, top, max(w, 1), max(h, 1)


@dataclass(frozen=True)
class PadCrop:
    """Resizes the whole picture, pads it with zeros, and cuts a window of the same size at random.

    Attributes:
      size: pixels of the result: its side, or (height, width).
      padding: pixels of zeros on each side.
      resample: Pillow's filter.
    """

    size: Size
    padding: int
    resample: Image.Resampling

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        high, wide = sides(self.size)
        image = image.resize((wide, high), self.resample)
        if not self.padding:
            return image
        left, top = (int(n) for n in rng.integers(-self.padding, self.padding + 1, 2))
        return image.crop((left, top, left + wide, top + high))  # beyond the border it is black


def _cut(image: Image.Image, box: Box, size: Size, resample: Image.Resampling) -> Image.Image:
    """An image of `size` pixels from `box` alone: `resize(box=...)` would also read the pixels around it."""
    left, top, w, h = box
    high, wide = sides(size)
    return image.crop((left, top, left + w, top + h)).resize((wide, high), resample)


def jitter(image: Image.Image, rng: np.random.Generator, strength: float, hue: float) -> Image.Image:
    """torchvision's `ColorJitter(strength, strength, strength, hue)`: the changes in a random order."""
    low = max(0.0, 1 - strength)
    enhancers: list[Any] = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for kind in rng.permutation(4):
        if kind < 3 and strength:
            image = enhancers[kind](image).enhance(rng.uniform(low, 1 + strength))
        elif kind == 3 and hue and image.mode == 'RGB':
            image = shift_hue(image, rng.uniform(-hue, hue))
    return image


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turns the hue by `shift`, a share of the full circle, as torchvision does with Pillow."""
    h, s, v = image.convert('HSV').split()
    turned = h.point([(level + int(shift * 255)) % 256 for level in range(256)])
    return Image.merge('HSV', (turned, s, v)).convert('RGB')

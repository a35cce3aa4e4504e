"""The record of how weights expect images to be prepared. Checked when it is made; JAX is not imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..checks import is_finite, is_whole
from ..errors import FlaxnetsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_MODES = ('center', 'squash', 'border', 'center_first')
INTERPOLATIONS = ('bilinear', 'bicubic', 'lanczos', 'nearest', 'hamming', 'box')
CHANNEL_ORDERS = ('rgb', 'bgr')
MOST = 2.0  # neither the mean nor the deviation of values from 0 to 1 is more
OF_BYTES = 'is of values from 0 to 255, but images have values from 0 to 1: divide mean and std by 255'


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a net's input, as timm's `create_transform` describes it, and more.

    Attributes:
      size: size of the net's input in pixels: one side of a square, or (height, width).
      crop_pct: the input's side divided by the side to which the image is resized; above 0. If it is above
        1, the resized image is smaller than the input and is placed in its middle.
      crop_mode: how an image is brought to `size`.
        'center': resize it, keeping its aspect ratio, until it just covers size / crop_pct, then cut out
        the centre (timm, torchvision).
        'squash': resize it to exactly size / crop_pct, then cut out the centre.
        'border': resize it, keeping its aspect ratio, until it just fits into size / crop_pct, then cut out
        the centre, and fill what is missing with the mean colour.
        'center_first': cut out the centre, crop_pct times the largest part with the input's aspect ratio,
        then resize it to `size` (the ResNeSt authors' `ECenterCrop`).
      interpolation: Pillow's 'bilinear', 'bicubic', 'lanczos', 'hamming' or 'box', all antialiased, or
        'nearest'.
      mean, std: the values, scaled to 0..1, become (value - mean) / std. One number for each channel of the
        net's input, in its order, or one for all.
      channel_order: the net's order of colours, 'rgb' or 'bgr'.
      unsupported: steps, in words, that the weights expect and flaxnets does not have. Such weights load, but
        no images are prepared for them.
      approximations: steps, in words, that differ slightly from what the weights expect.
    """

    size: int | tuple[int, int] = 224
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    interpolation: str = 'bilinear'
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = 'rgb'
    unsupported: tuple[str, ...] = ()
    approximations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        sides = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        if len(sides) != 2 or not all(is_whole(side, 1) for side in sides):
            problems.append(f'size={self.size!r} must be at least 1, or (height, width) of such')
        if not is_finite(self.crop_pct) or self.crop_pct <= 0:
            problems.append(f'crop_pct={self.crop_pct!r} must be above 0')
        for field, choices in (
            ('crop_mode', CROP_MODES),
            ('interpolation', INTERPOLATIONS),
            ('channel_order', CHANNEL_ORDERS),
        ):
            if getattr(self, field) not in choices:
                problems.append(f'{field}={getattr(self, field)!r} is not one of {", ".join(choices)}')
        for field in ('mean', 'std'):
            values = getattr(self, field)
            if not isinstance(values, tuple | list) or not values or not all(map(is_finite, values)):
                problems.append(f'{field}={values!r} must be a number for each channel, or one for all')
            elif field == 'std' and min(values) <= 0:
                problems.append(f'std={values!r} must be positive')
            elif max(values) > MOST:
                problems.append(f'{field}={values!r} {OF_BYTES}')
        if problems:
            raise FlaxnetsError('not a preprocessing: ' + '; '.join(problems))
        plain = {
            'size': sides[0] if sides[0] == sides[1] else tuple(sides),
            'mean': tuple(self.mean),
            'std': tuple(self.std),
        }
        for field, value in plain.items():
            object.__setattr__(self, field, value)

    @property
    def height(self) -> int:
        """Height of the net's input in pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Width of the net's input in pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]

    def channel_values(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and std for each channel of a net with so many, in the net's order.

        For grey images these are the averages over the colours.

        Raises:
          FlaxnetsError: there are values for another number of channels.
        """
        both = []
        for field, values in (('mean', self.mean), ('std', self.std)):
            if channels == 1:
                values = (math.fsum(values) / len(values),)
            elif len(values) == 1:
                values *= channels
            if len(values) != channels:
                raise FlaxnetsError(
                    f'{field}={values!r} has {len(values)} values for images of {channels} channels: '
                    'give one for each, or one for all'
                )
            both.append(values)
        return both[0], both[1]

    def changed(self, changes: Iterable[str]) -> Preprocess:
        """A copy with some fields changed, given as text: `preprocess.changed(['mean=0.5', 'size=24,48'])`.

        The caller decides how images are prepared, so that the copy has nothing `unsupported`. Show him what
        is `overruled` by that.

        Args:
          changes: texts `field=value`; several numbers have commas between them.

        Raises:
          FlaxnetsError: no such field, or a value that it cannot have.
        """
        values: dict[str, Any] = {'unsupported': ()}
        for change in changes:
            field, _, text = change.partition('=')
            try:
                if field in ('crop_mode', 'interpolation', 'channel_order'):
                    values[field] = text
                elif field == 'size':
                    sides = tuple(map(int, text.split(',')))
                    values[field] = sides[0] if len(sides) == 1 else sides
                elif field == 'crop_pct':
                    values[field] = float(Fraction(text))
                elif field in ('mean', 'std'):
                    values[field] = tuple(float(Fraction(number)) for number in text.split(','))
                else:
                    known = 'size, crop_pct, crop_mode, interpolation, mean, std and channel_order'
                    raise FlaxnetsError(f'{change!r}: images have no {field!r}; they have {known}')
                if field == 'interpolation':
                    values['approximations'] = ()
            except (ValueError, ZeroDivisionError, OverflowError) as error:
                if isinstance(error, FlaxnetsError):
                    raise
                raise FlaxnetsError(f'{change!r}: {field} is made of numbers') from error
        return dataclasses.replace(self, **values)

    @property
    def overruled(self) -> tuple[str, ...]:
        """Notes for a caller of `changed`: the `unsupported` steps that his images do without."""
        return tuple(f'the weights expect: {what}; images are prepared as told' for what in self.unsupported)

    def __str__(self) -> str:
        how = {
            'center': 'resize, then centre crop',
            'squash': 'resize to the shape of the input, then centre crop',
            'border': 'resize into a border',
            'center_first': 'centre crop, then resize',
        }
        order = '' if self.channel_order == 'rgb' else f', channels {self.channel_order}'
        size = f'{self.size}' if isinstance(self.size, int) else f'{self.height} x {self.width}'
        return (
            f'{size} px, crop {self.crop_pct:g}, {self.interpolation}, {how[self.crop_mode]}, '
            f'mean {self.mean}, std {self.std}{order}'
            + ''.join(f'; not given: {u}' for u in self.unsupported)
            + ''.join(f'; nearly: {a}' for a in self.approximations)
        )

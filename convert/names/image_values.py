"""The record of what a checkpoint says of its images, and functions that read the numbers in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from flaxnets.images.preprocess import Preprocess

IMAGENET = {'mean': Preprocess().mean, 'std': Preprocess().std}
MIN_STD = 1e-6  # of values from 0 to 1: a smaller one is a mistake


@dataclass(frozen=True)
class ImageSettings:
    """What a file says of its images.

    Attributes:
      fields: fields of `flaxnets.Preprocess`, by name; only those that the file gives.
      unsupported: settings in the file that no `Preprocess` can express, in words.
      notes: how the settings were understood, in words.
      approximations: settings that are honoured only nearly, in words.
      weights: timm's full name of the published weights whose settings stand in for those that are missing.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str | None = None
    approximations: tuple[str, ...] = ()

    def completed_by(self, other: ImageSettings) -> ImageSettings:
        """These settings, and those of another part of the file that they lack."""
        return ImageSettings(
            {**other.fields, **self.fields},
            (*self.unsupported, *other.unsupported),
            (*self.notes, *other.notes),
            self.weights or other.weights,
            (*self.approximations, *other.approximations),
        )

    def applied_to(self, usual: Preprocess) -> Preprocess:
        """`usual`, with what the file says in its place."""
        return replace(
            usual,
            **self.fields,
            unsupported=(*usual.unsupported, *self.unsupported),
            approximations=(*usual.approximations, *self.approximations),
        )


def share_of(crop: int, resize: int) -> float:
    """The `crop_pct` with which `Preprocess` resizes to exactly `resize` pixels, then crops to `crop`."""
    share = crop / resize
    while math.floor(crop / share) < resize:
        share = math.nextafter(share, 0)
    return share


def numbers(values: object) -> tuple[float, ...] | None:
    """A list of finite numbers, or one; None if it is anything else."""
    if isinstance(values, np.ndarray) and values.size <= 1000:
        values = values.reshape(-1).tolist()
    if is_number(values):
        values = [values]
    if not isinstance(values, list | tuple) or not values or not all(map(is_number, values)):
        return None
    return tuple(map(float, values))


def whole_numbers(values: object) -> tuple[int, ...] | None:
    """A list of whole numbers from 1 on, or one; None if it is anything else."""
    found = numbers(values)
    if found is None or any(value < 1 or value != int(value) for value in found):
        return None
    return tuple(map(int, found))


def of_bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers for pixels of 0..255 as numbers for 0..1; to twelve digits, so that 57.12 gives 0.224."""
    return tuple(float(f'{value / 255:.12g}') for value in values)


def is_on(value: object) -> bool:
    """Whether an option is True, or a whole number other than 0."""
    return isinstance(value, bool | int) and bool(value)


def is_number(value: Any) -> bool:
    """Whether it is one number, neither a bool nor huge nor NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return bool(abs(number) < 1e9)  # and so no NaN, no infinity, nothing that a float could not hold

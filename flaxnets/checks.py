"""Checks of values: of the fields of records when they are made, and of arrays."""

from __future__ import annotations

import math

import numpy as np


def is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object) -> bool:
    """True for a number that is neither NaN nor infinite, and no whole number too large for a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def all_finite(array: np.ndarray) -> bool:
    """True if no value of the array is NaN or infinite."""
    if array.dtype.itemsize < 4:
        return bool(np.isfinite(array).all())  # NumPy sums bfloat16 slowly, and a float16 soon overflows
    with np.errstate(all='ignore'):
        # A sum takes a quarter of the time of a test of each value, which only a sum that overflows needs.
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def is_text(value: object) -> bool:
    return isinstance(value, str) and value != ''


def are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, str) for value in values)

"""Checks of arrays, in every dtype that weights are kept in."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from flaxnets.checks import all_finite


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_one_value_that_is_not_finite(dtype: type) -> None:
    largest = jnp.finfo(dtype).max
    array = np.full(100, largest, dtype)  # whose sum overflows
    assert all_finite(array)
    for bad in (np.nan, np.inf, -np.inf):
        array[7] = bad
        assert not all_finite(array)


def test_whole_numbers_are_finite() -> None:
    assert all_finite(np.arange(3)) and all_finite(np.array([True])) and all_finite(np.int8([1]))

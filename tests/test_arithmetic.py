"""Checkpoint arithmetic: averages, heads, dtypes, folded BatchNorm."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from nets import numpy_state
from states import SMALL, small_net

import flaxnets
from convert.arithmetic import average, cast, drop_head, fold_batch_norm
from convert.names.tree import to_variables
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.nets.resnet import build


@pytest.mark.parametrize('kind', SMALL)
def test_a_folded_net_gives_the_same_logits(kind: str) -> None:
    reference = small_net(kind)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a channel for which epsilon is half of the variance
            module.running_var[0] = 1e-5
            module.weight.data[0] *= 1e-5**0.5
    folded = build(SMALL[kind], num_classes=5, folded=True)
    state = fold_batch_norm(numpy_state(reference))
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    found = jax.jit(folded.apply)(to_variables(state, folded), images)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert not any('bn' in key or 'running' in key for key in state)
    assert len(state) < len(list(reference.parameters()))


def test_a_folded_net_cannot_train() -> None:
    model = flaxnets.create('resnest14d', folded=True)
    with pytest.raises(FlaxnetsError, match='for inference'):
        model.init(jax.random.key(0), np.zeros((2, 64, 64, 3), np.float32), train=True)


def test_average_is_the_float64_mean_in_the_first_dtype() -> None:
    values = [np.array([1.0, 2**-11, 3.0], np.float16), np.array([2.0, 0, 5.0], np.float16)]
    states = [{'a.weight': v, 'a.num_batches_tracked': np.array(i)} for i, v in enumerate(values)]
    mean = average(states, ['x', 'y'])
    assert mean['a.weight'].dtype == np.float16
    np.testing.assert_array_equal(mean['a.weight'], [1.5, 2**-12, 4.0])
    assert mean['a.num_batches_tracked'] == 0
    # Sums that float32 would lose: 2**25 + 1 + 1 + 1.
    large = [{'w': np.array([x], np.float32)} for x in (2.0**25, 1, 1, 1)]
    assert average(large, list('abcd'))['w'] == np.float32((2**25 + 3) / 4)


def test_average_refuses_what_does_not_match() -> None:
    a, b = {'x': np.zeros(2), 'y': np.zeros(3)}, {'y': np.zeros(4), 'z': np.zeros(1)}
    with pytest.raises(CheckpointError) as info:
        average([a, b], ['A', 'B'])
    for words in ('x is only in A', 'z is only in B', 'y has shape (3,) in A and (4,) in B'):
        assert words in str(info.value)
    with pytest.raises(FlaxnetsError, match='at least two'):
        average([a], ['A'])


def test_drop_head() -> None:
    state = {'bn1.weight': np.ones(1), 'fc.weight': np.ones(1), 'fc.bias': np.ones(1)}
    assert list(drop_head(state)) == ['bn1.weight']
    with pytest.raises(CheckpointError, match='no classifier'):
        drop_head({'bn1.weight': np.ones(1)})


def test_cast_keeps_statistics_and_counters() -> None:
    state = {
        'a.weight': np.array([1.0, 1 / 3], np.float32),
        'a.running_var': np.array([1 / 3], np.float16),
        'a.num_batches_tracked': np.array(3),
    }
    half = cast(state, 'bfloat16')
    assert [t.dtype.name for t in half.values()] == ['bfloat16', 'float32', 'int64']
    np.testing.assert_array_equal(half['a.weight'], state['a.weight'].astype(ml_dtypes.bfloat16))
    with pytest.raises(FlaxnetsError, match="'int8'"):
        cast(state, 'int8')
    wrong = {'b.weight': np.array([1e6], np.float32), 'c.weight': np.array([np.nan], np.float32)}
    with pytest.raises(CheckpointError, match='b.weight is too large for float16; c.weight is not finite'):
        cast(wrong, 'float16')

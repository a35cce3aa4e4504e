"""The training step, on one device and on several."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import random_variables, shallow

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.layers import Span
from train import parallel
from train.settings import Settings
from train.step.optimizer import make_optimizer
from train.step.state import TrainState, create_state, initial_variables
from train.step.step import make_eval_step, make_train_step

N, CLASSES = 16, 5
BASE = Settings(
    model='resnext_tiny',
    batch_size=N,
    flip=0.5,
    lighting=0.1,
    mixup=0.2,
    mix_images=4,
    label_smoothing=0.1,
    epochs=2,
)


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    return {'image': images, 'label': rng.integers(0, CLASSES, N).astype(np.int32)}


class FirstStage(flaxnets.ResNet):
    """Enough of a net to take a step with."""

    def forward_maps(self, x: Any, train: bool = False, upto: int = 4) -> Any:
        return super().forward_maps(x, train, min(upto, 1))


class ThirdStage(flaxnets.ResNet):
    """The stem, and the first of the two stages in which DropBlock acts."""

    def forward_maps(self, x: Any, train: bool = False, upto: int = 4) -> Any:
        (stem,) = super().forward_maps(x, train, 0)
        return [stem, self.layer3(stem, train)]


def start(settings: Settings, net: type = FirstStage, **options: Any) -> tuple[Any, Any, TrainState]:
    model = shallow(flaxnets.create(settings.model, CLASSES, dtype=settings.dtype, **options), net)
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, 0.9, nesterov=True))
    state = create_state(random_variables(model), optimizer, ema=settings.ema_decay > 0)
    return model, optimizer, state


def shards_agree(tree: Any) -> bool:
    """Whether all devices of this host hold the same bytes of every array."""

    def same(array: jax.Array) -> bool:
        first, *others = (np.asarray(shard.data).tobytes() for shard in array.addressable_shards)
        return all(other == first for other in others)

    return all(same(leaf) for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


@functools.cache  # compiling takes seconds, and some cases meet in several tests
def one_step(settings: Settings, devices: int, **options: Any) -> tuple[TrainState, dict[str, float]]:
    """The state after a step on so many devices, and the means of its metrics."""
    model, optimizer, state = start(settings, **options)
    span = parallel.bn_span(settings.bn_images, N, settings.accumulation, devices)
    step = make_train_step(
        model.clone(bn_span=span), optimizer, settings, Preprocess(), epoch_steps=4, axis_name=parallel.AXIS
    )
    mapped = parallel.map_train_step(step, devices=jax.local_devices()[:devices])
    split = {key: array.reshape(devices, -1, *array.shape[1:]) for key, array in batch().items()}
    state, metrics = mapped(state, split)
    assert shards_agree((state, metrics))
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    return parallel.to_host(state), means


@functools.cache
def jitted(settings: Settings, **options: Any) -> Any:
    """(state, batch) -> (state, metrics) on one device, with the optimizer of `start`."""
    model, optimizer, _ = start(settings, **options)
    return jax.jit(make_train_step(model, optimizer, settings, Preprocess(), epoch_steps=4))


def largest_difference(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def exact_step(bn_images: int, devices: int, accumulation: int = 1) -> tuple[TrainState, dict[str, float]]:
    """`one_step` in float64: a ReLU whose float32 input is within rounding of 0 opens in one of two only."""
    settings = dataclasses.replace(BASE, bn_images=bn_images, accumulation=accumulation, dtype='float64')
    with jax.enable_x64(True):
        return one_step(settings, devices, param_dtype='float64')


@pytest.mark.parametrize(('bn_images', 'devices'), [(0, 4), (4, 2), (8, 4)])
def test_any_number_of_devices_does_what_one_does(bn_images: int, devices: int) -> None:
    alone, expected = exact_step(bn_images, 1)
    together, found = exact_step(bn_images, devices)
    assert found == pytest.approx(expected, rel=1e-9)
    assert largest_difference(together.params, alone.params) < 1e-9
    assert largest_difference(together.batch_stats, alone.batch_stats) < 1e-9


def test_statistics_are_averaged_over_spans_that_differ() -> None:
    """With statistics per device the devices would drift apart if the step did not make them agree."""
    (together, _), (everywhere, _) = exact_step(8, 4), exact_step(0, 4)
    assert largest_difference(together.batch_stats, everywhere.batch_stats) > 1e-4


def test_accumulation_takes_the_same_gradient() -> None:
    whole, expected = exact_step(8, 1)
    parts, found = exact_step(8, 1, accumulation=2)
    assert found == pytest.approx(expected, rel=1e-9)
    assert largest_difference(parts.params, whole.params) < 1e-9


def test_remat_changes_nothing_but_memory() -> None:
    kept, expected = one_step(BASE, 1)
    again, found = one_step(BASE, 1, remat=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert largest_difference(again.params, kept.params) < 1e-5


def test_averages_move_towards_parameters_and_statistics() -> None:
    settings = dataclasses.replace(BASE, ema_decay=0.75, ema_warmup=False)
    _, _, before = start(settings)
    after, _ = one_step(settings, 2)
    for part in ('params', 'batch_stats'):
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, getattr(before, part), getattr(after, part))
        assert largest_difference(after.ema[part], expected) < 1e-6
    assert after.variables is not after.params
    assert largest_difference(after.variables['params'], after.ema['params']) == 0


@pytest.mark.parametrize('where', ['image', 'params', 'batch_stats'])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    settings = dataclasses.replace(BASE, ema_decay=0.9)
    state, step = start(settings)[2], jitted(settings)
    data: dict[str, Any] = batch()
    if where == 'image':
        data['image'] = np.full((N, 32, 32, 3), np.inf, np.float32)
    elif where == 'params':
        state.params['fc']['bias'][0] = np.nan
    else:
        state.batch_stats['layer1']['0']['bn1']['var'][0] = np.nan
    after, metrics = step(state, data)
    assert int(after.step) == 1 and int(after.skipped) == 1
    assert int(metrics['non_finite'][0]) == 1
    assert int(metrics['loss'][1]) == 0 and float(metrics['loss'][0]) == 0
    for part in ('params', 'batch_stats', 'opt_state', 'ema'):
        old, new = getattr(state, part), getattr(after, part)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            np.testing.assert_array_equal(a, b)
    if where == 'image':  # the next one is the first update of the averages: a decay of 2 / 11
        data['image'] = np.random.default_rng(0).normal(size=(N, 32, 32, 3)).astype(np.float32)
        later, _ = step(after, data)
        assert int(later.step) == 2 and int(later.skipped) == 1
        expected = jax.tree.map(lambda a, b: 2 / 11 * a + 9 / 11 * b, state.params, later.params)
        assert largest_difference(later.ema['params'], expected) < 1e-6


def test_the_learning_rate_goes_on_over_a_step_that_is_skipped() -> None:
    settings = dataclasses.replace(BASE, warmup_epochs=1)  # from a rate of 0
    model, _, state = start(settings)
    optimizer = make_optimizer(settings, 4, state.params)
    state = create_state({'params': state.params, 'batch_stats': state.batch_stats}, optimizer)
    step = jax.jit(make_train_step(model, optimizer, settings, Preprocess(), epoch_steps=4))
    still, _ = step(state, batch())
    assert largest_difference(still.params, state.params) == 0
    skipped, _ = step(state, {**batch(), 'image': np.full((N, 32, 32, 3), np.inf, np.float32)})
    assert int(skipped.skipped) == 1
    after, _ = step(skipped, batch())
    assert largest_difference(after.params, state.params) > 0


def test_a_finite_step_counts_its_images() -> None:
    state, step = start(BASE)[2], jitted(BASE)
    after, metrics = step(state, batch())
    assert int(after.step) == 1 and int(after.skipped) == 0
    assert int(metrics['loss'][1]) == int(metrics['top1'][1]) == N
    again, _ = step(state, batch())
    assert largest_difference(after.params, again.params) == 0
    later, _ = step(after.replace(params=state.params, batch_stats=state.batch_stats), batch())
    assert largest_difference(later.params, after.params) > 0  # other flips, another mixing


def test_half_precision_keeps_parameters_and_statistics_exact() -> None:
    settings = dataclasses.replace(BASE, dtype='bfloat16')
    state, metrics = one_step(settings, 2)
    _, expected = one_step(BASE, 2)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))}
    assert kinds == {np.dtype('float32')}
    assert metrics['loss'] == pytest.approx(expected['loss'], rel=0.02)


@jax.enable_x64(True)  # two programs round differently
def test_drop_block_grows_by_epoch() -> None:
    settings = dataclasses.replace(BASE, model='resnest_tiny', dtype='float64', mixup=0, drop_block_rate=0.5)
    model, optimizer, state = start(settings, net=ThirdStage, param_dtype='float64')
    model = model.clone(drop_block_rate=0.5)
    # The rate of the first of two epochs, all the time.
    fixed = dataclasses.replace(settings, drop_block_rate=0.25, epochs=1)
    grows, constant = (
        jax.jit(make_train_step(model, optimizer, each, Preprocess(), epoch_steps=4))
        for each in (settings, fixed)
    )
    for number, same in ((0, True), (4, False)):
        here = state.replace(step=jnp.asarray(number))
        difference = largest_difference(grows(here, batch())[0].params, constant(here, batch())[0].params)
        assert (difference < 1e-7) == same, number


@jax.enable_x64(True)
def test_mixing_ends() -> None:
    mixed = dataclasses.replace(BASE, dtype='float64')
    plain = jitted(dataclasses.replace(mixed, mixup=0.0), param_dtype='float64')
    ending = jitted(dataclasses.replace(mixed, mix_off_epochs=1), param_dtype='float64')
    state = start(mixed, param_dtype='float64')[2]
    for number, same in ((3, False), (4, True)):  # the second of two epochs starts at step 4
        here = state.replace(step=jnp.asarray(number))
        difference = largest_difference(ending(here, batch())[0].params, plain(here, batch())[0].params)
        assert (difference < 1e-7) == same, number


@pytest.mark.parametrize(
    'bn_images, devices, accumulation, expected',
    [
        (0, 1, 1, Span()),
        (0, 4, 1, Span('batch')),
        (16, 4, 1, Span('batch')),
        (4, 4, 1, Span()),
        (2, 4, 1, Span(parts=2)),
        (8, 4, 1, Span('batch', ((0, 1), (2, 3)))),
        (8, 1, 2, Span()),
        (4, 2, 2, Span()),
    ],
)
def test_spans_of_sixteen_images(bn_images: int, devices: int, accumulation: int, expected: Span) -> None:
    assert parallel.bn_span(bn_images, 16, accumulation, devices) == expected


def test_spans_that_do_not_fit_name_those_that_do() -> None:
    with pytest.raises(FlaxnetsError, match=r'bn_images=3 .* 4 devices see 4 images .* can be 2, 4, 8, 16$'):
        parallel.bn_span(3, 16, 1, 4)
    with pytest.raises(FlaxnetsError, match=r'batch_size=18 .*4 devices.*; 16 or 20 can'):
        parallel.bn_span(0, 18, 1, 4)


@pytest.mark.parametrize('conv_init', ['fan_out', 'fan_in', 'prelu'])
def test_kernels_start_with_the_variance_of_their_rule(conv_init: str) -> None:
    params = initial_variables(flaxnets.create('resnest_tiny', 10), 0, conv_init)['params']
    kernel = params['layer4']['0']['conv2']['conv']['kernel']  # 3x3, two groups
    k, _, into, out = kernel.shape
    assert (k, into, out) == (3, 64, 256)
    # PyTorch's fan out, like MXNet's, takes all output channels, whatever the groups.
    fan_in, fan_out = 9 * into, 9 * out
    variance = {
        'fan_out': 2 / fan_out,
        'fan_in': 2 / fan_in,
        'prelu': 2 / (1 + 0.25**2) / ((fan_in + fan_out) / 2),
    }
    assert float(kernel.var()) == pytest.approx(variance[conv_init], rel=0.03)
    bound = 512**-0.5
    gates = params['layer1']['0']['conv2']
    assert bool(gates['fc2']['bias'].any()) == (conv_init == 'fan_out')
    if conv_init == 'fan_out':
        assert bound * 0.99 < float(jnp.abs(params['fc']['kernel']).max()) <= bound
    else:
        assert not params['fc']['bias'].any()


def test_what_is_known_of_each_image() -> None:
    logits = jnp.array([[1.0, 3, 2], [1, 1, 1], [0, 5, 9], [2, 1, 0]])

    net = mock.Mock(spec=flaxnets.ResNet)
    net.apply.return_value = logits
    data = {
        'image': jnp.zeros((4, 2, 2, 3)),
        'label': jnp.array([2, 1, 0, 0]),
        'mask': jnp.array([True, True, True, False]),
    }
    found = make_eval_step(net, Preprocess())({}, data)
    np.testing.assert_array_equal(found['prediction'], [1, 0, 2, 0])
    np.testing.assert_array_equal(found['rank'], [1, 1, 2, 0])
    exponentials = np.exp(np.asarray(logits))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(found['loss'], -np.log(probabilities[range(4), [2, 1, 0, 0]]), rtol=1e-5)

"""Whole nets, forward and one training step: flaxnets, the same with XLA's own convolutions, and timm.

    python benchmarks/nets.py [NET ...] [--batch 8] [--size 224]

Prints milliseconds (the best of some rounds, in which the contestants take turns, so that a busy machine
slows all of them) and ratios. `native` is flaxnets with `feature_group_count` convolutions throughout, which
is what a plain Flax net has; timm runs on PyTorch, in channels_last memory format, and is left out where
PyTorch is not installed or the device is not a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import flaxnets
from flaxnets.config import Preprocess
from train.settings import Settings
from train.state import create_state
from train.step import make_train_step

Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('nets', nargs='*', default=['resnext50_32x4d'], metavar='NET')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224, help='of the images, in pixels')
    parser.add_argument('--dtype', default='float32', help='of the computation')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--only', choices=('forward', 'step'), help='one of the two jobs')
    parser.add_argument('--no-native', action='store_true', help="leave out XLA's own grouped convolutions")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f'{device.device_kind}, {device.platform}, jax {jax.__version__}, {options.dtype}')
    for name in options.nets:
        for what, make in (('forward', flax_forward), ('training step', flax_step)):
            if options.only and not what.endswith(options.only):
                continue
            print(f'\n{name}, {what}, batch {options.batch}, {options.size} px', flush=True)
            contestants = {'flaxnets': compiled(partial(make, name, options))}
            if not options.no_native:
                with mock.patch('flaxnets.layers.conv2d', native_conv2d):
                    contestants['native'] = compiled(partial(make, name, options))
            reference = None if device.platform != 'cpu' else timm_run(name, what, options)
            if reference:
                contestants['timm'] = reference
            report(contestants, options)


def images_of(options: argparse.Namespace) -> np.ndarray[Any, Any]:
    shape = (options.batch, options.size, options.size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def flax_forward(name: str, options: argparse.Namespace) -> Run:
    model = flaxnets.create(name, dtype=options.dtype)
    variables = random_variables(model)
    images = jnp.asarray(images_of(options))
    run = jax.jit(model.apply).lower(variables, images).compile()
    return lambda: jax.block_until_ready(run(variables, images))


def flax_step(name: str, options: argparse.Namespace) -> Run:
    model = flaxnets.create(name, dtype=options.dtype)
    optimizer = optax.sgd(0.1, 0.9, nesterov=True)
    state = create_state(random_variables(model), optimizer)
    batch = {'image': jnp.asarray(images_of(options)), 'label': jnp.zeros(options.batch, jnp.int32)}
    step = make_train_step(model, optimizer, Settings(model=name), Preprocess(), epoch_steps=1)
    run = jax.jit(step).lower(state, batch).compile()
    return lambda: jax.block_until_ready(run(state, batch))


def random_variables(model: Any) -> Any:
    images = jnp.zeros((1, 64, 64, model.in_chans))
    return jax.jit(model.init)(jax.random.key(0), images)


def native_conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def timm_run(name: str, what: str, options: argparse.Namespace) -> Run | None:
    """The same work in timm, or None where it is not installed or has no such net."""
    try:
        sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
        import torchvision_ops

        torchvision_ops.define_missing()
        import timm
        import torch
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    net: Any = timm.create_model(name)
    net = net.to(memory_format=torch.channels_last)
    images = torch.from_numpy(images_of(options).transpose(0, 3, 1, 2)).contiguous(
        memory_format=torch.channels_last
    )
    if what == 'forward':
        net.eval()

        def run() -> Any:
            with torch.inference_mode():
                return net(images)
    else:
        optimizer = torch.optim.SGD(net.train().parameters(), 0.1, 0.9, nesterov=True)
        labels = torch.zeros(options.batch, dtype=torch.long)

        def run() -> Any:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()

    return run


def compiled(make: Callable[[], Run]) -> Run:
    start = time.perf_counter()
    run = make()
    print(f'  compiled in {time.perf_counter() - start:.1f} s', flush=True)
    return run


def report(contestants: dict[str, Run], options: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(options.rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_:  # the first one warms up
                times[name].append(elapsed)
            # A contestant that takes half a minute is measured once: the ratio is plain enough.
            if elapsed > 10 and not times[name]:
                times[name].append(elapsed)
        if round_ == 0:
            contestants = {name: run for name, run in contestants.items() if not times[name]}
    best = {name: min(measured) for name, measured in times.items()}
    for name, seconds in best.items():
        rate, ratio = options.batch / seconds, seconds / best['flaxnets']
        print(f'  {name:10} {1e3 * seconds:9.1f} ms {rate:8.1f} images/s   {ratio:6.2f} x flaxnets')


if __name__ == '__main__':
    main()

"""Times a convolution or pool in several forms, forward and both gradients, to find the fastest.

    python -m benchmarks.layers [--threads 2] [--rounds 5]

The forms take turns in one process. Beside the median milliseconds stand those of the processor (all
threads together): on a busy machine the second tells more. `torch` is channels_last, and its gradients
column counts the backward pass alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from flaxnets.cores import cores

Run = Callable[[], Any]
# Side of the map, input channels, output channels, groups, images. 0 groups: the average pool, stride 2.
SHAPES = [
    (56, 64, 128, 1, 8),
    (56, 32, 64, 1, 8),
    (28, 128, 256, 1, 8),
    (14, 256, 512, 1, 8),
    (14, 128, 256, 1, 8),
    (7, 512, 1024, 1, 8),
    (56, 64, 128, 2, 8),
    (28, 256, 256, 32, 8),
    (14, 512, 512, 32, 8),
    (56, 128, 128, 0, 8),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=cores())
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--maps', type=int, nargs='+', default=[], help='only maps of these sides')
    parser.add_argument('--groups', type=int, nargs='+', default=[], help='only so many groups; 0: pools')
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    print('| map, channels, groups | form | forward ms (processor) | both gradients ms (processor) | error |')
    print('|---|---|---|---|---|')
    for shape in SHAPES:
        side, inputs, outputs, groups, _ = shape
        if side not in (options.maps or [side]) or groups not in (options.groups or [groups]):
            continue
        for name, row in (compare(shape, options) if groups else compare_pools(shape, options)).items():
            print(f'| {side}x{side}, {inputs}->{outputs}, {groups} | {name} | {row} |', flush=True)


def compare(shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, str]:
    side, inputs, outputs, groups, images = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, side, side, inputs)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, inputs // groups, outputs)).astype(np.float32)
    runs, errors = jax_runs(forms(groups), x, kernel)
    conv = partial(import_torch(options.threads).nn.functional.conv2d, padding=1, groups=groups)
    runs['torch'] = torch_runs(conv, x, kernel)
    return timed(runs, errors, options.rounds)


def compare_pools(shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, str]:
    from flaxnets.nets.pooling import avg_pool_3x3

    side, channels, _, _, images = shape
    x = np.random.default_rng(0).normal(size=(images, side, side, channels)).astype(np.float32)
    runs, errors = jax_runs({'flaxnets': partial(avg_pool_3x3, stride=2), 'shifted': shifted_average}, x)
    pool = partial(import_torch(options.threads).nn.functional.avg_pool2d, kernel_size=3, stride=2, padding=1)
    runs['torch'] = torch_runs(pool, x)
    return timed(runs, errors, options.rounds)


def jax_runs(
    functions: dict[str, Callable[..., Any]], *args: Any
) -> tuple[dict[str, tuple[Run, Run]], dict[str, float]]:
    """Forward and gradients of each, and how far its result is from the first one's."""
    import jax

    runs: dict[str, tuple[Run, Run]] = {}
    errors: dict[str, float] = {}
    expected = None
    for name, function in functions.items():
        forward = jax.jit(function)
        out = np.asarray(forward(*args))
        expected = out if expected is None else expected
        errors[name] = float(np.abs(out - expected).max() / np.abs(expected).max())
        # These functions are linear in each argument, so that no result is computed on the way.
        gradient = jax.jit(lambda g, *args, f=function: jax.vjp(f, *args)[1](g))
        runs[name] = (partial(_wait, forward, *args), partial(_wait, gradient, expected, *args))
    return runs, errors


def timed(runs: dict[str, tuple[Run, Run]], errors: dict[str, float], rounds: int) -> dict[str, str]:
    found: dict[str, list[str]] = {name: [] for name in runs}
    for which in (0, 1):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, pair in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                pair[which]()
                spent = (time.perf_counter() - wall, time.process_time() - cpu)
                if i:
                    times[name].append(spent)
        for name, measured in times.items():
            wall, cpu = (1e3 * statistics.median(column) for column in zip(*measured, strict=True))
            found[name].append(f'{wall:.1f} ({cpu:.1f})')
    return {name: ' | '.join([*cells, f'{errors.get(name, 0):.0e}']) for name, cells in found.items()}


def _wait(function: Callable[..., Any], *args: Any) -> None:
    import jax

    jax.block_until_ready(function(*args))


def forms(groups: int) -> dict[str, Callable[..., Any]]:
    from benchmarks.forms import packed, plain, split
    from flaxnets.nets.convolution import conv2d

    geometry: dict[str, Any] = {'padding': 1, 'groups': groups}
    found: dict[str, Callable[..., Any]] = {'flaxnets': partial(conv2d, **geometry)}
    if groups > 4:  # not the plain form: its weight gradient takes seconds
        packs = {f'packs of {n} apart': packed(n, apart=True) for n in (16, 32, 64)}
        return {**found, **{name: partial(form, **geometry) for name, form in packs.items()}}
    found['plain'] = partial(plain, **geometry)
    if groups == 1:
        return {**found, 'patches': patches, 'winograd': winograd}
    return {**found, 'split': partial(split, **geometry)}


def patches(x: Any, kernel: Any) -> Any:
    """Nine shifted copies side by side, and one product."""
    import jax.numpy as jnp

    n, h, w, _ = x.shape
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = jnp.concatenate([wide[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)
    return (rows.reshape(n * h * w, -1) @ kernel.reshape(-1, kernel.shape[-1])).reshape(n, h, w, -1)


def winograd(x: Any, kernel: Any) -> Any:
    """F(2x2, 3x3) of Lavin and Gray, arXiv 1509.09308: sixteen products for each two by two pixels."""
    import jax.numpy as jnp

    to_map = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
    to_kernel = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
    back = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)
    n, h, w, channels = x.shape
    high, wide = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * high + 1 - h), (1, 2 * wide + 1 - w), (0, 0)))
    tiles = [
        [x[:, i : i + 2 * high : 2, j : j + 2 * wide : 2] for j in range(4)] for i in range(4)
    ]  # pixel i, j of every tile
    stacked = jnp.stack([jnp.stack(row) for row in tiles])
    maps = jnp.einsum('ai,bj,ijnhwc->abnhwc', to_map, to_map, stacked)
    kernels = jnp.einsum('ai,bj,ijco->abco', to_kernel, to_kernel, kernel)
    flat = maps.reshape(16, n * high * wide, channels) @ kernels.reshape(16, channels, -1)
    products = flat.reshape(4, 4, n, high, wide, -1)
    out = jnp.einsum('ia,jb,abnhwo->nhiwjo', back, back, products)
    return out.reshape(n, 2 * high, 2 * wide, -1)[:, :h, :w]


def shifted_average(x: Any) -> Any:
    """The 3x3 average pool of stride 2 and padding 1 as the sum of nine shifted maps."""
    import jax.numpy as jnp

    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, h % 2), (1, w % 2), (0, 0)))
    parts = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return sum(parts[1:], parts[0]) / 9


def import_torch(threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return torch


def torch_runs(function: Callable[..., Any], x: Any, kernel: Any = None) -> tuple[Run, Run]:
    import torch

    images = torch.from_numpy(x).permute(0, 3, 1, 2)  # channels last in memory
    args = [images]
    if kernel is not None:
        kernel = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        args.append(kernel.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        grad = function(*args)
    sources = [tensor.clone().requires_grad_() for tensor in args]
    out = function(*sources)

    def forward() -> Any:
        with torch.no_grad():
            return function(*args)

    return forward, lambda: torch.autograd.grad(out, sources, grad, retain_graph=True)


if __name__ == '__main__':
    main()

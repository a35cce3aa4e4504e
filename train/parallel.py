"""Runs steps on all devices of all hosts; the only module that uses `pmap`.

The state has no device axis: a mapped step takes it whole, and what it returns is one array that every
device holds. `pmap` does not check that the devices agree; the step makes it so, and its tests check it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flaxnets.errors import FlaxnetsError
from flaxnets.nets.layers import Span

AXIS = 'batch'
T = TypeVar('T')


class JobError(FlaxnetsError):
    """An error of one process of a job, or a difference between them, that all of them raise."""


def together(work: Callable[[], T], alike: Callable[[T], Any] = lambda result: None) -> T:
    """Returns what `work` returns, once it has succeeded in every process of the job; all must call it.

    An error in one process alone would leave the others waiting for it.

    Args:
      work: does something without the other processes.
      alike: gives the part of a result that must be the same in all processes, in a form for JSON.

    Raises:
      JobError: `work` has failed in one of the processes, or their results are not alike.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    error: Exception | None = None
    digest = b'\0' * 32
    try:
        result = work()
        digest = hashlib.sha256(json.dumps(alike(result), sort_keys=True).encode()).digest()
    except Exception as failure:
        error = failure
    own = np.append(np.frombuffer(digest, np.uint32), np.uint32(error is not None))
    found = multihost_utils.process_allgather(own)
    if isinstance(error, FlaxnetsError):
        raise JobError(str(error)) from error
    if error is not None:
        raise error
    if found[:, -1].any():
        raise JobError(f'process {int(found[:, -1].argmax())} of the job failed; see its message')
    if (found != found[0]).any():
        other = int((found != found[0]).any(1).argmax())
        raise JobError(f'process {other} has other settings or data than process 0; start all with the same')
    return result


def gather(values: list[float]) -> np.ndarray[Any, Any]:
    """A few numbers of each process, [processes, len(values)] float32; all must call it."""
    own = np.array(values, np.float32)
    return own[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(own))


def map_train_step(step: Callable[..., Any], devices: Any = None) -> Any:
    """`step(state, batch) -> (state, metrics)` over all devices; the buffers of the old state are donated."""
    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices)


def map_eval_step(evaluate: Callable[..., Any]) -> Any:
    """`evaluate(variables, batch) -> results` over all devices."""
    return jax.pmap(evaluate, AXIS, in_axes=(None, 0), out_axes=None)


def replicate(tree: Any) -> Any:
    """Host arrays as arrays that every device holds, placed as a mapped step returns them.

    A mapped step that is given host arrays is compiled for these, and again for the arrays that it returned.
    """
    whole = jax.pmap(lambda _, tree: tree, AXIS, in_axes=(0, None), out_axes=None)
    return whole(np.zeros(jax.local_device_count()), tree)


def bn_span(bn_images: int, batch_size: int, accumulation: int, devices: int) -> Span:
    """The BatchNorm span that takes statistics over `bn_images` images, 0 for all that are seen at once.

    Args:
      bn_images: contiguous images of the global batch that share statistics.
      batch_size: images of an update, over all devices.
      accumulation: parts that a device takes its images in, one after the other.
      devices: of all hosts.

    Raises:
      FlaxnetsError: the numbers do not divide each other; the message lists those that would.
    """
    check_batch(batch_size, accumulation, devices)
    local = batch_size // devices // accumulation
    wanted = bn_images or local * devices
    if wanted <= local and local % wanted == 0:
        return Span(parts=local // wanted)
    together, rest = divmod(wanted, local)
    if rest or devices % together:
        fits = [n for n in range(1, local * devices + 1) if local % n == 0 or _fits(n, local, devices)]
        raise FlaxnetsError(
            f'bn_images={bn_images} does not fit: {devices} devices see {local} images each at a time, '
            f'so that it can be {", ".join(map(str, fits[1:]))}'
        )
    if together == devices:
        return Span(AXIS)
    starts = range(0, devices, together)
    return Span(AXIS, tuple(tuple(range(start, start + together)) for start in starts))


def _fits(images: int, local: int, devices: int) -> bool:
    return images % local == 0 and devices % (images // local) == 0


def check_batch(batch_size: int, accumulation: int, devices: int) -> None:
    """Refuses a global batch that the devices cannot share equally.

    Raises:
      FlaxnetsError: they cannot; the message names the nearest sizes that they can share.
    """
    unit = devices * accumulation
    if batch_size % unit:
        below = batch_size // unit * unit
        near = ' or '.join(str(n) for n in (below, below + unit) if n)
        raise FlaxnetsError(
            f'batch_size={batch_size} cannot be shared by {devices} devices in {accumulation} part'
            f'{"s" * (accumulation > 1)} each; {near} can'
        )


def shard(batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Reshapes a host's part of a batch, [N, ...], for its devices: [devices, N / devices, ...]."""
    devices = jax.local_device_count()
    return {key: array.reshape(devices, -1, *array.shape[1:]) for key, array in batch.items()}


def to_host(tree: Any) -> Any:
    """NumPy copies of arrays that every device holds."""
    return jax.tree.map(lambda x: np.array(x.addressable_data(0)) if isinstance(x, jax.Array) else x, tree)

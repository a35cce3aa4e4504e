"""Chooses, within one compiled program, the form of a function that suits the platform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def by_platform(default: Callable[..., Array], **forms: Callable[..., Array]) -> Callable[..., Array]:
    """A function that computes `default`, or the form given for the platform that it is compiled for.

    `jax.checkpoint` makes the backward pass choose the platform anew. Without it, a function inside a jit
    carries the choice of the forward pass over as a value, and its gradient is a conditional on that value.
    XLA resolves this conditional only after it has brought convolutions into the one layout that is fast on
    a CPU, so that those inside miss it and run ten times as slowly. The checkpoint computes nothing twice,
    since the gradients of convolutions and pools need only the arguments.

    Args:
      default: the form for all other platforms.
      **forms: a form for each of some platforms, by JAX's name of it ('cpu', 'tpu').
    """
    return jax.checkpoint(partial(lax.platform_dependent, default=default, **forms), prevent_cse=False)


def on_tpu() -> Array:
    """Whether the program is compiled for a TPU, as a constant of the program."""
    return lax.platform_dependent(tpu=lambda: jnp.array(True), default=lambda: jnp.array(False))

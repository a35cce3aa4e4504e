"""One program with another form of a function on each platform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def by_platform(default: Callable[..., Array], **forms: Callable[..., Array]) -> Callable[..., Array]:
    """A function that has other forms on some platforms, all of which need only their arguments' gradients.

    The checkpoint keeps the choice of platform within the gradient. Without it, where the function stands
    in a jit, the choice made going forward is carried over as a value. The gradient is then a conditional
    on it, which XLA resolves only after it has brought convolutions into the one layout that it runs fast
    on a CPU: those inside miss that and run ten times as slowly. Nothing is computed twice, since gradients
    of convolutions and pools start from the arguments.
    """
    return jax.checkpoint(partial(lax.platform_dependent, default=default, **forms), prevent_cse=False)


def on_tpu() -> Array:
    """Whether the program is lowered for a TPU, a constant in it."""
    return lax.platform_dependent(tpu=lambda: jnp.array(True), default=lambda: jnp.array(False))

"""Chooses, within one compiled program, the form of a function that suits the platform."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from ..onednn import asked_for_onednn

Result = TypeVar('Result')


def by_platform(default: Callable[..., Result], **forms: Callable[..., Result]) -> Callable[..., Result]:
    """A function that computes `default`, or the form given for the platform that it is compiled for.

    `jax.checkpoint` makes the backward pass choose the platform anew. Without it, a function inside a jit
    carries the choice of the forward pass over as a value, and its gradient is a conditional on that value.
    XLA resolves this conditional only after it has brought convolutions into the one layout that is fast on
    a CPU, so that those inside miss it and run ten times as slowly. The gradients of convolutions and pools
    need only the arguments, so that nothing is computed twice; of other functions (`_normalise_and_relu`) XLA
    merges the second time with the first, or computes cheap operations within the gradient.

    Args:
      default: the form for all other platforms.
      **forms: a form for each of some platforms, by JAX's name of it: 'cpu', 'tpu', or 'gpu' for both 'cuda'
        and 'rocm'.
    """
    if 'gpu' in forms:
        forms['cuda'] = forms['rocm'] = forms.pop('gpu')
    return jax.checkpoint(partial(lax.platform_dependent, default=default, **forms), prevent_cse=False)


def on_accelerator() -> Array:
    """Whether the program is compiled for a GPU or TPU, as a constant of the program."""
    return lax.platform_dependent(cpu=lambda: jnp.array(False), default=lambda: jnp.array(True))


def by_onednn(dtype: DTypeLike) -> bool:
    """Whether XLA gives convolutions of that type to oneDNN in programs for CPUs.

    That takes flags in the environment (`onednn.ask_for_onednn`) and a jaxlib that heeds them. Grouped ones
    are among them unless they are of bfloat16.
    """
    dtype = jnp.dtype(dtype)
    groups = 1 if dtype == jnp.bfloat16 else 2
    return asked_for_onednn() and dtype != jnp.float64 and _has_onednn(dtype.name, groups)


@cache
def _has_onednn(dtype: str, groups: int) -> bool:
    """Compiles a small convolution and looks at the program: the flags alone say little."""
    try:
        where = SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
    except RuntimeError:
        return False  # `JAX_PLATFORMS` leaves CPUs out

    def convolve(x: Array, kernel: Array) -> Array:
        order = ('NHWC', 'HWIO', 'NHWC')
        return lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=order, feature_group_count=groups
        )

    shapes = (1, 8, 8, 32), (3, 3, 32 // groups, 32)
    x, kernel = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes)

    def program() -> str:
        return jax.jit(convolve).lower(x, kernel).compile().as_text() or ''

    # In a thread of its own: a mesh that the caller has set, which may have other devices, is its thread's.
    with ThreadPoolExecutor(1) as thread:
        return '__onednn$convolution' in thread.submit(program).result()


@jax.custom_jvp
@jax.jit
def computed_once(x: Array) -> Array:
    """`x` itself. A program for CPUs computes it once and keeps it, however many operations use it.

    XLA computes cheap elementwise operations anew within every operation that uses them. In a chain of
    residual blocks that grows: each sum would be computed from the branches of all blocks before it. It
    drops `lax.optimization_barrier` before it makes these choices, but never looks into a function that it
    was told not to inline. Of derivatives nothing is kept; `linear_once` keeps them.
    """
    return linear_once(x)


computed_once.defjvp(lambda primals, tangents: (computed_once(*primals), *tangents))


def linear_once(x: Array) -> Array:
    """As `computed_once`, and so are its tangents and cotangents."""
    return lax.platform_dependent(x, cpu=_through_a_call, default=_identity)


def computed_again(x: Array) -> Array:
    """`x` itself. On CPUs, XLA does not notice that what is computed from it was computed from `x` before.

    It would keep the first result for the second use. This pays where that is a map and `x` a vector.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=_identity)


@jax.jit
def _identity(x: Array) -> Array:
    return x


def _through_a_call(x: Array) -> Array:
    with set_xla_metadata(inlineable='false'):
        return _identity(x)

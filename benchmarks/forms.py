"""Other forms of the convolutions and pools, for benchmarks of nets that use them instead of the package's.

`in_place_of` exchanges a function in every module of the package that has imported it. The forms are written
out here, so that they do not change when the package's own do. All maps are [N, H, W, C], kernels
[kh, kw, C / groups, O].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array, lax

from flaxnets.nets import layers
from flaxnets.nets.convolution import conv2d
from flaxnets.nets.pooling import avg_pool_3x3, max_pool_3x3

Conv2d = Callable[..., Array]


def plain(
    x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
) -> Array:
    """What `flax.linen.Conv` does: XLA's convolution, `feature_group_count` groups."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def plain_max_pool(x: Array) -> Array:
    """What `flax.linen.max_pool` does, 3x3 with stride 2."""
    window, strides, padding = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def plain_avg_pool(x: Array, stride: int) -> Array:
    """What `flax.linen.avg_pool` does, 3x3 with padding that counts."""
    window, strides, padding = (1, 3, 3, 1), (1, stride, stride, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, 0.0, lax.add, window, strides, padding) / 9


def products(x: Array, kernel: Array, **geometry: int) -> Array:
    """1x1 convolutions as matrix products, all others as the package has them."""
    stride, groups = geometry.get('stride', 1), geometry.get('groups', 1)
    if kernel.shape[:2] != (1, 1) or groups > 1 or geometry.get('padding', 0):
        return conv2d(x, kernel, **geometry)
    x = x[:, ::stride, ::stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def split(x: Array, kernel: Array, **geometry: int) -> Array:
    """Few wide groups, as ResNeSt has, as separate dense convolutions; all others as XLA's."""
    groups = geometry.get('groups', 1)
    if not 1 < groups <= 8 or kernel.shape[:2] == (1, 1):
        return plain(x, kernel, **geometry)
    return _separate(x, kernel, groups, geometry)


def packed(width: int, apart: bool = False) -> Conv2d:
    """Narrow groups joined until they have `width` input channels, their kernels block-diagonal.

    The packs are groups of one convolution; `apart`, each is a dense convolution of its own. All other
    convolutions are as the package has them.
    """

    def convolve(x: Array, kernel: Array, **geometry: int) -> Array:
        groups = geometry.get('groups', 1)
        if groups == 1 or kernel.shape[:2] == (1, 1):
            return conv2d(x, kernel, **geometry)
        together = max(1, min(groups, width // kernel.shape[2]))
        while groups % together:
            together -= 1
        packs = groups // together
        blocks = kernel.reshape(*kernel.shape[:3], packs, together, -1)
        wide = jnp.einsum('hwipgo,gk->hwkipgo', blocks, jnp.eye(together, dtype=kernel.dtype))
        wide = wide.reshape(*kernel.shape[:2], together * kernel.shape[2], -1)
        return (
            _separate(x, wide, packs, geometry) if apart else plain(x, wide, **{**geometry, 'groups': packs})
        )

    return convolve


def _separate(x: Array, kernel: Array, groups: int, geometry: dict[str, int]) -> Array:
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    dense = {**geometry, 'groups': 1}
    return jnp.concatenate([plain(maps, part, **dense) for maps, part in pairs], -1)


def channels_first(x: Array, kernel: Array, **geometry: int) -> Array:
    """XLA's convolution of maps that are [N, C, H, W] before and after."""
    stride, padding = geometry.get('stride', 1), geometry.get('padding', 0)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=('NCHW', 'HWIO', 'NCHW'),
        feature_group_count=geometry.get('groups', 1),
    )


def padded(multiple: int) -> Conv2d:
    """Dense, the channels of map, kernel and result filled up with zeros to a multiple; those are cut off."""

    def convolve(x: Array, kernel: Array, **geometry: int) -> Array:
        outputs = kernel.shape[3]
        more, wider = -kernel.shape[2] % multiple, -outputs % multiple
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, wider)))
        return plain(x, kernel, **geometry)[..., :outputs]

    return convolve


# In place of the package's own in whole nets.
FORMS: dict[str, Conv2d] = {
    'plain': plain,
    'products': products,
    **{f'packed{n}': packed(n) for n in (16, 32, 64, 128)},
}
# Of a convolution by itself.
LAYER_FORMS: dict[str, Conv2d] = {
    'flaxnets': conv2d,
    'plain': plain,
    'products': products,
    'split': split,
    **{f'packs of {n}': packed(n) for n in (8, 16, 32, 64, 128)},
    **{f'packs of {n} apart': packed(n, apart=True) for n in (32, 64, 128)},
    **{f'padded to {n}': padded(n) for n in (8, 16, 32, 64)},
    'channels first': channels_first,
}


@contextmanager
def form(name: str) -> Iterator[None]:
    """Nets traced within have that form of convolution; '' is the package's own.

    'plain' has the plain pools too, and maps that are normalised whole, as a net of Flax's layers has them.
    """
    with ExitStack() as stack:
        # Functions of the package that were traced in one form are not used in the other.
        jax.clear_caches()
        stack.callback(jax.clear_caches)
        if name:
            stack.enter_context(in_place_of(conv2d, FORMS[name]))
        if name == 'plain':
            stack.enter_context(in_place_of(max_pool_3x3, plain_max_pool))
            stack.enter_context(in_place_of(avg_pool_3x3, plain_avg_pool))
            stack.enter_context(mock.patch.object(layers, 'by_platform', lambda default, **forms: default))
        yield


@contextmanager
def in_place_of(function: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """`other` wherever a module of the package has imported `function`."""
    package = function.__module__.partition('.')[0]
    modules = [m for name, m in list(sys.modules.items()) if name.partition('.')[0] == package]
    places = [(m, name) for m in modules for name, value in list(vars(m).items()) if value is function]
    if len(places) < 2:  # where it is defined, and where it is used
        raise RuntimeError(f'nothing in {package} imports {function.__name__} any more')
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, other))
        yield

"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), on the device.

As in the ResNeSt and Gluon recipes, the images of a group share one ratio, drawn from Beta(alpha, alpha) and
used as it is, whether it is above or below 1/2. The first image of a group is mixed with the last, the second
with the last but one, and so on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


def mix(
    images: Float[Array, 'n h w c'],
    targets: Float[Array, 'n classes'],
    keys: Key[Array, ' groups'],
    *,
    mixup: float,
    cutmix: float,
    on: Bool[Array, ''] | bool = True,
) -> tuple[Float[Array, 'n h w c'], Float[Array, 'n classes']]:
    """Mixes each image and its target with its partner's.

    Args:
      images: normalised.
      targets: probabilities.
      keys: a random key for each group; a group has n / groups images.
      mixup, cutmix: alpha of the Beta distribution, 0 for none; with both, a group takes either by chance.
      on: False leaves everything as it is; it may be a traced value.

    Returns:
      Images and targets of the same shapes.
    """

    def one(
        images: Float[Array, 'm h w c'], targets: Float[Array, 'm classes'], key: Key[Array, '']
    ) -> tuple[Float[Array, 'm h w c'], Float[Array, 'm classes']]:
        choice, up_key, cut_key, box_key = jax.random.split(key, 4)
        use_cutmix = jax.random.bernoulli(choice) if mixup and cutmix else bool(cutmix)
        share = jnp.ones(())
        mask = jnp.ones(images.shape[1:3])  # what an image keeps of itself, pixel by pixel
        if mixup:
            share = jax.random.beta(up_key, mixup, mixup)
            mask = mask * share
        if cutmix:
            cut = _box(box_key, jax.random.beta(cut_key, cutmix, cutmix), (images.shape[1], images.shape[2]))
            mask = jnp.where(use_cutmix, cut, mask)
            share = jnp.where(use_cutmix, cut.mean(), share)
        mask = jnp.where(on, mask, 1.0).astype(images.dtype)[None, :, :, None]
        share = jnp.where(on, share, 1.0).astype(targets.dtype)
        mixed = mask * images + (1 - mask) * images[::-1]
        return mixed, share * targets + (1 - share) * targets[::-1]

    def grouped(x: Float[Array, 'n ...']) -> Float[Array, 'groups m ...']:
        return x.reshape(keys.shape[0], -1, *x.shape[1:])

    mixed, both = jax.vmap(one)(grouped(images), grouped(targets), keys)
    return mixed.reshape(images.shape), both.reshape(targets.shape)


def _box(key: Key[Array, ''], share: Float[Array, ''], size: tuple[int, int]) -> Float[Array, 'h w']:
    """A mask: 0 in a box around a random pixel, else 1. Uncut by a border, the box has 1 - share of all."""
    centres = jax.random.uniform(key, (2,))
    inside = []
    for centre, length in zip(centres, size, strict=True):
        half = length * jnp.sqrt(1 - share) / 2
        middle = jnp.floor(centre * length)
        position = jnp.arange(length, dtype=share.dtype)
        inside.append((position >= jnp.floor(middle - half)) & (position < jnp.floor(middle + half)))
    return 1.0 - (inside[0][:, None] & inside[1][None]).astype(share.dtype)

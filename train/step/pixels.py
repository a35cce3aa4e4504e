"""Turns bytes into a net's input, on the device: mirrors, adds colour noise, normalises, erases.

The host sends bytes, and the device does the rest, since the host's cores are scarce. Each image has random
numbers of its own, so that what happens to it does not depend on how many devices there are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from flaxnets.images.preprocess import Preprocess

# Principal components of ImageNet's colours, of values in 0..1 (Krizhevsky et al., 2012; the numbers are
# those of fb.resnet.torch, which the ResNeSt authors and MXNet use too).
COLOUR_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
COLOUR_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)
ERASED_AREA = (0.02, 0.4)  # share of the image; Zhong et al., arXiv 1708.04896, section 4.1
ERASED_RATIO = 0.3  # height over width in ERASED_RATIO..1 / ERASED_RATIO


def normalise(
    images: UInt8[Array, 'n h w c'] | Float[Array, 'n h w c'], preprocess: Preprocess
) -> Float[Array, 'n h w c']:
    """What `flaxnets.transform` does after it has resized and cropped, on the device.

    Args:
      images: bytes, colours as RGB; floating-point images are taken as normalised already.
      preprocess: mean, std and channel order of the net.

    Returns:
      The net's input, channels in its order.

    Raises:
      FlaxnetsError: the mean or the std is for another number of channels.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    mean, std = np.array(preprocess.channel_values(images.shape[-1]), np.float32)[:, None, None, None]
    if preprocess.channel_order == 'bgr':
        images = images[..., ::-1]
    return (images.astype(jnp.float32) / 255 - mean) / std


def augment(
    images: UInt8[Array, 'n h w c'],
    keys: Key[Array, ' n'],
    preprocess: Preprocess,
    *,
    flip: float = 0.0,
    lighting: float = 0.0,
    erasing: float = 0.0,
) -> Float[Array, 'n h w c']:
    """Normalises images (`normalise`) and augments each at random, for training.

    Args:
      images: bytes, colours as RGB.
      keys: a random key for each image.
      preprocess: mean, std and channel order of the net.
      flip: probability of a mirrored image.
      lighting: standard deviation of the noise along the principal components of colour; none for grey.
      erasing: probability that a rectangle becomes normal noise.

    Returns:
      The net's input.
    """

    def one(image: UInt8[Array, 'h w c'], key: Key[Array, '']) -> Float[Array, 'h w c']:
        flip_key, light_key, erase_key = jax.random.split(key, 3)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key, flip), image[:, ::-1], image)
        x = normalise(image[None], preprocess)[0]
        if lighting and x.shape[-1] == 3:
            alpha = lighting * jax.random.normal(light_key, (3,))
            light = COLOUR_EIGENVECTORS @ (alpha * COLOUR_EIGENVALUES)
            light = light[::-1] if preprocess.channel_order == 'bgr' else light
            x = x + (light / np.array(preprocess.channel_values(3)[1], np.float32))[None, None]
        return _erase(x, erase_key, erasing) if erasing else x

    return jax.vmap(one)(images, keys)


def _erase(image: Float[Array, 'h w c'], key: Key[Array, ''], probability: float) -> Float[Array, 'h w c']:
    """The image, perhaps with normal noise in a rectangle that lies inside it."""
    height, width, _ = image.shape
    whether, area_key, ratio_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    area = height * width * jax.random.uniform(area_key, minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    limit = -np.log(ERASED_RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-limit, maxval=limit))
    h = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, height)
    w = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, width)
    inside = _between(top_key, h, height)[:, None] & _between(left_key, w, width)[None]
    erased = jax.random.bernoulli(whether, probability) & inside
    return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape), image)


def _between(key: Key[Array, ''], length: Float[Array, ''], size: int) -> Bool[Array, ' {size}']:
    """True in an interval of `length` positions at a random place."""
    start = jnp.floor(jax.random.uniform(key) * (size - length + 1))
    position = jnp.arange(size, dtype=length.dtype)
    return (position >= start) & (position < start + length)

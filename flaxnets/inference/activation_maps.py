"""Class activation maps: which parts of an image raise the score of a class.

`map_pictures.py` draws them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ..errors import FlaxnetsError
from ..nets.resnet import ResNet

_Maps = Float[Array, 'n h w c']
_Map = Float[Array, 'n h w']

EPSILON = 1e-6  # keeps denominators above 0; the value is that of the package grad-cam


def _grad_cam(maps: _Maps, grads: _Maps) -> _Map:
    return (maps * grads.mean((1, 2), keepdims=True)).sum(-1)


def _grad_cam_plus_plus(maps: _Maps, grads: _Maps) -> _Map:
    squares = grads**2
    alpha = squares / (2 * squares + maps.sum((1, 2), keepdims=True) * squares * grads + EPSILON)
    weights = (jnp.maximum(grads, 0) * jnp.where(grads != 0, alpha, 0)).sum((1, 2), keepdims=True)
    return (maps * weights).sum(-1)


def _hires_cam(maps: _Maps, grads: _Maps) -> _Map:
    return (maps * grads).sum(-1)


def _layer_cam(maps: _Maps, grads: _Maps) -> _Map:
    return (maps * jnp.maximum(grads, 0)).sum(-1)


def _eigen_cam(maps: _Maps, grads: _Maps) -> _Map:
    n, h, w, c = maps.shape
    rows = maps.reshape(n, h * w, c)
    rows = rows - rows.mean(1, keepdims=True)
    # The first principal component comes from the products of pixels, [N, h * w, h * w], or of channels,
    # [N, c, c], whichever is smaller: the stem's map has more than ten thousand pixels.
    if h * w <= c:
        _, vectors = jnp.linalg.eigh(rows @ rows.swapaxes(1, 2))
        found = vectors[..., -1]
    else:
        _, vectors = jnp.linalg.eigh(rows.swapaxes(1, 2) @ rows)
        found = (rows @ vectors[..., -1:])[..., 0]
        found = found / jnp.maximum(jnp.linalg.norm(found, axis=1, keepdims=True), EPSILON)
    # Its sign is arbitrary: the value of largest magnitude is made positive.
    low, high = found.min(1, keepdims=True), found.max(1, keepdims=True)
    return jnp.where(-low > high, -found, found).reshape(n, h, w)


METHODS: dict[str, Callable[[_Maps, _Maps], _Map]] = {
    'gradcam': _grad_cam,
    'gradcam++': _grad_cam_plus_plus,
    'hirescam': _hires_cam,
    'layercam': _layer_cam,
    'eigencam': _eigen_cam,
}


def class_activation_map(
    model: ResNet,
    variables: Any,
    images: Float[np.ndarray, 'n height width c'] | Float[Array, 'n height width c'],
    classes: Sequence[int] | Any | None = None,
    *,
    method: str = 'gradcam',
    stage: int = 4,
) -> tuple[Float32[Array, 'n height width'], Int[Array, ' n']]:
    """Computes which parts of images raise the score of a class.

        maps, classes = class_activation_map(model, variables, transform('cat.jpg')[None])

    Args:
      model: a net with a classifier.
      variables: its variables.
      images: prepared as the net expects them.
      classes: the class to explain for each image, by the number of its output; None takes the most
        probable one.
      method: 'gradcam' (Selvaraju et al., arXiv 1610.02391), 'gradcam++' (Chattopadhyay et al., arXiv
        1710.11063), 'hirescam' (Draelos and Carin, arXiv 2011.08891), 'layercam' (Jiang et al., 2021) or
        'eigencam' (Muhammad and Yeasin, arXiv 2008.00299: the first principal component of the channels,
        whatever the class; its sign is arbitrary, and the value of largest magnitude is made positive).
      stage: the part of the net whose output is explained: 0 is the stem, 1 to 4 are the stages. Late stages
        tell classes apart better, early ones have finer maps.

    Returns:
      The maps, from 0 to 1, resized to the images (bilinear); a map is all 0 if no part raises the score.
      And the class that each explains. The numbers equal those of the package grad-cam.

    Raises:
      FlaxnetsError: the net has no classifier; an unknown method, stage or class; the stage's map has only
        one pixel.
    """
    _check(model, classes, len(images), method, stage)
    asked = jnp.full(len(images), -1) if classes is None else jnp.asarray(classes, jnp.int32)
    maps, grads, chosen = _maps_and_grads(model, stage, variables, jnp.asarray(images), asked)
    if maps.shape[1] * maps.shape[2] == 1:
        raise FlaxnetsError(
            f'for images of {images.shape[1]} x {images.shape[2]} the map of stage {stage} has one pixel, '
            'which tells no places apart: choose a stage before it'
        )
    return _as_images(METHODS[method](maps, grads), (images.shape[1], images.shape[2])), chosen


def _check(model: ResNet, classes: Any, count: int, method: str, stage: int) -> None:
    problems = []
    if not model.num_classes or model.features_only:
        problems.append('the net has no classifier, so there are no classes to explain')
    if method not in METHODS:
        problems.append(f'method={method!r} is not one of {", ".join(METHODS)}')
    if stage not in range(5):
        problems.append(f'stage={stage!r} is not one of 0 (the stem), 1, 2, 3, 4')
    if classes is not None:
        numbers = [int(number) for number in classes]
        if len(numbers) != count:
            problems.append(f'{len(numbers)} classes are given for {count} images')
        strange = [number for number in numbers if not 0 <= number < model.num_classes]
        if strange and model.num_classes:
            problems.append(f'class {strange[0]} is none of the {model.num_classes} outputs, 0 and up')
    if problems:
        raise FlaxnetsError('; '.join(problems))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _maps_and_grads(
    model: ResNet,
    stage: int,
    variables: Any,
    images: Float[Array, 'n height width channels'],
    asked: Int[Array, ' n'],
) -> tuple[Float32[Array, 'n h w c'], Float32[Array, 'n h w c'], Int[Array, ' n']]:
    """The stage's maps, the gradients of each image's class score with respect to them, and the classes.

    `asked` has a class for each image, or -1 for the most probable one.
    """
    found: Any = model.apply(variables, images, upto=stage, method='forward_maps')

    def scores(maps: _Maps) -> tuple[Float[Array, ''], Int[Array, ' n']]:
        logits: Any = model.apply(variables, maps, stage, method='forward_from')
        chosen = jnp.where(asked < 0, logits.argmax(-1), asked)
        return jnp.take_along_axis(logits, chosen[:, None], 1).sum(), chosen

    grads, chosen = jax.grad(scores, has_aux=True)(found[-1])
    return found[-1].astype(jnp.float32), grads.astype(jnp.float32), chosen


def _as_images(found: _Map, size: tuple[int, int]) -> Float[Array, 'n {size[0]} {size[1]}']:
    """The positive part of maps, scaled to 0..1 and resized to the images."""
    positive = _scaled(jnp.maximum(found, 0))
    # Scaled before resizing, as in grad-cam, and after it, since resizing can lower the maximum.
    return _scaled(jax.image.resize(positive, (len(found), *size), 'linear', antialias=False))


def _scaled(maps: _Map) -> _Map:
    """Each map scaled to 0..1."""
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))

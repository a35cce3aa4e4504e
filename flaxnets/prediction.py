"""Classification of image files: what `python -m flaxnets predict` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .api import load_with_config, transform
from .errors import FlaxnetsError
from .zoo.classes import output_names


def predict(
    images: Sequence[str | os.PathLike[str]],
    source: str | os.PathLike[str],
    *,
    arch: str | None = None,
    topk: int = 5,
    classes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The most probable classes of each image.

    Args:
      images: image files.
      source: a directory of weights or a `.pth` file.
      arch: name of the net, for a `.pth` file whose name does not tell.
      topk: how many classes to give.
      classes: what the outputs are called, in their order, in place of what the weights say
        (`flaxnets.zoo.classes.output_names`).

    Returns:
      For each image {'image': path, 'top': [{'class': name, 'index': i, 'probability': p}, ...],
      'named_by': words}, the most probable class first; probabilities are between 0 and 1. 'named_by' says
      where the names are from.

    Raises:
      FlaxnetsError: unusable weights or images, or weights without a classifier.
    """
    if topk < 1:
        raise FlaxnetsError(f'--topk {topk}: must be at least 1')
    config, net, variables = load_with_config(source, model=arch)
    if config.num_classes == 0:
        raise FlaxnetsError(f'{source}: these weights have no classifier, so there are no classes to show')
    to_input = transform(config)
    names, named_by = output_names(config, classes)

    @jax.jit
    def probabilities(variables: Any, image: jax.Array) -> jax.Array:
        return jax.nn.softmax(net.apply(variables, image[None])[0])

    results = []
    for image in images:
        found = np.asarray(probabilities(variables, to_input(image)))
        best = np.argsort(-found, kind='stable')[:topk]
        top = [{'class': names[i], 'index': int(i), 'probability': float(found[i])} for i in best]
        results.append({'image': os.fspath(image), 'top': top, 'named_by': named_by})
    return results

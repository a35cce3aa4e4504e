"""Classifies images (`flaxnets predict`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ..api import load_with_config, transform
from ..errors import FlaxnetsError
from ..images.listing import ImageFile, find_images
from ..zoo.classes import output_names
from .batches import BATCH, mapped


@dataclass(frozen=True)
class Guess:
    """One class that an image may have.

    Attributes:
      name: the class's name.
      index: the number of its output.
      probability: between 0 and 1.
    """

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
      image: the name of the image.
      top: the most probable classes, most probable first; empty if the image cannot be read.
      problem: why the image cannot be read; None if it can.
    """

    image: str
    top: tuple[Guess, ...] = ()
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        top = [{'class': g.name, 'index': g.index, 'probability': g.probability} for g in self.top]
        return {'image': self.image, 'top': top} | ({'error': self.problem} if self.problem else {})


class Classifier:
    """Classifies image files with a net.

        classify = Classifier('weights/resnest50d')
        for prediction in classify(find_images(['photos'])):
            print(prediction.image, prediction.top[0].name)

    Args:
      source: anything that `flaxnets.load` opens.
      arch: name of the net, where the tensors of a file leave a choice.
      classes: names of the outputs, in their order, in place of those that the weights have
        (`flaxnets.zoo.classes.output_names`).

    Attributes:
      preprocess: how images are prepared.
      names: names of the outputs, in their order.
      named_by: where these names come from, in words.

    Raises:
      FlaxnetsError: unusable weights, or weights without a classifier.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        arch: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        config, self._net, self._variables = load_with_config(source, model=arch)
        if config.num_classes == 0:
            raise FlaxnetsError(
                f'{source}: these weights have no classifier, so there are no classes to show'
            )
        self._transform = transform(config)
        self.preprocess = config.preprocess
        self.names, self.named_by = output_names(config, classes)

    def __call__(
        self, files: Sequence[ImageFile], *, topk: int = 5, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """The most probable classes of each image, in the order of the files.

        Args:
          files: the images (`flaxnets.images.listing.find_images`).
          topk: how many classes to give for each image.
          batch: images per device.

        Raises:
          FlaxnetsError: `topk` or `batch` is not a positive number.
        """
        if topk < 1:
            raise FlaxnetsError(f'topk={topk!r} must be at least 1')

        def probabilities(variables: Any, images: Float[Array, 'n h w c']) -> Float[Array, 'n classes']:
            logits: Any = self._net.apply(variables, images)
            return jax.nn.softmax(logits)

        for result in mapped(probabilities, self._variables, self._transform, files, batch=batch):
            if result.value is None:
                yield Prediction(result.file.name, problem=result.problem)
            else:
                yield Prediction(result.file.name, self._top(result.value, topk))

    def _top(self, found: Float[np.ndarray, ' classes'], topk: int) -> tuple[Guess, ...]:
        best = np.argsort(-found, kind='stable')[:topk]
        return tuple(Guess(self.names[i], int(i), float(found[i])) for i in best)


def predict(
    images: Sequence[str | os.PathLike[str]], source: str | os.PathLike[str], **options: Any
) -> list[Prediction]:
    """Classifies images and returns all predictions at once; `Classifier` gives them one by one.

    Args:
      images: paths, as `flaxnets.images.listing.find_images` takes them.
      source: anything that `flaxnets.load` opens.
      **options: `topk` and `batch`, and the options of `Classifier`.

    Returns:
      A prediction for each image. For an image that cannot be read it has a `problem`.

    Raises:
      FlaxnetsError: unusable weights, no images, bad values.
    """
    call = {name: options.pop(name) for name in ('topk', 'batch') if name in options}
    return list(Classifier(source, **options)(find_images(images), **call))

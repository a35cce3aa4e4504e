"""The description inside an exported file, for use without flaxnets. JAX is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FlaxnetsError
from ..images.preprocess import Preprocess
from ..zoo.classes import output_names
from ..zoo.records import Config, to_json

FREE = 'free'  # the program takes images of any size
BATCH, HEIGHT, WIDTH = 'batch', 'height', 'width'
Size = int | tuple[int, int] | str | None
Dimension = int | str  # a number, or a name if any number is taken


@dataclass(frozen=True)
class Description:
    """Describes the input and output of an exported net.

    Attributes:
      config: describes the weights; its preprocessing has the size of the program's images.
      height, width: size of the images in pixels, or 'height' and 'width' if any size is taken.
      names: names of the outputs, in their order; empty without a classifier.
      named_by: where these names come from, in words.
      notes: messages for the user.
    """

    config: Config
    height: Dimension
    width: Dimension
    names: tuple[str, ...]
    named_by: str
    notes: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """Name of the output: 'logits', or 'features' without a classifier."""
        return 'logits' if self.config.num_classes else 'features'

    def as_json(self, shape: Sequence[Dimension], layout: str, outputs: int, **more: Any) -> dict[str, Any]:
        """The description as the file holds it. The class names come last, since they are long.

        Args:
          shape: shape of the images.
          layout: what each dimension of it is, such as 'NHWC'.
          outputs: number of outputs for an image.
          **more: further entries.
        """
        config = self.config
        weights = config.weights
        return {
            'architecture': config.name,
            'weights': weights.name if weights else None,
            'licence': weights.licence if weights else None,
            'input': {'name': 'images', 'shape': list(shape), 'layout': layout, 'dtype': 'float32'},
            'output': {'name': self.output, 'shape': [BATCH, outputs], 'dtype': 'float32'},
            'preprocess': _preprocess(config),
            **more,
            'named_by': self.named_by,
            'classes': list(self.names),
        }


def describe(config: Config, size: Size, classes: Sequence[str] | None) -> Description:
    """Makes the description of a net to be exported.

    Args:
      config: describes the weights.
      size: size of the images in pixels: one side of a square, (height, width), 'free' for any, or None for
        the size that the weights expect.
      classes: names of the outputs, in place of those that the weights have.

    Raises:
      FlaxnetsError: no such size; more or fewer names than outputs.
    """
    preprocess = config.preprocess
    if isinstance(size, str) and size != FREE:
        raise FlaxnetsError(f'size={size!r} must be a number of pixels, (height, width) or {FREE!r}')
    if size is not None and not isinstance(size, str):
        preprocess = replace(preprocess, size=size)
    height, width = (HEIGHT, WIDTH) if size == FREE else (preprocess.height, preprocess.width)
    config = replace(config, preprocess=preprocess)
    said = _preprocess(config)
    notes = tuple(f'images: {problem}' for problem in (*said['unsupported'], *preprocess.approximations))
    if not config.num_classes:
        return Description(config, height, width, (), 'nothing: these are features', notes)
    names, named_by = output_names(config, classes)
    return Description(config, height, width, names, named_by, notes)


def _preprocess(config: Config) -> dict[str, Any]:
    """The preprocessing as JSON, with a mean and std for each channel; `unsupported` says what is missing."""
    preprocess: Preprocess = config.preprocess
    said: dict[str, Any] = to_json(preprocess)
    said['size'] = [preprocess.height, preprocess.width]
    said['unsupported'] = list(preprocess.unsupported)
    try:
        said['mean'], said['std'] = map(list, preprocess.channel_values(config.in_chans))
    except FlaxnetsError as error:
        if not preprocess.unsupported:
            said['unsupported'] = [str(error)]
    return {**said, 'in_words': str(preprocess)}

"""`Checkpoint`: weights from any source, in the one form that the rest of the converter works on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flaxnets.errors import CheckpointError
from flaxnets.nets.resnet import ResNet, build
from flaxnets.store import weights
from flaxnets.zoo.records import Config

from .names.tree import to_variables


@dataclass(frozen=True)
class Checkpoint:
    """Weights from any source.

    Attributes:
      config: the net, how its images are prepared, its classes, and which published weights they are, if any.
      state: timm's name -> tensor in PyTorch's order of axes, with BatchNorm's counters; views of the file.
      source: where the weights came from, for the certificate.
      where: the path, or what else messages call it.
    """

    config: Config
    state: dict[str, np.ndarray]
    source: weights.Source
    where: str

    def noted(self, note: str) -> weights.Source:
        """The source with one more note."""
        return replace(self.source, notes=(*self.source.notes, note))

    @cached_property
    def variables(self) -> weights.Variables:
        """The Flax variables, as views with the dtypes of the state.

        Raises:
          CheckpointError: names every missing, unexpected, wrong-shaped, non-floating and non-finite tensor.
        """
        try:
            return to_variables(self.state, net_of(self.config))
        except CheckpointError as error:
            raise CheckpointError(f'{self.where} as {self.config.name}: {error}') from None


def net_of(config: Config) -> ResNet:
    """The net that takes these weights as they are stored, with or without BatchNorm."""
    return build(config.arch, config.num_classes, config.in_chans, folded=config.folded)

"""The batches of an evaluation, for the devices of this host."""

from __future__ import annotations

from collections.abc import Generator

import jax

from flaxnets.zoo.records import Config

from ..data.augment import eval_transform
from ..data.batches import Batch, eval_batches, workers_for
from ..data.sources import Source


def device_batches(
    source: Source, config: Config, *, images: int, feed: str, workers: int, crops: int = 1
) -> Generator[Batch]:
    """This host's part of each batch of an evaluation, of `images` for each device.

    Args:
      source: the images.
      config: of the weights: how images are prepared, and their channels.
      images: how many a device takes at a time.
      feed, workers: as `train.data.batches.workers_for` takes them.
      crops: as `train.data.augment.eval_transform` takes it.
    """
    return eval_batches(
        source,
        eval_transform(config.preprocess, config.in_chans, crops=crops),
        batch_size=images * jax.device_count(),
        in_chans=config.in_chans,
        host=jax.process_index(),
        hosts=jax.process_count(),
        **workers_for(feed, workers, len(source)),
    )

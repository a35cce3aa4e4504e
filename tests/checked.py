"""Which annotations are checked while tests run, and how: `conftest.py` applies it to modules on import."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# Shapes and types in the annotations of these modules are checked at every call. `train.step.state` is left
# out: JAX fills its trees with other things than arrays.
CHECKED = [
    'flaxnets.inference.activation_maps',
    'flaxnets.inference.batches',
    'flaxnets.inference.features',
    'flaxnets.inference.map_pictures',
    'flaxnets.inference.prediction',
    'flaxnets.nets.blocks',
    'flaxnets.nets.convolution',
    'flaxnets.nets.layers',
    'flaxnets.nets.pooling',
    'flaxnets.nets.resnet',
    'train.evaluation.metrics',
    'train.evaluation.pictures',
    'train.step.mixing',
    'train.step.pixels',
    'train.step.step',
]

# An int is a float, as for mypy.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

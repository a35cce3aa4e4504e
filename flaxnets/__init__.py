"""Res2Net, Res2NeXt, ResNeXt and ResNeSt in JAX, equal to PyTorch's.

model = flaxnets.create('resnest101e')
model, variables = flaxnets.load('path/to/converted')
images = flaxnets.transform('resnest101e')('photo.jpg')[None]
"""

from flaxnets.errors import CheckpointError, FlaxnetsError, ImageError
from flaxnets.load import config, create, load, transform
from flaxnets.version import VERSION as __version__
from flaxnets.zoo import list_models

__all__ = [
    'CheckpointError',
    'FlaxnetsError',
    'ImageError',
    '__version__',
    'config',
    'create',
    'list_models',
    'load',
    'transform',
]

"""Res2Net, Res2NeXt, ResNeXt and ResNeSt in JAX, equal to PyTorch's.

model = flaxnets.create('resnest101e')
model, variables = flaxnets.load('path/to/converted')
images = flaxnets.transform('resnest101e')('photo.jpg')[None]
"""

from .api import config, create, load, transform
from .errors import CheckpointError, FlaxnetsError, ImageError
from .exporting.files import export
from .images.preprocess import Preprocess
from .nets.arch import Arch
from .nets.resnet import ResNet
from .version import VERSION as __version__
from .zoo import list_models
from .zoo.records import Config

__all__ = [
    'Arch',
    'CheckpointError',
    'Config',
    'FlaxnetsError',
    'ImageError',
    'Preprocess',
    'ResNet',
    '__version__',
    'config',
    'create',
    'export',
    'list_models',
    'load',
    'transform',
]

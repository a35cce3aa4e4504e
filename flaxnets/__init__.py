"""Res2Net, Res2NeXt, ResNeXt and ResNeSt in JAX, equal to PyTorch's.

model = flaxnets.create('resnest101e')
model, variables = flaxnets.load('path/to/converted')
images = flaxnets.transform('resnest101e')('photo.jpg')[None]

JAX is imported only when a name that needs it is used. `flaxnets list` therefore answers at once, and the
processes that decode images stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    'Arch': 'nets.arch',
    'CheckpointError': 'errors',
    'Config': 'zoo.records',
    'FlaxnetsError': 'errors',
    'ImageError': 'errors',
    'Preprocess': 'images.preprocess',
    'ResNet': 'nets.resnet',
    '__version__': 'version',
    'config': 'api',
    'create': 'api',
    'export': 'exporting.files',
    'list_models': 'zoo',
    'load': 'api',
    'transform': 'api',
}
_ROOMS = ('api', 'errors', 'exporting', 'images', 'inference', 'nets', 'store', 'version', 'words', 'zoo')


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        module = importlib.import_module(f'.{_MODULES[name]}', __name__)
        value = module.VERSION if name == '__version__' else getattr(module, name)
        globals()[name] = value
        return value
    if name in _ROOMS:  # so that `flaxnets.zoo` works after `import flaxnets` alone
        return importlib.import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

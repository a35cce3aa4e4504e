"""Trains the nets, and resumes runs that were stopped.

    from train import Settings, train

    outcome = train(Settings('resnest50d', weights='resnest50d', data='folder:flowers'), 'runs/flowers')

JAX is imported only when one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop import Outcome, train
    from .settings import Settings

__all__ = ['Outcome', 'Settings', 'train']

_MODULES = {'Outcome': '.loop', 'Settings': '.settings', 'train': '.loop'}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

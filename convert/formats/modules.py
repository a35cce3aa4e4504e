"""Reads the tensors of a whole model that `torch.save(net)` pickled, as `net.state_dict()` would give them.

A module's state is plain data: its parameters, its buffers, and the modules in it by name. The module's own
code is neither needed nor run. What its layers compute is judged by `convert.names.whole_models`, from the
classes and settings that are kept here.

Reference: `torch.nn.Module.state_dict` and `_save_to_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flaxnets.errors import CheckpointError

from .pickles import Placeholder

# The most tensors and layers in a file's models, shared ones counted at each use: a detector has 2,000.
MOST = 100_000
_DEPTH = 64
_OUTER = 2  # levels of modules whose attributes are kept: the model's own, and of those directly in it
# What a layer that normalises images keeps, as a buffer or as a plain attribute.
_STATISTIC = re.compile(r'(?!running_)(?:\w*_)?(?:mean|std)')


@dataclass(frozen=True)
class Layer:
    """One module of a pickled model.

    Attributes:
      made_by: its class and the Python module that has it: 'torch.nn.modules.conv.Conv2d'.
      settings: its attributes, as the pickle gives them; objects among them are placeholders.
      has_tensors: whether it has tensors of its own.
      has_layers: whether there are modules in it.
    """

    made_by: str
    settings: Mapping[Any, Any]
    has_tensors: bool
    has_layers: bool

    @property
    def kind(self) -> str:
        """The name of its class alone: 'Conv2d'."""
        return self.made_by.rpartition('.')[2]


class ModuleState(dict[str, Any]):
    """A pickled module's tensors by name.

    Attributes:
      kind: the class of the module.
      layers: all modules in it by name, and itself as ''.
      attributes: what else was set on the module or, where it only wraps another, on that.
      statistics: by name, what its layers keep under names such as `mean` and `pixel_std`.
    """

    kind: str
    layers: dict[str, Layer]
    attributes: dict[str, Any]
    statistics: dict[str, Any]

    @property
    def kinds(self) -> dict[str, str]:
        """Layer name -> `Layer.made_by`, for all layers."""
        return {name: layer.made_by for name, layer in self.layers.items()}

    @property
    def bare(self) -> dict[str, str]:
        """Layer name -> `Layer.kind`, for layers without tensors."""
        return {
            name: layer.kind
            for name, layer in self.layers.items()
            if name and not layer.has_tensors and not layer.has_layers
        }


def is_module(value: object) -> bool:
    """Whether a placeholder is a pickled `torch.nn.Module`."""
    state = value.state if isinstance(value, Placeholder) else None
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ('_parameters', '_buffers', '_modules')
    )


def module_state(module: Placeholder, spend: Callable[[int], None]) -> ModuleState:
    """What `state_dict()` would give for a pickled module (`is_module`); its values are not checked yet.

    Args:
      module: the module.
      spend: called with a number of layers and tensors before they are listed; raises if a file has too
        many. Modules may be shared, so that a small file can stand for very many.

    Raises:
      CheckpointError: modules are nested too deep.
    """
    state = ModuleState()
    state.kind = module.name
    state.layers, state.attributes, state.statistics = {}, {}, {}
    for name, inner in _walk(module):
        settings: Any = inner.state
        spend(1 + len(settings['_parameters']) + len(settings['_buffers']) + len(settings['_modules']))
        prefix = f'{name}.' if name else ''
        plain = {key: v for key, v in settings.items() if isinstance(key, str) and not key.startswith('_')}
        if prefix.count('.') < _OUTER:
            state.attributes = plain | state.attributes
        buffers = settings['_buffers']
        hidden = settings.get('_non_persistent_buffers_set')
        hidden = hidden if isinstance(hidden, set) else ()
        own = {**settings['_parameters'], **{key: v for key, v in buffers.items() if key not in hidden}}
        own = {key: value for key, value in own.items() if value is not None}
        state |= {f'{prefix}{key}': value for key, value in own.items()}
        state.statistics |= {
            f'{prefix}{key}': value
            for key, value in {**plain, **buffers}.items()
            if isinstance(key, str) and _STATISTIC.fullmatch(key)
        }
        state.layers[name] = Layer(inner.name, settings, bool(own), any(_inner(inner)))
    return state


def _walk(module: Placeholder) -> Iterator[tuple[str, Placeholder]]:
    """The module and all modules in it, with their names; a shared one comes once for each use."""
    left = [('', module, 0)]
    while left:
        name, module, depth = left.pop()
        if depth > _DEPTH:
            raise CheckpointError(f'a pickled model has modules more than {_DEPTH} deep in each other')
        yield name, module
        start = f'{name}.' if name else ''
        left += [(start + key, child, depth + 1) for key, child in reversed(list(_inner(module)))]


def _inner(module: Placeholder) -> Iterator[tuple[str, Placeholder]]:
    settings: Any = module.state
    for name, child in settings['_modules'].items():
        if isinstance(name, str) and is_module(child):
            yield name, child

"""Whole models, as `torch.save(net)` pickles them: their tensors, as `net.state_dict()` would give them.

A module's state is plain data: its parameters, its buffers, and the modules in it by name. Nothing of the
module's own code is needed to read them, and none is run.

Reference: `torch.nn.Module.state_dict` and `_save_to_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .pickles import Placeholder

_MOST = 100_000  # modules in a net
_DEPTH = 64

# Layers without tensors that give other numbers than the nets here where they stand within one.
_OTHER_ACTIVATIONS = frozenset(
    [
        'CELU',
        'ELU',
        'GELU',
        'GELUTanh',
        'Hardshrink',
        'Hardsigmoid',
        'Hardswish',
        'HardSwish',
        'Hardtanh',
        'LeakyReLU',
        'LogSigmoid',
        'Mish',
        'PReLU',
        'ReLU6',
        'RReLU',
        'SELU',
        'SiLU',
        'Softplus',
        'Softshrink',
        'Softsign',
        'Swish',
        'Tanh',
        'Tanhshrink',
        'HardMish',
        'HardMishJit',
    ]
)
_BN_EPSILON = 1e-5


class ModuleState(dict[str, Any]):
    """A pickled module's tensors by name.

    Attributes:
      kind: the class of the module.
      differences: layers that compute something else than the nets here have in their place, by the name
        of the layer.
      kinds: all layers by name, and their classes with the modules that these are in.
      bare: layers without tensors by name, and their classes.
      attributes: what else was set on the module, or on a module in it that is only wrapped.
    """

    kind = ''
    differences: dict[str, str]
    kinds: dict[str, str]
    bare: dict[str, str]
    attributes: dict[str, Any]


def is_module(value: object) -> bool:
    """Whether a placeholder is a pickled `torch.nn.Module`."""
    state = value.state if isinstance(value, Placeholder) else None
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ('_parameters', '_buffers', '_modules')
    )


def module_state(module: Placeholder) -> ModuleState:
    """What `state_dict()` would give of a pickled module (`is_module`), its tensors not yet looked at."""
    state = ModuleState()
    state.kind = module.name
    state.differences, state.kinds, state.bare, state.attributes = {}, {}, {}, {}
    for prefix, inner in _walk(module, '', 0):
        attributes: Any = inner.state
        state.kinds[prefix[:-1]] = inner.name
        if prefix.count('.') < 2:
            said = {k: v for k, v in attributes.items() if isinstance(k, str) and not k.startswith('_')}
            state.attributes = said | state.attributes
        hidden = attributes.get('_non_persistent_buffers_set') or ()
        own = {
            **attributes['_parameters'],
            **{name: value for name, value in attributes['_buffers'].items() if name not in hidden},
        }
        state |= {f'{prefix}{name}': value for name, value in own.items() if value is not None}
        if prefix and not own and not attributes['_modules']:
            state.bare[prefix[:-1]] = inner.name.rpartition('.')[2]
        if difference := _difference(inner.name.rpartition('.')[2], attributes):
            state.differences[prefix[:-1]] = difference
    return state


def _walk(module: Placeholder, prefix: str, depth: int) -> Iterator[tuple[str, Placeholder]]:
    """The module and all within it, as `named_modules` without its care for modules that are shared."""
    left = [(module, prefix, depth)]
    seen = 0
    while left and seen < _MOST:
        module, prefix, depth = left.pop()
        seen += 1
        yield prefix, module
        attributes: Any = module.state
        inner = [
            (child, f'{prefix}{name}.', depth + 1)
            for name, child in attributes['_modules'].items()
            if isinstance(name, str) and is_module(child) and depth < _DEPTH
        ]
        left += reversed(inner)


def _difference(kind: str, attributes: dict[Any, Any]) -> str | None:
    """What a layer of a pickled module does that none of the nets here does; None if nothing."""
    if kind in _OTHER_ACTIVATIONS:
        return kind
    epsilon = attributes.get('eps')
    if 'BatchNorm' in kind and isinstance(epsilon, float) and epsilon != _BN_EPSILON:
        return f'{kind} with eps={epsilon}'
    dilation = attributes.get('dilation')
    if kind.startswith('Conv2d') and dilation not in (None, 1, (1, 1), [1, 1]):
        return f'{kind} with dilation={dilation}'
    if kind in ('AdaptiveMaxPool2d', 'AdaptiveConcatPool2d'):
        return kind
    return None

"""The state dict in what was saved: training files hold more than weights, and often two sets of them.

References: timm's `load_state_dict`; the EMA hooks of mmengine (`EMAHook.before_save_checkpoint`) and of mmcv
(0.x, `runner/hooks/ema.py`); torchvision's and DeiT's training references.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from convert.class_names import Said, class_names
from convert.image_settings import image_settings
from flaxnets.errors import CheckpointError, shown

Tensors = Mapping[str, np.ndarray]

# Each of the nets has this tensor, once; what stands before it in a name is a wrapper's prefix.
ANCHOR = 'layer1.0.conv1.weight'

# Averaged weights: timm; DeiT and torchvision's references; others. Weights as trained.
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict')
_TRAINED = ('state_dict', 'model')

# Options in the configuration inside mm files that change what a net computes, but none of its tensors.
_OTHER_GEOMETRY = {
    r"""\bstyle['"]?\s*[=:]\s*['"]caffe['"]""": "style='caffe' (stride in the first 1x1 convolutions)",
    r"""\bavg_down_stride['"]?\s*[=:]\s*False""": 'avg_down_stride=False (no average pool in the blocks)',
}


@dataclass(frozen=True)
class Unwrapped:
    """The state dict of a checkpoint, and what the file says about it.

    Attributes:
      tensors: name -> tensor, nothing renamed.
      notes: what was taken and what was left out, in words.
      classes: what the file says of its classes, unchecked.
      named: what the file calls its net, unchecked; None if nothing.
      differences: what makes its net compute something else than those here, by its own configuration.
      images: fields of `flaxnets.config.Preprocess`, as its training evaluated.
    """

    tensors: Tensors
    notes: tuple[str, ...] = ()
    classes: Said = field(default_factory=Said)
    named: str | None = None
    differences: tuple[str, ...] = ()
    images: Mapping[str, Any] = field(default_factory=dict)


def unwrap(loaded: object, ema: bool) -> Unwrapped:
    """Finds the state dict in what `convert.pth.read_pth` gives: bare, or in a dictionary of other things.

    Args:
      loaded: anything.
      ema: where there are both, take the averaged weights rather than those as trained.

    Raises:
      CheckpointError: there is no state dict, or no telling which; it holds other things than tensors.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f'holds a {type(loaded).__name__}, not a state dict (name -> tensor)')
    key, other = _choice(loaded, ema)
    if key is None:
        tensors, notes = _without_mmcv_average(_checked(loaded, 'the state dict'), ema)
        return Unwrapped(tensors, notes)
    took = f'took {plain(key)}'
    if _is_mmengine(loaded):
        took += f', where mmengine puts the {"averaged" if ema else "trained"} weights when it saves'
    if other is not None:
        took += f' (its other choice: {other}; {"--no-ema" if ema else "the default"} takes that)'
    rest = [plain(k) for k in loaded if k not in (key, other)]
    left_out = [f'left out what stands beside {plain(key)}: {some(rest)}'] if rest else []
    tensors, notes = _without_mmcv_average(_checked(loaded[key], plain(key)), ema)
    meta = loaded.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    named = loaded.get('arch')
    arguments = loaded.get('args')
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return Unwrapped(
        tensors,
        notes=(took, *left_out, *notes),
        classes=class_names(loaded),
        named=named if isinstance(named, str) else None,
        differences=(*_differences(meta), *_pooling(arguments)),
        images=image_settings(arguments),
    )


def _choice(loaded: Mapping[Any, Any], ema: bool) -> tuple[Any, Any]:
    """Key of the state dict to take, None if `loaded` is one itself; and key of the other, or None."""
    nested = [key for key, value in loaded.items() if _holds_tensors(value)]
    if not nested and _holds_tensors(loaded):
        return None, None
    averaged = [key for key in _AVERAGED if key in nested]
    trained = [key for key in _TRAINED if key in nested]
    if _is_mmengine(loaded):
        averaged, trained = ['state_dict'], ['ema_state_dict']
    if averaged and not trained and not ema:
        raise CheckpointError(f'holds averaged weights only ({averaged[0]}), and --no-ema asks for others')
    bare = any(is_anchor(key) for key in loaded)
    if (averaged or trained) and not bare:
        first, second = (averaged, trained) if ema else (trained, averaged)
        chosen = [*first[:1], *second[:1], None]
        return chosen[0], chosen[1]
    if len(nested) == 1 and not bare:
        return nested[0], None
    problem = 'no telling which state dict is meant' if nested else 'holds no state dict (name -> tensor)'
    described = [f'{plain(key)} ({_kind(value)})' for key, value in loaded.items()]
    raise CheckpointError(f'{problem}; what it holds: {some(described) or "nothing"}')


def _is_mmengine(loaded: Mapping[Any, Any]) -> bool:
    """True if it has the two sets of weights that mmengine's EMAHook exchanges when it saves."""
    averaged = loaded.get('ema_state_dict')
    return _holds_tensors(averaged) and 'steps' in averaged and _holds_tensors(loaded.get('state_dict'))


def _holds_tensors(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping) and any(isinstance(leaf, np.ndarray) for leaf in value.values())


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        tensors = sum(isinstance(leaf, np.ndarray) for leaf in value.values())
        return count(tensors, 'tensor') if tensors else f'dict of {len(value)}'
    return 'tensor' if isinstance(value, np.ndarray) else type(value).__name__


def _checked(state: Mapping[Any, Any], where: str) -> Tensors:
    wrong = [
        f'{plain(key)} ({_kind(value)})'
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, np.ndarray)
    ]
    if wrong:
        raise CheckpointError(f'{where} holds other things than named tensors: {some(wrong)}')
    return state


def _without_mmcv_average(tensors: Tensors, ema: bool) -> tuple[Tensors, tuple[str, ...]]:
    """Takes out the twin that mmcv's EMA hook keeps of each parameter, such as `ema_backbone_conv1_weight`.

    The hook exchanges the two at the end of an epoch, before the file is written: the twin is the value
    as trained.
    """
    twins = {name: 'ema_' + name.replace('.', '_') for name in tensors}
    twins = {name: twin for name, twin in twins.items() if twin in tensors}
    if not twins:
        return tensors, ()
    note = (
        f"took the {'averaged' if ema else 'trained'} of two values that mmcv's EMA hook saves of "
        f'{count(len(twins), "parameter")} ({"--no-ema" if ema else "the default"} takes the other)'
    )
    left_out = set(twins.values())
    kept = {
        name: tensor if ema else tensors[twins.get(name, name)]
        for name, tensor in tensors.items()
        if name not in left_out
    }
    return kept, (note,)


def _differences(meta: Mapping[Any, Any]) -> tuple[str, ...]:
    """Options of `_OTHER_GEOMETRY` in the configuration where mmengine (1.x) or mmcv (0.x) keeps it."""
    configs = [text for text in (meta.get('cfg'), meta.get('config')) if isinstance(text, str)]
    return tuple(
        f'its configuration has {option}, which none of the nets here computes'
        for pattern, option in _OTHER_GEOMETRY.items()
        if any(re.search(pattern, text) for text in configs)
    )


def _pooling(arguments: Mapping[Any, Any]) -> tuple[str, ...]:
    pool = arguments.get('gp')  # timm's --gp
    usual = not isinstance(pool, str) or pool in ('', 'avg')
    return () if usual else (f'its training pooled globally by {shown(pool)}',)


def is_anchor(name: object) -> bool:
    """True for `ANCHOR`, whatever its prefix."""
    return isinstance(name, str) and f'.{name}'.endswith(f'.{ANCHOR}')


def plain(key: object) -> str:
    """A key of the file as a message may hold it, whatever it is."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) < 80 else shown(key)


def count(number: int, thing: str) -> str:
    """'1 tensor', '2 tensors'."""
    return f'{number} {thing}{"" if number == 1 else "s"}'


def some(words: Sequence[str], most: int = 8) -> str:
    """The first words of a list that may be long."""
    more = f' and {len(words) - most} more' if len(words) > most else ''
    return ', '.join(words[:most]) + more

"""The state dict in what was saved: training files hold more than weights, and often two sets of them.

Which dictionary is the net is decided by what it holds (`convert.names.anchors`), wherever it lies and
whatever it is called; what it is called decides between averaged and trained weights.

References: timm's `load_state_dict`; the EMA hooks of mmengine (`EMAHook.before_save_checkpoint`) and of mmcv
(0.x, `runner/hooks/ema.py`); torchvision's and DeiT's training references; Lightning's `WeightAveraging`
and `StochasticWeightAveraging`; Composer's `EMA`; `ema_pytorch`; `torch_ema`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from flaxnets.errors import CheckpointError

from ..formats.modules import ModuleState
from ..formats.pth import Inert
from ..words import count, plain, some
from .anchors import Place, bare, places
from .class_names import Said, class_names
from .image_settings import ImageSettings, image_settings
from .options import other_options
from .whole_models import differences as layer_differences

Tensors = Mapping[str, np.ndarray]

# Keys of averaged and of trained weights, where a file has several of either: the first counts.
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict')
_TRAINED = ('state_dict', 'model')

# Words in the keys and prefixes of averages, of what is trained beside one, and of the slower of the two
# encoders of self-supervised training, which nobody uses afterwards (MoCo, BYOL).
_WORDS_AVERAGED = frozenset(['ema', 'swa', 'averaged', 'average', 'avg', 'shadow', 'polyak', 'teacher'])
_WORDS_TRAINED = frozenset(['student', 'online', 'training', 'current', 'raw', 'query'])
_WORDS_MOMENTUM = frozenset(['momentum', 'target'])

# What of a net holds tensors, by the last part of its name.
_LEAVES = ('weight', 'bias', 'running_mean', 'running_var')
_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
_SHADOWS = 20  # tensors in a list that is taken for averaged parameters without names

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
      around: the same of what stands around its classifier in a pickled model.
      images: how its training prepared them for evaluation.
      place: where in `tensors` the net is; None if it is none that is known.
      bare: of a pickled model, its layers without tensors by name, and their classes.
      kinds: of a pickled model, all its layers by name, and their classes.
      projection: True if the net is one of the two of self-supervised training, whose heads project.
    """

    tensors: Tensors
    notes: tuple[str, ...] = ()
    classes: Said = field(default_factory=Said)
    named: str | None = None
    differences: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    images: ImageSettings = field(default_factory=ImageSettings)
    place: Place | None = None
    bare: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    projection: bool = False


@dataclass
class _Net:
    """One of the nets in what was saved.

    Attributes:
      path: the keys that lead to its state dict.
      state: that, with whatever else is in it.
      place: where in it the net is.
      role: 'averaged', 'trained', 'momentum' or '' by what it is called.
    """

    path: tuple[Any, ...]
    state: Mapping[Any, Any]
    place: Place
    role: str

    @property
    def key(self) -> str:
        return _label(self.path)

    @property
    def steps(self) -> list[Any]:
        """The keys that lead to it and the parts of its prefix."""
        return [*self.path, *self.place.prefix.split('.')]

    @property
    def called(self) -> str:
        prefix = plain(self.place.prefix) if self.place.prefix else ''
        return f'{self.key} {prefix}'.strip() or 'the file'

    def named(self) -> dict[str, Any]:
        """Its tensors by their names within the net, the classifier left out."""
        return self.place.body(self.state)


class AmbiguousError(CheckpointError):
    """A file holds several nets. `choices` are the keywords for `open_checkpoint` that take each."""

    def __init__(self, message: str, choices: Sequence[Mapping[str, str]]) -> None:
        super().__init__(message)
        self.choices = tuple(choices)


def unwrap(loaded: object, ema: bool, key: str | None = None, prefix: str | None = None) -> Unwrapped:
    """Finds the state dict in what `convert.formats.pth.read_pth` gives, bare or anywhere in other things.

    Args:
      loaded: anything.
      ema: where there are both, take the averaged weights rather than those as trained.
      key: where the state dict is, as 'state.model'; None to find out.
      prefix: what stands before the net's names, as 'encoder_q.'; None to find out.

    Raises:
      AmbiguousError: several nets, and no telling which.
      CheckpointError: there is no state dict; a tensor of the net is something else; no such key or prefix.
    """
    walk = _Walk(loaded)
    nets = _asked_for(walk.nets, key, prefix)
    if not nets:
        return Unwrapped(*_without_net(loaded, walk))
    if ema and key is None and walk.shadows and not any(net.role == 'averaged' for net in nets):
        raise CheckpointError(
            f'{walk.shadows[0]} has averaged weights as a list without names, which only the code that '
            'trained them can put back; ema=False takes the trained ones'
        )
    if not ema and all(net.role == 'averaged' for net in nets) and key is None and prefix is None:
        raise CheckpointError(
            f'holds averaged weights only ({nets[0].called}), and ema=False asks for others'
        )
    net, other = _choice(nets, ema)
    notes = _notes(loaded, net, other, ema)
    tensors: Tensors = _checked(net, notes)
    if other and ema and net.role == 'averaged':
        tensors = _with_statistics(tensors, net, other, notes)
    tensors, more = _without_mmcv_average(tensors, ema)
    if walk.inert:
        notes.append(f'left alone, and not called: {some([plain(name) for name in walk.inert])}')
    around = _around(loaded, net)
    arguments = _mapping(around.get('args'))
    named = next((n for n in (around.get('arch'), arguments.get('model')) if isinstance(n, str)), None)
    meta = _mapping(around.get('meta'))
    in_body, in_head = _of_layers(net)
    return Unwrapped(
        tensors,
        notes=(*notes, *more),
        classes=class_names({**around, **_own_words(net)}),
        named=named,
        differences=(*_differences(meta), *other_options(around), *in_body),
        around=in_head,
        images=image_settings(around),
        place=net.place,
        bare=_clean(net.state.bare) if isinstance(net.state, ModuleState) else {},
        kinds=_clean(net.state.kinds) if isinstance(net.state, ModuleState) else {},
        projection=other is not None and other.role == 'momentum',
    )


class _Walk:
    """What there is in `loaded`: nets, state dicts of anything, lists of averages, objects left alone."""

    def __init__(self, loaded: object) -> None:
        self.nets: list[_Net] = []
        self.states: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = []
        self.shadows: list[str] = []
        self.inert: dict[str, None] = {}
        self._seen: set[int] = set()
        self._look(loaded, (), None)
        steps = [net.steps for net in self.nets]
        common = frozenset.intersection(*map(frozenset, steps)) if len(steps) > 1 else frozenset()
        for net in self.nets:
            net.role = _role(net, loaded, common)
        known = [*_AVERAGED, *_TRAINED]
        self.nets.sort(key=lambda net: known.index(net.key) if net.key in known else len(known))

    def _look(self, value: object, path: tuple[Any, ...], parent: object) -> None:
        if isinstance(value, Inert):
            self.inert |= dict.fromkeys(value.names)
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Mapping):
            if _holds_tensors(value):
                self.states.append((path, value))
            names = [k for k, v in value.items() if isinstance(k, str) and isinstance(v, np.ndarray | Inert)]
            self.nets += [_Net(path, value, place, '') for place in places(names)]
        elif sum(isinstance(item, np.ndarray) for item in value) >= _SHADOWS and any(
            _words(step) & _WORDS_AVERAGED for step in path
        ):
            self.shadows.append(_label(path))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, (Mapping, list, tuple, Inert)):
                self._look(item, (*path, key), value)


def _role(net: _Net, loaded: object, common: frozenset[object]) -> str:
    """Which of two sets of weights this is, by the innermost of its names that says so.

    Names that all nets of the file have in `common` tell none from another.
    """
    around = _at(loaded, net.path[:-1])
    if net.path and isinstance(around, Mapping):
        last = net.path[-1]
        if _is_mmengine(around):
            return {'state_dict': 'averaged', 'ema_state_dict': 'trained'}.get(last, '')
        if last == 'state_dict' and _holds_tensors(around.get('current_model_state')):
            return 'averaged'  # Lightning's WeightAveraging exchanges the two when it saves
    for step in reversed(net.steps):
        words = frozenset() if step in common else _words(step)
        if words & _WORDS_TRAINED:
            return 'trained'
        if words & _WORDS_AVERAGED:
            return 'averaged'
        if words & _WORDS_MOMENTUM or {'encoder', 'k'} <= words:
            return 'momentum'
    return ''


def _words(step: object) -> frozenset[str]:
    """'EMACallback' -> ema, callback; 'model_ema' -> model, ema."""
    found = re.findall('[A-Z]+(?![a-z])|[A-Z]?[a-z]+', step[:200]) if isinstance(step, str) else ()
    return frozenset(word.lower() for word in found)


def _asked_for(nets: list[_Net], key: str | None, prefix: str | None) -> list[_Net]:
    """Those of the nets that the user means by `key` and `prefix`."""
    found = nets
    if key is not None:
        exact = [net for net in nets if net.key == key]
        below = [net for net in nets if net.key.startswith(f'{key}.')]
        found = exact or below or [net for net in nets if net.key.endswith(f'.{key}')]
    if prefix is not None:
        wanted = prefix.rstrip('.')
        found = [
            net for net in found if wanted in (net.place.prefix.rstrip('.'), net.place.written.rstrip('.'))
        ]
    if nets and not found:
        asked = [
            f'{name}={value!r}' for name, value in (('key', key), ('prefix', prefix)) if value is not None
        ]
        raise AmbiguousError(f'has no net at {", ".join(asked)}; {_listed(nets)}', _choices(nets))
    if not nets and (key is not None or prefix is not None):
        raise CheckpointError('holds none of these nets, whatever the key and prefix')
    return found


def _choice(nets: list[_Net], ema: bool) -> tuple[_Net, _Net | None]:
    """The net to take, and the other one of an averaged and a trained set."""
    chosen = _by_role(nets, ema) or _by_role(_without_twins(nets), ema)
    if chosen is None:
        raise AmbiguousError(f'no telling which net is meant: {_listed(nets)}', _choices(nets))
    return chosen


def _by_role(nets: list[_Net], ema: bool) -> tuple[_Net, _Net | None] | None:
    if len(nets) == 1:
        return nets[0], None
    fast = [net for net in nets if net.role != 'momentum']
    if len(fast) == 1:
        return fast[0], next(net for net in nets if net is not fast[0])
    averaged = _preferred([net for net in fast if net.role == 'averaged'], _AVERAGED)
    trained = _preferred([net for net in fast if net.role != 'averaged'], _TRAINED)
    if averaged is None or trained is None or not _same_net(averaged, trained):
        return None
    return (averaged, trained) if ema else (trained, averaged)


def _preferred(nets: list[_Net], keys: Sequence[str]) -> _Net | None:
    """The only one, or that under the first of the keys."""
    if len(nets) == 1:
        return nets[0]
    known = {net.key: net for net in nets if net.key in keys}
    if len({net.key for net in nets}) < len(nets) or '' in {net.key for net in nets}:
        return None
    return next((known[key] for key in keys if key in known), None)


def _same_net(averaged: _Net, trained: _Net) -> bool:
    """Whether two nets have tensors of the same names and shapes; an average may have no statistics."""
    first, second = averaged.named(), trained.named()
    missing = [name for name in second if name not in first]
    return all(name.endswith(_STATISTICS) for name in missing) and all(
        name in second and np.shape(tensor) == np.shape(second[name]) for name, tensor in first.items()
    )


def _without_twins(nets: list[_Net]) -> list[_Net]:
    """One of each set of nets that hold the same numbers, the one with most tensors."""
    kept: list[_Net] = []
    for net in nets:
        twin = next((other for other in kept if _equal(net, other)), None)
        if twin is None:
            kept.append(net)
            continue
        roles = {net.role, twin.role} - {''}
        larger = net if len(net.state) > len(twin.state) else twin
        role = roles.pop() if len(roles) == 1 else ''
        kept[kept.index(twin)] = _Net(larger.path, larger.state, larger.place, role)
    return kept


def _equal(first: _Net, second: _Net) -> bool:
    a, b = first.named(), second.named()
    return a.keys() == b.keys() and all(_same_numbers(tensor, b[name]) for name, tensor in a.items())


def _same_numbers(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool((np.ascontiguousarray(a).view(np.uint8) == np.ascontiguousarray(b).view(np.uint8)).all())
    )


def _choices(nets: list[_Net]) -> list[dict[str, str]]:
    """The keywords that take each of the nets, as few as tell them apart."""
    keys, prefixes = {net.key for net in nets}, {net.place.prefix for net in nets}
    by_key = len(keys) > 1 and all(keys)
    out = []
    for net in nets:
        choice = {'key': net.key} if by_key else {}
        if len(prefixes) > 1 and (not by_key or sum(n.key == net.key for n in nets) > 1):
            choice['prefix'] = net.place.prefix
        out.append(choice)
    return out


def _listed(nets: list[_Net]) -> str:
    words = [
        ' and '.join(f'{name}={value!r}' for name, value in choice.items()) or net.called
        for net, choice in zip(nets, _choices(nets), strict=True)
    ]
    return f'it holds {count(len(nets), "net")}, which are taken by {some(words)}'


def _notes(loaded: object, net: _Net, other: _Net | None, ema: bool) -> list[str]:
    """What was taken, what the other choice is, and what stands beside."""
    notes = []
    if isinstance(net.state, ModuleState):
        notes.append(f'read the tensors of a pickled {plain(net.state.kind)}; nothing of it was called')
    if net.path or other:
        took = f'took {net.called}' if other and other.key == net.key else f'took {net.key}'
        around = _at(loaded, net.path[:-1])
        if isinstance(around, Mapping) and _is_mmengine(around):
            took += f', where mmengine puts the {"averaged" if ema else "trained"} weights when it saves'
        if other is not None and other.role == 'momentum':
            took += f', the encoder that is trained (its momentum twin: {other.called})'
        elif other is not None:
            name = other.called if other.key == net.key else other.key
            took += f' (its other choice: {name}; ema={not ema} takes that)'
        notes.append(took)
    if net.path and isinstance(loaded, Mapping):
        rest = [plain(k) for k in loaded if k != net.path[0] and not (other and other.path[:1] == (k,))]
        if rest:
            notes.append(f'left out what stands beside {plain(net.path[0])}: {some(rest)}')
    return notes


def _checked(net: _Net, notes: list[str]) -> dict[str, np.ndarray]:
    """The tensors of the dictionary that holds the net; whatever else is in it is left out.

    Raises:
      CheckpointError: something of the net itself is no tensor.
    """
    tensors, left_out, wrong = {}, [], []
    for key, value in net.state.items():
        if isinstance(key, str) and isinstance(value, np.ndarray):
            tensors[key] = value
        elif isinstance(key, str) and key.endswith('num_batches_tracked') and type(value) is int:
            tensors[key] = np.array(value, np.float64 if abs(value) >= 2**63 else np.int64)
        elif isinstance(key, str) and key.endswith(_LEAVES) and bare(key).startswith(net.place.prefix):
            wrong.append(f'{plain(key)} ({_kind(value)})')
        else:
            left_out.append(plain(key))
    if wrong:
        where = net.key or 'the state dict'
        raise CheckpointError(f'{where} holds other things than tensors: {some(wrong)}')
    if left_out and not isinstance(net.state, ModuleState):
        notes.append(f'left out what is no tensor: {some(left_out)}')
    return tensors


def _with_statistics(tensors: Tensors, net: _Net, other: _Net, notes: list[str]) -> Tensors:
    """An average of parameters alone, completed with BatchNorm's statistics of the trained weights."""
    have, trained = net.named(), other.named()
    missing = {name: t for name, t in trained.items() if name not in have and isinstance(t, np.ndarray)}
    if missing:
        notes.append(
            f'took {count(len(missing), "statistic")} of BatchNorm from {other.called}: the average has none'
        )
    return {**tensors, **{net.place.prefix + name: t for name, t in missing.items()}}


def _without_net(loaded: object, walk: _Walk) -> tuple[Tensors, tuple[str, ...]]:
    """The state dict of what is none of these nets, so that what it is can be said."""
    if isinstance(loaded, Inert):
        raise CheckpointError(
            f'holds an object of {plain(loaded.names[0])}, not weights; nothing was called. If you trust its '
            'author, load it in PyTorch and save model.state_dict() alone'
        )
    if not isinstance(loaded, (Mapping, list, tuple)):
        raise CheckpointError(f'holds a {type(loaded).__name__}, not a state dict (name -> tensor)')
    if len(walk.states) == 1:
        path, state = walk.states[0]
        named = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
        return named, ((f'took {_label(path)}',) if path else ())
    items = loaded.items() if isinstance(loaded, Mapping) else enumerate(loaded)
    described = [f'{plain(key)} ({_kind(value)})' for key, value in items]
    problem = (
        'holds none of these nets, and no telling which state dict is meant'
        if walk.states
        else 'holds no state dict (name -> tensor)'
    )
    raise CheckpointError(f'{problem}; what it holds: {some(described) or "nothing"}')


def _around(loaded: object, net: _Net) -> dict[Any, Any]:
    """What stands beside the net, on whichever level: the nearest counts."""
    around: dict[Any, Any] = {}
    for depth in range(len(net.path)):
        level = _at(loaded, net.path[:depth])
        if isinstance(level, Mapping):
            around |= level
    return around


def _own_words(net: _Net) -> dict[Any, Any]:
    """What a state dict holds beside tensors, and what was set on a pickled model (`net.class_to_idx`)."""
    if isinstance(net.state, ModuleState):
        return net.state.attributes
    return {key: value for key, value in net.state.items() if not isinstance(value, np.ndarray)}


def _at(loaded: object, path: tuple[Any, ...]) -> Any:
    for step in path:
        loaded = loaded[step]  # type: ignore[index]  # a path that was walked
    return loaded


def _label(path: tuple[Any, ...]) -> str:
    return '.'.join(plain(step) if isinstance(step, str) else str(step) for step in path)


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _clean(layers: Mapping[str, str]) -> dict[str, str]:
    """What is said of layers, by their names without what wrappers put into these."""
    return {bare(f'{layer}.')[:-1]: said for layer, said in layers.items()}


def _of_layers(net: _Net) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What layers of a pickled model compute that none of the nets here does: its own, and its head's."""
    if not isinstance(net.state, ModuleState):
        return (), ()
    body, head = (
        (f'the pickled model has layers that none of the nets here has: {some(found, 3)}',) if found else ()
        for found in layer_differences(net.state, net.place)
    )
    return body, head


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
    if isinstance(value, Inert):
        return plain(value.names[0])
    return 'tensor' if isinstance(value, np.ndarray) else type(value).__name__


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
        f'{count(len(twins), "parameter")} (ema={not ema} takes the other)'
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

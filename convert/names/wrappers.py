"""Finds the net's state dict in a file: training files hold more than weights, and often two sets of them.

Which dictionary is the net is decided by the names in it (`convert.names.anchors`), wherever it lies and
whatever its key. Between several nets, `convert.names.roles` decides.

References: timm's `load_state_dict`; the EMA hooks of mmengine (`EMAHook.before_save_checkpoint`) and of mmcv
(0.x, `runner/hooks/ema.py`); torchvision's and DeiT's training references; Lightning's `WeightAveraging`
and `StochasticWeightAveraging`; Composer's `EMA`; `ema_pytorch`; `torch_ema`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxnets.errors import CheckpointError
from flaxnets.words import count, plain, some

from ..formats.modules import ModuleState
from ..formats.pth import Inert
from .anchors import Place, bare, bare_layer, bare_names, places
from .class_names import class_names
from .found import Found, Tensors
from .image_settings import image_settings
from .options import other_options
from .roles import (
    AVERAGED_WORDS,
    Net,
    choose,
    holds_tensors,
    label,
    of_other_nets,
    scopes,
    split_by_role,
    words_of,
)
from .tree import COUNTER
from .whole_models import differences as layer_differences

# Last parts of names whose values must be tensors in a net.
_LEAVES = ('weight', 'bias', 'running_mean', 'running_var')
_SHADOWS = 20  # tensors in a list that is taken for averaged parameters without names

# Options in the configuration inside mm files that change what a net computes, but none of its tensors.
_OTHER_GEOMETRY = {
    r'\bstyle=caffe\b': "style='caffe' (stride in the first 1x1 convolutions)",
    r'\bavg_down_stride=(?i:false)\b': 'avg_down_stride=False (no average pool in the blocks)',
    # Four small numbers: the strides of anchors and the dilations of a decoder are called alike.
    r'\bstrides=\((?!1,2,2,2\b)[12](?:,[12]){3},?\)': 'other strides than (1, 2, 2, 2)',
    r'\bdilations=\((?!1,1,1,1\b)[124](?:,[124]){3},?\)': 'dilations (convolutions that skip pixels)',
    r'\bnorm_cfg=\([^()]*\beps=(?!1e-0?5\b|0?\.00001\b)': 'another epsilon in its BatchNorm',
    r'\bconv_cfg=\([^()]*\bConvA?WS\b': 'standardised weights (ConvWS)',
}
_BRACKETS = str.maketrans({'[': '(', ']': ')', '{': '(', '}': ')', ':': '=', "'": '', '"': ''})


def unwrap(loaded: object, ema: bool, key: str | None = None, prefix: str | None = None) -> Found:
    """Finds the net's state dict in what `convert.formats.pth.read_pth` gives, at whatever depth.

    Args:
      loaded: anything.
      ema: take the averaged weights where there are both averaged and trained ones.
      key: the keys that lead to the state dict: 'state.model'; None to find out.
      prefix: what the net's names start with: 'encoder_q.'; None to find out.

    Raises:
      AmbiguousError: there are several nets, and nothing tells which is meant.
      CheckpointError: there is no state dict; a tensor of the net is something else; no such key or prefix.
    """
    walk = _Walk(loaded)
    if not walk.nets and not walk.aside:
        if key is not None or prefix is not None:
            raise CheckpointError('holds none of these nets, whatever the key and prefix')
        return Found(*_without_net(loaded, walk))
    if ema and key is None and walk.shadows and not any(net.role == 'averaged' for net in walk.nets):
        raise CheckpointError(
            f'{walk.shadows[0]} has averaged weights as a list without names, which only the code that '
            'trained them can put back; ema=False takes the trained ones'
        )
    net, other, by_ema = choose(walk.nets, walk.aside, ema, key, prefix)
    notes = _notes(loaded, net, other if by_ema else None, ema)
    tensors: Tensors = _checked(net, walk, notes)
    if other and net.role == 'averaged' and other.role != 'momentum':
        tensors = _with_statistics(tensors, net, other, notes)
    tensors = _without_flat_average(tensors, net.place, ema, notes)
    if walk.inert:
        notes.append(f'left alone, and not called: {some([plain(name) for name in walk.inert])}')
    in_body, in_head = _of_layers(net)
    arch, args, meta = (net.around.get(name) for name in ('arch', 'args', 'meta'))
    own = _own_words(net).get('pretrained_cfg')  # of a pickled model of timm's
    names = (arch, _mapping(args).get('model'), _mapping(own).get('architecture'))
    module = net.state if isinstance(net.state, ModuleState) else None
    return Found(
        tensors,
        notes=tuple(notes),
        said=class_names({**net.around, **_own_words(net)}),
        named=next((name for name in names if isinstance(name, str)), None),
        differences=(*_differences(_mapping(meta)), *other_options(net.around), *in_body),
        head_differences=in_head,
        images=image_settings(net.around, net.state, net.place.prefix),
        place=net.place,
        bare=_clean(module.bare) if module else {},
        kinds=_clean(module.kinds) if module else {},
        projection=other is not None and 'momentum' in (net.role, other.role),
        author=net.around.get('__author__'),
    )


class _Walk:
    """Searches all of a loaded file.

    Attributes:
      nets: the nets in it, with their roles.
      aside: what has the names of a net, and is the state of an optimizer.
      states: every mapping that holds tensors, with the keys that lead to it.
      shadows: the keys that lead to averages kept as a list without names.
      inert: names of the objects that mean nothing here.
    """

    def __init__(self, loaded: object) -> None:
        self.states: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = []
        self.shadows: list[str] = []
        self.inert: dict[str, None] = {}
        self._found: list[Net] = []
        self._seen: set[int] = set()
        self._look(loaded, (), ())
        self.nets, self.aside = split_by_role(self._found)

    def _look(self, value: object, path: tuple[Any, ...], above: tuple[Any, ...]) -> None:
        if isinstance(value, Inert):
            self.inert |= dict.fromkeys(value.names)
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Mapping):
            if holds_tensors(value):
                self.states.append((path, value))
            names = [k for k, v in value.items() if isinstance(k, str) and isinstance(v, np.ndarray | Inert)]
            found = places(names)
            self._found += [
                Net(path, above, value, place, scope)
                for place, scope in zip(found, scopes(found), strict=True)
            ]
        elif sum(isinstance(item, np.ndarray) for item in value) >= _SHADOWS and any(
            words_of(step) & AVERAGED_WORDS for step in path
        ):
            self.shadows.append(label(path))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, (Mapping, list, tuple, Inert)):
                self._look(item, (*path, key), (*above, value))


def _notes(loaded: object, net: Net, other: Net | None, ema: bool) -> list[str]:
    """Notes: what was taken, what the other choice is, and what was left out."""
    notes = []
    if isinstance(net.state, ModuleState):
        notes.append(f'read the tensors of a pickled {plain(net.state.kind)}; nothing of it was called')
    if net.path or other:
        took = f'took {net.called}' if other and other.key == net.key else f'took {net.key}'
        if net.is_mmengines:
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


def _checked(net: Net, walk: _Walk, notes: list[str]) -> dict[str, np.ndarray]:
    """All tensors in the net's dictionary but those of other nets.

    Raises:
      CheckpointError: something of the net itself is no tensor.
    """
    tensors, left_out, wrong = {}, [], []
    anothers = of_other_nets(net, [*walk.nets, *walk.aside])
    for key, value in net.state.items():
        if key in anothers:
            continue
        if isinstance(key, str) and isinstance(value, np.ndarray):
            tensors[key] = value
        elif isinstance(key, str) and key.endswith(COUNTER[1:]) and type(value) is int:
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


def _with_statistics(tensors: Tensors, net: Net, other: Net, notes: list[str]) -> Tensors:
    """An average of parameters alone, completed with BatchNorm's statistics of the trained weights."""
    missing = {n: t for n, t in other.body.items() if n not in net.body and isinstance(t, np.ndarray)}
    if missing:
        notes.append(
            f'took {count(len(missing), "statistic")} of BatchNorm from {other.called}: the average has none'
        )
    return {**tensors, **{net.place.prefix + name: t for name, t in missing.items()}}


def _without_net(loaded: object, walk: _Walk) -> tuple[Tensors, tuple[str, ...]]:
    """The state dict in a file without any of these nets, so that an error can say what it is."""
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
        return named, ((f'took {label(path)}',) if path else ())
    items = loaded.items() if isinstance(loaded, Mapping) else enumerate(loaded)
    described = [f'{plain(key)} ({_kind(value)})' for key, value in items]
    problem = (
        'holds none of these nets, and no telling which state dict is meant'
        if walk.states
        else 'holds no state dict (name -> tensor)'
    )
    raise CheckpointError(f'{problem}; what it holds: {some(described) or "nothing"}')


def _own_words(net: Net) -> dict[Any, Any]:
    """What a state dict holds beside tensors, and what was set on a pickled model (`net.class_to_idx`)."""
    if isinstance(net.state, ModuleState):
        return net.state.attributes
    return {key: value for key, value in net.state.items() if not isinstance(value, np.ndarray)}


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _clean(layers: Mapping[str, str]) -> dict[str, str]:
    """The same mapping, with what wrappers put into names taken off."""
    return {bare_layer(layer): said for layer, said in layers.items()}


def _of_layers(net: Net) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Differences of a pickled model's layers from ours: of the net, and around its classifier."""
    if not isinstance(net.state, ModuleState):
        return (), ()
    body, head = (
        (f'the pickled model has layers that none of the nets here has: {some(found, 3)}',) if found else ()
        for found in layer_differences(net.state, net.place)
    )
    return body, head


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        tensors = sum(isinstance(leaf, np.ndarray) for leaf in value.values())
        return count(tensors, 'tensor') if tensors else f'dict of {len(value)}'
    if isinstance(value, Inert):
        return plain(value.names[0])
    return 'tensor' if isinstance(value, np.ndarray) else type(value).__name__


def _without_flat_average(tensors: Tensors, place: Place, ema: bool, notes: list[str]) -> Tensors:
    """Takes out the second value that mmcv's EMA hook and latent diffusion's `LitEma` keep of a parameter.

    mmcv's twin of `backbone.conv1.weight` is `ema_backbone_conv1_weight`. The hook exchanges the two at the
    end of an epoch, before the file is written: the twin is the value as trained. LitEma's twin of
    `model.layer1.0.conv1.weight` is `model_ema.layer10conv1weight`, named from within what it averages; it is
    the average.
    """
    twins = {name: 'ema_' + name.replace('.', '_') for name in tensors}
    twins = {name: twin for name, twin in twins.items() if twin in tensors}
    owner, swap, left_out = "mmcv's EMA hook", not ema, {*twins.values()}
    if not twins:
        owner, swap = 'LitEma', ema
        twins, left_out = _of_lit_ema(tensors, place)
    if not twins:
        return tensors
    notes.append(
        f'took the {"averaged" if ema else "trained"} of two values that {owner} saves of '
        f'{count(len(twins), "parameter")} (ema={not ema} takes the other)'
    )
    return {
        name: tensors[twins.get(name, name)] if swap else tensor
        for name, tensor in tensors.items()
        if name not in left_out
    }


def _of_lit_ema(tensors: Tensors, place: Place) -> tuple[dict[str, str], set[str]]:
    """Parameter -> its average's name in `LitEma`, and all names in there, those of its counters too.

    Both are empty where it did not average this net.
    """
    flat = {match[1]: name for name in tensors if (match := re.fullmatch(r'(?:.+\.)?\w*ema\.([^.]+)', name))}
    parts, clean = place.prefix.split('.'), bare_names(tensors)
    for outer in (''.join(f'{part}.' for part in parts[:n]) for n in range(len(parts) if flat else 0)):
        inner = {name: new[len(outer) :] for name, new in clean.items() if new.startswith(outer)}
        twins = {name: flat[n.replace('.', '')] for name, n in inner.items() if n.replace('.', '') in flat}
        twins = {name: twin for name, twin in twins.items() if name != twin}
        if any(place.is_body(clean[name]) for name in twins):
            return twins, {*flat.values()}
    return {}, set()


def _differences(meta: Mapping[Any, Any]) -> tuple[str, ...]:
    """Options of `_OTHER_GEOMETRY` in the configuration where mmengine (1.x) or mmcv (0.x) keeps it."""
    configs = [text for text in (meta.get('cfg'), meta.get('config')) if isinstance(text, str)]
    # Python's `dict(a=1)` and JSON's `{"a": 1}` alike become `(a=1)`.
    text = re.sub(r'\s*([,()=])\s*', r'\1', ' '.join(configs).translate(_BRACKETS)).replace('dict(', '(')
    return tuple(
        f'its configuration has {option}, which none of the nets here computes'
        for pattern, option in _OTHER_GEOMETRY.items()
        if re.search(pattern, text)
    )

"""Every publisher's tensor names to one canonical naming, timm's, and back.

Three things stand between a file and a net. A training file wraps the weights, often two sets of them,
in a dictionary of other things; modules around the net leave a prefix before its names; and publishers
call the same layers differently. The first is opened here, the second stripped, the third translated.
No tensor is touched, and all that was chosen, renamed or left out is said in `Canonical.notes`.

References: timm's `load_state_dict` and `clean_state_dict`; the EMA hooks of mmengine and mmcv; the stems
and `ResLayer`s of mmpretrain and mmdetection; Cadene's `senet.py` (timm's `legacy_se*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from convert.pickles import shown
from flaxnets.config import Arch
from flaxnets.errors import CheckpointError, FlaxnetsError

Tensors = Mapping[str, np.ndarray]
Names = dict[str, str]  # a tensor's name in the file -> its name so far

LAYOUTS = ('timm', 'torchvision', 'mmpretrain')  # that `from_canonical` writes

# Each of the nets has this tensor, once; what stands before it in a name is a wrapper's prefix.
_ANCHOR = 'layer1.0.conv1.weight'

# Averaged weights: timm; DeiT and torchvision's references; others. Weights as trained.
_AVERAGED = ('state_dict_ema', 'model_ema', 'ema_state_dict')
_TRAINED = ('state_dict', 'model')
# Counters that averaging keeps beside the weights: mmengine, torch.optim.swa_utils.
_COUNTERS = ('steps', 'n_averaged')

# A publisher's layer -> timm's.
_MMPRETRAIN_STEM = {
    'stem.0.conv': 'conv1.0',
    'stem.0.bn': 'conv1.1',
    'stem.1.conv': 'conv1.3',
    'stem.1.bn': 'conv1.4',
    'stem.2.conv': 'conv1.6',
    'stem.2.bn': 'bn1',
}
_MMDETECTION_STEM = {f'stem.{i}': f'conv1.{i}' for i in (0, 1, 3, 4, 6)} | {'stem.7': 'bn1'}
_CADENE = {'layer0.conv1': 'conv1', 'layer0.bn1': 'bn1', 'last_linear': 'fc'}
# mmpretrain has no pool in a shortcut that does not shrink, in the first stage; timm has an identity there.
_MMPRETRAIN_SHORTCUT = {
    'layer1.0.downsample.0': 'layer1.0.downsample.1',
    'layer1.0.downsample.1': 'layer1.0.downsample.2',
}
_DETECTOR = {'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head'}

# Options in the configuration inside mm files that change what a net computes, but none of its tensors.
_OTHER_GEOMETRY = {
    r"""\bstyle['"]?\s*[=:]\s*['"]caffe['"]""": "style='caffe' (stride in the first 1x1 convolutions)",
    r"""\bavg_down_stride['"]?\s*[=:]\s*False""": 'avg_down_stride=False (no average pool in the blocks)',
}
_CADENE_REFUSED = (
    "has the names of Cadene's SENets (timm's legacy_seresnext50_32x4d and others). They pool their stem with "
    'MaxPool2d(3, 2, ceil_mode=True), every net here with padding=1: the same weights would give other '
    'numbers. Use weights published for seresnext50_32x4d or seresnext101_32x4d'
)


@dataclass(frozen=True)
class Canonical:
    """The tensors of one net under timm's names.

    Attributes:
      state: name -> tensor, in the file's order; the arrays are the file's own.
      layout: whose names they were: 'canonical' (timm, torchvision, the Gluon port, the Res2Net and
        ResNeSt authors, Facebook), 'mmpretrain', 'mmdetection' or 'cadene'.
      notes: what was taken, stripped, renamed and left out, in words.
      classes: the classifier's classes in order, where the file names them.
      named: what a training file calls its net (`arch`), unchecked.
    """

    state: dict[str, np.ndarray]
    layout: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    named: str | None = None


def to_canonical(loaded: object, *, ema: bool = True, cadene_pool: bool = False) -> Canonical:
    """The tensors of a checkpoint under timm's names, whoever wrote it.

    Args:
      loaded: what `convert.pth.read_pth` or a safetensors file gives: a state dict, bare or within a
        training file.
      ema: of a training file that holds both, take the averaged weights rather than those as trained.
      cadene_pool: accept Cadene's names, although his nets pool their stem differently from those here,
        so that the weights will compute something else than they did.

    Raises:
      CheckpointError: there is no state dict or no telling which; it holds other things than tensors;
        two names turn into one; there are several nets; the net computes what none of those here does.
    """
    notes: list[str] = []
    wrapper, tensors = _unwrap(loaded, ema, notes)
    _check_geometry(wrapper)
    tensors = _without_mmcv_average(tensors, ema, notes)
    names, beside, prefix = _split(_strip_wrappers(tensors, notes))
    head, beside = _head(beside, tensors)
    layout, translation = _publisher(names, head, beside, prefix)
    if layout == 'cadene' and not cadene_pool:
        raise CheckpointError(_CADENE_REFUSED)
    names = _translate(names | head, translation)
    _check_distinct(names | beside)
    if layout != 'canonical':
        count = sum(name != new for name, new in names.items())
        notes.append(f"renamed {_count(count, 'name')} from {layout}'s")
    else:
        if prefix:
            notes.append(f'stripped {prefix!r} from {_count(len(names) - len(head), "name")}')
        if head:
            notes.append(f'took {" and ".join(head)} as the classifier')
    if beside:
        notes.append(f'left out {_count(len(beside), "tensor")} beside the net: {_groups(beside)}')
    state = {new: tensors[name] for name, new in names.items()}
    if _ANCHOR in state and 'fc.weight' not in state:
        notes.append('it has no classifier (fc.weight)')
    classes = _classes(wrapper, state, notes)
    named = wrapper.get('arch')
    return Canonical(state, layout, tuple(notes), classes, named if isinstance(named, str) else None)


def from_canonical(state: Tensors, layout: str, arch: Arch) -> dict[str, np.ndarray]:
    """The way back: the tensors of a net of `arch` as another library's own net calls them.

    `to_canonical` undoes it for every architecture; see `caveat` for what the names alone do not promise.

    Args:
      state: timm's names.
      layout: 'timm'; 'torchvision', which has the plain ResNeXts and calls everything as timm does; or
        'mmpretrain': the state dict of an `ImageClassifier` with a `LinearClsHead`.
      arch: the architecture, which decides the names.

    Raises:
      FlaxnetsError: unknown layout, or one that has no such net.
    """
    if layout not in LAYOUTS:
        raise FlaxnetsError(f'layout {layout!r} is not one of {", ".join(LAYOUTS)}')
    if layout == 'torchvision' and not _in_torchvision(arch):
        raise FlaxnetsError(
            'torchvision has plain ResNeXts only (one 7x7 stem, no SE gates, no pooled shortcuts), so no net '
            "that could load these weights; use layout 'timm' or 'mmpretrain'"
        )
    if layout != 'mmpretrain':
        return dict(state)
    translation = {}
    if arch.deep_stem:
        translation |= {timm: mm for mm, timm in _MMPRETRAIN_STEM.items()}
    if arch.avg_down and arch.block != 'res2net':  # mmpretrain's Res2Layer has a pool in every shortcut
        translation |= {timm: mm for mm, timm in _MMPRETRAIN_SHORTCUT.items()}
    for name in state:
        if gate := re.fullmatch(r'(layer\d+\.\d+)\.se\.fc([12])\.\w+', name):
            translation[f'{gate[1]}.se.fc{gate[2]}'] = f'{gate[1]}.se_layer.conv{gate[2]}.conv'
    names = _translate({name: name for name in state}, translation)
    _check_distinct(names)
    return {f'{"head" if new.startswith("fc.") else "backbone"}.{new}': state[name] for name, new in names.items()}


def caveat(layout: str, arch: Arch) -> str | None:
    """What the user must know of a net of `arch` in a layout of `from_canonical`; None if nothing."""
    if layout != 'mmpretrain':
        return None
    if arch.avd_first:
        return (
            "mmpretrain's ResNeSt pools after the split attention, this net before it: the weights load there, "
            'but compute something else'
        )
    if arch.block == 'res2net' and arch.cardinality > 1:
        return "mmpretrain's Res2Net has no grouped convolutions: no net of it takes these weights"
    return None


def _in_torchvision(arch: Arch) -> bool:
    return arch.block == 'resnext' and not (arch.se or arch.deep_stem or arch.avg_down)


# The state dict in what was saved.


def _unwrap(loaded: object, ema: bool, notes: list[str]) -> tuple[Mapping[Any, Any], Tensors]:
    """The dictionary around the state dict (empty if there is none), and the state dict."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f'holds a {type(loaded).__name__}, not a state dict (name -> tensor)')
    key, other = _choice(loaded, ema)
    if key is None:
        return {}, _checked(loaded, 'the state dict')
    words = f'took {key}'
    if _is_mmengine(loaded):
        words += f', where mmengine puts the {"averaged" if ema else "trained"} weights when it saves'
    if other is not None:
        words += f' (its other choice: {other}; {"--no-ema" if ema else "the default"} takes that)'
    notes.append(words)
    rest = [_plain(k) for k in loaded if k not in (key, other)]
    if rest:
        notes.append(f'left out what stands beside {key}: {_list(rest)}')
    return loaded, _checked(loaded[key], key)


def _choice(loaded: Mapping[Any, Any], ema: bool) -> tuple[Any, Any]:
    """Key of the state dict to take, None if `loaded` is one itself; and key of the other, or None."""
    nested = [key for key, value in loaded.items() if _holds_tensors(value)]
    averaged = [key for key in _AVERAGED if key in nested]
    trained = [key for key in _TRAINED if key in nested]
    if _is_mmengine(loaded):
        averaged, trained = ['state_dict'], ['ema_state_dict']
    bare = any(_is_anchor(key) for key in loaded)
    if not nested and _holds_tensors(loaded):
        return None, None
    if averaged and not trained and not ema:
        raise CheckpointError(f'holds averaged weights only ({averaged[0]}), and --no-ema asks for others')
    if (averaged or trained) and not bare:
        first, second = (averaged, trained) if ema else (trained, averaged)
        chosen = [*first[:1], *second[:1], None]
        return chosen[0], chosen[1]
    if len(nested) == 1 and not bare:
        return nested[0], None
    problem = 'no telling which state dict is meant' if nested else 'holds no state dict (name -> tensor)'
    described = [f'{_plain(key)} ({_kind(value)})' for key, value in loaded.items()]
    raise CheckpointError(f'{problem}; what it holds: {_list(described) or "nothing"}')


def _is_mmengine(loaded: Mapping[Any, Any]) -> bool:
    """True if it has the two sets of weights that mmengine's EMAHook exchanges when it saves."""
    averaged = loaded.get('ema_state_dict')
    return _holds_tensors(averaged) and 'steps' in averaged and _holds_tensors(loaded.get('state_dict'))


def _holds_tensors(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping) and any(isinstance(leaf, np.ndarray) for leaf in value.values())


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        tensors = sum(isinstance(leaf, np.ndarray) for leaf in value.values())
        return _count(tensors, 'tensor') if tensors else f'dict of {len(value)}'
    return 'tensor' if isinstance(value, np.ndarray) else type(value).__name__


def _checked(state: Mapping[Any, Any], where: str) -> Tensors:
    wrong = [
        f'{_plain(key)} ({_kind(value)})'
        for key, value in state.items()
        if not isinstance(key, str) or not isinstance(value, np.ndarray)
    ]
    if wrong:
        raise CheckpointError(f'{where} holds other things than named tensors: {_list(wrong)}')
    return state


def _check_geometry(wrapper: Mapping[Any, Any]) -> None:
    meta = wrapper.get('meta')
    texts = [meta.get(key) for key in ('cfg', 'config')] if isinstance(meta, Mapping) else []
    for pattern, option in _OTHER_GEOMETRY.items():
        if any(isinstance(text, str) and re.search(pattern, text) for text in texts):
            raise CheckpointError(f'was trained with {option}, which none of the nets here computes')


def _without_mmcv_average(tensors: Tensors, ema: bool, notes: list[str]) -> Tensors:
    """mmcv's EMA hook keeps a twin of each parameter in the same state dict, `ema_backbone_conv1_weight`,
    and exchanges the two at the end of an epoch, before the file is written."""
    twins = {name: 'ema_' + name.replace('.', '_') for name in tensors}
    twins = {name: twin for name, twin in twins.items() if twin in tensors}
    if not twins:
        return tensors
    notes.append(
        f"took the {'averaged' if ema else 'trained'} of two values that mmcv's EMA hook saves of "
        f'{_count(len(twins), "parameter")} ({"--no-ema" if ema else "the default"} takes the other)'
    )
    left_out = set(twins.values())
    return {
        name: tensor if ema else tensors[twins.get(name, name)]
        for name, tensor in tensors.items()
        if name not in left_out
    }


def _classes(wrapper: Mapping[Any, Any], state: Tensors, notes: list[str]) -> tuple[str, ...] | None:
    """The classes in the `meta` of mmengine (1.x) and mmcv (0.x), if there is one for each output."""
    meta = wrapper.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get('dataset_meta')
    dataset = dataset if isinstance(dataset, Mapping) else {}
    found = next((d[key] for d in (dataset, meta) for key in ('classes', 'CLASSES') if key in d), None)
    weight = state.get('fc.weight')
    if found is None or weight is None or weight.ndim != 2:
        return None
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        notes.append("left out the file's classes, which are no list of names")
    elif len(found) != len(weight):
        notes.append(f"left out the file's {_count(len(found), 'class name')}: there are {len(weight)} outputs")
    else:
        return tuple(found)
    return None


# Names.

_WRAPPERS = re.compile(r'^(?:(?:module|_orig_mod)\.)+(?=.)|(?<=\.)_orig_mod\.(?=.)')


def _strip_wrappers(tensors: Tensors, notes: list[str]) -> Names:
    """Takes off what DataParallel and torch.compile put before names, and the latter also within."""
    names = {name: _WRAPPERS.sub('', name) for name in tensors}
    stripped = Counter(''.join(_WRAPPERS.findall(name)) for name in tensors)
    notes += [f'stripped {text!r} from {_count(n, "name")}' for text, n in stripped.items() if text]
    _check_distinct(names)
    return names


def _split(names: Names) -> tuple[Names, Names, str]:
    """The net's tensors with their common prefix taken off, the tensors beside the net, and the prefix."""
    prefixes = [new.removesuffix(_ANCHOR) for new in names.values() if _is_anchor(new)]
    if len(prefixes) > 1:
        listed = _list([_plain(prefix) for prefix in prefixes])
        raise CheckpointError(f'holds {len(prefixes)} nets, under {listed}: save the one that is meant alone')
    prefix = prefixes[0] if prefixes else ''
    inside = {name: new for name, new in names.items() if new.startswith(prefix) and new not in _COUNTERS}
    beside = {name: new for name, new in names.items() if name not in inside}
    return {name: new[len(prefix) :] for name, new in inside.items()}, beside, prefix


def _is_anchor(name: object) -> bool:
    return isinstance(name, str) and f'.{name}'.endswith(f'.{_ANCHOR}')


def _head(beside: Names, tensors: Tensors) -> tuple[Names, Names]:
    """Of the tensors beside a prefixed net: its classifier, if that is a plain linear layer; and the rest."""
    head = {}
    for name, new in beside.items():
        match = re.fullmatch(r'(?:head\.)?(fc\.(?:weight|bias))', new)
        if match and tensors[name].ndim == (2 if new.endswith('weight') else 1):
            head[name] = match[1]
    return head, {name: new for name, new in beside.items() if name not in head}


def _publisher(names: Names, head: Names, beside: Names, prefix: str) -> tuple[str, dict[str, str]]:
    """Whose names these are, and the publisher's layers as timm calls them."""
    layers = {new.rpartition('.')[0] for new in names.values()}
    translation = {}
    for layer in layers:
        if gate := re.fullmatch(r'(.+)\.(?:se_layer\.conv([12])\.conv|se_module\.fc([12]))', layer):
            translation[layer] = f'{gate[1]}.se.fc{gate[2] or gate[3]}'
    if 'layer0.conv1' in layers:
        return 'cadene', translation | _CADENE
    if 'stem.0' in layers and 'stem.7' in layers:
        return 'mmdetection', _MMDETECTION_STEM
    if 'stem.0.conv' in layers:
        translation |= _MMPRETRAIN_STEM
    if {'layer1.0.downsample.0', 'layer2.0.downsample.2'} <= layers:
        translation |= _MMPRETRAIN_SHORTCUT
    if translation:
        return 'mmpretrain', translation
    if prefix == 'backbone.' and 'conv1' in layers:
        if any(_group(new) in _DETECTOR for new in beside.values()):
            return 'mmdetection', {}
        if any('head.fc.' in name for name in head):
            return 'mmpretrain', {}
    return 'canonical', {}


def _translate(names: Names, translation: Mapping[str, str]) -> Names:
    out = {}
    for name, new in names.items():
        layer, dot, leaf = new.rpartition('.')
        out[name] = translation.get(layer, layer) + dot + leaf
    return out


def _check_distinct(names: Names) -> None:
    """Raises if two of the file's names have become one."""
    first: Names = {}
    for name, new in names.items():
        if first.setdefault(new, name) != name:
            raise CheckpointError(
                f'two tensors are both {_plain(new)}: {_plain(first[new])} and {_plain(name)}; keep only one'
            )


# Words.


def _count(number: int, thing: str) -> str:
    return f'{number} {thing}{"" if number == 1 else "s"}'


def _plain(key: object) -> str:
    """A key of the file as a message may hold it, whatever it is."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) < 80 else shown(key)


def _list(words: Sequence[str], most: int = 8) -> str:
    more = f' and {len(words) - most} more' if len(words) > most else ''
    return ', '.join(words[:most]) + more


def _group(name: str) -> str:
    return name.partition('.')[0]


def _groups(names: Iterable[str]) -> str:
    """'neck (40), rpn_head (6)': names counted by their first part."""
    counts = Counter(_group(name) for name in names)
    return _list([_plain(group) if n == 1 else f'{_plain(group)} ({n})' for group, n in counts.items()])

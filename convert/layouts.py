"""Every publisher's tensor names to one canonical naming, timm's, and back.

Modules around a net leave a prefix before its names, and publishers call the same layers differently: the
former is stripped, the latter are translated. No tensor is touched, and all that was chosen, renamed or
left out is said in `Canonical.notes`.

References: timm's `clean_state_dict`; the stems and `ResLayer`s of mmpretrain and mmdetection; Cadene's
`senet.py` (timm's `legacy_se*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.wrappers import ANCHOR, Tensors, count, is_anchor, plain, some, unwrap
from flaxnets.config import Arch
from flaxnets.errors import CheckpointError, FlaxnetsError, shown

Names = dict[str, str]  # a tensor's name in the file -> its name so far

LAYOUTS = ('timm', 'torchvision', 'mmpretrain')  # that `from_canonical` writes

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

# Nets that give other numbers than those here with the same weights, though every name and shape agrees.
_CADENE_POOL = (
    "the names are Cadene's (timm's legacy_seresnext50_32x4d and others), whose nets pool their stem with "
    'MaxPool2d(3, 2, ceil_mode=True), those here with padding=1: with these weights they give other numbers'
)
_MMDETECTION_RES2NET = (
    "the names are those of mmdetection's Res2Net, which leaves out the average pool in the first block of "
    'layer1 (mmpretrain and the authors have it): weights that were trained there give other numbers here. '
    "The authors' own weights in its names (res2net101_v1d_26w_4s_mmdetv2) are right here"
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
      class_order: as `flaxnets.config.Config.class_order`.
      named: what a training file calls its net (`arch`), unchecked.
      images: fields of `flaxnets.config.Preprocess` that a training file gives.
    """

    state: dict[str, np.ndarray]
    layout: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    class_order: str | None = None
    named: str | None = None
    images: Mapping[str, Any] = field(default_factory=dict)


def to_canonical(loaded: object, *, ema: bool = True, approximate: bool = False) -> Canonical:
    """The tensors of a checkpoint under timm's names, whoever wrote it.

    Args:
      loaded: what `convert.pth.read_pth` or a safetensors file gives: a state dict, bare or within a
        training file.
      ema: of a training file that holds both, take the averaged weights rather than those as trained.
      approximate: accept weights of a net known to compute something else than the one here that has the
        same tensors (Cadene's SENets, mmdetection's Res2Net, style='caffe'); `notes` then say so.

    Raises:
      CheckpointError: there is no state dict or no telling which; it holds other things than tensors;
        two names turn into one; there are several nets; the net computes what none of those here does.
    """
    saved = unwrap(loaded, ema)
    tensors, notes = saved.tensors, [*saved.notes]
    names, beside, prefix = _split(_strip_wrappers(tensors, notes))
    head, beside = _head(beside, tensors)
    layout, translation = _publisher(names, head, beside, prefix)
    differences = [*saved.differences, *_differences(layout, names)]
    if differences and not approximate:
        raise CheckpointError('; '.join(differences))
    notes += differences
    names = _translate(names | head, translation)
    _check_distinct(names | beside)
    if layout != 'canonical':
        renamed = sum(name != new for name, new in names.items())
        owner = 'Cadene' if layout == 'cadene' else layout
        notes.append(f"renamed {count(renamed, 'name')} from {owner}'s")
    else:
        if prefix:
            notes.append(f'stripped {shown(prefix)} from {count(len(names) - len(head), "name")}')
        if head:
            notes.append(f'took {" and ".join(map(plain, head))} as the classifier')
    if beside:
        notes.append(f'left out {count(len(beside), "tensor")} beside the net: {_groups(beside.values())}')
    state = {new: tensors[name] for name, new in names.items()}
    if ANCHOR in state and 'fc.weight' not in state:
        notes.append('it has no classifier (fc.weight)')
    weight = state.get('fc.weight')
    classes, more = saved.classes.of(len(weight)) if weight is not None and weight.ndim else (None, ())
    order = None if classes else saved.classes.order
    return Canonical(state, layout, (*notes, *more), classes, order, saved.named, saved.images)


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
    plain_resnext = arch.block == 'resnext' and not (arch.se or arch.deep_stem or arch.avg_down)
    if layout == 'torchvision' and not plain_resnext:
        raise FlaxnetsError(
            'torchvision has plain ResNeXts only (one 7x7 stem, no SE gates, no pooled shortcuts), so no net '
            "that could load these weights; use layout 'timm' or 'mmpretrain'"
        )
    if layout != 'mmpretrain':
        return dict(state)
    translation: dict[str, str] = {}
    if arch.deep_stem:
        translation |= {timm: mm for mm, timm in _MMPRETRAIN_STEM.items()}
    if arch.avg_down and arch.block != 'res2net':  # mmpretrain's Res2Layer has a pool in every shortcut
        translation |= {timm: mm for mm, timm in _MMPRETRAIN_SHORTCUT.items()}
    for name in state:
        if gate := re.fullmatch(r'((layer\d+\.\d+)\.se\.fc([12]))\.\w+', name):
            translation[gate[1]] = f'{gate[2]}.se_layer.conv{gate[3]}.conv'
    names = _translate({name: name for name in state}, translation)
    _check_distinct(names)
    return {
        f'{"head" if new.startswith("fc.") else "backbone"}.{new}': state[name] for name, new in names.items()
    }


def caveat(layout: str, arch: Arch) -> str | None:
    """What the user must know of a net of `arch` in a layout of `from_canonical`; None if nothing."""
    if layout != 'mmpretrain':
        return None
    if arch.avd_first:
        return (
            "mmpretrain's ResNeSt pools after its split attention, this net before: the weights load there, "
            'but compute something else'
        )
    if arch.block == 'res2net' and arch.cardinality > 1:
        return "mmpretrain's Res2Net has no grouped convolutions: no net of it takes these weights"
    return None


_WRAPPERS = re.compile(r'^(?:(?:module|_orig_mod)\.)+(?=.)|(?<=\.)_orig_mod\.(?=.)')


def _strip_wrappers(tensors: Tensors, notes: list[str]) -> Names:
    """Takes off what DataParallel and torch.compile put before names, and the latter also within."""
    names = {name: _WRAPPERS.sub('', name) for name in tensors}
    stripped = Counter(''.join(_WRAPPERS.findall(name)) for name in tensors)
    notes += [f'stripped {shown(text)} from {count(n, "name")}' for text, n in stripped.items() if text]
    _check_distinct(names)
    return names


def _split(names: Names) -> tuple[Names, Names, str]:
    """The net's tensors with their common prefix taken off, the tensors beside the net, and the prefix."""
    prefixes = [new.removesuffix(ANCHOR) for new in names.values() if is_anchor(new)]
    if len(prefixes) > 1:
        listed = some([plain(prefix) for prefix in prefixes])
        raise CheckpointError(f'holds {len(prefixes)} nets, under {listed}: save the one that is meant alone')
    prefix = prefixes[0] if prefixes else ''
    inside = {name: new for name, new in names.items() if new.startswith(prefix) and new not in _COUNTERS}
    beside = {name: new for name, new in names.items() if name not in inside}
    return {name: new[len(prefix) :] for name, new in inside.items()}, beside, prefix


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
    if gates := _gates(layers, r'se_module\.fc([12])'):
        return 'cadene', gates | _CADENE
    if 'stem.0' in layers and 'stem.7' in layers:
        return 'mmdetection', _MMDETECTION_STEM
    translation = _gates(layers, r'se_layer\.conv([12])\.conv')
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


def _differences(layout: str, names: Names) -> list[str]:
    """What makes the publisher's net compute something else than ours of the same tensors."""
    if layout == 'cadene':
        return [_CADENE_POOL]
    if layout == 'mmdetection' and 'layer1.0.convs.0.weight' in names.values():
        return [_MMDETECTION_RES2NET]
    return []


def _gates(layers: Iterable[str], gate: str) -> dict[str, str]:
    """The two layers of each SE gate, which match `gate` within their block, as timm calls them."""
    found = (re.fullmatch(rf'(layer\d+\.\d+)\.{gate}', layer) for layer in layers)
    return {match[0]: f'{match[1]}.se.fc{match[2]}' for match in found if match}


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
                f'two tensors are both {plain(new)}: {plain(first[new])} and {plain(name)}; keep only one'
            )


def _group(name: str) -> str:
    return name.partition('.')[0]


def _groups(names: Iterable[str]) -> str:
    """'neck (40), rpn_head (6)': names counted by their first part."""
    counts = Counter(_group(name) for name in names)
    return some([plain(group) if n == 1 else f'{plain(group)} ({n})' for group, n in counts.items()])

"""Translates every publisher's tensor names to timm's, which are the canonical ones here, and back.

Modules around a net put a prefix before its names, which is stripped. Publishers name the same layers
differently, which is translated. No tensor is changed, and `Found.notes` says what was chosen, renamed or
left out.

A new publisher is a table of its layers' names below and a case in `_publisher`. If its stages are called
otherwise too, it also needs a form in `convert.names.anchors`; if its classifier is, a name in
`convert.names.heads`. docs/house.md has the whole list.

References: timm's `clean_state_dict`; the stems and `ResLayer`s of mmpretrain and mmdetection; Cadene's
`senet.py` (timm's `legacy_se*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flaxnets.errors import CheckpointError, FlaxnetsError, shown
from flaxnets.nets.arch import Arch
from flaxnets.words import count, plain, some

from .anchors import ANCHOR, WRAPPERS, Place, bare_names
from .found import Found, Tensors
from .heads import Head, find_head
from .wrappers import unwrap

Names = dict[str, str]  # a tensor's name in the file -> its name so far

LAYOUTS = ('timm', 'torchvision', 'mmpretrain')  # those that are written; many more are read (`_publisher`)

# Tensors under the net's prefix that do not belong to the net: counters of averaging (mmengine,
# torch.optim.swa_utils, ema_pytorch), losses and metrics.
_BESIDE = re.compile(
    r'(?:steps|n_averaged|initted|step|num_updates|decay)$'
    r'|(?:(?:train|val|valid|test)_)?(?:acc|accuracy|criterion|criterions|loss|loss_fn|loss_func|metric|metrics)\w*\.'
    r'|(?:queue|queue_ptr)$'
)

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
_DETECTRON2_STEM = {
    'stem.conv1': 'conv1',
    'stem.conv1.norm': 'bn1',
    'stem.conv1_1': 'conv1.0',
    'stem.conv1_1.norm': 'conv1.1',
    'stem.conv1_2': 'conv1.3',
    'stem.conv1_2.norm': 'conv1.4',
    'stem.conv1_3': 'conv1.6',
    'stem.conv1_3.norm': 'bn1',
    'stem.fc': 'fc',  # as tools/convert-torchvision-to-d2.py leaves it
}
# A stem called layer0, like a stage: Sequential(conv1, bn1, relu, maxpool).
_STEM_LIST = {'layer0.0': 'conv1', 'layer0.1': 'bn1'}
_CADENE = {'layer0.conv1': 'conv1', 'layer0.bn1': 'bn1', 'last_linear': 'fc'}
# In the first stage, where nothing shrinks, mmpretrain's shortcut has no pool and timm's has an identity in
# its place, so that the numbers of the layers differ by one.
_MMPRETRAIN_SHORTCUT = {
    'layer1.0.downsample.0': 'layer1.0.downsample.1',
    'layer1.0.downsample.1': 'layer1.0.downsample.2',
}
# First parts of the names beside a backbone of mmdetection or mmsegmentation.
_DETECTOR = {'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head'}

# Publishers' nets whose names and shapes all agree with ours, and which compute something else.
_CADENE_POOL = (
    "the names are Cadene's (timm's legacy_seresnext50_32x4d and others), whose nets pool their stem with "
    'MaxPool2d(3, 2, ceil_mode=True), those here with padding=1: with these weights they give other numbers'
)
_MMDETECTION_RES2NET = (
    "the names are those of mmdetection's Res2Net, which leaves out the average pool in the first block of "
    'layer1 (mmpretrain and the authors have it): weights that were trained there give other numbers here. '
    "The authors' own weights in its names (res2net101_v1d_26w_4s_mmdetv2) are right here"
)


_DETECTRON2_RESNEXT = (
    "the names are those of detectron2's ResNeXt, which takes images as BGR of 0 to 255, and may have its "
    'strides in the first 1x1 convolutions: the file does not say'
)


def to_canonical(
    loaded: object,
    *,
    ema: bool = True,
    approximate: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    drop_head: bool = False,
) -> Found:
    """The tensors of a checkpoint under timm's names, whoever wrote it.

    Args:
      loaded: what `convert.formats.pth.read_pth` or a safetensors file gives: a state dict, bare or within a
        training file.
      ema: take the averaged weights of a training file that holds both averaged and trained ones.
      approximate: accept weights of a net known to compute something else than the one here that has the
        same tensors (Cadene's SENets, mmdetection's Res2Net, mm's style='caffe'); `notes` then say so.
      key: which of several state dicts in a file to take, by the keys that lead to it: 'state.model'.
      prefix: which of several nets in a state dict to take, by what its names start with: 'encoder_q.'.
      drop_head: leave out a classifier that is not one linear layer, instead of refusing it.

    Raises:
      CheckpointError: there is no state dict, or several and nothing tells which is meant; something of the
        net is no tensor; two names turn into one; the net computes what none of those here does; its
        classifier is not one linear layer.
    """
    found = unwrap(loaded, ema, key, prefix)
    tensors, notes = found.state, [*found.notes]
    place = found.place or Place('layers', '', '')
    clean = _strip_wrappers(tensors, notes)
    names, beside = _split(clean, place)
    features = _features(names, tensors, place.form)
    head = find_head(found, clean, features, drop_head) if found.place else Head()
    names, beside = ({n: new for n, new in part.items() if n not in head.names} for part in (names, beside))
    layout, translation = _publisher(names, head.names, beside, place)
    ignored = drop_head or found.projection
    differences = [
        *found.differences,
        *(() if ignored else found.around),
        *_differences(layout, names, found.author),
    ]
    if differences and not approximate:
        raise CheckpointError('; '.join(differences))
    notes += differences
    names = _translate(names, translation)
    _check_distinct(names | beside)
    if layout != 'canonical':
        renamed = sum(name != new for name, new in names.items()) + len(head.names)
        owner = {'cadene': 'Cadene', 'children': 'a list of children'}.get(layout, layout)
        notes.append(f"renamed {count(renamed, 'name')} from {owner}'s")
    elif place.prefix:
        inside = len(names) + sum(clean[name].startswith(place.prefix) for name in head.names)
        notes.append(f'stripped {shown(place.prefix)} from {count(inside, "name")}')
    notes += head.notes
    if beside:
        notes.append(f'left out {count(len(beside), "tensor")} beside the net: {_groups(beside.values())}')
    state = {new: tensors[name] for name, new in names.items()} | head.tensors
    if ANCHOR in state and 'fc.weight' not in state:
        notes.append('it has no classifier (fc.weight)')
    weight = state.get('fc.weight')
    classes, more = found.said.of(len(weight)) if weight is not None and weight.ndim else (None, ())
    return replace(
        found,
        state=state,
        layout=layout,
        notes=(*notes, *more),
        headless=bool(head.names and not head.tensors),
        classes=classes,
        class_order=None if classes else found.said.order,
    )


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


def _strip_wrappers(tensors: Tensors, notes: list[str]) -> Names:
    """Names without what DataParallel, torch.compile and others put into them; notes say what that was."""
    names = bare_names(tensors)
    stripped = Counter(''.join(WRAPPERS.findall(name)) for name in tensors)
    notes += [f'stripped {shown(text)} from {count(n, "name")}' for text, n in stripped.items() if text]
    _check_distinct(names)
    return names


def _split(names: Names, place: Place) -> tuple[Names, Names]:
    """The net's tensors with their prefix taken off, and those beside the net."""
    prefix = place.prefix
    inside = {
        name: new[len(prefix) :]
        for name, new in names.items()
        if new.startswith(prefix) and not _BESIDE.match(new[len(prefix) :])
    }
    return inside, {name: new for name, new in names.items() if name not in inside}


def _features(names: Names, tensors: Tensors, form: str) -> int | None:
    """How many features the net gives: the channels of its last stage."""
    stage = {'children': '7', 'detectron2': 'res5'}.get(form, 'layer4')
    shapes = (tensors[name].shape for name, new in names.items() if new == f'{stage}.0.conv3.weight')
    return next((shape[0] for shape in shapes if shape), None)


def _publisher(names: Names, head: Iterable[str], beside: Names, place: Place) -> tuple[str, dict[str, str]]:
    """Whose names these are (`Found.layout`), and how to translate them: the publisher's layer -> timm's.

    Args:
      names: the net's tensors: name in the file -> name within the net.
      head: names in the file of its classifier's tensors.
      beside: tensors that do not belong to the net: name in the file -> name without wrappers.
      place: where the net is, and how its stages are named (`Place.form`).
    """
    layers = {new.rpartition('.')[0] for new in names.values()}
    if place.form == 'detectron2':
        return 'detectron2', _detectron2(layers)
    if place.form == 'children':
        return 'children', _children(layers)
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
    if stem := {layer: _STEM_LIST[layer[:8]] + layer[8:] for layer in layers if layer[:8] in _STEM_LIST}:
        return 'a list of the stem', stem
    if place.prefix == 'backbone.' and 'conv1' in layers:
        if any(_group(new) in _DETECTOR for new in beside.values()):
            return 'mmdetection', {}
        if any('head.fc.' in name for name in head):
            return 'mmpretrain', {}
    return 'canonical', {}


def _children(layers: Iterable[str]) -> dict[str, str]:
    """Layers of `nn.Sequential(*net.children())` as timm calls them."""
    stages = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
    out = {}
    for layer in layers:
        first, dot, rest = layer.partition('.')
        if first in stages:
            out[layer] = stages[first] + dot + rest
    return out


def _detectron2(layers: set[str]) -> dict[str, str]:
    """Layers of detectron2's ResNeSts (and ResNeXts) as timm calls them."""
    out = {}
    pooled = any(layer.endswith('.conv2.bn0') for layer in layers)  # the ResNeSts' shortcuts pool
    shortcut = ('downsample.1', 'downsample.2') if pooled else ('downsample.0', 'downsample.1')
    inner = {'conv1.norm': 'bn1', 'conv2.norm': 'bn2', 'conv3.norm': 'bn3'}
    inner |= {'shortcut': shortcut[0], 'shortcut.norm': shortcut[1]}
    for layer in layers:
        if match := re.fullmatch(r'res([2-5])\.(\d+)\.(.+)', layer):
            out[layer] = f'layer{int(match[1]) - 1}.{match[2]}.{inner.get(match[3], match[3])}'
        elif layer in _DETECTRON2_STEM:
            out[layer] = _DETECTRON2_STEM[layer]
    return out


def _differences(layout: str, names: Names, author: object) -> list[str]:
    """Why the publisher's net computes something else than ours from the same tensors, if it does."""
    if layout == 'detectron2' and not any('.conv2.bn0.' in name for name in names.values()):
        return [] if author == 'torchvision' else [_DETECTRON2_RESNEXT]
    if layout == 'cadene':
        return [_CADENE_POOL]
    if layout == 'mmdetection' and 'layer1.0.convs.0.weight' in names.values():
        return [_MMDETECTION_RES2NET]
    return []


def _gates(layers: Iterable[str], gate: str) -> dict[str, str]:
    """Translates the two layers of each SE gate; `gate` matches their names within a block."""
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

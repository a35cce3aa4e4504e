"""Translates every publisher's tensor names to timm's, which are the canonical ones here.

Modules around a net put a prefix before its names, which is stripped. Publishers name the same layers
differently, which is translated. No tensor is changed, and `Found.notes` says what was chosen, renamed or
left out.

A new publisher is a table of its layers' names below and a case in `_publisher`. One that calls the stages
otherwise is a record in `convert.names.stages` instead. docs/house.md has the whole list.

References: timm's `clean_state_dict`; the stems and `ResLayer`s of mmpretrain and mmdetection; Cadene's
`senet.py` (timm's `legacy_se*`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flaxnets.errors import CheckpointError, shown
from flaxnets.words import count, plain, some

from .anchors import WRAPPERS, Place, bare_names
from .found import Found, Tensors
from .heads import Head, find_head
from .stages import LAYERS
from .wrappers import unwrap

Names = dict[str, str]  # a tensor's name in the file -> its name so far

OPENMMLAB = ('mmpretrain', 'mmdetection')  # those of its layouts

# Tensors under the net's prefix that do not belong to the net: counters of averaging (mmengine,
# torch.optim.swa_utils, ema_pytorch), losses and metrics.
_BESIDE = re.compile(
    r'(?:steps|n_averaged|initted|step|num_updates|decay)$'
    r'|(?:(?:train|val|valid|test)_)?(?:acc|accuracy|criterion|criterions|loss|loss_fn|loss_func|metric|metrics)\w*\.'
    r'|(?:queue|queue_ptr)$'
)

# A publisher's layer -> timm's.
MMPRETRAIN_STEM = {
    'stem.0.conv': 'conv1.0',
    'stem.0.bn': 'conv1.1',
    'stem.1.conv': 'conv1.3',
    'stem.1.bn': 'conv1.4',
    'stem.2.conv': 'conv1.6',
    'stem.2.bn': 'bn1',
}
_MMDETECTION_STEM = {f'stem.{i}': f'conv1.{i}' for i in (0, 1, 3, 4, 6)} | {'stem.7': 'bn1'}
# A stem called layer0, like a stage: Sequential(conv1, bn1, relu, maxpool).
_STEM_LIST = {'layer0.0': 'conv1', 'layer0.1': 'bn1'}
_CADENE = {'layer0.conv1': 'conv1', 'layer0.bn1': 'bn1', 'last_linear': 'fc'}
# In the first stage, where nothing shrinks, mmpretrain's shortcut has no pool and timm's has an identity in
# its place, so that the numbers of the layers differ by one.
MMPRETRAIN_SHORTCUT = {
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
    place = found.place or Place(LAYERS, '', '')
    clean = _strip_wrappers(tensors, notes)
    names, beside = _split(clean, place)
    features = _features(names, tensors, place)
    head = find_head(found, clean, features, drop_head) if found.place else Head()
    names, beside = ({n: new for n, new in part.items() if n not in head.names} for part in (names, beside))
    layout, translation = _publisher(names, head.names, beside, place)
    ignored = drop_head or found.projection
    differences = [
        *found.differences,
        *(() if ignored else found.head_differences),
        *_differences(layout, names, found.author),
    ]
    if differences and not approximate:
        raise CheckpointError('; '.join(differences))
    notes += differences
    names = translate(names, translation)
    check_distinct(names | beside)
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
    if LAYERS.anchor in state and 'fc.weight' not in state:
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


def _strip_wrappers(tensors: Tensors, notes: list[str]) -> Names:
    """Names without what DataParallel, torch.compile and others put into them; notes say what that was."""
    names = bare_names(tensors)
    stripped = Counter(''.join(WRAPPERS.findall(name)) for name in tensors)
    notes += [f'stripped {shown(text)} from {count(n, "name")}' for text, n in stripped.items() if text]
    check_distinct(names)
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


def _features(names: Names, tensors: Tensors, place: Place) -> int | None:
    """How many features the net gives, the channels of its last stage; None if it has no such stage."""
    last = f'{place.stage_names.stages[-1]}.0.conv3.weight'
    shapes = (tensors[name].shape for name, new in names.items() if new == last)
    return next((shape[0] for shape in shapes if shape), None)


def _publisher(names: Names, head: Iterable[str], beside: Names, place: Place) -> tuple[str, dict[str, str]]:
    """Whose names these are (`Found.layout`), and how to translate them: the publisher's layer -> timm's.

    Args:
      names: the net's tensors: name in the file -> name within the net.
      head: names in the file of its classifier's tensors.
      beside: tensors that do not belong to the net: name in the file -> name without wrappers.
      place: where the net is, and what its stages are called.
    """
    layers = {new.rpartition('.')[0] for new in names.values()}
    if place.stage_names is not LAYERS:
        return place.stage_names.layout, place.stage_names.to_timm(layers)
    if gates := _in_blocks(layers, {r'se_module\.fc([12])': r'se.fc\1'}):
        return 'cadene', gates | _CADENE
    if 'stem.0' in layers and 'stem.7' in layers:
        return 'mmdetection', _MMDETECTION_STEM
    translation = _in_blocks(layers, {r'se_layer\.conv([12])\.conv': r'se.fc\1'})
    if 'stem.0.conv' in layers:
        translation |= MMPRETRAIN_STEM
    if {'layer1.0.downsample.0', 'layer2.0.downsample.2'} <= layers:
        translation |= MMPRETRAIN_SHORTCUT
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


def _differences(layout: str, names: Names, author: object) -> list[str]:
    """Why the publisher's net computes something else than ours from the same tensors, if it does."""
    if layout == 'detectron2' and not any('.conv2.bn0.' in name for name in names.values()):
        return [] if author == 'torchvision' else [_DETECTRON2_RESNEXT]
    if layout == 'cadene':
        return [_CADENE_POOL]
    if layout == 'mmdetection' and 'layer1.0.convs.0.weight' in names.values():
        return [_MMDETECTION_RES2NET]
    return []


def _in_blocks(layers: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Translates layers in blocks; `names` has patterns of names within a block, and timm's names there."""
    out = {}
    for layer in layers:
        block = re.match(r'layer\d+\.\d+\.', layer)
        for theirs, ours in names.items():
            if block and (match := re.fullmatch(theirs, layer[block.end() :])):
                out[layer] = block[0] + match.expand(ours)
    return out


def translate(names: Names, translation: Mapping[str, str]) -> Names:
    out = {}
    for name, new in names.items():
        layer, dot, leaf = new.rpartition('.')
        out[name] = translation.get(layer, layer) + dot + leaf
    return out


def check_distinct(names: Names) -> None:
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

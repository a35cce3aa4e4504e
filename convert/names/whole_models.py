"""Compares the layers of a pickled model with those of the nets here.

A state dict has tensors only. A model that was pickled whole also has each layer's class, strides, padding
and epsilon. The layers of the net are compared with ours, and so are those between the net and its classifier
and after it. A layer that is not known to compute the same as ours is a difference. The order in which a
model calls its layers is code, and stays unknown.

References: the blocks of torchvision's and timm's `resnet.py`, timm's `res2net.py` and `resnest.py`, their
authors' own, mmpretrain's and detectron2's backbones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flaxnets.errors import shown
from flaxnets.nets.layers import BN_EPSILON
from flaxnets.words import plain

from ..formats.modules import Layer, ModuleState
from .anchors import Place, bare_layer
from .heads import root_of
from .stages import StageNames

Layers = Mapping[str, Layer]

_SEQUENTIAL = 'Sequential'
# Layers of PyTorch that matter beside the net, where only the code says whether they are called.
_JUDGED = ('torch.nn.modules.activation.', 'torch.nn.modules.pooling.')
_NORM = re.compile(r'(?:Frozen|Sync|NaiveSync|Synchronized)?BatchNorm(?:1d|2d)?')
_IDLE = re.compile(  # layers that change nothing in evaluation
    r'Identity|Flatten|Sequential|ModuleList|ModuleDict|(?:Alpha)?Dropout\w*|DropPath|DropBlock\w*|StochasticDepth'
)
_LOSS = re.compile(r'\w*(?:Loss|Accuracy|Metric|MetricCollection|CrossEntropy)')
_OUTPUT = ('Softmax', 'LogSoftmax', 'Sigmoid', 'LogSigmoid')  # after a classifier: here it gives logits
_RADIX_SOFTMAX = ('RadixSoftmax', 'rSoftMax', 'RSoftmax')  # timm's, the authors', OpenMMLab's
# Names that activations have in all publishers' nets.
_ACTIVATION = re.compile(r'(?:act|relu|activation|activate)\d*')
_POOL = re.compile(r'(?:global_?|avg|adaptive_?)?_?pool(?:ing)?|gap')


def differences(model: ModuleState, place: Place) -> tuple[list[str], list[str]]:
    """The layers that differ from ours, in words: of the net at `place`, and around its classifier."""
    layers = {bare_layer(name): layer for name, layer in model.layers.items() if name}
    body = _body(layers, place)
    rest = {name: layer for name, layer in layers.items() if name not in body}
    sequentials = _sequentials(layers, model.layers[''], place)
    keepers = {name.rpartition('.')[0] for name in model.statistics}  # they normalise images
    own = [
        (place.prefix + name, what)
        for name, what in _of_body({n[len(place.prefix) :]: x for n, x in body.items()}, place.stage_names)
        if place.prefix + name not in keepers
    ]
    ahead = [
        (name, f'is {layer.kind}, before the net')
        for name, layer in rest.items()
        if _distance(name, sequentials) < 0
        and not (layer.has_layers or name in keepers or _IDLE.fullmatch(layer.kind))
    ]
    return _told([*ahead, *own]), _told(_of_classifier(rest, sequentials, place.prefix))


def _body(layers: Layers, place: Place) -> dict[str, Layer]:
    """The net's own layers: those with its names, and layers without tensors that come before its stages."""
    names = [name for name in layers if name.startswith(place.prefix)]
    in_stage = (place.stage_names.has_in_stage(name[len(place.prefix) :]) for name in names)
    first = next((i for i, found in enumerate(in_stage) if found), 0)
    return {
        name: layers[name]
        for i, name in enumerate(names)
        if place.is_body(f'{name}.') or (i < first and not layers[name].has_tensors)
    }


def _told(found: Iterable[tuple[str, str]]) -> list[str]:
    return [f'{plain(name)} {what}' for name, what in found]


# The net's own layers.


def _of_body(body: Layers, stage_names: StageNames) -> Iterator[tuple[str, str]]:
    blocks: dict[tuple[int, str], dict[str, Layer]] = {}
    stem: dict[str, Layer] = {}
    for name, layer in body.items():
        block = stage_names.block_of(name)
        (blocks.setdefault(block, {}) if block else stem)[name] = layer
        if said := _of_layer(name, layer):
            yield name, said
    yield from _of_stem(stem, stage_names)
    for (stage, number), block_layers in blocks.items():
        start = f'{stage_names.stages[stage]}.{number}.'
        first = number == '0'
        stride = 2 if first and stage > 0 else 1
        inner = {name[len(start) :]: layer for name, layer in block_layers.items()}
        yield from ((start + name, said) for name, said in _of_block(inner, first, stride))


def _of_layer(name: str, layer: Layer) -> str | None:
    """What makes a layer differ from ours wherever in the net it stands; None if nothing does."""
    own, kind = name.rpartition('.')[2], layer.kind
    if layer.has_tensors:
        return _of_tensors(layer)
    if layer.has_layers:
        return None
    if _ACTIVATION.fullmatch(own) and not _in_gate(name):
        return None if kind in ('ReLU', 'Identity') else f'is {kind}'
    if kind == 'ReLU' or kind in _RADIX_SOFTMAX or any(idle.fullmatch(kind) for idle in (_IDLE, _LOSS)):
        return None
    if kind == 'MaxPool2d':
        return _unless(layer, kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)
    if kind == 'AvgPool2d':
        return _of_average_pool(layer)
    if kind == 'AdaptiveAvgPool2d':  # in a gate
        return _unless(layer, output_size=1)
    gates = _in_gate(name) and kind == 'Sigmoid'
    return None if gates or (own == 'rsoftmax' and kind == 'Softmax') else f'is {kind}'


def _in_gate(name: str) -> bool:
    return any(part in ('se', 'se_layer', 'se_module') for part in name.split('.'))


def _of_tensors(layer: Layer) -> str | None:
    if _NORM.fullmatch(layer.kind):
        return _unless(layer, eps=BN_EPSILON)
    if layer.kind != 'Conv2d':
        return None if layer.kind == 'Linear' else f'is {layer.kind}'
    kernel = _pair(layer.settings.get('kernel_size')) or (1, 1)
    padding = tuple(side // 2 for side in kernel)
    return _unless(layer, padding=padding, dilation=1, padding_mode='zeros')


def _of_average_pool(layer: Layer) -> str | None:
    """Average pools: of shortcuts (2x2 with stride 2, or 1x1), and those of 3x3 in the blocks."""
    kernel = _pair(layer.settings.get('kernel_size'))
    if kernel == (3, 3):
        return _unless(layer, padding=1, ceil_mode=False, count_include_pad=True, divisor_override=None)
    if kernel == (1, 1):
        return _unless(layer, stride=1, padding=0, divisor_override=None)
    return _unless(layer, kernel_size=2, stride=2, padding=0, ceil_mode=True, divisor_override=None)


def _of_stem(stem: Layers, stage_names: StageNames) -> Iterator[tuple[str, str]]:
    convolutions = [(name, layer) for name, layer in stem.items() if layer.kind == 'Conv2d']
    for i, (name, layer) in enumerate(convolutions):
        if said := _unless(layer, stride=2 if i == 0 else 1):
            yield name, said
    leaves = {n: x for n, x in stem.items() if not x.has_layers and not x.has_tensors}
    active = re.compile(f'{stage_names.activations}|{_ACTIVATION.pattern}')
    for name, layer in leaves.items():
        if active.fullmatch(name) and layer.kind == 'Identity':
            yield name, f'is {layer.kind}, not ReLU'
    pools = [name for name, layer in leaves.items() if layer.kind == 'MaxPool2d']
    if len(pools) != 1 and stage_names.pools_in_layer:
        yield 'the stem', f'has {len(pools)} layers MaxPool2d, not one'


def _of_block(block: Layers, first: bool, stride: int) -> Iterator[tuple[str, str]]:
    """Checks a block's activations, pools and strides, in its branch and its shortcut.

    Args:
      block: its layers by their names within it.
      first: whether it is the first of its stage.
      stride: that it must have, in the 3x3 convolution or in the pool beside it, and in the shortcut.
    """
    shortcut = {n: x for n, x in block.items() if n.startswith(('downsample', 'shortcut'))}
    branch = {n: x for n, x in block.items() if n not in shortcut}
    middle = {n: x for n, x in branch.items() if _kernel(x) == 3 and x.kind == 'Conv2d'}
    pools = {n: x for n, x in branch.items() if x.kind == 'AvgPool2d'}
    splits = any(name.startswith('convs.') for name in middle)  # Res2Net
    attends = any(name.startswith('conv2.') for name in middle)  # ResNeSt
    if not middle:
        return
    for name, layer in block.items():
        own = name.rpartition('.')[2]
        # ResNeSt's activation behind conv2 is in its split attention.
        if layer.kind == 'Identity' and _ACTIVATION.fullmatch(own) and not (attends and name == 'act2'):
            yield name, 'is Identity, not ReLU'
        if layer.kind == 'MaxPool2d':
            yield name, 'is MaxPool2d'
    for name, layer in branch.items():
        if layer.kind == 'Conv2d' and name not in middle and (said := _unless(layer, stride=1)):
            yield name, said
    wanted = int(first) if splits else int(attends and stride > 1)
    if len(pools) != wanted:
        yield next(iter(middle)), f'has {len(pools)} AvgPool2d beside it, not {wanted}'
    for name, layer in (*middle.items(), *pools.items()):
        pooled = attends and name in middle
        if said := _unless(layer, stride=1 if pooled else stride):
            yield name, said
    pools = {n: x for n, x in shortcut.items() if x.kind == 'AvgPool2d'}
    for name, layer in shortcut.items():
        if layer.kind == 'Conv2d':
            after_pool = bool(pools) or name == 'downsample.1'
            if said := _unless(layer, stride=1 if after_pool else stride):
                yield name, said
            if after_pool and stride > 1 and not pools:
                yield name, f'is not after AvgPool2d({stride}, {stride})'
    for name, layer in pools.items():
        if said := _unless(layer, stride=stride):
            yield name, said


# What stands around the net.


def _sequentials(layers: Layers, outermost: Layer, place: Place) -> list[tuple[str, int]]:
    """The `nn.Sequential`s around the net: the prefix of each, and the net's position in it."""
    out = []
    parts = place.prefix.split('.')[:-1]
    for depth, part in enumerate(parts):
        outer = '.'.join(parts[:depth])
        if layers.get(outer, outermost).kind == _SEQUENTIAL and part.isdigit():
            out.append((f'{outer}.' if outer else '', int(part)))
    return out


def _distance(name: str, sequentials: Iterable[tuple[str, int]]) -> int:
    """How many places after the net a layer is in an `nn.Sequential`; negative before it, 0 if in none."""
    for outer, number in sequentials:
        first = name[len(outer) :].partition('.')[0]
        if name.startswith(outer) and first.isdigit() and int(first) != number:
            return int(first) - number
    return 0


def _of_classifier(
    rest: Layers, sequentials: Sequence[tuple[str, int]], prefix: str
) -> Iterator[tuple[str, str]]:
    """Differences of layers in heads, beside heads, and after the net in an `nn.Sequential`."""
    heads = {name: root for name in rest if (root := root_of(f'{name}.weight', prefix))}
    dense = {root for name, root in heads.items() if _kernel(rest[name]) not in (None, 1)}
    heads = {name: root for name, root in heads.items() if root not in dense}
    last = next((name for name in reversed(heads) if rest[name].has_tensors), None)
    levels = {prefix, *(_level(root) for name, root in heads.items() if rest[name].has_tensors)}
    passed = False
    for name, layer in rest.items():
        behind = name in heads or _distance(name, sequentials) > 0
        if layer.has_layers and not layer.has_tensors:
            continue
        if name in heads and layer.has_tensors:
            said = _of_head(layer)
        elif behind:
            said = _after(layer) if passed else _between(layer)
        else:
            said = _beside(name, layer, levels)
        passed |= name == last
        if said:
            yield name, said


def _level(root: str) -> str:
    """Where a head stands: '' for 'fc', 'model.' for 'model.fc'."""
    return root[: root.rfind('.') + 1]


def _of_head(layer: Layer) -> str | None:
    if _NORM.fullmatch(layer.kind):
        return _unless(layer, eps=BN_EPSILON)
    if layer.kind == 'Conv2d':
        return _unless(layer, stride=1, padding=0)
    known = ('Linear', 'NonDynamicallyQuantizableLinear')
    return None if layer.kind in known or layer.has_layers else f'is {layer.kind}'


def _between(layer: Layer) -> str | None:
    """A layer between the pooled features and a head's first layer: a ReLU changes nothing there."""
    if layer.kind == 'ReLU' or _IDLE.fullmatch(layer.kind) or _LOSS.fullmatch(layer.kind):
        return None
    if layer.kind in ('AdaptiveAvgPool1d', 'AdaptiveAvgPool2d'):
        return _unless(layer, output_size=1)
    if layer.kind == 'AvgPool2d' and _pair(layer.settings.get('kernel_size')) == (7, 7):
        return _unless(layer, padding=0)  # global for the 7x7 map of inputs of 224 pixels
    average = layer.kind in ('FastAdaptiveAvgPool', 'FastAdaptiveAvgPool2d', 'GlobalAvgPool2d')
    return None if average else f'is {layer.kind}'


def _after(layer: Layer) -> str | None:
    """A layer after the classifier's last one with tensors."""
    idle = layer.kind in _OUTPUT or _IDLE.fullmatch(layer.kind) or _LOSS.fullmatch(layer.kind)
    return None if idle else f'is {layer.kind}'


def _beside(name: str, layer: Layer, levels: Iterable[str]) -> str | None:
    """A layer beside the net or a head, where only the model's code says whether and when it is called.

    PyTorch's own activations and pools are judged there, and whatever is called a pool.
    """
    for level in levels:
        inner = name[len(level) :].split('.')
        nested = len(inner) > 1 and inner[0] != 'neck' and not _POOL.fullmatch(inner[0])
        if not name.startswith(level) or nested:
            continue
        if layer.made_by.startswith(_JUDGED) and layer.kind not in _OUTPUT:
            return _between(layer)
        if 'Pool' in layer.kind or any(map(_POOL.fullmatch, inner)):
            return _between(layer)
    return None


# Settings.


def _unless(layer: Layer, **expected: Any) -> str | None:
    """'is Conv2d with stride=1' if a setting differs; one that is missing (old PyTorch) is as expected."""
    found = []
    for name, value in expected.items():
        got = layer.settings.get(name, value)
        if got != value and _pair(got) != (_pair(value) or ()):
            found.append(f'{name}={shown(got)}')
    return f'is {layer.kind} with {", ".join(found)}' if found else None


def _pair(value: object) -> tuple[Any, ...] | None:
    """(height, width) of one number for both, or of two."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 2 else None


def _kernel(layer: Layer) -> object:
    return (_pair(layer.settings.get('kernel_size')) or (None,))[0]

"""Reduces classifiers of every make to the one linear layer that the nets here have, where that is exact.

What stands after the pooled features is read as a chain of layers: linear layers and 1x1 convolutions (with
weight or spectral norm or a mask, with or without a bias) and BatchNorm, in the order of their numbers in an
`nn.Sequential`. Without anything between them they are one linear layer. A layer that has any other tensor is
none of these, and its head is refused.

A layer without tensors leaves no trace in a state dict but a gap in the numbers: before the first layer it is
harmless (dropout, flattening, or a ReLU of features that are averages of what a ReLU gave), between two it
may be a ReLU. A function called between two layers of an `nn.ModuleList` leaves none at all: two linear
layers are one only where a pickled model says that they are in an `nn.Sequential`.

Reference: `torch.nn.utils.weight_norm`, `spectral_norm`, `prune`, `torch.nn.BatchNorm1d` in evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from flaxnets.errors import CheckpointError
from flaxnets.nets.layers import BN_EPSILON
from flaxnets.words import count, plain, some

from .found import Found, Tensors
from .stages import CHILDREN
from .tree import COUNTER

# What classifiers are called: 'fc' by timm, the rest by others. Heads of detectors and decoders are left out.
_CLASSIFIERS = frozenset(
    [
        'fc',
        'head',
        'heads',
        'classifier',
        'classifiers',
        'last_linear',
        'linear',
        'lin',
        'logits',
        'cls',
        'clf',
        'cls_head',
        'clf_head',
        'fc_head',
        'head_fc',
        'output',
        'out',
        'output_layer',
        'out_layer',
        'final',
        'final_layer',
        'last_layer',
        'classification_head',
        'class_head',
        'fc_out',
        'fc_cls',
        'new_fc',
        'dense',
        'top',
        'mlp',
        'mlp_head',
        'model_head',
    ]
)
_LAST_CHILD = int(CHILDREN.stages[-1])  # in a list of children, the classifier comes after the last stage
_SEQUENTIAL = 'torch.nn.modules.container.Sequential'
_HARMLESS = frozenset(['Dropout', 'AlphaDropout', 'Identity', 'Flatten', 'Sequential', 'ModuleList'])
_LEAF = re.compile(r'(?:(.*?)\.)?(parametrizations\..+|[^.]+)')

# The tensors of a linear layer but its bias; the first is the matrix, the next what it is multiplied with.
_NEW = 'parametrizations.weight'
_PLAIN = ('weight',)
_MASKED = ('weight_orig', 'weight_mask')
_WEIGHT_NORMS = (('weight_v', 'weight_g'), (f'{_NEW}.original1', f'{_NEW}.original0'))
_SPECTRAL_NORMS = (
    ('weight_orig', 'weight_u', 'weight_v'),
    (f'{_NEW}.original', f'{_NEW}.0._u', f'{_NEW}.0._v'),
)
_LINEAR = (_PLAIN, _MASKED, *_WEIGHT_NORMS, *_SPECTRAL_NORMS)
_NORM = (
    frozenset(['running_mean', 'running_var']),
    frozenset(['running_mean', 'running_var', 'weight', 'bias']),
)


@dataclass
class HeadLayer:
    """One layer of a head: its path, and its tensors by leaf ('weight', 'bias', ...)."""

    path: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """'linear', 'norm' (BatchNorm) or 'other'."""
        if frozenset(self.tensors) in _NORM:
            width = self.tensors['running_var'].shape
            same = len(width) == 1 and all(tensor.shape == width for tensor in self.tensors.values())
            return 'norm' if same else 'other'
        return 'linear' if self._fits(self._leaves()) else 'other'

    def _leaves(self) -> tuple[str, ...]:
        """Which of `_LINEAR` its tensors are; none if it has any other, or lacks one."""
        own = set(self.tensors) - {'bias'}
        return next((leaves for leaves in _LINEAR if own == set(leaves)), ())

    def _fits(self, leaves: tuple[str, ...]) -> bool:
        """Whether the shapes are those of a linear layer."""
        if not leaves:
            return False
        matrix, *more = (self.tensors[leaf].shape for leaf in leaves)
        if len(matrix) not in (2, 4) or matrix[2:] not in ((), (1, 1)):
            return False
        if leaves == _MASKED and more != [matrix]:
            return False
        if leaves in _SPECTRAL_NORMS and more != [matrix[:1], matrix[1:2]]:
            return False
        if leaves in _WEIGHT_NORMS:  # one number, or one for each row or column
            one_each = [tuple(n if i == axis else 1 for i, n in enumerate(matrix)) for axis in (0, 1)]
            if more[0] not in ((), *one_each):
                return False
        return 'bias' not in self.tensors or self.tensors['bias'].shape == matrix[:1]

    @property
    def takes(self) -> int:
        """How many features its matrix takes, whatever the kind of layer; 0 if it has no matrix."""
        leaves = self._leaves()
        matrices = leaves[:1] or [leaf for leaf in self.tensors if leaf.startswith(('weight', _NEW))]
        shapes = [self.tensors[leaf].shape for leaf in matrices]
        return max((shape[1] for shape in shapes if len(shape) in (2, 4)), default=0)

    def matrix(self) -> tuple[np.ndarray, np.ndarray, np.dtype]:
        """Weight [O, I] and bias [O] of a linear layer in float64, and the dtype that they were stored in."""
        leaves = self._leaves()
        dtype = self.tensors[leaves[0]].dtype
        matrix, *more = (self.tensors[leaf].astype(np.float64) for leaf in leaves)
        if leaves == _MASKED:
            matrix = matrix * more[0]
        elif leaves in _WEIGHT_NORMS:
            (scale,) = more
            axes = tuple(i for i, n in enumerate(scale.shape) if n == 1) if scale.ndim else None
            matrix = matrix * (scale / np.sqrt((matrix**2).sum(axis=axes, keepdims=True)))
        elif leaves in _SPECTRAL_NORMS:
            u, v = more
            matrix = matrix / (u @ matrix.reshape(len(u), -1) @ v)
        matrix = matrix.reshape(matrix.shape[:2])
        bias = self.tensors.get('bias')
        return matrix, np.zeros(len(matrix)) if bias is None else bias.astype(np.float64), dtype

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and offset of a BatchNorm in evaluation, in float64."""
        t = {leaf: tensor.astype(np.float64) for leaf, tensor in self.tensors.items()}
        factor = t.get('weight', 1.0) / np.sqrt(t['running_var'] + BN_EPSILON)
        return factor, t.get('bias', 0.0) - t['running_mean'] * factor


@dataclass
class Head:
    """A classifier that was found.

    Attributes:
      names: the names of its tensors in the file.
      tensors: 'fc.weight' [O, I] and 'fc.bias' [O]; nothing if it was left out.
      notes: what was found, and what was done with it, in words.
    """

    names: list[str] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_head(found: Found, clean: Mapping[str, str], features: int | None, drop: bool) -> Head:
    """The classifier among tensors that are not of the net's body.

    Args:
      found: the tensors of a file, and where among them the net is.
      clean: name in the file -> name without wrappers.
      features: how many features the net gives; None if that is unknown.
      drop: leave out a classifier that is not one linear layer, instead of raising.

    Returns:
      The classifier; an empty one if there is none.

    Raises:
      CheckpointError: there is a classifier that is not one linear layer, or there are several.
    """
    assert found.place is not None
    prefix, tensors = found.place.prefix, found.state
    names = found.place.beside(clean)
    chains = _chains(names, tensors, prefix)
    widths: dict[str, list[int]] = {}
    if features is not None:
        widths = {root: [features, 2 * features] for root in chains}
    own = tensors.get(next((name for name, clean in names.items() if clean == f'{prefix}fc.weight'), ''))
    if own is not None and own.ndim:
        for root in widths:  # a layer that takes the classifier's outputs
            widths[root] += [len(own)] if root != f'{prefix}fc' else []
    heads = {root: chain for root, chain in chains.items() if _is_classifier(chain, widths.get(root))}
    if not heads:
        return Head()
    norms = {layer.path for chain in heads.values() for layer in chain if layer.kind == 'norm'}
    used = [
        name
        for name, clean in names.items()
        if root_of(clean, prefix) in heads
        and (not clean.endswith(COUNTER) or clean.removesuffix(COUNTER) in norms)
    ]
    if found.projection:
        return Head(used, {}, [f'left out {some(list(heads))}, which self-supervised training projects with'])
    chain = [layer for layers in heads.values() for layer in layers]
    if _is_own(chain, prefix) and chain[0].kind == 'other' and not drop:
        return Head()  # its shapes are judged with those of the net's other layers
    if len(heads) > 1 and not _follow(heads, prefix):
        problem: str | None = f'it has several classifiers: {some(list(heads))}'
    else:
        problem = _problem(chain, features, found.bare, found.kinds)
    if problem and drop:
        return Head(used, {}, [f'dropped the head: {problem}'])
    if problem:
        raise CheckpointError(f'{problem}. drop_head=True takes the net without it')
    reduced, notes = _reduced(chain, f'{prefix}fc')
    if len(heads) > 1 and not found.kinds:
        notes.append(
            f'took {" and ".join(heads)} for an nn.Sequential, as they are numbered: nothing between'
        )
    return Head(used, reduced, notes)


def _is_own(chain: Sequence[HeadLayer], prefix: str) -> bool:
    """Whether these are the classifier of the net itself, with a weight and a bias of whatever shapes."""
    own = [layer.path for layer in chain] == [f'{prefix}fc']
    return own and chain[0].tensors.keys() <= {'weight', 'bias'}


def root_of(name: str, prefix: str) -> str | None:
    """The classifier that a name belongs to, 'fc', 'head' or its number beside the net; None if to none."""
    place = prefix
    while True:
        if name.startswith(place):
            inner = name[len(place) :]
            first = inner.partition('.')[0]
            if first in _CLASSIFIERS and '.' in inner:
                return place + first
            beside = prefix[len(place) :].rstrip('.')
            if first.isdigit() and '.' in inner and beside.isdigit() and int(first) > int(beside):
                return f'{place}{first}'
            if place == prefix and first.isdigit() and int(first) > _LAST_CHILD and '.' in inner:
                return f'{place}{first}'
        if not place:
            return None
        place = place[: place.rstrip('.').rfind('.') + 1]


def _chains(names: Mapping[str, str], tensors: Tensors, prefix: str) -> dict[str, list[HeadLayer]]:
    """The layers of each classifier, in the file's order."""
    roots: dict[str, dict[str, HeadLayer]] = {}
    for name, clean in names.items():
        root = root_of(clean, prefix)
        match = _LEAF.fullmatch(clean)
        if root is None or match is None or match[2] == COUNTER[1:]:
            continue
        path = match[1] or ''
        layer = roots.setdefault(root, {}).setdefault(path, HeadLayer(path))
        layer.tensors[match[2]] = tensors[name]
    return {root: list(layers.values()) for root, layers in roots.items()}


def _is_classifier(chain: Sequence[HeadLayer], widths: Sequence[int] | None) -> bool:
    """Whether these layers turn pooled features into numbers, rather than maps into maps."""
    takes = [layer.takes for layer in chain if layer.takes]
    shapes = [tensor.shape for layer in chain for tensor in layer.tensors.values()]
    if not takes or any(len(shape) == 4 and shape[2:] != (1, 1) for shape in shapes):
        return False
    # Without convolutions it is a classifier, even if it takes more than the net's features.
    return widths is None or takes[0] in widths or all(len(shape) <= 2 for shape in shapes)


def _follow(found: Mapping[str, Sequence[HeadLayer]], prefix: str) -> bool:
    """Whether two heads are the net's own classifier and one after it, in an `nn.Sequential`."""
    if len(found) != 2:
        return False
    (first, own), (second, after) = found.items()
    own_linear, after_linear = ([x for x in layers if x.kind == 'linear'] for layers in (own, after))
    return (
        second == _following(prefix)
        and first.startswith(prefix)
        and len(own) == len(after) == len(own_linear) == len(after_linear) == 1
        and after[0].path == second
    )


def _following(prefix: str) -> str:
    """The name of the layer after the net in an `nn.Sequential`; '' if the net is in none."""
    place, number = prefix.rstrip('.').rpartition('.')[::2]
    return f'{place}.{int(number) + 1}'.lstrip('.') if number.isdigit() else ''


def _problem(
    chain: Sequence[HeadLayer], features: int | None, bare: Mapping[str, str], kinds: Mapping[str, str]
) -> str | None:
    """Why the layers are not one linear layer; None if they are."""
    listed = some([f'{plain(layer.path)} ({_said(layer)})' for layer in chain])
    odd = [layer for layer in chain if layer.kind == 'other']
    if odd and all(layer.tensors.keys() <= {'weight', 'bias'} and layer.takes for layer in odd):
        return f'its head has a weight and a bias whose shapes do not fit each other: {listed}'
    if odd:
        return f'its head is more than a linear layer: {listed}'
    first = next(layer for layer in chain if layer.kind == 'linear')
    if features is not None and first.takes != features:
        pooled = ', as of pools by average and by maximum side by side' if first.takes == 2 * features else ''
        return f'its head {listed} takes {first.takes} features, and the net gives {features}{pooled}'
    if sum(layer.kind == 'linear' for layer in chain) > 1 and not _in_sequential(chain, kinds):
        return f'its head has several layers, and no telling whether a ReLU is between them: {listed}'
    for before, after in pairwise(chain):
        between = _between(before.path, after.path, bare)
        if between is None:
            return f'its head has {count(len(chain), "layer")}, and no telling what is between them: {listed}'
        if between:
            return f'its head has {between} between its layers: {listed}'
    width = features
    for layer in chain:
        size = layer.takes if layer.kind == 'linear' else len(layer.tensors['running_var'])
        if width is not None and size != width:
            return f'its head has layers that do not fit each other: {listed}'
        if layer.kind == 'linear':
            width = layer.matrix()[0].shape[0]
    return None


def _in_sequential(chain: Sequence[HeadLayer], kinds: Mapping[str, str]) -> bool:
    """Whether layers are called one after the other, by what a pickled model says or by their names."""
    if len(chain) == 2 and (chain[0].path, chain[1].path) == ('0.fc', '1') and not kinds:
        return True  # a file of `nn.Sequential(net, nn.Linear(...))`
    return all(kinds.get(layer.path.rpartition('.')[0]) == _SEQUENTIAL for layer in chain[1:])


def _between(before: str, after: str, bare: Mapping[str, str]) -> str | None:
    """What is between two layers of a Sequential: '' if nothing that computes, None if that is unknown."""
    (parent, first), (other, second) = (path.rpartition('.')[::2] for path in (before, after))
    if other == parent and first.isdigit() and second.isdigit():
        start = f'{parent}.' if parent else ''
        gap = [f'{start}{i}' for i in range(int(first) + 1, int(second))]
        if not gap:
            return ''
        if not all(layer in bare for layer in gap):
            return 'a layer without tensors, such as a ReLU,'
        return some(sorted({bare[layer] for layer in gap} - _HARMLESS)) or ''
    if second.isdigit() and before.endswith('.fc'):
        return ''  # a net and the layer after it (`_follow`)
    return None


def _said(layer: HeadLayer) -> str:
    if layer.kind == 'norm':
        return 'BatchNorm'
    if layer.kind == 'linear':
        return f'linear {layer.takes} to {len(layer.matrix()[0])}'
    return some([f'{leaf} {"x".join(map(str, t.shape))}' for leaf, t in layer.tensors.items()], 3)


def _reduced(chain: Sequence[HeadLayer], usual: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The layers as one linear layer, and notes. A single plain layer keeps its numbers bit by bit."""
    called = some([plain(layer.path) for layer in chain])
    notes = [] if called == usual else [f'took {called} as the classifier']
    if len(chain) == 1 and chain[0].tensors.keys() <= {'weight', 'bias'}:
        weight = chain[0].tensors['weight']
        bias = chain[0].tensors.get('bias')
        if bias is None:
            notes.append(f'{called} has no bias: zeros')
            bias = np.zeros(len(weight), weight.dtype)
        if weight.ndim == 4:
            notes.append(f'{called} is a 1x1 convolution, which is a linear layer after the pool')
            weight = weight.reshape(weight.shape[:2])
        return {'fc.weight': weight, 'fc.bias': bias}, notes
    total, offset, dtype = None, np.zeros(()), None
    for layer in chain:
        if layer.kind == 'linear':
            matrix, bias, dtype = layer.matrix()
            offset = bias if total is None and not offset.ndim else matrix @ offset + bias
            total = matrix if total is None else matrix @ (total if total.ndim == 2 else np.diag(total))
        else:
            factor, shift = layer.affine()
            factor, shift = np.broadcast_arrays(factor, shift)
            offset = shift if not offset.ndim else offset * factor + shift
            spread = factor if total is None or total.ndim == 1 else factor[:, None]
            total = spread if total is None else total * spread
    assert total is not None and dtype is not None
    notes.append(
        f'folded {called} into one linear layer: equal but for rounding, computed in float64, kept in {dtype}'
    )
    return {'fc.weight': total.astype(dtype), 'fc.bias': offset.astype(dtype)}, notes

"""Which architecture the tensors of a checkpoint belong to, by their names and shapes.

A few shapes determine every field of `Arch` but one: whether a ResNeSt pools before or after its split
attention leaves no trace in its tensors. A name settles that, or the user is asked.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

from flaxnets import zoo
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.nets.arch import Arch
from flaxnets.nets.blocks import EXPANSION
from flaxnets.words import plain, some

from .layouts import OPENMMLAB
from .stages import LAYERS
from .tree import State

Traits = dict[str, Any]  # a field of `Arch` -> its value; None where the tensors have none that fits

# A kind of block -> its spelling, the 3x3 convolution that tells it from others, all of its layers.
_KINDS = {
    'resnext': ('ResNeXt', 'conv2.weight', {'conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3', 'downsample'}),
    'res2net': ('Res2Net', 'convs.0.weight', {'conv1', 'bn1', 'convs', 'bns', 'conv3', 'bn3', 'downsample'}),
    'resnest': ('ResNeSt', 'conv2.conv.weight', {'conv1', 'bn1', 'conv2', 'conv3', 'bn3', 'downsample'}),
}


def identify(state: State, hint: str | None = None, *, layout: str | None = None) -> str:
    """The architecture, a key of `flaxnets.zoo.NETS`, whose tensors these are.

    The number of classes and of input channels do not matter, nor do a missing classifier or a few
    missing tensors.

    Args:
      state: timm's names (`convert.names.layouts.to_canonical`).
      hint: what may name the net where shapes cannot tell two apart: a file's name, or what a training
        file calls its net. It decides between such candidates and nothing else.
      layout: whose names they were (`Found.layout`). OpenMMLab's ResNeSts all pool after their split
        attention, so that the names tell what the shapes do not.

    Raises:
      CheckpointError: it is none of these nets; the message names the nearest, and what differs.
      FlaxnetsError: two architectures have these tensors and no hint tells which one is meant, or the
        hint contradicts the layout.
    """
    traits = _traits(state)
    found = _candidates(traits)
    if not found:
        raise CheckpointError(_unknown(state, traits))
    named = _named(hint, found)
    if layout in OPENMMLAB:
        after = [name for name in found if not zoo.NETS[name].avd_first]
        if not after or named not in (None, *after):
            name = named or found[0]
            raise FlaxnetsError(
                f'it has the tensors of {name}, which pools before its split attention, but the names of '
                f"{layout}'s ResNeSts, which pool after it. If it is {name} all the same, say so "
                f'(model={name!r})'
            )
        found = after
    meant = found[0] if len(found) == 1 else named
    if meant is None:
        alike = len({replace(zoo.NETS[name], avd_first=False) for name in found}) == 1
        why = (
            'their tensors look alike, but they compute different things' if alike else 'tensors are missing'
        )
        raise FlaxnetsError(
            f'it may be {some(found, 6, " or ")}: {why}. Say which one it is, as with model={found[0]!r}'
        )
    return meant


def contradiction(state: State, name: str) -> str | None:
    """Why these tensors are not those of the net `name`; None if they may be.

    Returns:
      What differs and what they look like: 'layer3 has 23 blocks, not 6; ... it looks like resnest101e'.

    Raises:
      FlaxnetsError: the zoo has no such name.
    """
    arch, _ = zoo.resolve(name)
    traits = _traits(state)
    differences = _differences(traits, zoo.NETS[arch])
    if not differences:
        return None
    found = _candidates(traits)
    looks = f'it looks like {some(found, 6, " or ")}' if found else _unknown(state, traits)
    return f'{"; ".join(differences)}; {looks}'


def _candidates(traits: Traits) -> list[str]:
    """The nets of the zoo that agree with the traits."""
    return [name for name, arch in zoo.NETS.items() if not _differences(traits, arch)]


def _named(hint: str | None, candidates: list[str]) -> str | None:
    """The candidate that the hint names, if it names one and has no part of another's name."""
    if not hint:
        return None
    text = hint.lower().replace('-', '_')
    aliases = {name: [n for n, arch in zoo.ARCH_ALIASES.items() if arch == name] for name in zoo.NETS}
    names = {n.lower(): name for name in zoo.NETS for n in (name, *aliases[name])}
    longest = max((n for n in names if n in text), key=len, default=None)
    if longest is None or names[longest] not in candidates:
        return None
    meant = names[longest]
    # 'resnest50_2s1x64d' names resnest50, but may well mean resnest50_fast_2s1x64d.
    others = {part for name in candidates if name != meant for part in name.split('_')[1:]}
    rest = text.replace(longest, '')
    return None if any(part in rest for part in (*others, 'avd')) else meant


# What the shapes tell.


def _traits(state: State) -> Traits:
    """The fields of `Arch` that the tensors show, and 'extra', layers of its blocks that no net here has.

    A field is missing where the tensors that would show it are. There are none at all where the blocks
    are of no kind known here.
    """
    blocks, inner = _blocks(state)
    kind = next((kind for kind, (_, sign, _) in _KINDS.items() if sign in inner), None)
    if kind is None or 'conv3.weight' not in inner:
        return {}
    gated = 'se.fc1.weight' in inner
    layers = {name.partition('.')[0] for name in inner} - _KINDS[kind][2] - ({'se'} if gated else set())
    traits: Traits = {
        'block': kind,
        'extra': some(map(plain, sorted(layers)), 6, ' and ') if layers else '',
        'layers': tuple(len(blocks[stage]) for stage in LAYERS.stages),
        'se': gated,
    }
    for stem, deep in (('conv1.weight', False), ('conv1.0.weight', True)):
        if shape := _shape(state, stem):
            traits |= {'deep_stem': deep, 'stem_width': shape[0]}
    for shortcut, pooled in (('layer2.0.downsample.0.weight', False), ('layer2.0.downsample.1.weight', True)):
        if _shape(state, shortcut):
            traits['avg_down'] = pooled
    if shape := _shape(state, 'layer1.0.conv3.weight'):
        traits['planes'] = shape[0] // EXPANSION
    return traits | _widths(state, kind)


def _blocks(state: State) -> tuple[dict[str, set[str]], set[str]]:
    """The numbers of the blocks of each stage, and the names that tensors have within blocks."""
    blocks: dict[str, set[str]] = {stage: set() for stage in LAYERS.stages}
    inner = set()
    for name in state:
        if match := re.match(r'(layer[1-4])\.(\d+)\.(.+)', name):
            blocks[match[1]].add(match[2])
            inner.add(match[3])
    return blocks, inner


def _widths(state: State, kind: str) -> Traits:
    """Groups, widths and splits of the 3x3 convolutions, if the stages agree about them."""
    found = set()
    closing = _shape(state, 'layer1.0.conv3.weight')
    first = max(1, closing[0] // EXPANSION) if closing else 64
    for i, stage in enumerate(LAYERS.stages):
        planes = first << i
        opening = _shape(state, f'{stage}.0.conv1.weight')
        middle = _shape(state, f'{stage}.0.{_KINDS[kind][1]}')
        if opening and middle:
            width = opening[0] if kind == 'resnest' else middle[0]
            scale = Fraction(opening[0], width)
            radix = Fraction(middle[0], width)
            cardinality = Fraction(width, middle[1]) / radix
            found.add((cardinality, Fraction(64 * width, planes) / cardinality, scale, radix))
    if not found:
        return {}
    numbers = found.pop()
    if found or any(number.denominator != 1 for number in numbers):
        return {'base_width': None}
    return dict(zip(('cardinality', 'base_width', 'scale', 'radix'), map(int, numbers), strict=True))


def _shape(state: State, name: str) -> tuple[int, ...] | None:
    """Shape of a convolution's kernel, [O, I, H, W]; None if there is none of that name."""
    tensor = state.get(name)
    return tensor.shape if tensor is not None and tensor.ndim == 4 and tensor.size else None


# Differences in words.


def _differences(traits: Traits, arch: Arch) -> list[str]:
    """What the traits say that is not so in `arch`, as 'layer3 has 23 blocks, not 6'."""
    if not traits:
        return ['its blocks are of another kind']
    wanted = {**vars(arch), 'extra': ''}
    if traits['block'] != arch.block:  # the rest would only repeat it
        return [f"its blocks are {_KINDS[traits['block']][0]}'s, not {_KINDS[arch.block][0]}'s"]
    words = []
    for field, found in traits.items():
        if found == wanted[field]:
            continue
        if field == 'layers':
            words += [
                f'{stage} has {n} block{"" if n == 1 else "s"}, not {m}'
                for stage, n, m in zip(LAYERS.stages, found, arch.layers, strict=True)
                if n != m
            ]
        elif field != 'stem_width' or traits['deep_stem'] == arch.deep_stem:
            words.append(_difference(field, found, wanted[field]))
    return words


def _difference(field: str, found: Any, wanted: Any) -> str:
    match field:
        case 'extra':
            return f'its blocks have also {found}'
        case 'se':
            return 'its blocks have SE gates' if found else 'its blocks have no SE gates'
        case 'deep_stem':
            kinds = ('one 7x7 convolution', 'three 3x3 convolutions')
            return f'its stem is {kinds[found]}, not {kinds[wanted]}'
        case 'stem_width':
            return f'its stem is {found} channels wide, not {wanted}'
        case 'avg_down':
            return 'its shortcuts pool' if found else 'its shortcuts do not pool'
        case 'planes':
            return f'its first stage makes {EXPANSION * found} channels, not {EXPANSION * wanted}'
        case 'base_width' if found is None:
            return 'its 3x3 convolutions have widths that no such net has'
        case 'base_width':
            return f'its groups are {found} channels wide, not {wanted}'
        case 'cardinality':
            return f'its 3x3 convolutions have {found} group{"" if found == 1 else "s"}, not {wanted}'
    return f'its {field} is {found}, not {wanted}'


def _unknown(state: State, traits: Traits) -> str:
    """What to say of tensors that are of none of the nets."""
    if traits:
        nearest = min(zoo.NETS, key=lambda name: _distance(traits, zoo.NETS[name]))
        differences = '; '.join(_differences(traits, zoo.NETS[nearest]))
        return f'it is none of these nets: the nearest is {nearest}, but {differences}'
    inner = {name.partition('.')[0]: None for name in _blocks(state)[1]}
    if inner:
        return (
            f'it is none of these nets: its blocks are made of {some(map(plain, sorted(inner)), 6, " and ")}'
        )
    held = f'starts with {some(map(plain, state), 6, " and ")}' if state else 'is empty'
    return f'it is none of these nets, which have blocks called layer1.0 and so on; it {held}'


def _distance(traits: Traits, arch: Arch) -> int:
    return len(_differences(traits, arch)) + 100 * (traits['block'] != arch.block)

"""Reads mean and std from the layers of a model that normalises images itself.

Such layers stand before the net or beside it, as in `nn.Sequential(Normalize(...), net)`. Their numbers are
`pixel_mean` and `pixel_std` in detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flaxnets.words import plain, some

from ..formats.modules import ModuleState
from .anchors import bare_names
from .image_values import IMAGENET, MIN_STD, ImageSettings, numbers, of_bytes

_MOST_CHANNELS = 64
_OF_OUTPUTS = re.compile('target|label|output|latent|feat|embed|action|head|loss|metric')
# What layers that normalise images call their numbers: 'normalizer.new_mean', 'pixel_mean'.
_MEAN = re.compile(r'(?:(?P<layer>.+)\.)?(?!running_)(?:\w*_)?mean')


def with_layers(found: ImageSettings, model: Mapping[Any, Any], prefix: str) -> ImageSettings:
    """Adds mean and std of a model that normalises images itself, in a layer before or beside the net."""
    pairs = _normalising(model, prefix)
    if len({pair for _, pair in pairs}) > 1:
        problem = f'the model normalises by several layers: {some([name for name, _ in pairs])}'
        return replace(found, unsupported=(*found.unsupported, problem))
    if not pairs:
        return found
    name, (mean, std) = pairs[0]
    order, notes = _order(name, mean, model)
    if max(mean) > 2 or max(std) > 2:
        mean, std = of_bytes(mean), of_bytes(std)
    notes = (*notes, f'mean and std are those of {plain(name)} in the model')
    outer: list[Any] = [found.fields.get('mean', mean), found.fields.get('std', std)]
    if outer != [mean, std] and (set(outer[0]), set(outer[1])) != ({0.0}, {1.0}):
        problem = (
            f'its training normalised by mean {outer[0]} and std {outer[1]}, and {plain(name)} once more'
        )
        return replace(found, unsupported=(*found.unsupported, problem))
    fields = {'channel_order': order, **found.fields, 'mean': mean, 'std': std}
    return replace(found, fields=fields, notes=(*found.notes, *notes))


def _normalising(
    model: Mapping[Any, Any], prefix: str
) -> list[tuple[str, tuple[tuple[float, ...], tuple[float, ...]]]]:
    """The layers around a net that hold a mean and a std: name, (mean, std)."""
    values = model.statistics if isinstance(model, ModuleState) else model
    named = {new: values[name] for name, new in bare_names(values).items()}
    out = []
    for name, value in named.items():
        match = _MEAN.fullmatch(name)
        beside = named.get(f'{name[:-4]}std')
        if match is None or beside is None:
            continue
        layer = match['layer'] or ''
        outer = layer[: layer.rfind('.') + 1]
        mean, std = _decimals(value), _decimals(beside)
        if _OF_OUTPUTS.search(name):
            continue
        likely = len(mean or ()) > 1 or re.search('norm|prep|transform|pixel|image|img', name.lower())
        if likely and mean and std and min(std) >= MIN_STD and prefix.startswith(outer):
            out.append((layer or name, (mean, std)))
    return out


def _decimals(value: object) -> tuple[float, ...] | None:
    """A few numbers in the shortest decimals that float32 rounds to them: 0.485, not 0.4850000143."""
    if isinstance(value, np.ndarray) and value.size <= _MOST_CHANNELS and value.dtype.kind in 'fV':
        value = [float(str(number)) for number in value.reshape(-1)]
    found = numbers(value)
    return found if found and len(found) <= _MOST_CHANNELS else None


def _order(name: str, mean: Sequence[float], model: Mapping[Any, Any]) -> tuple[str, tuple[str, ...]]:
    """The channel order of a layer's mean and std, by its own options or ImageNet's means; and notes."""
    settings: dict[Any, Any] = {}
    if isinstance(model, ModuleState):
        for layer in ('', name):
            settings |= model.layers[layer].settings if layer in model.layers else {}
    for option in ('to_rgb', 'channel_conversion', '_channel_conversion'):
        if isinstance(settings.get(option), bool):  # OpenMMLab's load images as BGR
            return ('rgb' if settings[option] else 'bgr'), ()
    if settings.get('input_format') in ('RGB', 'BGR'):  # detectron2
        return settings['input_format'].lower(), ()
    scale = 255 if max(mean) > 2 else 1
    usual = [scale * value for value in IMAGENET['mean']]
    near = [np.allclose(mean, values, rtol=0.02) for values in (usual, usual[::-1])]
    if near[1]:
        return 'bgr', ("the channels are in the order of ImageNet's means: blue first",)
    if near[0] or len(set(mean)) == 1:
        return 'rgb', ()
    return 'rgb', ('took the channels as red, green, blue: the model does not say',)

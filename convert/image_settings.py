"""How a checkpoint's own training prepared the images of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.hub import three_numbers
from flaxnets.config import INTERPOLATIONS


def image_settings(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    """How a training evaluated its images, by the options of timm's `train.py` or torchvision's.

    What is None there, or not what `flaxnets.config.Preprocess` takes, is left to the net's own.
    """
    size, crop, resize = (arguments.get(key) for key in ('img_size', 'val_crop_size', 'val_resize_size'))
    shape = arguments.get('input_size')
    if isinstance(shape, list | tuple) and len(shape) == 3 and type(shape[1]) is int:
        size = shape[1]
    share, interpolation = arguments.get('crop_pct'), arguments.get('interpolation')
    if type(crop) is int and type(resize) is int and 0 < crop <= resize:
        size, share = crop, crop / resize
    std = three_numbers(arguments.get('std'))
    found = {
        'size': size if type(size) is int and size > 0 else None,
        'crop_pct': share if isinstance(share, float | int) and 0 < share <= 1 else None,
        'interpolation': interpolation if isinstance(interpolation, str) else None,
        'mean': three_numbers(arguments.get('mean')),
        'std': std if std and min(std) > 0 else None,
    }
    if found['interpolation'] not in INTERPOLATIONS:
        del found['interpolation']
    return {name: value for name, value in found.items() if value is not None}

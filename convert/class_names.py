"""What a checkpoint calls its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def named_classes(meta: Mapping[Any, Any]) -> object:
    """The classes where mmengine (1.x) or mmcv (0.x) keeps them."""
    dataset = meta.get('dataset_meta')
    places = (dataset if isinstance(dataset, Mapping) else {}, meta)
    return next((place[key] for place in places for key in ('classes', 'CLASSES') if key in place), None)

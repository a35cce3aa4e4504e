"""Reads how images are prepared from the configurations that OpenMMLab's libraries keep as text.

Nothing here raises, whatever the text, and nothing of it is executed.

References: the transforms `ResizeEdge`, `Resize`, `CenterCrop` and `Normalize` of mmpretrain and mmcls, and
mmengine's `ImgDataPreprocessor`.
"""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flaxnets.errors import shown
from flaxnets.images.preprocess import INTERPOLATIONS

from .image_values import MIN_STD, ImageSettings, is_number, is_on, numbers, of_bytes, share_of, whole_numbers

MAX_TEXT = 200_000  # characters of a configuration; the longest known have some ten thousand

# One of these is in each configuration of OpenMMLab's.
_SECTIONS = ('test_pipeline', 'test_dataloader', 'data', 'img_norm_cfg', 'data_preprocessor')

# Steps of OpenMMLab's test pipelines that leave the pixels alone.
_NO_CHANGE = (
    'LoadImageFromFile',
    'PackInputs',
    'ImageToTensor',
    'ToTensor',
    'Collect',
    'NumpyToPIL',
    'PILToNumpy',
)
# Steps that only detection and segmentation have, whose images have no fixed size.
_DENSE = (
    'LoadAnnotations',
    'PackDetInputs',
    'PackSegInputs',
    'MultiScaleFlipAug',
    'DefaultFormatBundle',
    'Pad',
)


def openmmlab_settings(configuration: object) -> ImageSettings | None:
    """What a configuration of mmpretrain, mmcls, mmdet or mmseg says of images; None if it is none of theirs.

    Args:
      configuration: the text of a Python file of assignments, or what they assign by name.
    """
    if isinstance(configuration, str):
        configuration = _assignments(configuration)
    if not isinstance(configuration, Mapping) or not any(key in configuration for key in _SECTIONS):
        return None
    steps = _steps(configuration)
    found = _normalisation(configuration, steps)
    if not steps and not found.fields and not found.unsupported:
        return None  # other libraries have sections of these names too
    return found.completed_by(_geometry(steps))


def _steps(configuration: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The steps of the test pipeline, or of the validation's where there is none."""
    for path in (
        ('test_dataloader', 'dataset', 'pipeline'),
        ('test_pipeline',),
        ('data', 'test', 'pipeline'),
        ('val_dataloader', 'dataset', 'pipeline'),
        ('data', 'val', 'pipeline'),
    ):
        value: Any = configuration
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if steps := [step for step in _listed(value) if isinstance(step, Mapping)]:
            return steps
    return []


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _kind(step: Mapping[Any, Any]) -> str:
    """'mmpretrain.datasets.ResizeEdge' -> 'ResizeEdge'."""
    kind = step.get('type')
    return kind.rpartition('.')[2] if isinstance(kind, str) else ''


def _normalisation(configuration: Mapping[Any, Any], steps: Sequence[Mapping[Any, Any]]) -> ImageSettings:
    """Mean, std (here of values 0..255) and channel order."""
    inner = [s for step in steps for s in _listed(step.get('transforms')) if isinstance(s, Mapping)]
    model = configuration.get('model')
    preprocessor = model.get('data_preprocessor') if isinstance(model, Mapping) else None
    if not isinstance(preprocessor, Mapping):
        preprocessor = configuration.get('data_preprocessor')
    normalize = next((step for step in (*steps, *inner) if _kind(step) == 'Normalize'), None)
    if normalize is None:
        normalize = configuration.get('img_norm_cfg')
    found = normalize if isinstance(normalize, Mapping) else preprocessor
    if not isinstance(found, Mapping):
        return ImageSettings()
    # Images are loaded as BGR, so that either exchange of mmengine's ImgDataPreprocessor makes them RGB.
    # mmcv's Normalize exchanges channels by default, the preprocessors do not.
    flags = [found[name] for name in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr') if name in found]
    exchanges = any(map(is_on, flags)) if flags else found is normalize
    mean, std = numbers(found.get('mean')), numbers(found.get('std'))
    said = [f'{name}={shown(found[name])}' for name in ('mean', 'std') if found.get(name) is not None]
    if len(said) > bool(mean) + bool(std) or (std and min(std) < MIN_STD * 255):
        return ImageSettings(unsupported=(f'normalised by {" and ".join(said)}',))
    notes = () if said else ('the net takes values from 0 to 255, not normalised',)
    mean, std = mean or (0.0,), std or (1.0,)
    order = 'rgb' if exchanges else 'bgr'
    return ImageSettings({'mean': of_bytes(mean), 'std': of_bytes(std), 'channel_order': order}, notes=notes)


def _geometry(steps: Sequence[Mapping[Any, Any]]) -> ImageSettings:
    """Size, crop and interpolation."""
    kinds = [_kind(step) for step in steps]
    if not steps:
        return ImageSettings()
    if set(kinds) & set(_DENSE):
        note = 'its images have no fixed size: they are of the size that classifiers of this net take'
        return ImageSettings(notes=(note,))
    resize: tuple[int, int] | int | None = None
    crop: tuple[int, ...] | None = None
    filters, problems = [], []
    for kind, step in zip(kinds, steps, strict=True):
        if kind in ('Resize', 'ResizeEdge'):
            resize = _resized(kind, step)
            if resize is None:
                problems.append(f'{kind} of {shown(dict(step))}')
            filters.append(_filter(step, 'bilinear'))
        elif kind == 'CenterCrop' and not is_on(step.get('efficientnet_style')):
            crop = _pair(step.get('crop_size'))
            if crop is None:
                problems.append(f'CenterCrop of {shown(dict(step))}')
        elif kind == 'Normalize' or kind in _NO_CHANGE:
            pass
        else:
            problems.append(f'{kind or "a step without a type"} in its test pipeline')
    opencv = any(backend != "'pillow'" for backend, _ in filters)
    nearly = (
        ('its evaluation resized with OpenCV, without antialiasing, here Pillow resizes',) if opencv else ()
    )
    found: dict[str, Any] = {}
    if filters and filters[0][1] in INTERPOLATIONS:
        found['interpolation'] = filters[0][1]
    elif filters:
        problems.append(f'interpolation={shown(filters[0][1])}')
    if not problems:
        shape = _shape(resize, crop)
        if shape is None:
            problems.append(f'resized to {resize}, then cropped to {crop}')
        else:
            found |= shape
    return ImageSettings(found, tuple(problems), approximations=nearly)


def _shape(resize: tuple[int, int] | int | None, crop: tuple[int, ...] | None) -> dict[str, Any] | None:
    """`size`, `crop_pct` and `crop_mode` that resize and crop in this way; None if there are none."""
    if isinstance(resize, int) and crop and crop[0] == crop[1] <= resize:
        return {'size': crop[0], 'crop_pct': share_of(crop[0], resize), 'crop_mode': 'center'}
    if isinstance(resize, tuple) and (crop is None or crop == resize):
        return {'size': resize, 'crop_pct': 1.0, 'crop_mode': 'squash'}
    if isinstance(resize, tuple) and crop and crop[0] <= resize[0] and crop[1] <= resize[1]:
        share = share_of(crop[0], resize[0])
        if math.floor(crop[1] / share) == resize[1]:
            return {'size': crop, 'crop_pct': share, 'crop_mode': 'squash'}
    return None


def _resized(kind: str, step: Mapping[Any, Any]) -> tuple[int, int] | int | None:
    """(height, width) to which a step resizes, or the length of the short side; None if neither."""
    if kind == 'ResizeEdge':
        scale = whole_numbers([step.get('scale')])
        return scale[0] if scale and step.get('edge', 'short') == 'short' else None
    if is_on(step.get('keep_ratio')):
        return None
    if 'size' in step:  # mmcls: (height, width); -1 keeps the aspect ratio
        size = step['size']
        if isinstance(size, list | tuple) and len(size) == 2 and is_number(size[1]) and size[1] == -1:
            short = whole_numbers([size[0]])
            return short[0] if short and step.get('adaptive_side', 'short') == 'short' else None
        return _pair(size)
    width_height = _pair(step.get('scale'))
    return width_height and (width_height[1], width_height[0])


def _pair(value: object) -> tuple[int, int] | None:
    found = whole_numbers(value)
    return (found[0], found[-1]) if found and len(found) in (1, 2) else None


def _filter(step: Mapping[Any, Any], usual: str) -> tuple[object, object]:
    """Library and interpolation by which a step resizes."""
    name = step.get('interpolation', usual)
    return shown(step.get('backend', 'cv2')), 'box' if isinstance(name, str) and name == 'area' else name


def _assignments(text: str) -> dict[str, Any]:
    """What a Python file of plain assignments gives to which names; nothing of it is executed."""
    if len(text) > MAX_TEXT:
        return {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with contextlib.suppress(RecursionError):  # no configuration nests so deep
                found[statement.targets[0].id] = _literal(statement.value, found)
    return found


def _literal(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of a literal, a `dict(...)` or a name assigned before; else 'an expression'."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple():
            return [_literal(item, known) for item in node.elts]
        case ast.Dict():
            pairs = [
                (key and _literal(key, known), _literal(v, known))
                for key, v in zip(node.keys, node.values, strict=True)
            ]
            return _merged(pairs)
        case ast.Call(func=ast.Name(id='dict'), args=[]):
            return _merged([(keyword.arg, _literal(keyword.value, known)) for keyword in node.keywords])
        case ast.UnaryOp(op=ast.USub()):
            value = _literal(node.operand, known)
            return -value if is_number(value) else None
        case ast.Name():
            return known.get(node.id, node.id)  # the name of a class, in a lazy configuration
        case ast.Attribute():
            return node.attr
    return 'an expression'  # any other, which no setting is read from


def _merged(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Keys and values; a value without a key is a mapping that is unpacked."""
    out: dict[Any, Any] = {}
    for key, value in pairs:
        if key is None:
            out |= value if isinstance(value, Mapping) else {}
        elif isinstance(key, str | int | float):
            out[key] = value
    return out

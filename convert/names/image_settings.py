"""Reads from a checkpoint how its training prepared images for evaluation.

It understands the options of timm's `train.py` (and `config.json` on the Hugging Face hub), of torchvision's
reference training, of PyTorch's ImageNet example, of DeiT's training and those made from it, and the
configuration that OpenMMLab's libraries keep as text. Everything else in a file is ignored: nothing here
raises, and nothing is executed.

References: timm's `resolve_data_config`; torchvision's `references/classification/presets.py`; the
`build_transform` of DeiT, MAE, BEiT and ConvNeXt; mmpretrain's and mmcls's transforms `ResizeEdge`, `Resize`,
`CenterCrop`, `Normalize` and mmengine's `ImgDataPreprocessor`.
"""

from __future__ import annotations

import ast
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import numpy as np

from flaxnets.errors import shown
from flaxnets.images.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess
from flaxnets.words import plain, some

from ..formats.modules import ModuleState
from .anchors import bare_names

MAX_TEXT = 200_000  # characters of a configuration; the longest known have some ten thousand

# One of these is in each configuration of OpenMMLab's.
_SECTIONS = ('test_pipeline', 'test_dataloader', 'data', 'img_norm_cfg', 'data_preprocessor')
_EXAMPLE = {'size': 224, 'crop_pct': 0.875, 'crop_mode': 'center', 'interpolation': 'bilinear'}
_IMAGENET = {'mean': Preprocess().mean, 'std': Preprocess().std}
_MIN_STD = 1e-6
_MOST_CHANNELS = 64
_OF_OUTPUTS = re.compile('target|label|output|latent|feat|embed|action|head|loss|metric')
# What layers that normalise images call their numbers: 'normalizer.new_mean', 'pixel_mean'.
_MEAN = re.compile(r'(?:(?P<layer>.+)\.)?(?!running_)(?:\w*_)?mean')
# Options that tell how images are prepared: a dictionary that has none of them is passed over.
_OPTIONS = (
    'input_size',
    'img_size',
    'crop_pct',
    'crop_mode',
    'interpolation',
    'mean',
    'std',
    'val_crop_size',
    'val_resize_size',
    'eval_crop_ratio',
)

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


@dataclass(frozen=True)
class ImageSettings:
    """What a file says of its images.

    Attributes:
      fields: of `flaxnets.Preprocess`, by name; what the file does not say is missing.
      unsupported: settings in the file that no `Preprocess` can express, in words.
      notes: how the settings were understood, in words.
      approximations: settings that are honoured only nearly, in words.
      weights: timm's full name of the published weights whose settings stand in for those that are missing.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: str | None = None
    approximations: tuple[str, ...] = ()

    def applied_to(self, usual: Preprocess) -> Preprocess:
        """`usual`, but for what the file says."""
        return replace(
            usual,
            **self.fields,
            unsupported=(*usual.unsupported, *self.unsupported),
            approximations=(*usual.approximations, *self.approximations),
        )


def image_settings(
    beside: Mapping[Any, Any], model: Mapping[Any, Any] | None = None, prefix: str = ''
) -> ImageSettings:
    """How the training that wrote a file prepared images for evaluation.

    Args:
      beside: what the file holds beside the weights, or the options of the training themselves.
      model: the state dict that holds the weights; it may be a pickled model's.
      prefix: of the net's names in this state dict.
    """
    found = _of_training(beside)
    if model is not None:
        found = _with_layers(found, model, prefix)
    if isinstance(model, ModuleState):
        found = _with_timm_configuration(found, model.attributes)
    return found


def _of_training(beside: Mapping[Any, Any]) -> ImageSettings:
    options = _options(beside)
    arguments = next((found for found in options if _says_something(found)), options[0])
    meta = beside.get('meta')
    texts = [meta.get('cfg'), meta.get('config')] if isinstance(meta, Mapping) else []
    for configuration in (beside.get('cfg'), beside.get('config'), *texts):
        if found := openmmlab_settings(configuration):
            return found
    names = (*(found.get('model') for found in options), beside.get('arch'))
    named = next((name for name in names if isinstance(name, str)), None)
    weights = named if named and '.' in named else None
    if 'val_crop_size' in arguments or 'val_resize_size' in arguments:
        return _torchvision(arguments)
    if 'cache_dataset' in arguments and 'test_only' in arguments:  # torchvision's before it had these options
        return ImageSettings({**_EXAMPLE, **_IMAGENET})
    example = {'arch', 'best_acc1', 'optimizer'} <= beside.keys() and 'args' not in beside
    if example:  # pytorch/examples, imagenet/main.py
        return ImageSettings({**_EXAMPLE, **_IMAGENET})
    if found := _deit(arguments):
        return found
    fields, unsupported, notes = timm_fields(arguments)
    return ImageSettings(fields, unsupported, notes, weights)


def _options(beside: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The options of the training, by the names that timm, torchvision, Lightning and others give them.

    There may be several; the last are what stands beside the weights itself.
    """
    names = ('args', 'hyper_parameters', 'hparams', 'opt', 'options', 'config')
    found = [options for name in names if isinstance(options := beside.get(name), Mapping)]
    # Among the results of a training, a mean may be one of anything.
    paired = numbers(beside.get('mean')) and numbers(beside.get('std'))
    return [*found, beside if paired else {k: v for k, v in beside.items() if k not in ('mean', 'std')}]


def _says_something(options: Mapping[Any, Any]) -> bool:
    return any(not _is_empty(options.get(name)) for name in _OPTIONS)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


def timm_fields(options: Mapping[Any, Any]) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Fields of `Preprocess` by timm's names of them, what cannot be expressed, and notes."""
    found: dict[str, Any] = {}
    problems, notes = [], []

    def given(name: str) -> Any:
        value = options.get(name)
        return None if _is_empty(value) else value

    shape, side, share = given('input_size'), given('img_size'), given('crop_pct')
    if shape is not None:
        sides = _whole_numbers(shape)
        if sides and len(sides) == 3:
            found['size'] = sides[1:]
        elif sides and _is_number(shape):  # as DeiT and many others call the side of a square
            found['size'] = (sides[0], sides[0])
        else:
            problems.append(f'input_size={shown(shape)}')
    elif side is not None:
        sides = _whole_numbers(side if isinstance(side, list | tuple) else [side])
        if sides and len(sides) in (1, 2):
            found['size'] = (sides[0], sides[-1])
        else:
            problems.append(f'img_size={shown(side)}')
    if share is not None and not (_is_number(share) and share == 0):  # for timm, 0 says nothing
        if _is_number(share) and 0.001 < share < 1000:
            found['crop_pct'] = float(share)
        else:
            problems.append(f'crop_pct={shown(share)}')
    for name, choices in (('crop_mode', CROP_MODES[:3]), ('interpolation', INTERPOLATIONS)):
        value = given(name)
        if isinstance(value, str) and value in choices:
            found[name] = value
        elif value is not None:
            problems.append(f'{name}={shown(value)}')
    for name in ('mean', 'std'):
        value = given(name)
        values = numbers(value)
        if values and (name == 'mean' or min(values) >= _MIN_STD):
            found[name] = values
        elif value is not None:
            problems.append(f'{name}={shown(value)}')
    problems += [
        f'{name}={shown(options[name])}'
        for name in ('crop_border_pixels', 'tf_preprocessing')
        if _is_on(options.get(name))
    ]
    if max(found.get('mean', (0,))) > 2 or min(found.get('std', (1,))) > 2:
        notes.append('took mean and std as of values from 0 to 255')
        for name in {'mean', 'std'} & set(found):
            found[name] = _of_bytes(found[name])
    return found, tuple(problems), tuple(notes)


def _torchvision(arguments: Mapping[Any, Any]) -> ImageSettings:
    found, problems, notes = timm_fields({'interpolation': arguments.get('interpolation')})
    crop, resize = arguments.get('val_crop_size', 224), arguments.get('val_resize_size', 256)
    sides = _whole_numbers([crop, resize])
    if sides:
        found |= {'size': sides[0], 'crop_pct': share_of(sides[0], sides[1])}
    else:
        problems = (*problems, f'val_crop_size={shown(crop)}, val_resize_size={shown(resize)}')
    backend = arguments.get('backend')
    nearly: tuple[str, ...] = ()
    if isinstance(backend, str) and backend.lower() != 'pil':
        nearly = (f'its evaluation resized tensors (backend={shown(backend)}), here Pillow resizes images',)
    fields = {**_IMAGENET, 'crop_mode': 'center', **found}
    return ImageSettings(fields, problems, notes, approximations=nearly)


def _deit(arguments: Mapping[Any, Any]) -> ImageSettings | None:
    """DeiT's training and those made from it: MAE, BEiT, ConvNeXt; None if it is none of them.

    All resize by bicubic interpolation; images of up to 32 pixels stay as they are. They differ in what they
    do with large ones.
    """
    side = arguments.get('input_size')
    sides = _whole_numbers(side) if _is_number(side) else None
    has_mean = 'imagenet_default_mean_and_std' in arguments  # BEiT and ConvNeXt
    is_deit = 'eval_crop_ratio' in arguments or {'data_path', 'data_set'} <= arguments.keys()
    is_mae = {'data_path', 'nb_classes'} <= arguments.keys()
    if sides is None or not (has_mean or is_deit or is_mae):
        return None
    share = arguments.get('eval_crop_ratio', arguments.get('crop_pct'))
    said, problems, notes = timm_fields({**arguments, 'crop_pct': share})
    is_beit = 'rel_pos_bias' in arguments or 'abs_pos_emb' in arguments
    fields = {**_IMAGENET, 'crop_mode': 'center', 'interpolation': 'bicubic', 'crop_pct': 0.875}
    if has_mean:
        if not _is_on(arguments['imagenet_default_mean_and_std']):
            fields |= {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
        if sides[0] >= 384:
            fields['crop_pct'] = 1.0
    elif not is_deit and sides[0] > 224:
        fields['crop_pct'] = 1.0
    fields |= said
    if has_mean and not is_beit and sides[0] >= 384:  # ConvNeXt, whatever its percentage
        fields |= {'crop_pct': 1.0, 'crop_mode': 'squash'}
    elif sides[0] <= 32:
        fields['crop_pct'] = 1.0
    return ImageSettings(fields, problems, notes)


def share_of(crop: int, resize: int) -> float:
    """The percentage by which an input of `crop` pixels is cut from exactly `resize`, rounding included."""
    share = crop / resize
    while math.floor(crop / share) < resize:
        share = math.nextafter(share, 0)
    return share


def numbers(values: object) -> tuple[float, ...] | None:
    """A list of finite numbers, or one; None if it is anything else."""
    if isinstance(values, np.ndarray) and values.size <= 1000:
        values = values.reshape(-1).tolist()
    if _is_number(values):
        values = [values]
    if not isinstance(values, list | tuple) or not values or not all(map(_is_number, values)):
        return None
    return tuple(map(float, values))


def _whole_numbers(values: object) -> tuple[int, ...] | None:
    found = numbers(values)
    if found is None or any(value < 1 or value != int(value) for value in found):
        return None
    return tuple(map(int, found))


def _of_bytes(values: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers of 0..255 as those of 0..1; twelve digits, so that 57.12 is 0.224 again."""
    return tuple(float(f'{value / 255:.12g}') for value in values)


def _is_on(value: object) -> bool:
    return isinstance(value, bool | int) and bool(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return bool(abs(number) < 1e9)  # and so no NaN, no infinity, nothing that a float could not hold


def for_channels(preprocess: Preprocess, channels: int) -> Preprocess:
    """The preprocessing for so many input channels; marked as unsupported if mean and std are for others."""
    values = {name: getattr(preprocess, name) for name in ('mean', 'std')}
    if channels == 1 or all(len(v) in (1, channels) for v in values.values()):
        return preprocess
    fitted = {name: v[:1] if len(set(v)) == 1 else v for name, v in values.items()}
    if all(len(v) in (1, channels) for v in fitted.values()):
        return replace(preprocess, **fitted)
    problem = f'nothing gives a mean and a std of {channels} channels'
    return replace(preprocess, unsupported=(*preprocess.unsupported, problem))


# Layers of the model that normalise.


def _with_timm_configuration(found: ImageSettings, attributes: Mapping[str, Any]) -> ImageSettings:
    """Adds what a pickled net of timm's says of its images, where the training says nothing."""
    own = next(
        (attributes.get(name) for name in ('pretrained_cfg', 'default_cfg') if attributes.get(name)), None
    )
    if not isinstance(own, Mapping):
        return found
    fields, unsupported, notes = timm_fields(own)
    weights = '.'.join(str(own[name]) for name in ('architecture', 'tag') if own.get(name))
    return replace(
        found,
        fields={**fields, **found.fields},
        unsupported=(*found.unsupported, *unsupported),
        notes=(*found.notes, *notes),
        weights=found.weights or (weights if '.' in weights else None),
    )


def _with_layers(found: ImageSettings, model: Mapping[Any, Any], prefix: str) -> ImageSettings:
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
        mean, std = _of_bytes(mean), _of_bytes(std)
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
        if likely and mean and std and min(std) >= _MIN_STD and prefix.startswith(outer):
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
    usual = [scale * value for value in _IMAGENET['mean']]
    near = [np.allclose(mean, values, rtol=0.02) for values in (usual, usual[::-1])]
    if near[1]:
        return 'bgr', ("the channels are in the order of ImageNet's means: blue first",)
    if near[0] or len(set(mean)) == 1:
        return 'rgb', ()
    return 'rgb', ('took the channels as red, green, blue: the model does not say',)


# OpenMMLab.


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
    fields, problems, notes = _normalisation(configuration, steps)
    if not steps and not fields and not problems:
        return None  # other libraries have sections of these names too
    geometry, more_problems, more_notes, nearly = _geometry(steps)
    return ImageSettings(
        {**fields, **geometry},
        (*problems, *more_problems),
        (*notes, *more_notes),
        approximations=nearly,
    )


def _steps(configuration: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """Of the test pipeline, as it is used."""
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


def _normalisation(
    configuration: Mapping[Any, Any], steps: Sequence[Mapping[Any, Any]]
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Mean, std (here of values 0..255) and channel order; what cannot be expressed; notes."""
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
        return {}, (), ()
    # Images are loaded as BGR, so that either exchange of mmengine's ImgDataPreprocessor makes them RGB.
    # mmcv's Normalize exchanges channels by default, the preprocessors do not.
    flags = [found[name] for name in ('to_rgb', 'bgr_to_rgb', 'rgb_to_bgr') if name in found]
    exchanges = any(map(_is_on, flags)) if flags else found is normalize
    mean, std = numbers(found.get('mean')), numbers(found.get('std'))
    said = [f'{name}={shown(found[name])}' for name in ('mean', 'std') if found.get(name) is not None]
    if len(said) > bool(mean) + bool(std) or (std and min(std) < _MIN_STD * 255):
        return {}, (f'normalised by {" and ".join(said)}',), ()
    notes = () if said else ('the net takes values from 0 to 255, not normalised',)
    mean, std = mean or (0.0,), std or (1.0,)
    return (
        {
            'mean': _of_bytes(mean),
            'std': _of_bytes(std),
            'channel_order': 'rgb' if exchanges else 'bgr',
        },
        (),
        notes,
    )


def _geometry(
    steps: Sequence[Mapping[Any, Any]],
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Size, crop and interpolation; what cannot be expressed; notes; what is only nearly so."""
    kinds = [_kind(step) for step in steps]
    if not steps:
        return {}, (), (), ()
    if set(kinds) & set(_DENSE):
        return (
            {},
            (),
            ('its images have no fixed size: they are of the size that classifiers of this net take',),
            (),
        )
    resize: tuple[int, int] | int | None = None
    crop: tuple[int, ...] | None = None
    filters, problems = [], []
    for kind, step in zip(kinds, steps, strict=True):
        if kind in ('Resize', 'ResizeEdge'):
            resize = _resized(kind, step)
            if resize is None:
                problems.append(f'{kind} of {shown(dict(step))}')
            filters.append(_filter(step, 'bilinear'))
        elif kind == 'CenterCrop' and not _is_on(step.get('efficientnet_style')):
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
    return found, tuple(problems), (), nearly


def _shape(resize: tuple[int, int] | int | None, crop: tuple[int, ...] | None) -> dict[str, Any] | None:
    """Size, percentage and mode that resize and cut just so; None if there are none."""
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
        scale = _whole_numbers([step.get('scale')])
        return scale[0] if scale and step.get('edge', 'short') == 'short' else None
    if _is_on(step.get('keep_ratio')):
        return None
    if 'size' in step:  # mmcls: (height, width), and -1 for what the shape asks
        size = step['size']
        if isinstance(size, list | tuple) and len(size) == 2 and _is_number(size[1]) and size[1] == -1:
            short = _whole_numbers([size[0]])
            return short[0] if short and step.get('adaptive_side', 'short') == 'short' else None
        return _pair(size)
    width_height = _pair(step.get('scale'))
    return width_height and (width_height[1], width_height[0])


def _pair(value: object) -> tuple[int, int] | None:
    found = _whole_numbers(value)
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
    """The value of literals, `dict(...)` and names assigned before; of the rest, that it is an expression."""
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
            return -value if _is_number(value) else None
        case ast.Name():
            return known.get(node.id, node.id)  # of lazy configurations: the name of a class
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

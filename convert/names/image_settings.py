"""Reads from a checkpoint how its training prepared images for evaluation.

It understands the options of timm's `train.py` (and `config.json` on the Hugging Face hub), of torchvision's
reference training, of PyTorch's ImageNet example, and of DeiT's training and those made from it.
`image_openmmlab` reads the configurations of OpenMMLab's libraries, `image_layers` the layers that normalise.
Everything else in a file is ignored: nothing here raises, and nothing is executed.

References: timm's `resolve_data_config`; torchvision's `references/classification/presets.py`; the
`build_transform` of DeiT, MAE, BEiT and ConvNeXt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flaxnets.errors import shown
from flaxnets.images.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess

from ..formats.modules import ModuleState
from .image_layers import with_layers
from .image_openmmlab import openmmlab_settings
from .image_values import (
    IMAGENET,
    MIN_STD,
    ImageSettings,
    is_number,
    is_on,
    numbers,
    of_bytes,
    share_of,
    whole_numbers,
)

_EXAMPLE = {'size': 224, 'crop_pct': 0.875, 'crop_mode': 'center', 'interpolation': 'bilinear'}
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


def image_settings(
    beside: Mapping[Any, Any], model: Mapping[Any, Any] | None = None, prefix: str = ''
) -> ImageSettings:
    """How the training that wrote a file prepared images for evaluation.

    Args:
      beside: what the file holds beside the weights, or the options of the training themselves.
      model: the state dict that holds the weights; it may be a pickled model's.
      prefix: what the net's names in this state dict start with.
    """
    found = _of_training(beside)
    if model is not None:
        found = with_layers(found, model, prefix)
    if isinstance(model, ModuleState):
        found = _with_timm_configuration(found, model.attributes)
    return found


def _of_training(beside: Mapping[Any, Any]) -> ImageSettings:
    """What the options or the configuration of a training say."""
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
        return ImageSettings({**_EXAMPLE, **IMAGENET})
    example = {'arch', 'best_acc1', 'optimizer'} <= beside.keys() and 'args' not in beside
    if example:  # pytorch/examples, imagenet/main.py
        return ImageSettings({**_EXAMPLE, **IMAGENET})
    if found := _deit(arguments):
        return found
    return replace(timm_settings(arguments), weights=weights)


def _options(beside: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The options of the training, by the names that timm, torchvision, Lightning and others give them.

    There may be several; the last is what stands beside the weights directly.
    """
    names = ('args', 'hyper_parameters', 'hparams', 'opt', 'options', 'config')
    found = [options for name in names if isinstance(options := beside.get(name), Mapping)]
    # A mean alone, among the results of a training, may be the mean of anything.
    paired = numbers(beside.get('mean')) and numbers(beside.get('std'))
    return [*found, beside if paired else {k: v for k, v in beside.items() if k not in ('mean', 'std')}]


def _says_something(options: Mapping[Any, Any]) -> bool:
    return any(not _is_empty(options.get(name)) for name in _OPTIONS)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


def timm_settings(options: Mapping[Any, Any]) -> ImageSettings:
    """What timm's options say of images."""
    found: dict[str, Any] = {}
    problems, notes = [], []

    def given(name: str) -> Any:
        value = options.get(name)
        return None if _is_empty(value) else value

    shape, side, share = given('input_size'), given('img_size'), given('crop_pct')
    if shape is not None:
        sides = whole_numbers(shape)
        if sides and len(sides) == 3:
            found['size'] = sides[1:]
        elif sides and is_number(shape):  # DeiT and many others give the side of a square
            found['size'] = (sides[0], sides[0])
        else:
            problems.append(f'input_size={shown(shape)}')
    elif side is not None:
        sides = whole_numbers(side if isinstance(side, list | tuple) else [side])
        if sides and len(sides) in (1, 2):
            found['size'] = (sides[0], sides[-1])
        else:
            problems.append(f'img_size={shown(side)}')
    if share is not None and not (is_number(share) and share == 0):  # timm takes 0 for not given
        if is_number(share) and 0.001 < share < 1000:
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
        if values and (name == 'mean' or min(values) >= MIN_STD):
            found[name] = values
        elif value is not None:
            problems.append(f'{name}={shown(value)}')
    problems += [
        f'{name}={shown(options[name])}'
        for name in ('crop_border_pixels', 'tf_preprocessing')
        if is_on(options.get(name))
    ]
    if max(found.get('mean', (0,))) > 2 or min(found.get('std', (1,))) > 2:
        notes.append('took mean and std as of values from 0 to 255')
        for name in {'mean', 'std'} & set(found):
            found[name] = of_bytes(found[name])
    return ImageSettings(found, tuple(problems), tuple(notes))


def _torchvision(arguments: Mapping[Any, Any]) -> ImageSettings:
    said = timm_settings({'interpolation': arguments.get('interpolation')})
    fields, problems = {**IMAGENET, 'crop_mode': 'center', **said.fields}, said.unsupported
    crop, resize = arguments.get('val_crop_size', 224), arguments.get('val_resize_size', 256)
    sides = whole_numbers([crop, resize])
    if sides:
        fields |= {'size': sides[0], 'crop_pct': share_of(sides[0], sides[1])}
    else:
        problems = (*problems, f'val_crop_size={shown(crop)}, val_resize_size={shown(resize)}')
    backend = arguments.get('backend')
    nearly: tuple[str, ...] = ()
    if isinstance(backend, str) and backend.lower() != 'pil':
        nearly = (f'its evaluation resized tensors (backend={shown(backend)}), here Pillow resizes images',)
    return replace(said, fields=fields, unsupported=problems, approximations=nearly)


def _deit(arguments: Mapping[Any, Any]) -> ImageSettings | None:
    """DeiT's training and those made from it: MAE, BEiT, ConvNeXt; None if it is none of them.

    All resize by bicubic interpolation; images of up to 32 pixels stay as they are. They differ in what they
    do with large ones.
    """
    side = arguments.get('input_size')
    sides = whole_numbers(side) if is_number(side) else None
    has_mean = 'imagenet_default_mean_and_std' in arguments  # BEiT and ConvNeXt
    is_deit = 'eval_crop_ratio' in arguments or {'data_path', 'data_set'} <= arguments.keys()
    is_mae = {'data_path', 'nb_classes'} <= arguments.keys()
    if sides is None or not (has_mean or is_deit or is_mae):
        return None
    share = arguments.get('eval_crop_ratio', arguments.get('crop_pct'))
    said = timm_settings({**arguments, 'crop_pct': share})
    is_beit = 'rel_pos_bias' in arguments or 'abs_pos_emb' in arguments
    fields = {**IMAGENET, 'crop_mode': 'center', 'interpolation': 'bicubic', 'crop_pct': 0.875}
    if has_mean:
        if not is_on(arguments['imagenet_default_mean_and_std']):
            fields |= {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
        if sides[0] >= 384:
            fields['crop_pct'] = 1.0
    elif not is_deit and sides[0] > 224:
        fields['crop_pct'] = 1.0
    fields |= said.fields
    if has_mean and not is_beit and sides[0] >= 384:  # ConvNeXt, whatever its percentage
        fields |= {'crop_pct': 1.0, 'crop_mode': 'squash'}
    elif sides[0] <= 32:
        fields['crop_pct'] = 1.0
    return replace(said, fields=fields)


def for_channels(preprocess: Preprocess, channels: int) -> Preprocess:
    """The preprocessing for so many input channels; unsupported if mean and std are for another number."""
    values = {name: getattr(preprocess, name) for name in ('mean', 'std')}
    if channels == 1 or all(len(v) in (1, channels) for v in values.values()):
        return preprocess
    fitted = {name: v[:1] if len(set(v)) == 1 else v for name, v in values.items()}
    if all(len(v) in (1, channels) for v in fitted.values()):
        return replace(preprocess, **fitted)
    problem = f'nothing gives a mean and a std of {channels} channels'
    return replace(preprocess, unsupported=(*preprocess.unsupported, problem))


def _with_timm_configuration(found: ImageSettings, attributes: Mapping[str, Any]) -> ImageSettings:
    """Adds what a pickled net of timm's says of its images, where the training says nothing."""
    own = next(
        (attributes.get(name) for name in ('pretrained_cfg', 'default_cfg') if attributes.get(name)), None
    )
    if not isinstance(own, Mapping):
        return found
    weights = '.'.join(str(own[name]) for name in ('architecture', 'tag') if own.get(name))
    return found.completed_by(replace(timm_settings(own), weights=weights if '.' in weights else None))

"""Folders as timm keeps them on the Hugging Face hub: `config.json` beside the weights.

`config.json` names the architecture and says how the weights expect their images:

    {"architecture": "resnest101e", "num_classes": 1000, "num_features": 2048,
     "pretrained_cfg": {"tag": "in1k", "input_size": [3, 256, 256], "interpolation": "bilinear", ...}}

A directory of weights written by flaxnets has a `config.json` as well, which says "format": "flaxnets".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.class_names import class_names
from convert.options import changing, described
from flaxnets.config import Preprocess
from flaxnets.errors import CheckpointError, FlaxnetsError

CONFIG_FILE = 'config.json'
# In timm's order of preference; the first is the only one that the hub still asks for.
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')
MAX_CONFIG_BYTES = 16_000_000  # 20,000 classes with descriptions take two million

# What timm takes where its configuration says nothing (`timm.data.resolve_data_config`).
_TIMM_DEFAULTS = {
    'input_size': [3, 224, 224],
    'interpolation': 'bicubic',
    'crop_pct': 0.875,
    'crop_mode': 'center',
    'mean': list(Preprocess().mean),
    'std': list(Preprocess().std),
}


@dataclass(frozen=True)
class HubConfig:
    """What a folder's `config.json` says, in the terms of flaxnets.

    Attributes:
      architecture: timm's name of the net, without a tag: 'resnest101e'.
      num_classes: outputs of the classifier; 0 means none.
      in_chans: input channels.
      preprocess: how images are prepared.
      classes: the class names in order, or None.
      differences: options with which timm builds the net that make it compute something else than the
        architecture of that name, in words.
      notes: what it says of its classes and cannot be used, in words.
    """

    architecture: str
    num_classes: int
    in_chans: int
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_hub_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a `config.json` in timm's form; whether it is sound is not asked."""
    try:
        data = _read_json(Path(path) / CONFIG_FILE)
    except CheckpointError:
        return False
    return isinstance(data, dict) and data.get('format') != 'flaxnets' and 'architecture' in data


def read_hub_folder(path: str | os.PathLike[str]) -> tuple[Path, HubConfig]:
    """The weights file of a Hugging Face folder, which is not opened, and what the folder says of it.

    Args:
      path: a folder with `config.json` and one of `WEIGHTS_FILES`, of which the first there is taken.

    Raises:
      CheckpointError: no such files; a `config.json` that is not timm's, or that asks for a
        preprocessing that `flaxnets.config.Preprocess` cannot express (all such values named).
    """
    folder = Path(path)
    config = read_hub_config(folder / CONFIG_FILE)
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name, config
    raise CheckpointError(f'{folder}: holds {CONFIG_FILE} but no weights: none of {", ".join(WEIGHTS_FILES)}')


def read_hub_config(path: str | os.PathLike[str]) -> HubConfig:
    """What a `config.json` of timm's says; raises as `read_hub_folder` does."""
    data = _read_json(path)
    if not isinstance(data, dict) or data.get('format') == 'flaxnets':
        what = 'of a directory written by flaxnets: open it with flaxnets.load' if data else 'not a table'
        raise CheckpointError(f'{path}: is {what}')
    architecture = data.get('architecture')
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f'{path}: names no "architecture", so it is not a configuration of timm')
    try:
        return _parse(data, architecture)
    except (FlaxnetsError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: {error}') from error


def _parse(data: Mapping[str, Any], architecture: str) -> HubConfig:
    # Before timm 0.9 the file was the pretrained_cfg itself, with "labels" for its "label_names".
    pretrained = _table(data, 'pretrained_cfg') if 'pretrained_cfg' in data else data
    both = {**pretrained, **data}
    architecture = architecture.partition('.')[0]  # without timm's tag of the weights
    arguments = dict(_table(data, 'model_args'))
    image: dict[str, Any] = {key: pretrained.get(key) or default for key, default in _TIMM_DEFAULTS.items()}
    preprocess = _preprocess(image)
    in_chans = arguments.pop('in_chans', None) or image['input_size'][0]
    num_classes = both.get('num_classes', 1000)
    for name, number, least in (('num_classes', num_classes, 0), ('in_chans', in_chans, 1)):
        if type(number) is not int or number < least:
            raise ValueError(f'{name}={number!r} must be a whole number from {least} on')
    classes, notes = class_names(data).of(num_classes)
    arguments.setdefault('global_pool', both.get('global_pool', 'avg'))
    return HubConfig(
        architecture,
        num_classes,
        in_chans,
        preprocess,
        classes,
        described(changing(arguments), CONFIG_FILE),
        notes,
    )


def _table(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f'{key}={value!r} must be a table')
    return value


def _preprocess(image: Mapping[str, Any]) -> Preprocess:
    size = image['input_size']
    problems = []
    if not isinstance(size, list | tuple) or len(size) != 3 or any(type(n) is not int for n in size):
        problems.append(f'input_size={size!r} is not [channels, height, width]')
    elif size[1] != size[2]:
        problems.append(f'input_size={size!r} is not square')
    if image['crop_mode'] != 'center':
        problems.append(f'crop_mode={image["crop_mode"]!r} is not center')
    if image['interpolation'] not in ('bilinear', 'bicubic'):
        problems.append(f'interpolation={image["interpolation"]!r} is neither bilinear nor bicubic')
    mean, std = (three_numbers(image[key]) for key in ('mean', 'std'))
    if mean is None or std is None:
        problems.append(f'mean={image["mean"]!r} and std={image["std"]!r} are not three numbers each')
    if not _is_number(image['crop_pct']):
        problems.append(f'crop_pct={image["crop_pct"]!r} is not a number')
    if problems or mean is None or std is None:
        raise ValueError(f'asks for images that flaxnets cannot prepare: {"; ".join(problems)}')
    return Preprocess(size[1], float(image['crop_pct']), 'center', image['interpolation'], mean, std)


def three_numbers(values: object) -> tuple[float, float, float] | None:
    """One number per channel; for other than three channels timm writes one and the same for each."""
    if not isinstance(values, list | tuple) or not values or not all(map(_is_number, values)):
        return None
    if len(values) != 3 and len(set(values)) == 1:
        values = [values[0]] * 3
    return (float(values[0]), float(values[1]), float(values[2])) if len(values) == 3 else None


def _is_number(value: object) -> bool:
    small = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return small  # and so no NaN, no infinity, nothing that a float could not hold


def _read_json(path: str | os.PathLike[str]) -> Any:
    try:
        with open(path, 'rb') as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f'{os.fsdecode(path)}: cannot be read: {error.strerror or error}') from error
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f'{os.fsdecode(path)}: larger than any configuration')
    try:
        return json.loads(content.decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{os.fsdecode(path)}: is not JSON: {error}') from error

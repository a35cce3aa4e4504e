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

from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from flaxnets.store.files import read_small

from .class_names import class_names
from .image_settings import timm_settings
from .options import changing, described

CONFIG_FILE = 'config.json'
# In timm's order of preference; the first is the only one that the hub still asks for.
WEIGHTS_FILES = ('model.safetensors', 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')

# What timm takes where its configuration says nothing (`timm.data.resolve_data_config`).
_TIMM_DEFAULTS: dict[str, Any] = {
    'size': 224,
    'interpolation': 'bicubic',
    'crop_pct': 0.875,
    'crop_mode': 'center',
    'mean': IMAGENET_MEAN,
    'std': IMAGENET_STD,
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
      notes: what it says of images and classes that cannot be honoured, or only nearly, in words.
    """

    architecture: str
    num_classes: int
    in_chans: int
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_hub_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a `config.json` in timm's form; its contents are not checked."""
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
      CheckpointError: no such files; a `config.json` that is not timm's.
    """
    folder = Path(path)
    config = read_hub_config(folder / CONFIG_FILE)
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name, config
    raise CheckpointError(f'{folder}: holds {CONFIG_FILE} but no weights: none of {", ".join(WEIGHTS_FILES)}')


def read_hub_config(path: str | os.PathLike[str]) -> HubConfig:
    """What a `config.json` of timm's says.

    Raises:
      CheckpointError: it cannot be read, or is not timm's.
    """
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
    preprocess, notes = _preprocess(pretrained)
    in_chans = arguments.pop('in_chans', None) or _channels(pretrained.get('input_size'))
    num_classes = both.get('num_classes', 1000)
    for name, number, least in (('num_classes', num_classes, 0), ('in_chans', in_chans, 1)):
        if type(number) is not int or number < least:
            raise ValueError(f'{name}={number!r} must be a whole number from {least} on')
    classes, more = class_names(data).of(num_classes)
    arguments.setdefault('global_pool', both.get('global_pool', 'avg'))
    return HubConfig(
        architecture,
        num_classes,
        in_chans,
        preprocess,
        classes,
        described(changing(arguments), CONFIG_FILE),
        (*notes, *more),
    )


def _channels(shape: object) -> Any:
    return shape[0] if isinstance(shape, list) and shape else 3


def _table(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f'{key}={value!r} must be a table')
    return value


def _preprocess(options: Mapping[str, Any]) -> tuple[Preprocess, tuple[str, ...]]:
    """How images are prepared, and notes on it; what cannot be is listed in `Preprocess.unsupported`."""
    said = timm_settings(options)
    found = Preprocess(**{**_TIMM_DEFAULTS, **said.fields}, unsupported=said.unsupported)
    return found, tuple(f'images: {note}' for note in said.notes)


def _read_json(path: str | os.PathLike[str]) -> Any:
    content = read_small(path, 'configuration')
    try:
        return json.loads(content.decode('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{os.fsdecode(path)}: is not JSON: {error}') from error

"""Writes weights as a folder in the form that timm has on the hub, so that timm and flaxnets both open it.

FOLDER/config.json             the net and how its images are prepared, in timm's form
FOLDER/model.safetensors       the tensors, under timm's names
FOLDER/model.safetensors.json  the certificate: what flaxnets knows, with a digest of every array
FOLDER/README.md               the model card
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from flaxnets import zoo
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import build
from flaxnets.store.files import folder_written_whole
from flaxnets.store.weights import write_json
from flaxnets.zoo.records import Config

from ..checkpoint import Checkpoint
from ..names.hub_folder import CONFIG_FILE, WEIGHTS_FILES, is_hub_folder
from ..writing import write
from .facts import NOT_IN_TIMM, Facts
from .model_card import CARD_FILE, card

TIMM_CROPS = ('center', 'squash', 'border')


def write_folder(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    facts: Facts,
    *,
    repository: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes weights as a folder of the hub, whole or not at all.

    Args:
      checkpoint: the weights.
      folder: path of the folder; it must not exist yet, unless it is such a folder and `overwrite` is True.
      facts: licence and accuracy, for the card.
      repository: 'org/name' that the card names as the place of the weights; None names the folder.
      overwrite: replace an earlier folder of this form.

    Raises:
      FlaxnetsError: the weights cannot be published (`check_publishable`), or the folder cannot be written.
    """
    check_publishable(checkpoint)
    check_folder(folder, overwrite)
    with folder_written_whole(folder) as work:
        write(checkpoint, work / WEIGHTS_FILES[0], approximate=True)
        write_json(work / CONFIG_FILE, timm_config(checkpoint.config, facts))
        where = repository or str(folder)
        text = card(checkpoint.config, checkpoint.source, facts, where, is_local=repository is None)
        (work / CARD_FILE).write_text(text, encoding='utf-8')
    return Path(folder).absolute()


def check_folder(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises `CheckpointError` if `write_folder` would refuse this folder; for use before long work."""
    path = Path(folder)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(f'{path} exists; choose another folder or overwrite it (overwrite=True)')
    if not is_hub_folder(path):
        raise CheckpointError(f'{path} is no folder of the hub, so it is not overwritten')


def check_publishable(checkpoint: Checkpoint) -> None:
    """Raises for weights that other programs could not open, or would use wrongly without noticing.

    Raises:
      FlaxnetsError: BatchNorm is folded, the net is not in the zoo, or its channels are not in timm's order.
    """
    config, where = checkpoint.config, checkpoint.where
    if config.folded:
        raise FlaxnetsError(f'{where}: folded weights have no BatchNorm, so no PyTorch net takes them')
    if zoo.NETS.get(config.name) != config.arch:
        raise FlaxnetsError(
            f'{where}: {config.name!r} is a net of your own: neither timm nor flaxnets could open it by that '
            'name. Keep the directory of weights, which flaxnets.load opens'
        )
    if config.preprocess.channel_order != 'rgb':
        raise FlaxnetsError(
            f'{where}: these weights take images as {config.preprocess.channel_order}, and timm always gives '
            'rgb: it would be wrong without a word'
        )


def remarks(config: Config) -> tuple[str, ...]:
    """In which ways timm will use these weights unlike flaxnets, or unlike their training, in words."""
    out = [f'images: {problem}' for problem in config.preprocess.unsupported]
    out += [f'images, nearly: {what}' for what in config.preprocess.approximations]
    if config.name in NOT_IN_TIMM:
        out.append(f'timm has no net called {config.name}: only flaxnets opens this')
    if config.preprocess.crop_mode not in TIMM_CROPS:
        out.append(
            f'timm cannot prepare images by crop_mode={config.preprocess.crop_mode!r}, as flaxnets does '
            'where it has the certificate: both resize them first, then crop'
        )
    return tuple(out)


def timm_config(config: Config, facts: Facts) -> dict[str, Any]:
    """timm's `config.json` for weights.

    It has no `model_args`: timm takes channels and classes from the other entries, and transformers, which
    opens such folders through timm, fails if they are given twice.
    """
    out: dict[str, Any] = {
        'architecture': config.name,
        'num_classes': config.num_classes,
        'num_features': build(config.arch).num_features,
        'global_pool': 'avg',
    }
    if config.classes:
        out['label_names'] = list(config.classes)
    out['pretrained_cfg'] = _pretrained(config, facts)
    return out


def _pretrained(config: Config, facts: Facts) -> dict[str, Any]:
    preprocess = config.preprocess
    mean, std = _normalisation(preprocess, config.in_chans)
    pools = [math.ceil(side / 32) for side in (preprocess.height, preprocess.width)]
    return {
        **({'tag': config.weights.tag} if config.weights else {}),
        'custom_load': False,
        'input_size': [config.in_chans, preprocess.height, preprocess.width],
        'fixed_input_size': False,
        'interpolation': preprocess.interpolation,
        'crop_pct': preprocess.crop_pct,
        'crop_mode': preprocess.crop_mode if preprocess.crop_mode in TIMM_CROPS else 'center',
        'mean': list(mean),
        'std': list(std),
        'num_classes': config.num_classes,
        'pool_size': pools,
        'first_conv': 'conv1.0' if config.arch.deep_stem else 'conv1',
        'classifier': 'fc',
        'license': facts.licence,
    }


def _normalisation(preprocess: Preprocess, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel; unchanged if they are for another number of channels."""
    try:
        return preprocess.channel_values(channels)
    except FlaxnetsError:
        return preprocess.mean, preprocess.std

"""Reads the weights, and nothing else, from the checkpoints of a training run.

WORKDIR/checkpoints/STEP/   what `train.run.checkpoints` writes, in the form of `flaxnets.store.arrays`
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FlaxnetsError
from ..zoo.records import Config, config_from_json
from . import arrays
from .remote import StorePath, place

_VARIABLES = ('params', 'batch_stats')


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one step of a run.

    Attributes:
      step: how many updates the run had done.
      config: describes the weights.
      variables: {'params': ..., 'batch_stats': ...}, NumPy arrays.
      averaged: whether these are the run's moving averages.
    """

    step: int
    config: Config
    variables: dict[str, Any]
    averaged: bool


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run's workdir, its folder of checkpoints, or a checkpoint."""
    try:
        find(path)
    except CheckpointError:
        return False
    return True


def find(path: str | os.PathLike[str], which: str = 'last') -> str:
    """The folder of one checkpoint.

    Args:
      path: a run's workdir, its folder of checkpoints, or one checkpoint.
      which: 'last', 'best' (by the accuracy of its evaluation) or a step.

    Raises:
      CheckpointError: there is no such checkpoint; the message names those that exist.
    """
    folder = place(path)
    if arrays.is_committed(folder) and (folder / 'manifest').exists():
        return os.fspath(folder)
    inner = folder / 'checkpoints'
    folder = inner if inner.is_dir() else folder
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal() and arrays.is_committed(folder / name))
    if not steps:
        raise CheckpointError(f'{path}: no checkpoint of a training run')
    there = ', '.join(map(str, steps))
    if which == 'best':
        scores = {step: arrays.read_manifest(folder / str(step)).facts.get('score') for step in steps}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        if not scored:
            raise CheckpointError(f'{folder}: no checkpoint has been evaluated; there are {there}')
        return os.fspath(folder / str(max(scored)[1]))
    if which != 'last' and which not in map(str, steps):
        raise CheckpointError(f'{folder}: no checkpoint {which}; there are {there}, last and best')
    return os.fspath(folder / (str(steps[-1]) if which == 'last' else which))


def read_config(path: str | os.PathLike[str], which: str = 'last') -> Config:
    """Describes the weights of a checkpoint without reading them.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = find(path, which)
    return _facts(folder)[0]


def _facts(folder: str) -> tuple[Config, int]:
    """The description of a checkpoint's weights, and its step."""
    facts = arrays.read_manifest(folder).facts
    try:
        return config_from_json(facts['meta']['config']), int(facts['step'])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{folder}: not a checkpoint of a training run ({error!r})') from error


def read(path: str | os.PathLike[str], which: str = 'last', *, ema: bool = True) -> Checkpoint:
    """Reads the weights of a checkpoint and checks every digest.

    Args:
      path, which: as in `find`.
      ema: take the moving averages, if the run kept them; False takes the trained weights.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = find(path, which)
    config, step = _facts(folder)
    averaged = ema and any(name.startswith('ema/') for name in arrays.read_manifest(folder).arrays)
    variables = arrays.read(folder, ['ema'])['ema'] if averaged else arrays.read(folder, _VARIABLES)
    return Checkpoint(step, config, variables, averaged)


@contextlib.contextmanager
def fetched(source: str | os.PathLike[str]) -> Iterator[Path]:
    """Copies weights from a store such as `gs://` to this machine, until the block ends.

    Errors of the block name the source in place of the copy.

    Args:
      source: a file, a folder with files directly in it, or a path that `find` takes.

    Returns:
      The copy, a path of the same name. Of a run it has only the last checkpoint. Arrays that are mapped from
      it stay valid after the block.

    Raises:
      CheckpointError: there is no such file, folder or checkpoint.
    """
    path = StorePath(source)
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary) / path.name
        names = [name for name, entry in path.entries() if entry['type'] == 'file']
        if path.is_file():
            path.parent.download(here.parent, [path.name])
        elif is_checkpoint(path):
            checkpoint = StorePath(find(path))
            checkpoint.download(here / 'checkpoints' / checkpoint.name, checkpoint.files())
        elif names:
            path.download(here, names)
        else:
            raise CheckpointError(f'{path}: no such file or directory')
        try:
            yield here
        except FlaxnetsError as error:
            error.args = (str(error).replace(str(here), str(path)), *error.args[1:])
            raise

"""What nets learn, and what they learn from weights that they begin with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import finish, start

import flaxnets
from convert.conversion import open_checkpoint
from convert.writing import write
from train import recipes
from train.data.sources import open_source
from train.job import initial_state, make_job
from train.loop import Outcome, train
from train.run.log import read
from train.settings import Settings

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'


@pytest.mark.parametrize(
    'fields',
    [
        *(('epochs=6', f'seed={seed}') for seed in range(3 if FULL else 1)),
        # Averages far longer than the run must not keep it near the net that it began with.
        ('model=resnest_tiny', 'epochs=6', 'ema_decay=0.9999'),
    ],
    ids=' '.join,
)
def test_digits_are_learned(fields: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of block, optimised, in processes of their own; the third is fine-tuned below."""
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '0')
    small = ('image_size=16', 'eval_size=16', 'crop_padding=1')
    finish(start(tmp_path / 'run', '--recipe', 'digits', *small, fields=fields, program=('-m', 'train')))
    evaluation = [record for record in read(str(tmp_path / 'run')) if record['kind'] == 'eval'][-1]
    assert evaluation['top1'] >= 97.0  # logistic regression: 96.39


def quiet(settings: Settings, workdir: Path) -> Outcome:
    return train(settings, str(workdir), quiet=True)


@pytest.mark.usefixtures('compiled_once')
def test_fine_tuning_beats_starting_from_nothing(tmp_path: Path) -> None:
    """Digits 0 to 4 are learned, taken to PyTorch's format and back, and help to learn 5 to 9."""
    for name, low in (('first', 0), ('second', 5)):
        arrays: dict[str, Any] = {'classes': np.array(list('0123456789')[low : low + 5])}
        for part, training in (('train', True), ('test', False)):
            source = open_source('digits', '', training)
            rows = [i for i in range(len(source)) if low <= source[i].label < low + 5]
            arrays[f'x_{part}'] = np.stack([np.asarray(source[i].image) for i in rows])
            arrays[f'y_{part}'] = np.array([source[i].label - low for i in rows])
        np.savez(tmp_path / f'{name}.npz', **arrays)
    base = dataclasses.replace(
        recipes.get('digits'),
        model='resnext_tiny',
        image_size=16,  # of 8x8 digits
        eval_size=16,
        batch_size=64,
        epochs=6,
        eval_epochs=99,  # at the end
    )
    first = dataclasses.replace(base, data=f'arrays:{tmp_path}/first.npz')
    quiet(first, tmp_path / 'first')
    write(open_checkpoint(tmp_path / 'first' / 'weights'), tmp_path / 'first.pth')
    (tmp_path / 'first.pth.json').unlink()  # as people hand on a file: without what it says of the classes
    second = dataclasses.replace(base, data=f'arrays:{tmp_path}/second.npz', max_steps=22)
    scratch = quiet(second, tmp_path / 'scratch')
    directory, file = tmp_path / 'first' / 'weights', tmp_path / 'first.pth'

    def begins_with(weights: Path) -> Any:
        job = make_job(dataclasses.replace(second, weights=str(weights)))
        return initial_state(job).params['fc']['kernel']

    # A directory knows its classes, which are not these, and gets a new classifier. A `.pth` keeps its own.
    learned = flaxnets.load(directory)[1]['params']['fc']['kernel']
    assert not np.array_equal(begins_with(directory), learned)
    np.testing.assert_array_equal(begins_with(file), learned)
    tuned = quiet(dataclasses.replace(second, weights=str(file), frozen_stages=2), tmp_path / 'tuned')
    assert tuned.evaluation is not None and scratch.evaluation is not None
    assert tuned.evaluation.top1 > scratch.evaluation.top1 + 5
    before, after = (flaxnets.load(tmp_path / name / 'weights')[1] for name in ('first', 'tuned'))
    for part in ('params', 'batch_stats'):
        for frozen in ('conv1', 'bn1', 'layer1'):
            jax.tree.map(np.testing.assert_array_equal, before[part][frozen], after[part][frozen])
    assert before['params']['layer1']['0']['conv1']['kernel'].any()

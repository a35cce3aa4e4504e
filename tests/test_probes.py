"""Probes of features: scikit-learn's on the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from nets import random_variables
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import flaxnets
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo.records import Config
from train.__main__ import main
from train.data.sources import open_source
from train.evaluation.probes import TEMPERATURE, linear_probe, vote

CLASSES = 4


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points around four centres, near enough to be confused."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(9).normal(size=(CLASSES, 12))
    return (centres[labels] + 1.2 * rng.normal(size=(count, 12))).astype(np.float32), labels


def by_similarity(distances: np.ndarray) -> np.ndarray:
    return np.exp((1 - distances) / TEMPERATURE)


@pytest.mark.parametrize('k', [1, 20, 1000])
def test_the_vote_is_sklearns(k: int) -> None:
    (known, labels), (asked, _) = clouds(300, 0), clouds(200, 1)
    peer = KNeighborsClassifier(min(k, 300), metric='cosine', weights=by_similarity).fit(known, labels)
    np.testing.assert_array_equal(vote(asked, known, labels, CLASSES, k), peer.predict(asked))


@pytest.mark.parametrize('strength', [0.01, 1.0])
def test_the_linear_probe_is_sklearns(strength: float) -> None:
    (known, labels), (asked, _) = clouds(300, 0), clouds(500, 1)
    peer = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(known, labels)
    found = linear_probe(known, labels, CLASSES, strength)(asked)
    assert (found == peer.predict(asked)).mean() > 0.995


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = Arch('resnext', (1, 1, 1, 1), 2, 32, planes=8)
    config = Config('small', arch, Preprocess(32, 1.0), num_classes=0, in_chans=1)
    weights.save(tmp_path / 'net', random_variables(build(arch, 0, 1)), config)
    options = ['probe', '--model', str(tmp_path / 'net'), '--data', 'digits', '--quiet', '--threads', '1']
    options += ['--train-split', 'train[:20%]', '--split', 'val[:40%]']
    assert main([*options, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found['trained'], found['judged'], found['features']) == (287, 140, 256)
    model, variables = flaxnets.load(tmp_path / 'net')
    transform = flaxnets.transform(tmp_path / 'net')
    parts = []
    for split in ('train[:20%]', 'val[:40%]'):
        source = open_source('digits', split, training=False)
        records = [source[i] for i in range(len(source))]
        images = np.stack([transform(record.image) for record in records])
        parts.append(
            (np.asarray(jax.jit(model.apply)(variables, images)), np.array([r.label for r in records]))
        )
    (known, labels), (asked, wanted) = parts
    peer = KNeighborsClassifier(20, metric='cosine', weights=by_similarity).fit(known, labels)
    assert found['knn'] == pytest.approx(100 * peer.score(asked, wanted), abs=0.3)
    assert 30 < found['linear'] < 100
    for wrong in (['--neighbours', '0'], ['--strength', '-1'], ['--train-split', 'val[:40%]']):
        assert main([*options, *wrong]) == 1 and capsys.readouterr().err.startswith('error: ')

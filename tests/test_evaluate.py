"""Accuracy: every image once, integer counts, labels of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from nets import random_variables

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from train import parallel
from train.evaluation.metrics import Evaluation, Evaluator, real_labels

CLASSES, SIZE = 4, 32
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (26, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = RNG.integers(0, CLASSES, 26).astype(np.int32)


def batches(count: int, size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        there = rows < count
        rows = np.where(there, rows, 0)
        yield {'image': IMAGES[rows], 'label': LABELS[rows], 'mask': there}


@pytest.fixture(scope='module')
def net() -> tuple[Evaluator, dict, np.ndarray]:
    """An evaluator, its variables, and the logits of a plain loop over single images."""
    model = flaxnets.create('resnext_tiny', CLASSES)
    variables = random_variables(model)
    transform = flaxnets.transform('resnext_tiny')
    apply = jax.jit(model.apply)
    logits = np.concatenate([apply(variables, transform(image)[None]) for image in IMAGES])
    return Evaluator(model, Preprocess()), parallel.replicate(variables), logits


def test_every_number_of_images_is_counted_exactly(net: tuple[Evaluator, dict, np.ndarray]) -> None:
    evaluator, variables, logits = net
    size = 2 * jax.device_count()
    for count in range(1, 3 * size + 2):
        seen: list[int] = []
        result = evaluator(variables, batches(count, size), seen.append)
        order = np.argsort(-logits[:count], axis=1, kind='stable')
        assert result.images == sum(seen) == count
        np.testing.assert_array_equal(result.labels, LABELS[:count])
        np.testing.assert_array_equal(result.predictions, order[:, 0])
        np.testing.assert_array_equal(order[np.arange(count), result.ranks], LABELS[:count])
        exponentials = np.exp(logits[:count].astype(np.float64))
        own = exponentials[np.arange(count), LABELS[:count]] / exponentials.sum(1)
        assert result.loss == pytest.approx(-np.log(own).mean(), rel=1e-5)


def test_no_images_is_an_error(net: tuple[Evaluator, dict, np.ndarray]) -> None:
    with pytest.raises(FlaxnetsError, match='no images'):
        net[0](net[1], [])


def evaluation(labels: list[int], predictions: list[int], ranks: list[int], classes: int) -> Evaluation:
    return Evaluation(np.array(labels), np.array(predictions), np.array(ranks), np.ones(len(labels)), classes)


def test_accuracies_by_hand() -> None:
    result = evaluation([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 2], [0, 1, 0, 5, 0, 0], 4)
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.top5 == pytest.approx(100 * 5 / 6)
    np.testing.assert_array_equal(result.confusion, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(result.per_class, [50, 100, 200 / 3, np.nan])


def test_judged_among_some_outputs_as_if_there_were_no_others(
    net: tuple[Evaluator, dict, np.ndarray],
) -> None:
    logits, among = net[2], [0, 1, 3]
    evaluator = Evaluator(flaxnets.create('resnext_tiny', CLASSES), Preprocess(), among=(3, 0, 1))
    rows = np.flatnonzero(LABELS != 2)
    size = 2 * jax.device_count()
    data = [{'image': IMAGES[r], 'label': LABELS[r], 'mask': m} for r, m in padded(rows, size)]
    result = evaluator(net[1], data)
    order = np.argsort(-logits[rows][:, among], axis=1, kind='stable')
    np.testing.assert_array_equal(result.labels, LABELS[rows])
    np.testing.assert_array_equal(result.predictions, np.array(among)[order[:, 0]])
    np.testing.assert_array_equal(np.array(among)[order[np.arange(len(rows)), result.ranks]], LABELS[rows])
    wanted = torch.from_numpy(np.searchsorted(among, LABELS[rows]))
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits[rows][:, among]), wanted)
    assert result.loss == pytest.approx(float(loss), rel=1e-5)


def padded(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield np.resize(part, size), np.arange(size) < len(part)


def test_logits_that_are_not_finite_are_wrong_and_counted() -> None:
    model = flaxnets.create('resnext_tiny', CLASSES)
    variables = random_variables(model)
    variables['params']['fc']['bias'][0] = np.nan
    result = Evaluator(model, Preprocess())(
        parallel.replicate(variables), batches(10, 2 * jax.device_count())
    )
    assert (result.top1, result.top5, result.non_finite) == (0, 0, 10)
    assert result.confusion.sum() == 0
    np.testing.assert_array_equal(result.per_class[np.unique(LABELS[:10])], 0)


def test_reassessed_labels_count_images_that_have_some(tmp_path: Path) -> None:
    path = tmp_path / 'real.json'
    path.write_text(json.dumps([[3], [], [1, 2], [0]]))
    names = [f'x/ILSVRC2012_val_0000000{n}.JPEG' for n in (3, 1, 2, 4)]  # in an order of their own
    result = evaluation([1, 3, 0, 0], [2, 3, 0, 1], [1, 0, 0, 1], 5)
    found = real_labels(str(path), names, result)
    assert found == {'real_top1': pytest.approx(100 * 2 / 3), 'real_images': 3}
    with pytest.raises(FlaxnetsError, match='not the reassessed labels'):
        real_labels(str(path), ['cat.jpg'] * 4, result)
    with pytest.raises(FlaxnetsError, match='not the reassessed labels'):
        real_labels(str(tmp_path / 'absent.json'), names, result)

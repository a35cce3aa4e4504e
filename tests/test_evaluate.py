"""Accuracy: every image once, integer counts, labels of every kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from nets import random_variables

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from train import parallel
from train.evaluation.metrics import BINS, Evaluation, Evaluator, averaged, real_labels

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
    top = np.array([[2, 4], [3, 0], [2, 0], [1, 0]])
    found = real_labels(str(path), names, replace(result, top=top))
    assert found['real_top5'] == 100
    with pytest.raises(FlaxnetsError, match='not the reassessed labels'):
        real_labels(str(path), ['cat.jpg'] * 4, result)
    with pytest.raises(FlaxnetsError, match='not the reassessed labels'):
        real_labels(str(tmp_path / 'absent.json'), names, result)


def test_confidence_and_the_five_largest(net: tuple[Evaluator, dict, np.ndarray]) -> None:
    evaluator, variables, logits = net
    result = evaluator(variables, batches(len(IMAGES), 2 * jax.device_count()))
    shares = torch.from_numpy(logits).softmax(1).numpy()
    np.testing.assert_allclose(result.confidences, shares.max(1), rtol=1e-5)
    np.testing.assert_array_equal(result.top, np.argsort(-logits, axis=1, kind='stable')[:, :5])
    assert result.scores is None


def test_views_are_averaged_as_probabilities() -> None:
    """Five crops and their mirror images: ten crops, as in He et al., in torch."""
    model = build(Arch('resnext', (1, 1, 1, 1), 2, 32, planes=8), CLASSES)
    variables = random_variables(model)
    rng = np.random.default_rng(1)
    crops = rng.integers(0, 256, (4, 5, SIZE, SIZE, 3), dtype=np.uint8)
    data = {'image': crops, 'label': LABELS[:4], 'mask': np.ones(4, bool)}
    evaluator = Evaluator(model, Preprocess(), among=(0, 1, 3), flip=True, scores=True)
    labels = np.array([0, 3, 1, 3])
    result = evaluator(parallel.replicate(variables), [{**data, 'label': labels}])
    views = np.concatenate([crops, crops[:, :, :, ::-1]], 1).reshape(-1, SIZE, SIZE, 3)
    transform = flaxnets.transform('resnext_tiny')
    logits = np.asarray(jax.jit(model.apply)(variables, np.stack([transform(view) for view in views])))
    shares = torch.from_numpy(logits[:, [0, 1, 3]]).softmax(1).reshape(4, 10, 3).mean(1)
    np.testing.assert_allclose(np.exp(result.scores), shares, rtol=1e-4)
    np.testing.assert_array_equal(result.predictions, np.array([0, 1, 3])[shares.argmax(1)])
    loss = torch.nn.functional.nll_loss(shares.log(), torch.tensor([0, 2, 1, 2]))
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)


def known(scores: np.ndarray, labels: np.ndarray) -> Evaluation:
    """What is known of images by all probabilities."""
    order = np.argsort(-scores, axis=1, kind='stable')
    ranks = (order == labels[:, None]).argmax(1)
    return Evaluation(
        labels, order[:, 0], ranks, np.ones(len(labels)), scores.shape[1], scores=np.log(scores)
    )


def test_several_nets_are_averaged() -> None:
    rng = np.random.default_rng(2)
    shares = torch.from_numpy(rng.normal(size=(3, 20, 7))).softmax(2)
    labels = rng.integers(0, 7, 20)
    found = averaged([known(one, labels) for one in shares.numpy()], None)
    expected = shares.mean(0)
    np.testing.assert_array_equal(found.predictions, expected.argmax(1))
    np.testing.assert_array_equal(found.top, expected.topk(5).indices)
    np.testing.assert_allclose(found.confidences, expected.max(1).values, rtol=1e-5)
    loss = torch.nn.functional.nll_loss(expected.log(), torch.from_numpy(labels))
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    own = expected.gather(1, torch.from_numpy(labels)[:, None])
    np.testing.assert_array_equal(found.ranks, (expected > own).sum(1))
    among = (3, 5, 8, 9, 12, 13, 20)
    other = averaged(
        [replace(known(one, labels), labels=np.array(among)[labels]) for one in shares.numpy()], among
    )
    np.testing.assert_array_equal(other.predictions, np.array(among)[found.predictions])
    np.testing.assert_array_equal(other.ranks, found.ranks)


def test_calibration_error() -> None:
    """The formula of Guo et al., section 2, interval by interval."""
    rng = np.random.default_rng(3)
    confidences = np.append(rng.uniform(0.2, 1, 400), [1.0, 1 / 15, 0.4])
    right = rng.uniform(size=403) < confidences**2
    result = Evaluation(
        np.zeros(403, int), np.where(right, 0, 1), np.where(right, 0, 1), np.ones(403), 2, confidences
    )
    expected = 0.0
    for i in range(BINS):
        inside = (confidences > i / BINS) & (confidences <= (i + 1) / BINS)
        if inside.any():
            expected += inside.sum() / 403 * abs(right[inside].mean() - confidences[inside].mean())
    assert result.calibration_error == pytest.approx(100 * expected)
    assert result.reliability[0].sum() == 403

"""Evaluates every image exactly once, on any number of devices and hosts, and measures the results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int, Int64

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.inference.batches import one_ahead
from flaxnets.nets.resnet import ResNet

from .. import parallel
from ..step.step import make_eval_step

BINS = 15  # intervals of confidence, as in Guo et al.


@dataclass(frozen=True)
class Evaluation:
    """The results of a net on a data set, image by image, in the data's order.

    Only the outputs that the net is judged among count; they are all outputs unless `Evaluator` is told.

    Attributes:
      labels: true classes.
      predictions: the class with the largest logit; -1 where a logit is not finite.
      ranks: how many classes have a larger logit than the true one.
      losses: cross entropy without label smoothing, in nats.
      num_classes: how many outputs the net has.
      confidences: the largest probability, 0 to 1; None if it is not known.
      top: the outputs with the five largest logits (fewer columns if there are fewer outputs); None
        if they are not known.
      scores: logarithms of the probabilities of the outputs judged among; None unless they were asked for.
    """

    labels: Int[np.ndarray, ' n']
    predictions: Int[np.ndarray, ' n']
    ranks: Int[np.ndarray, ' n']
    losses: Float[np.ndarray, ' n']
    num_classes: int
    confidences: Float[np.ndarray, ' n'] | None = None
    top: Int[np.ndarray, 'n five'] | None = None
    scores: Float[np.ndarray, 'n judged'] | None = None

    @property
    def images(self) -> int:
        """How many images were evaluated."""
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Share of the images whose class has the largest logit, in percent."""
        return 100 * int((self.ranks == 0).sum()) / self.images

    @property
    def top5(self) -> float:
        """Share of the images whose class is among the five largest logits, in percent."""
        return 100 * int((self.ranks < 5).sum()) / self.images

    @property
    def loss(self) -> float:
        """Mean of `losses`, in nats."""
        return float(self.losses.astype(np.float64).mean())

    @cached_property
    def confusion(self) -> Int64[np.ndarray, '{self.num_classes} {self.num_classes}']:
        """[true class, predicted class]: numbers of images."""
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        there = self.predictions >= 0
        np.add.at(matrix, (self.labels[there], self.predictions[there]), 1)
        return matrix

    @property
    def per_class(self) -> Float[np.ndarray, ' {self.num_classes}']:
        """Top-1 of each class in percent; NaN for a class without images."""
        with np.errstate(invalid='ignore'):
            return 100 * self.confusion.diagonal() / self.class_sizes

    @property
    def class_sizes(self) -> Int64[np.ndarray, ' {self.num_classes}']:
        """Images of each class."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @property
    def reliability(
        self,
    ) -> tuple[Int[np.ndarray, ' 15'], Float[np.ndarray, ' 15'], Float[np.ndarray, ' 15']]:
        """For each of 15 equal intervals of confidence: number of images, mean confidence, accuracy.

        Guo et al., arXiv 1706.04599, section 2. Confidence and accuracy are from 0 to 1; all three are 0 for
        an interval without images.
        """
        assert self.confidences is not None, 'an evaluation of a net has them'
        there = self.predictions >= 0
        confidences = self.confidences[there].astype(np.float64)
        bins = np.clip(np.ceil(confidences * BINS).astype(int) - 1, 0, BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        sums = (
            np.bincount(bins, weights, minlength=BINS) for weights in (confidences, self.ranks[there] == 0)
        )
        confidence, accuracy = (total / np.maximum(counts, 1) for total in sums)
        return counts, confidence, accuracy

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (ECE) over 15 intervals, in percent."""
        counts, confidence, accuracy = self.reliability
        return float(100 * (counts * abs(accuracy - confidence)).sum() / max(1, counts.sum()))

    @property
    def non_finite(self) -> int:
        """How many images have a logit that is not a finite number; they count as wrong."""
        return int((self.predictions < 0).sum())

    def values(self) -> dict[str, float]:
        """The values that a log records: accuracies in percent, the loss in nats."""
        return {'images': self.images, 'top1': self.top1, 'top5': self.top5, 'loss': self.loss}


class Evaluator:
    """Evaluates variables of one net; compiled once.

    Args:
      model: the net.
      preprocess: how its images are normalised.
      among: outputs among which it is judged, every label one of them; None for all.
      flip, scores: as in `make_eval_step`.
    """

    def __init__(
        self,
        model: ResNet,
        preprocess: Preprocess,
        *,
        among: Sequence[int] | None = None,
        flip: bool = False,
        scores: bool = False,
    ) -> None:
        self._num_classes = model.num_classes
        step = make_eval_step(
            model, preprocess, axis_name=parallel.AXIS, among=among, flip=flip, scores=scores
        )
        self._step = parallel.map_eval_step(step)

    def __call__(
        self,
        variables: Any,
        batches: Iterable[dict[str, npt.NDArray[Any]]],
        on_batch: Callable[[int], None] = lambda images: None,
    ) -> Evaluation:
        """Runs all batches.

        Args:
          variables: of the net.
          batches: {'image', 'label', 'mask'}, this host's part of each; all hosts have the same number.
          on_batch: told how many images of the global batch are done, for a progress bar.
        """
        parts: list[dict[str, npt.NDArray[Any]]] = []
        for results in one_ahead(self._step(variables, parallel.shard(batch)) for batch in batches):
            parts.append(_kept(results))
            on_batch(len(parts[-1]['label']))
        if not parts:
            raise FlaxnetsError('there are no images to evaluate')
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return Evaluation(
            whole['label'],
            whole['prediction'],
            whole['rank'],
            whole['loss'],
            self._num_classes,
            whole['confidence'],
            whole['top'],
            whole.get('scores'),
        )


def _kept(results: Any) -> dict[str, npt.NDArray[Any]]:
    """The results of the images that exist, without those of the padding."""
    host: dict[str, npt.NDArray[Any]] = parallel.to_host(results)
    mask = host.pop('mask')
    return {key: array[mask] for key, array in host.items()}


def real_labels(path: str, names: Sequence[str], evaluation: Evaluation) -> dict[str, float]:
    """Top-1 by ImageNet's reassessed labels (Beyer et al., arXiv 2006.07159), in percent.

    Args:
      path: their `real.json`: for each validation image in order, the classes that it shows.
      names: file names of the evaluated images (`ILSVRC2012_val_00000001.JPEG`), in the same order.
      evaluation: of all outputs of a net for ImageNet.

    Returns:
      {'real_top1': ..., 'real_top5': ..., 'real_images': ...}; images without any label do not count. One of
      the five predictions must be one of the labels, as timm counts.

    Raises:
      FlaxnetsError: the file does not hold these labels, or a name has no number.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding='utf-8'))
        numbers = [int(re.search(r'val_(\d{8})', name)[1]) - 1 for name in names]  # type: ignore[index]
        sets = [set(labels[number]) for number in numbers]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise FlaxnetsError(
            f'{path}: not the reassessed labels of these images ({error}); they are a list of 50000 lists '
            'of classes, for images named ILSVRC2012_val_00000001 and so on'
        ) from error
    judged = [int(p) in s for p, s in zip(evaluation.predictions, sets, strict=True) if s]
    found = {'real_top1': 100 * sum(judged) / max(1, len(judged))}
    if evaluation.top is not None:
        rows = zip(evaluation.top.tolist(), evaluation.predictions, sets, strict=True)
        five = [bool(s & set(row)) and p >= 0 for row, p, s in rows if s]
        found['real_top5'] = 100 * sum(five) / max(1, len(five))
    return {**found, 'real_images': len(judged)}


def averaged(evaluations: Sequence[Evaluation], among: Sequence[int] | None) -> Evaluation:
    """The results of several nets together: the average of their probabilities.

    Args:
      evaluations: of the same images, with `scores`, whose columns are the same classes in the same order.
      among: the outputs of the columns, in their order; None for all.
    """
    first = evaluations[0]
    scores = [evaluation.scores for evaluation in evaluations if evaluation.scores is not None]
    together = np.zeros_like(scores[0], np.float32)
    for one in scores:
        together += np.exp(one) / len(scores)
    columns = np.arange(first.num_classes) if among is None else np.array(sorted(among))
    rows, places = np.arange(len(together)), np.searchsorted(columns, first.labels)
    own = together[rows, places][:, None]
    before = (together > own) | ((together == own) & (np.arange(len(columns)) < places[:, None]))
    order = np.argsort(-together, axis=1, kind='stable')[:, :5]
    finite = np.all([e.predictions >= 0 for e in evaluations], axis=0)
    with np.errstate(divide='ignore'):
        losses = -np.log(own[:, 0])
        logs = np.log(together)
    return Evaluation(
        first.labels,
        np.where(finite, columns[order[:, 0]], -1),
        np.where(finite, before.sum(1), np.iinfo(np.int32).max),
        losses,
        first.num_classes,
        together.max(1),
        columns[order],
        logs,
    )

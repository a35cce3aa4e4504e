"""The command `python -m train eval`: accuracy of weights, beside what was published for them."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flaxnets.api import load_with_config
from flaxnets.errors import FlaxnetsError
from flaxnets.store.remote import is_remote, staged
from flaxnets.store.weights import write_json
from flaxnets.zoo import imagenet
from flaxnets.zoo.classes import Matching, imagenet_places, match, read_classes
from flaxnets.zoo.records import Config, to_json

from .. import parallel
from ..data.sources import Source
from . import pictures
from .benchmarks import (
    REAL_LABELS,
    Benchmark,
    check_classes,
    notes,
    open_benchmark,
    preprocess_notes,
    published,
)
from .feed import device_batches
from .metrics import BINS, Evaluation, Evaluator, averaged, real_labels
from .mistakes import write_mistakes


@dataclass(frozen=True)
class Judged:
    """The outputs that a net is judged among: the largest of these is its answer.

    Attributes:
      among: 'all' for all outputs, 'data' for those of the data's classes.
      outputs: their numbers; None for all.
      words: the same in words, with the other choice.
    """

    among: str
    outputs: tuple[int, ...] | None
    words: str


class Views(NamedTuple):
    """The views of an image whose probabilities are averaged.

    Attributes:
      crops: 1 (the centre) or 5 (the corners and the centre).
      flip: whether their mirror images count too.
    """

    crops: int = 1
    flip: bool = False

    def __str__(self) -> str:
        if self.crops == 1:
            return 'the image and its mirror image' if self.flip else ''
        return f'{self.crops} crops' + (' and their mirror images' if self.flip else '')


ONE_VIEW = Views()


@dataclass(frozen=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
      model: the weights, as the user named them.
      config: the configuration of the weights.
      source: the data.
      matching: how the classes of the data were matched with the outputs.
      judged: the outputs that the net is judged among.
      result: the results, image by image.
      extra: further accuracies by name, in percent.
      views: of each image, whose probabilities are averaged.
      benchmark: the published test set that the data was said to be, if any.
      members: how many nets were averaged.
    """

    model: str
    config: Config
    source: Source
    matching: Matching
    judged: Judged
    result: Evaluation
    extra: dict[str, float]
    views: Views = ONE_VIEW
    benchmark: Benchmark | None = None
    members: int = 1

    @property
    def published(self) -> dict[str, Any]:
        """The accuracy that is published for these weights on this data, if there is one.

        'top1' and 'top5' in percent ('real_top1' and 'real_top5' by the reassessed labels), the 'size' in
        pixels with which they were measured, 'source' and 'data'.
        """
        row, data, top = self.config.weights, 'ImageNet-1k validation', 'top'
        if row is None or self.members > 1:
            return {}
        found = row.accuracy[0] if row.accuracy and self.matching.whole else None
        if self.benchmark:
            found = published(self.benchmark, self.config, self.source)
            data = ', '.join(filter(None, (self.benchmark.title, self.benchmark.version)))
            top = 'real_top' if self.benchmark.real else 'top'
        among_some = bool(self.benchmark and self.benchmark.subset)
        if found is None or bool(self.judged.outputs) != among_some:
            return {}
        accuracies = {f'{top}1': found.top1, f'{top}5': found.top5}
        return {**accuracies, 'size': found.size, 'source': found.source, 'data': data}

    def as_json(self) -> dict[str, Any]:
        """What result.json holds."""
        return {
            'model': self.model,
            'architecture': self.config.name,
            'data': self.source.name,
            'matched': self.matching.rule,
            'preprocess': to_json(self.config.preprocess),
            'among': self.judged.among,
            'among_classes': len(self.judged.outputs or self.matching.names),
            **self.result.values(),
            'loss': self.result.loss if np.isfinite(self.result.loss) else None,  # JSON has no NaN
            'ece': self.result.calibration_error,
            'non_finite': self.result.non_finite,
            'crops': self.views.crops,
            'flip': self.views.flip,
            'benchmark': self.benchmark.title if self.benchmark else None,
            **self.extra,
            'published': self.published,
        }

    def text(self) -> str:
        """The report as text for a terminal."""
        result, beside = self.result, self.published
        lines = [
            f'{self.model} ({self.config.name}) on {self.source.name}, {result.images} images',
            f'top-1  {result.top1:6.2f} %' + _beside(beside.get('top1')),
            f'top-5  {result.top5:6.2f} %' + _beside(beside.get('top5')),
            f'loss   {result.loss:7.4f}',
            f'ECE    {result.calibration_error:6.2f} %   (expected calibration error, {BINS} intervals)',
            f'classes are matched {self.matching.rule}',
            f'judged among {self.judged.words}',
            f'images: {self.config.preprocess}',
        ]
        if self.benchmark:
            lines.append(f'as {self.benchmark.title}')
        if str(self.views):
            lines.append(f'probabilities are averaged over {self.views}')
        if self.members > 1:
            lines.append(f'probabilities of {self.members} nets are averaged')
        if result.non_finite:
            lines.append(f'{result.non_finite} images have logits that are not finite, and count as wrong')
        lines += [f'{name}  {value:.2f}' + _beside(beside.get(name)) for name, value in self.extra.items()]
        if beside:
            lines.append(
                f'published: {beside["data"]} at {beside["size"]} px, {beside["source"]}'
                + (', of the centre crop alone' if str(self.views) else '')
            )
        return '\n'.join(lines)


def _beside(published: float | None) -> str:
    return '' if published is None else f'   published {published:.2f} %'


def run(options: argparse.Namespace) -> Report:
    """Evaluates weights on data, by the options of the command line.

    Raises:
      FlaxnetsError: no such weights or data, classes that do not fit, an image that cannot be read, a folder
        that cannot be made.
    """
    if options.out and not is_remote(options.out):
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:  # before the work, and not after it
            raise FlaxnetsError(f'{options.out}: no such folder can be made ({error.strerror})') from error
    source, benchmark, beside = open_benchmark(options.data, options.split)
    named = notes(benchmark, source) if benchmark else ()
    _tell(*source.notes, *named)
    labels = options.real_labels or beside
    if benchmark and benchmark.real and not labels:
        raise FlaxnetsError(
            f'the reassessed labels are missing: {REAL_LABELS} of github.com/google-research/'
            'reassessed-imagenet, in the folder or given as the file of real labels'
        )
    several = len(options.model) > 1
    members = [
        _evaluate(options, weights, source, benchmark, bool(labels), several) for weights in options.model
    ]
    report = members[0] if len(members) == 1 else _together(members)
    if labels:
        names = [source.record_name(i) for i in range(len(source))]
        report = replace(report, extra={**report.extra, **real_labels(labels, names, report.result)})
    if options.out and jax.process_index() == 0:
        with staged(options.out) as out:
            write(report, out)
    return report


def _evaluate(
    options: argparse.Namespace,
    weights: str,
    source: Source,
    benchmark: Benchmark | None,
    real: bool,
    scores: bool,
) -> Report:
    """Evaluates one net on all images."""
    config, model, variables = load_with_config(weights, dtype=options.dtype)
    if options.images:
        _tell(*config.preprocess.overruled)
        config = replace(config, preprocess=config.preprocess.changed(options.images))
    if config.num_classes == 0:
        raise FlaxnetsError(f'{weights} has no classifier: there is nothing to evaluate')
    classes = read_classes(options.classes) if options.classes else None
    matching = match(source.classes, config, classes=classes, order=options.class_order)
    places = imagenet_places(config, classes)
    if benchmark:
        check_classes(benchmark, source, matching.outputs, places)
        _tell(*preprocess_notes(benchmark, config))
    among = options.among or ('data' if benchmark and benchmark.subset else None)
    judged = judge(source, matching, places, among)
    if real:
        _check_real_labels(judged, places)
    batches = device_batches(
        source,
        config,
        images=options.batch,
        feed=options.feed,
        workers=options.workers,
        crops=options.crops,
    )
    evaluator = Evaluator(model, config.preprocess, among=judged.outputs, flip=options.flip, scores=scores)
    variables = parallel.replicate(jax.tree.map(np.asarray, variables))
    with tqdm(total=len(source), unit=' images', disable=options.quiet or None) as bar:
        result = evaluator(variables, _mapped(batches, matching.outputs), bar.update)
    views = Views(options.crops, options.flip)
    return Report(weights, config, source, matching, judged, result, {}, views, benchmark)


def _tell(*notes: str) -> None:
    """Prints notes on stderr, in the first process alone."""
    if jax.process_index() == 0:
        for note in notes:
            print(f'note: {note}', file=sys.stderr, flush=True)


def _together(members: Sequence[Report]) -> Report:
    """One report of several nets, whose probabilities are averaged; its outputs are those of the first net.

    Raises:
      FlaxnetsError: nothing tells which of their outputs mean the same class.
    """
    first = members[0]
    results = []
    for report in members:
        scores = report.result.scores
        assert scores is not None, 'they were asked for'
        results.append(replace(report.result, scores=scores[:, _columns(first, report)]))
    # Labels become numbers of the first net's outputs.
    results = [replace(result, labels=first.result.labels) for result in results]
    extra = {f'top1 of {report.model} alone': report.result.top1 for report in members}
    whole = averaged(results, first.judged.outputs)
    return replace(
        first, model=' + '.join(r.model for r in members), result=whole, extra=extra, members=len(members)
    )


def _columns(first: Report, other: Report) -> Sequence[int]:
    """For each column of the first net's scores, the column of the other's that means the same class."""
    ours, theirs = (list(r.judged.outputs or range(len(r.matching.names))) for r in (first, other))
    same = dict(zip(first.matching.outputs, other.matching.outputs, strict=True))
    if set(ours) <= set(same):  # each is a class of the data
        return [theirs.index(same[i]) for i in ours]
    if first.matching.names == other.matching.names and first.matching.outputs == other.matching.outputs:
        return range(len(ours))
    raise FlaxnetsError(
        f'{first.model} and {other.model} have outputs that are no classes of the data, and it is not '
        "certain which of them mean the same; judge among the data's classes"
    )


def judge(source: Source, matching: Matching, places: tuple[int, ...] | None, among: str | None) -> Judged:
    """Decides which outputs a net is judged among, if data has only a part of its classes.

    Args:
      source: the data.
      matching: of the data's classes with the outputs.
      places: for each output the number of ImageNet's class; None if they are other classes.
      among: 'all', 'data' (the classes that have images), or None: all, but for ImageNet-A and ImageNet-R,
        whose published accuracies are among their own 200 classes.
    """
    count = len(matching.names)
    own = _with_images(source, ask=among == 'data' or bool(re.search(r'imagenet_[ar]\b', source.name)))
    outputs = tuple(sorted(matching.outputs[i] for i in own)) if own is not None else None
    if outputs is None or len(outputs) == count:
        return Judged('all', None, f'all {count} outputs')
    known = imagenet.subset({places[i] for i in outputs}) if places else None
    if among == 'data' or (among is None and known):
        of_which = f'{known}, as its published accuracies are' if known else 'the data'
        words = f'the {len(outputs)} classes of {of_which}, not all {count} outputs (the other choice: all)'
        return Judged('data', outputs, words)
    words = f'all {count} outputs, {len(outputs)} of them classes of the data (the other choice: data)'
    return Judged('all', None, words)


def _with_images(source: Source, ask: bool) -> list[int] | None:
    """The classes that have images; None if all records would have to be read for that and not `ask`."""
    labels = source.labels
    if len(labels) != len(source):
        if not ask:
            return None
        labels = np.array([source[i].label for i in range(len(source))])
    found: list[int] = np.unique(labels).tolist()
    return found


def _check_real_labels(judged: Judged, places: tuple[int, ...] | None) -> None:
    if judged.outputs is not None or places != tuple(range(imagenet.CLASSES)):
        raise FlaxnetsError(
            "the reassessed labels are those of ImageNet's validation images, for nets with its 1000 outputs "
            'in its order, judged among all of them'
        )


def _mapped(batches: Any, outputs: tuple[int, ...]) -> Any:
    """The batches, with the numbers of the net's outputs as labels."""
    places = np.array(outputs, np.int32)
    for batch in batches:
        labels = batch['label']
        if labels.min() < 0 or labels.max() >= len(places):
            raise FlaxnetsError(
                f'the data has labels in {labels.min()}..{labels.max()}, for {len(places)} classes'
            )
        yield {**batch, 'label': places[labels]}


def write(report: Report, out: Path) -> None:
    """Writes result.json, and tables and pictures of accuracy by class, mistakes and confidence."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / 'result.json', report.as_json())
    result, names = report.result, report.matching.names
    data = dict(zip(report.matching.outputs, report.source.classes, strict=True))
    counts = result.class_sizes
    with (out / 'per_class.csv').open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file)
        table.writerow(['class', 'name', 'images', 'top1', 'data'])
        for i in np.flatnonzero(counts).tolist():
            table.writerow([i, names[i], counts[i], f'{result.per_class[i]:.2f}', data[i]])
    pictures.confusion(result.confusion, names, str(out / 'confusion.png'))
    if result.confidences is not None:
        there = result.predictions >= 0
        error = result.calibration_error
        pictures.reliability(*result.reliability, error, str(out / 'reliability.png'))
        if there.any():
            sure, right = result.confidences[there], result.ranks[there] == 0
            pictures.by_confidence(sure, right, str(out / 'by_confidence.png'))
        write_mistakes(report.source, report.config, names, result, out)

"""python -m train eval: accuracy of weights, beside what was published for them."""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flaxnets.config import Config
from flaxnets.errors import FlaxnetsError
from flaxnets.load import load_with_config
from flaxnets.weights import write_json
from train import parallel, pictures
from train.augment import eval_transform
from train.data import eval_batches
from train.evaluate import Evaluation, Evaluator, label_map, real_labels
from train.sources import Source, open_source


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      model: the weights, as they were named.
      config: what they are.
      source: the data.
      result: image by image.
      extra: further accuracies, in percent.
    """

    model: str
    config: Config
    source: Source
    result: Evaluation
    extra: dict[str, float]

    @property
    def published(self) -> dict[str, Any]:
        """The accuracy that is published for these weights and this preprocessing, if there is one."""
        row = self.config.weights
        if row is None or not row.accuracy:
            return {}
        first = row.accuracy[0]
        return {'top1': first.top1, 'top5': first.top5, 'size': first.size, 'source': first.source}

    def as_json(self) -> dict[str, Any]:
        return {
            'model': self.model,
            'architecture': self.config.name,
            'data': self.source.name,
            **self.result.values(),
            'loss': self.result.loss if np.isfinite(self.result.loss) else None,  # JSON has no NaN
            'non_finite': self.result.non_finite,
            **self.extra,
            'published': self.published,
        }

    def text(self) -> str:
        """For people."""
        result, published = self.result, self.published
        lines = [
            f'{self.model} ({self.config.name}) on {self.source.name}, {result.images} images',
            f'top-1  {result.top1:6.2f} %' + _beside(published.get('top1')),
            f'top-5  {result.top5:6.2f} %' + _beside(published.get('top5')),
            f'loss   {result.loss:7.4f}',
        ]
        if result.non_finite:
            lines.append(f'{result.non_finite} images have logits that are not finite, and count as wrong')
        lines += [f'{name}  {value:.2f}' for name, value in self.extra.items()]
        if published:
            lines.append(
                f'published: ImageNet-1k validation at {published["size"]} px, {published["source"]}'
            )
        return '\n'.join(lines)


def _beside(published: float | None) -> str:
    return '' if published is None else f'   published {published:.2f} %'


def run(options: argparse.Namespace) -> Report:
    """Evaluates as the command line says.

    Raises:
      FlaxnetsError: no such weights or data, classes that do not fit, an image that cannot be read.
    """
    config, model, variables = load_with_config(options.model, dtype=options.dtype)
    if config.num_classes == 0:
        raise FlaxnetsError(f'{options.model} has no classifier: there is nothing to evaluate')
    source = open_source(options.data, options.split, training=False)
    classes = label_map(source.classes, config)
    batches = eval_batches(
        source,
        eval_transform(config.preprocess, config.in_chans),
        batch_size=options.batch * jax.device_count(),
        in_chans=config.in_chans,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=options.threads,
    )
    evaluator = Evaluator(model)
    variables = parallel.replicate(jax.tree.map(np.asarray, variables))
    with tqdm(total=len(source), unit=' images', disable=options.quiet or None) as bar:
        result = evaluator(variables, _mapped(batches, classes), bar.update)
    extra = {}
    if options.real_labels:
        names = [source.record_name(i) for i in range(len(source))]
        extra = real_labels(options.real_labels, names, result)
    report = Report(options.model, config, source, result, extra)
    if options.out and jax.process_index() == 0:
        write(report, Path(options.out))
    return report


def _mapped(batches: Any, classes: Any) -> Any:
    for batch in batches:
        yield batch if classes is None else {**batch, 'label': classes[batch['label']].astype(np.int32)}


def write(report: Report, out: Path) -> None:
    """result.json, per_class.csv and confusion.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / 'result.json', report.as_json())
    result, names = report.result, _class_names(report)
    counts = result.class_sizes
    with (out / 'per_class.csv').open('w', newline='', encoding='utf-8') as file:
        table = csv.writer(file)
        table.writerow(['class', 'name', 'images', 'top1'])
        for i in np.flatnonzero(counts):
            table.writerow([i, names[i], counts[i], f'{result.per_class[i]:.2f}'])
    pictures.confusion(result.confusion, names, str(out / 'confusion.png'))


def _class_names(report: Report) -> tuple[str, ...]:
    if report.config.classes:
        return report.config.classes
    if report.source.num_classes == report.result.num_classes:
        return report.source.classes
    return tuple(map(str, range(report.result.num_classes)))

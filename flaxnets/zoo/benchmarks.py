"""The accuracies that timm publishes for test sets other than ImageNet's validation set."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from .imagenet import table_lines
from .records import Accuracy

# The test sets, each with the file of timm's results for it.
FILES = {
    'imagenet-v2': 'results-imagenetv2-matched-frequency.csv',
    'imagenet-a': 'results-imagenet-a.csv',
    'imagenet-r': 'results-imagenet-r.csv',
    'imagenet-sketch': 'results-sketch.csv',
    'imagenet-real': 'results-imagenet-real.csv',
}


def published(weights: str, test_set: str) -> Accuracy | None:
    """The published accuracy of weights on a test set, None if there is none.

    It was measured with the weights' `preprocess` or `test_preprocess`, whichever has the accuracy's size.
    For ImageNet-A and ImageNet-R only the outputs of their own 200 classes count. ImageNet-V2 is the version
    'matched frequency'.

    Args:
      weights: full name of the weights (`resnext50_32x4d.gluon_in1k`).
      test_set: one of `FILES`.
    """
    return _table().get((weights, test_set))


@functools.cache
def _table() -> Mapping[tuple[str, str], Accuracy]:
    found = {}
    header, *rows = (line.split('\t') for line in table_lines('imagenet_benchmarks.tsv'))
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        for test_set, file in FILES.items():
            top1, top5 = (float(cells[f'{test_set} {top}']) for top in ('top1', 'top5'))
            found[cells['weights'], test_set] = Accuracy(top1, top5, int(cells['size']), f'timm {file}')
    return found

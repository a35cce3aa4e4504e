"""What timm publishes for the weights on other test sets, and when an evaluation shows it."""

from __future__ import annotations

import importlib.resources
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flaxnets import zoo
from flaxnets.zoo import benchmarks, imagenet
from flaxnets.zoo.classes import Matching
from flaxnets.zoo.records import Config
from train.evaluation.benchmarks import BENCHMARKS, notes, preprocess_notes
from train.evaluation.metrics import Evaluation
from train.evaluation.report import ONE_VIEW, Judged, Report, Views

ROWS = {row.name: row for row in zoo.WEIGHTS}
HEADER, *TABLE = (line.split('\t') for line in imagenet.table_lines('imagenet_benchmarks.tsv'))


class Images(SimpleNamespace):
    """A source of which only the name and the number of images matter."""

    def __len__(self) -> int:
        return self.images


def report(config: Config, test_set: str, **changes: Any) -> Report:
    benchmark = BENCHMARKS[test_set]
    outputs = tuple(range(200)) if benchmark.subset else None
    names = imagenet.class_names()
    made = Report(
        'weights',
        config,
        Images(name='folder:images', images=benchmark.images),  # type: ignore[arg-type]
        Matching(outputs or tuple(range(1000)), 'by name', names),
        Judged('data' if outputs else 'all', outputs, 'some'),
        Evaluation(*np.zeros((3, 4), np.int64), np.zeros(4), 1000, confidences=np.ones(4)),
        {'real_top1': 10.0, 'real_top5': 20.0} if benchmark.real else {},
        ONE_VIEW,
        benchmark,
    )
    return replace(made, **changes)


def test_rows_are_weights_as_they_are_evaluated() -> None:
    names = [row[0] for row in TABLE]
    assert len(set(names)) == len(names)
    # timm lists all its weights but those of a net that it cannot create.
    of_timm = {name for name, row in ROWS.items() if row.hub_id}
    assert set(names) == of_timm - {'resnext101_32x48d.fb_wsl_ig1b_ft_in1k'}
    assert set(BENCHMARKS) == set(benchmarks.FILES)
    for name, size, crop_pct, *_ in TABLE:
        both = (ROWS[name].preprocess, ROWS[name].test_preprocess)
        (measured,) = [p for p in both if p and p.size == int(size)]
        assert measured.crop_pct == float(crop_pct), name


def test_accuracies_are_sound() -> None:
    for name, row in ROWS.items():
        found = {key: benchmarks.published(name, key) for key in BENCHMARKS}
        if None in found.values():
            assert set(found.values()) == {None}
            continue
        top = {key: accuracy.top1 for key, accuracy in found.items() if accuracy}
        for key, accuracy in found.items():
            assert accuracy and accuracy.top5 and 0 < accuracy.top1 < accuracy.top5 < 100
            assert accuracy.source == f'timm {benchmarks.FILES[key]}'
        # timm's accuracy on ImageNet's own validation set lies between these two, for every net.
        (usual,) = [
            a.top1 for a in row.accuracy if a.size == found['imagenet-v2'].size and 'timm' in a.source
        ]
        assert 8 < usual - top['imagenet-v2'] < 13 and 3 < top['imagenet-real'] - usual < 7, name
        assert top['imagenet-a'] < top['imagenet-v2'] and top['imagenet-sketch'] < top['imagenet-r'], name


@pytest.mark.parametrize(
    ('name', 'test_set', 'top1', 'top5', 'size'),
    [
        ('resnest269e.in1k', 'imagenet-v2', 74.200, 91.960, 416),
        ('resnext50_32x4d.gluon_in1k', 'imagenet-a', 8.933, 36.307, 224),
        ('resnext101_32x16d.fb_swsl_ig1b_ft_in1k', 'imagenet-r', 76.300, 87.743, 224),
        ('resnext50_32x4d.tv2_in1k', 'imagenet-sketch', 29.480, 47.232, 224),
        ('res2net50_26w_4s.in1k', 'imagenet-real', 84.359, 96.091, 224),
        ('seresnext50_32x4d.racm_in1k', 'imagenet-real', 87.350, 97.613, 288),
    ],
)
def test_accuracies_of_timms_tables(name: str, test_set: str, top1: float, top5: float, size: int) -> None:
    found = benchmarks.published(name, test_set)
    assert found and (found.top1, found.top5, found.size) == (top1, top5, size)


@pytest.mark.parametrize('test_set', list(BENCHMARKS))
def test_shown_beside_ours(test_set: str) -> None:
    config = zoo.config('res2net50_26w_4s')
    found = benchmarks.published('res2net50_26w_4s.in1k', test_set)
    assert found
    made = report(config, test_set)
    shown, top = made.as_json()['published'], 'real_top' if test_set == 'imagenet-real' else 'top'
    expected = {f'{top}1': found.top1, f'{top}5': found.top5, 'size': 224, 'source': found.source}
    assert shown == {**expected, 'data': shown['data']} and BENCHMARKS[test_set].title in shown['data']
    lines = made.text().splitlines()
    (line,) = [line for line in lines if f'{found.top1:.2f}' in line]
    assert line.startswith('real_top1' if top == 'real_top' else 'top-1')
    assert lines[-1].startswith('published') and shown['data'] in lines[-1] and found.source in lines[-1]
    assert ('matched frequency' in shown['data']) is (test_set == 'imagenet-v2')
    assert 'centre' in replace(made, views=Views(5)).text().splitlines()[-1]


@pytest.mark.parametrize('test_set', list(BENCHMARKS))
def test_not_shown_of_other_images(test_set: str) -> None:
    config, benchmark = zoo.config('res2net50_26w_4s'), BENCHMARKS[test_set]
    among = Judged('all', None, '') if benchmark.subset else Judged('data', (1, 2), '')
    for changes in (
        {'source': Images(name='folder:images', images=benchmark.images - 1)},
        {'config': replace(config, preprocess=replace(config.preprocess, size=256))},
        {'config': replace(config, preprocess=replace(config.preprocess, crop_pct=1.0))},
        {'config': replace(config, weights=None)},
        {'config': zoo.config('res2net50_26w_8s.mm_in1k')},
        {'judged': among},
        {'members': 2},
    ):
        made = report(**{'config': config, 'test_set': test_set, **changes})
        assert made.published == made.as_json()['published'] == {}, changes
        assert 'published' not in made.text(), changes


def test_other_versions_of_imagenet_v2() -> None:
    benchmark = BENCHMARKS['imagenet-v2']
    for folder in ('imagenetv2-threshold0.7-format-val', 'imagenetv2-top-images-format-val'):
        source: Any = Images(name=f'folder:{folder}', images=benchmark.images)
        assert report(zoo.config('resnest50d'), 'imagenet-v2', source=source).published == {}
        assert 'matched frequency' in notes(benchmark, source)[0]
    source = Images(name='folder:imagenetv2-matched-frequency-format-val', images=benchmark.images)
    assert notes(benchmark, source) == ()


def test_measured_with_the_larger_images() -> None:
    config, benchmark = zoo.config('resnext50_32x4d.a1_in1k'), BENCHMARKS['imagenet-r']
    assert report(config, 'imagenet-r').published == {}
    (note,) = preprocess_notes(benchmark, config)
    assert '288 px' in note and 'crop 1' in note
    larger = replace(config, preprocess=config.preprocess.changed(['size=288', 'crop_pct=1']))
    assert report(larger, 'imagenet-r').published['top1'] == 39.183
    assert preprocess_notes(benchmark, larger) == ()
    assert preprocess_notes(benchmark, zoo.config('res2net50_26w_8s.mm_in1k')) == ()


def test_the_table_names_its_source() -> None:
    text = importlib.resources.files('flaxnets.zoo').joinpath('imagenet_benchmarks.tsv').read_text('utf-8')
    comment = ''.join(line for line in text.splitlines(keepends=True) if line.startswith('#'))
    assert 'huggingface/pytorch-image-models' in comment and len(HEADER) == 3 + 2 * len(BENCHMARKS)

"""Rows of published weights against timm and torchvision as installed, and the other publishers' tables."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import timm
import timm.models
from torchvision.models import resnet as torchvision_resnet

from flaxnets import zoo
from flaxnets.images.preprocess import Preprocess
from flaxnets.zoo.records import Weights

IN_TIMM = [name for name in zoo.ARCHS if timm.is_model(name)]
ROWS = {row.name: row for row in zoo.WEIGHTS}

GITHUB = 'https://github.com'
MM = 'https://download.openmmlab.com/mmclassification/v0'


def timm_cfg(name: str) -> Any:
    """timm's own row, also for resnext101_32x48d, whose row it has but which it cannot create."""
    arch, _, tag = name.partition('.')
    if timm.is_model(arch):
        return timm.models.get_pretrained_cfg(name)
    return timm.models.resnet.default_cfgs[arch].cfgs[tag]


@pytest.mark.parametrize('name', [row.name for row in zoo.WEIGHTS if row.hub_id])
def test_row_is_timms(name: str) -> None:
    row, cfg = ROWS[name], timm_cfg(name)
    if cfg.url:
        # timm still writes the repository's old owner in places; GitHub redirects.
        assert cfg.url.replace('rwightman/pytorch-image', 'huggingface/pytorch-image') in row.urls
    # 'timm/' alone is timm's shorthand, expanded only for the nets that it can create.
    assert row.hub_id == (cfg.hf_hub_id if cfg.hf_hub_id != 'timm/' else f'timm/{name}') == f'timm/{name}'

    ours, theirs = row.preprocess, cfg
    assert (3, ours.size, ours.size) == theirs.input_size
    assert ours.crop_pct == theirs.crop_pct
    assert (ours.crop_mode, ours.interpolation) == (theirs.crop_mode, theirs.interpolation)
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)

    test = row.test_preprocess
    assert (test and (3, test.size, test.size)) == theirs.test_input_size
    assert (test and test.crop_pct) == theirs.test_crop_pct
    if test:
        assert test == dataclasses.replace(ours, size=test.size, crop_pct=test.crop_pct)

    expected = 'cc-by-nc-sa-4.0' if row.arch.startswith('res2') else theirs.license
    assert row.licence == expected
    assert theirs.license != 'unknown' or row.arch.startswith('res2')


@pytest.mark.parametrize('arch', IN_TIMM)
def test_every_tag_of_timm_is_here_and_its_default_is_ours(arch: str) -> None:
    tagged = timm.list_models(f'{arch}.*', pretrained=True)
    assert tagged
    assert {row.name for row in zoo.weights_of(arch) if row.hub_id} == set(tagged)
    default = zoo.resolve(arch)[1]
    assert default is not None
    assert default.tag == timm_cfg(arch).tag


@pytest.mark.parametrize('arch', ['resnext50_32x4d', 'resnext101_32x8d', 'resnext101_64x4d'])
def test_rows_are_torchvisions(arch: str) -> None:
    enum = {
        'resnext50_32x4d': torchvision_resnet.ResNeXt50_32X4D_Weights,
        'resnext101_32x8d': torchvision_resnet.ResNeXt101_32X8D_Weights,
        'resnext101_64x4d': torchvision_resnet.ResNeXt101_64X4D_Weights,
    }[arch]
    for theirs in enum:
        _, row = zoo.resolve(str(theirs))
        assert row is not None
        assert row.arch == arch
        assert row.urls == (theirs.url,)
        metrics = theirs.meta['_metrics']['ImageNet-1K']
        (own,) = [a for a in row.accuracy if a.source == 'torchvision']
        assert (own.top1, own.top5, own.size) == (metrics['acc@1'], metrics['acc@5'], 224)


@pytest.mark.parametrize('row', zoo.WEIGHTS, ids=lambda row: row.name)
def test_row_is_sound(row: Weights) -> None:
    assert row.arch in zoo.ARCHS
    assert row.urls
    for url in row.urls:
        assert re.fullmatch(rf'https://[\w./-]+[-_]{row.sha256}\.pth', url), url
    assert re.fullmatch('[0-9a-f]{8}', row.sha256 or '')
    assert row.layout == ('mmpretrain' if 'openmmlab' in row.urls[0] else 'canonical')
    # What `preprocess` reaches comes first.
    assert row.accuracy[0].size == row.preprocess.size
    for accuracy in row.accuracy:
        assert 75 < accuracy.top1 < 90
        assert accuracy.top5 is None or 92 < accuracy.top5 < 99
    assert row.licence in ('apache-2.0', 'bsd-3-clause', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0')


def test_no_two_rows_share_a_name_an_alias_or_a_file() -> None:
    aliases = [alias.lower() for row in zoo.WEIGHTS for alias in row.aliases]
    names = [*ROWS, *zoo.ARCHS, *zoo.ARCH_ALIASES, *aliases]
    assert len(names) == len(set(names))
    assert len(ROWS) == len(zoo.WEIGHTS) == 64
    files = [{url.rpartition('/')[2] for url in row.urls} for row in zoo.WEIGHTS]
    assert all(len(f) == 1 for f in files)
    assert len(set.union(*files)) == 64
    assert set(zoo.ARCH_ALIASES.values()) <= set(zoo.ARCHS)


@pytest.mark.parametrize(
    ('name', 'urls'),
    [
        (
            'res2next50.in1k',
            (
                f'{GITHUB}/huggingface/pytorch-image-models/releases/download/v0.1-res2net/res2next50_4s-6ef7e7bf.pth',
                'https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net/res2next50_4s-6ef7e7bf.pth',
            ),
        ),
        (
            'res2net101d.in1k',
            ('https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net/res2net101_v1b_26w_4s-0812c246.pth',),
        ),
        (
            'resnest200e.in1k',
            (
                f'{GITHUB}/zhanghang1989/ResNeSt/releases/download/weights_step1/resnest200-75117900.pth',
                f'{GITHUB}/huggingface/pytorch-image-models/releases/download/v0.1-resnest/resnest200-75117900.pth',
            ),
        ),
        (
            'resnest14d.gluon_in1k',
            (
                f'{GITHUB}/huggingface/pytorch-image-models/releases/download/v0.1-weights/gluon_resnest14-9c8fe254.pth',
            ),
        ),
        (
            'resnest50_fast_2s1x64d.in1k',
            (
                f'{GITHUB}/zhanghang1989/ResNeSt/releases/download/weights_step1/resnest50_fast_2s1x64d-44938639.pth',
            ),
        ),
        (
            'resnext152_32x4d.mm_in1k',
            (f'{MM}/resnext/resnext152_32x4d_b32x8_imagenet_20210524-927787be.pth',),
        ),
        ('resnest269e.mm_in1k', (f'{MM}/resnest/resnest269_imagenet_converted-59930960.pth',)),
        (
            'res2net50_14w_8s.mm_in1k',
            (f'{MM}/res2net/res2net50-w14-s8_3rdparty_8xb32_in1k_20210927-bc967bf1.pth',),
        ),
    ],
)
def test_urls_that_timm_does_not_know(name: str, urls: tuple[str, ...]) -> None:
    assert ROWS[name].urls == urls


def test_evaluation_of_files_that_are_not_timms() -> None:
    def prepared(name: str) -> tuple[Preprocess, Preprocess | None]:
        return ROWS[name].preprocess, ROWS[name].test_preprocess

    authors = Preprocess(224, 224 / 256, 'center_first', 'bicubic')
    assert prepared('resnest50_fast_1s2x40d.in1k') == (authors, None)
    assert prepared('resnext152_32x4d.mm_in1k') == (Preprocess(224, 0.875, 'center', 'bilinear'), None)
    assert prepared('resnest101e.mm_in1k') == (
        Preprocess(224, 0.875, 'center', 'bilinear'),
        Preprocess(256, 256 / 288, 'center_first', 'bicubic'),
    )


@pytest.mark.parametrize(
    ('arch', 'error1', 'error5'),
    [
        ('res2net50_48w_2s', 22.68, 6.47),
        ('res2net50_26w_4s', 22.01, 6.15),
        ('res2net50_14w_8s', 21.86, 6.14),
        ('res2net50_26w_6s', 21.42, 5.87),
        ('res2net50_26w_8s', 20.80, 5.63),
        ('res2net101_26w_4s', 20.81, 5.57),
        ('res2next50', 21.76, 6.09),
        ('res2net50d', 19.73, 4.96),
        ('res2net101d', 18.77, 4.64),
    ],
)
def test_accuracies_are_the_res2net_authors_errors(arch: str, error1: float, error5: float) -> None:
    (own,) = [a for a in ROWS[f'{arch}.in1k'].accuracy if a.source == 'Res2Net authors']
    assert (own.top1, own.top5) == pytest.approx((100 - error1, 100 - error5))


@pytest.mark.parametrize(
    ('name', 'source', 'top1', 'top5', 'size'),
    [
        ('resnest50d.in1k', 'ResNeSt authors', 81.03, None, 224),
        ('resnest101e.in1k', 'ResNeSt authors', 82.83, None, 256),
        ('resnest200e.in1k', 'ResNeSt authors', 83.84, None, 320),
        ('resnest269e.in1k', 'ResNeSt authors', 84.54, None, 416),
        ('resnest50_fast_4s1x64d.in1k', 'ResNeSt authors', 80.76, None, 224),
        ('resnest26d.gluon_in1k', 'GluonCV', 78.68, 94.38, 224),
        ('resnext101_64x4d.gluon_in1k', 'GluonCV', 80.69, 95.17, 224),
        ('resnext101_32x48d.fb_wsl_ig1b_ft_in1k', 'Facebook WSL-Images', 85.4, 97.6, 224),
        ('resnext101_32x8d.mm_in1k', 'mmpretrain', 79.27, 94.58, 224),
        ('res2net50_26w_8s.mm_in1k', 'mmpretrain', 79.20, 94.36, 224),
        ('resnest200e.mm_in1k', 'mmpretrain', 82.41, 96.22, 224),
        ('resnext50_32x4d.a3_in1k', 'timm results-imagenet.csv', 77.732, 93.314, 160),
    ],
)
def test_accuracies_of_the_publishers_tables(
    name: str, source: str, top1: float, top5: float | None, size: int
) -> None:
    found = [(a.top1, a.top5) for a in ROWS[name].accuracy if (a.source, a.size) == (source, size)]
    assert found == [(top1, top5)]

"""Every published weights file of the zoo's nets, one row each.

Names, tags, preprocessing and most accuracies are timm's (1.0.31 and its results-imagenet.csv; the tests
compare each row with the installed timm and torchvision). Two things differ on purpose. The licence of the
Res2Net weights is CC BY-NC-SA 4.0, as in the authors' README; timm says 'unknown'. Some URLs differ, because
timm has dropped its own for Res2Net and ResNeSt, and its repository has moved from `rwightman/` to
`huggingface/`. Hosts known to be dead are left out.

The first row of an architecture is its default: the file that timm takes for the bare name.
"""

from __future__ import annotations

from typing import Any

from ..images.preprocess import Preprocess
from .records import Accuracy, Weights

TIMM = 'https://github.com/huggingface/pytorch-image-models/releases/download'
RES2NET_AUTHORS = 'https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net'
RESNEST_AUTHORS = 'https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1'
GLUON_PORT = 'https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1'
PYTORCH = 'https://download.pytorch.org/models'
FACEBOOK = 'https://dl.fbaipublicfiles.com/semiweaksupervision/model_files'
OPENMMLAB = 'https://download.openmmlab.com/mmclassification/v0'

# In all builders below `file` is a file name without `.pth`; it ends in the first eight digits of the file's
# SHA-256. `csv` and the publisher's own accuracies are top-1 and top-5 in percent.
Percent = tuple[float, float]


def _row(arch: str, tag: str, *urls: str, hub: bool = True, **facts: Any) -> Weights:
    """A row for one file, by its addresses without `.pth`; timm's hub has it too unless `hub` is False."""
    return Weights(
        arch,
        tag,
        urls=tuple(f'{url}.pth' for url in urls),
        hub_id=f'timm/{arch}.{tag}' if hub else None,
        sha256=urls[0][-8:],
        **facts,
    )


def _bicubic(size: int, crop_pct: float) -> Preprocess:
    return Preprocess(size, crop_pct, interpolation='bicubic')


def _csv(size: int, csv: Percent) -> Accuracy:
    return Accuracy(*csv, size, 'timm results-imagenet.csv')


def _res2net(arch: str, file: str, csv: Percent, authors: Percent, mirrored: bool = True) -> Weights:
    """The Res2Net authors' files. timm's release mirrors those of the paper, not the later v1b."""
    hosts = (f'{TIMM}/v0.1-res2net', RES2NET_AUTHORS) if mirrored else (RES2NET_AUTHORS,)
    return _row(
        arch,
        'in1k',
        *(f'{host}/{file}' for host in hosts),
        accuracy=(_csv(224, csv), Accuracy(*authors, 224, 'Res2Net authors')),
        licence='cc-by-nc-sa-4.0',
    )


def _resnest(arch: str, file: str, preprocess: Preprocess, csv: Percent, authors: float) -> Weights:
    """The ResNeSt authors' files as timm evaluates them: resized first, then cropped."""
    size = preprocess.height
    return _row(
        arch,
        'in1k',
        f'{RESNEST_AUTHORS}/{file}',
        f'{TIMM}/v0.1-resnest/{file}',
        preprocess=preprocess,
        accuracy=(_csv(size, csv), Accuracy(authors, None, size, 'ResNeSt authors')),
        licence='apache-2.0',
    )


def _resnest_fast(file: str, authors: float) -> Weights:
    """The authors' ablations that timm lacks, hence evaluated as the authors' `verify.py` does."""
    arch = file.partition('-')[0]
    return _row(
        arch,
        'in1k',
        f'{RESNEST_AUTHORS}/{file}',
        hub=False,
        preprocess=Preprocess(224, 0.875, 'center_first', 'bicubic'),
        accuracy=(Accuracy(authors, None, 224, 'ResNeSt authors'),),
        licence='apache-2.0',
    )


def _resnest_gluon(arch: str, file: str, csv: Percent, gluon: Percent) -> Weights:
    """GluonCV's small ResNeSts, which are not the paper authors', ported to PyTorch by timm."""
    return _row(
        arch,
        'gluon_in1k',
        f'{TIMM}/v0.1-weights/{file}',
        accuracy=(_csv(224, csv), Accuracy(*gluon, 224, 'GluonCV')),
        licence='apache-2.0',
    )


def _timm(
    name: str,
    release: str,
    suffix: str,
    small: Preprocess,
    large: Preprocess,
    at_small: Percent,
    at_large: Percent,
) -> Weights:
    """timm's own training, with what timm measured at its default and at its larger size."""
    arch, tag = name.split('.')
    return _row(
        arch,
        tag,
        f'{TIMM}/{release}-weights/{arch}{suffix}',
        preprocess=small,
        test_preprocess=large,
        accuracy=(_csv(small.height, at_small), _csv(large.height, at_large)),
        licence='apache-2.0',
    )


def _torchvision(file: str, csv: Percent, torchvision: Percent) -> Weights:
    """torchvision's first weights; its own figure for 64x4d resizes to 232 pixels, not 256."""
    arch = file.partition('-')[0]
    return _row(
        arch,
        'tv_in1k',
        f'{PYTORCH}/{file}',
        accuracy=(_csv(224, csv), Accuracy(*torchvision, 224, 'torchvision')),
        licence='bsd-3-clause',
        aliases=(f'tv_{arch}', _torchvision_enum(arch, 1)),
    )


def _torchvision_v2(file: str, at_176: Percent, at_224: Percent, torchvision: Percent) -> Weights:
    """torchvision's second weights, trained at 176 pixels and meant for 224 out of 232."""
    arch = file.partition('-')[0]
    return _row(
        arch,
        'tv2_in1k',
        f'{PYTORCH}/{file}',
        preprocess=Preprocess(176),
        test_preprocess=Preprocess(224, 0.965),
        accuracy=(_csv(176, at_176), _csv(224, at_224), Accuracy(*torchvision, 224, 'torchvision')),
        licence='bsd-3-clause',
        aliases=(_torchvision_enum(arch, 2),),
    )


def _torchvision_enum(arch: str, version: int) -> str:
    return f'{arch.upper().replace("RESNEXT", "ResNeXt")}_Weights.IMAGENET1K_V{version}'


def _facebook(arch: str, kind: str, sha256: str, csv: Percent | None, own: Percent | None = None) -> Weights:
    """Facebook's pretraining on Instagram ('wsl', 'swsl') or YFCC100M ('ssl'), tuned on ImageNet."""
    tag, stem, prefix = {
        'wsl': ('fb_wsl_ig1b_ft_in1k', f'{PYTORCH}/ig_', 'ig'),
        'ssl': ('fb_ssl_yfcc100m_ft_in1k', f'{FACEBOOK}/semi_supervised_', 'ssl'),
        'swsl': ('fb_swsl_ig1b_ft_in1k', f'{FACEBOOK}/semi_weakly_supervised_', 'swsl'),
    }[kind]
    accuracy = [_csv(224, csv)] if csv else []
    if own:
        accuracy.append(Accuracy(*own, 224, 'Facebook WSL-Images'))
    return _row(
        arch,
        tag,
        f'{stem}{arch.removesuffix("d")}-{sha256}',
        accuracy=tuple(accuracy),
        licence='cc-by-nc-4.0',
        aliases=(f'{prefix}_{arch}', f'{arch}_{kind}'),
    )


def _gluon(file: str, csv: Percent, gluon: Percent | None = None) -> Weights:
    """GluonCV's files in the PyTorch port; GluonCV's own figures come from OpenCV's bilinear resize."""
    name = file.partition('-')[0]
    arch = name.removeprefix('gluon_')
    accuracy = [_csv(224, csv)]
    if gluon:
        accuracy.append(Accuracy(*gluon, 224, 'GluonCV'))
    return _row(
        arch,
        'gluon_in1k',
        f'{GLUON_PORT}/{file}',
        preprocess=_bicubic(224, 0.875),
        accuracy=tuple(accuracy),
        licence='apache-2.0',
        aliases=(name,),
    )


def _openmmlab(
    arch: str, file: str, own: Percent, licence: str, *aliases: str, test: Preprocess | None = None
) -> Weights:
    return _row(
        arch,
        'mm_in1k',
        f'{OPENMMLAB}/{file}',
        hub=False,
        layout='mmpretrain',
        test_preprocess=test,
        accuracy=(Accuracy(*own, 224, 'mmpretrain'),),
        licence=licence,
        aliases=aliases,
    )


def _mm_res2net(arch: str, model: str, version: str, own: Percent) -> Weights:
    """The authors' file in OpenMMLab's layout."""
    name = f'{model}_3rdparty_8xb32_in1k'
    return _openmmlab(arch, f'res2net/{name}_{version}', own, 'cc-by-nc-sa-4.0', name, model)


def _mm_resnext(arch: str, version: str, own: Percent) -> Weights:
    """OpenMMLab's own training."""
    model = arch.replace('_', '-')
    file = f'resnext/{arch}_b32x8_imagenet_{version}'
    return _openmmlab(arch, file, own, 'apache-2.0', f'{model}_8xb32_in1k', model)


def _mm_resnest(arch: str, version: str, own: Percent, size: int | None = None) -> Weights:
    """The authors' file in OpenMMLab's layout: measured at 224, configured for the authors' size."""
    file = f'resnest/{arch.rstrip("de")}_imagenet_converted-{version}'
    test = Preprocess(size, size / (size + 32), 'center_first', 'bicubic') if size else None
    return _openmmlab(arch, file, own, 'apache-2.0', test=test)


RES2NET = (
    _res2net('res2net50_26w_4s', 'res2net50_26w_4s-06e79181', (77.994, 93.860), (77.99, 93.85)),
    _res2net('res2net50_48w_2s', 'res2net50_48w_2s-afed724a', (77.528, 93.562), (77.32, 93.53)),
    _res2net('res2net50_14w_8s', 'res2net50_14w_8s-6527dddc', (78.142, 93.852), (78.14, 93.86)),
    _res2net('res2net50_26w_6s', 'res2net50_26w_6s-19041792', (78.586, 94.120), (78.58, 94.13)),
    _res2net('res2net50_26w_8s', 'res2net50_26w_8s-2c7c9f12', (78.950, 94.280), (79.20, 94.37)),
    _res2net('res2net101_26w_4s', 'res2net101_26w_4s-02a759a1', (79.192, 94.466), (79.19, 94.43)),
    _res2net('res2next50', 'res2next50_4s-6ef7e7bf', (78.238, 93.904), (78.24, 93.91)),
    _res2net('res2net50d', 'res2net50_v1b_26w_4s-3cf99910', (80.280, 95.028), (80.27, 95.04), False),
    _res2net('res2net101d', 'res2net101_v1b_26w_4s-0812c246', (81.236, 95.346), (81.23, 95.36), False),
)

_BILINEAR, _BICUBIC = Preprocess(), _bicubic(224, 0.875)

RESNEST = (
    _resnest_gluon('resnest14d', 'gluon_resnest14-9c8fe254', (75.516, 92.512), (75.75, 92.70)),
    _resnest_gluon('resnest26d', 'gluon_resnest26-50eb607c', (78.476, 94.300), (78.68, 94.38)),
    _resnest('resnest50d', 'resnest50-528c19ca', _BILINEAR, (80.958, 95.372), 81.03),
    _resnest('resnest101e', 'resnest101-22405ba7', Preprocess(256), (82.916, 96.310), 82.83),
    _resnest('resnest200e', 'resnest200-75117900', _bicubic(320, 0.909), (83.880, 96.880), 83.84),
    _resnest('resnest269e', 'resnest269-0cc87c48', _bicubic(416, 0.928), (84.542, 96.988), 84.54),
    _resnest('resnest50d_4s2x40d', 'resnest50_fast_4s2x40d-41d14ed0', _BICUBIC, (81.146, 95.566), 81.14),
    _resnest('resnest50d_1s4x24d', 'resnest50_fast_1s4x24d-d4a4f76f', _BICUBIC, (81.024, 95.338), 80.99),
    _resnest_fast('resnest50_fast_1s1x64d-d8fbf808', 80.33),
    _resnest_fast('resnest50_fast_2s1x64d-44938639', 80.53),
    _resnest_fast('resnest50_fast_4s1x64d-f74f3fc3', 80.76),
    _resnest_fast('resnest50_fast_1s2x40d-32830b84', 80.59),
    _resnest_fast('resnest50_fast_2s2x40d-9d126481', 80.61),
)

# timm's recipes, each with its default preprocessing and its larger one. `_RSB` is that of "ResNet strikes
# back" (arXiv 2110.00476), whose cheapest variant, A3, trains at 160 pixels.
_RA = (_BICUBIC, _bicubic(288, 0.95))
_RSB = (_bicubic(224, 0.95), _bicubic(288, 1.0))
_A3 = (_bicubic(160, 0.95), _bicubic(224, 0.95))

TIMM_TRAINED = (
    _timm('resnext50_32x4d.a1h_in1k', 'v0.1-rsb', '_a1h-0146ab0a', *_RSB, (81.140, 95.320), (82.016, 95.934)),
    _timm('resnext50_32x4d.a1_in1k', 'v0.1-rsb', '_a1_0-b5a91a1d', *_RSB, (80.526, 94.458), (81.480, 95.152)),
    _timm('resnext50_32x4d.a2_in1k', 'v0.1-rsb', '_a2_0-efc76add', *_RSB, (80.444, 94.630), (81.304, 95.114)),
    _timm('resnext50_32x4d.a3_in1k', 'v0.1-rsb', '_a3_0-3e450271', *_A3, (77.732, 93.314), (79.258, 94.308)),
    _timm('resnext50_32x4d.ra_in1k', 'v0.1', '_ra-d733960d', *_RA, (79.800, 94.608), (80.720, 95.344)),
    _timm('resnext50d_32x4d.bt_in1k', 'v0.1', '-103e99f8', *_RA, (79.672, 94.878), (80.676, 95.426)),
    _timm('resnext101_64x4d.c1_in1k', 'v0.1-tpu', '_c-0d0e0cc0', *_RSB, (82.446, 95.920), (83.158, 96.370)),
    _timm('seresnext50_32x4d.racm_in1k', 'v0.1', '_racm-a304a460', *_RA, (81.268, 95.626), (82.186, 96.148)),
)

TORCHVISION = (
    _torchvision('resnext50_32x4d-7cdf4587', (77.632, 93.674), (77.618, 93.698)),
    _torchvision_v2('resnext50_32x4d-1a0047aa', (79.374, 94.302), (81.190, 95.344), (81.198, 95.340)),
    _torchvision('resnext101_32x8d-8ba56ff5', (79.308, 94.530), (79.312, 94.526)),
    _torchvision_v2('resnext101_32x8d-110c445d', (81.990, 95.716), (82.832, 96.234), (82.834, 96.228)),
    _torchvision('resnext101_64x4d-173b62eb', (82.978, 96.252), (83.246, 96.454)),
)

FACEBOOK_TRAINED = (
    _facebook('resnext101_32x8d', 'wsl', 'c38310e5', (82.720, 96.624), (82.2, 96.4)),
    _facebook('resnext101_32x16d', 'wsl', 'c6f796b0', (84.166, 97.192), (84.2, 97.2)),
    _facebook('resnext101_32x32d', 'wsl', 'e4b90b00', (85.090, 97.442), (85.1, 97.5)),
    _facebook('resnext101_32x48d', 'wsl', '3e41cc8a', None, (85.4, 97.6)),
    _facebook('resnext50_32x4d', 'ssl', 'ddb3e555', (80.316, 95.386)),
    _facebook('resnext101_32x4d', 'ssl', 'dc43570a', (80.936, 95.732)),
    _facebook('resnext101_32x8d', 'ssl', '2cfe2f8b', (81.620, 96.036)),
    _facebook('resnext101_32x16d', 'ssl', '15fffa57', (81.856, 96.084)),
    _facebook('resnext50_32x4d', 'swsl', '72679e44', (82.162, 96.224)),
    _facebook('resnext101_32x4d', 'swsl', '3f87e46b', (83.268, 96.760)),
    _facebook('resnext101_32x8d', 'swsl', 'b4712904', (84.276, 97.188)),
    _facebook('resnext101_32x16d', 'swsl', 'f3559a9c', (83.340, 96.844)),
)

GLUON = (
    _gluon('gluon_resnext50_32x4d-e6a097c1', (79.354, 94.424), (79.32, 94.53)),
    _gluon('gluon_resnext101_32x4d-b253c8c4', (80.336, 94.908), (80.37, 95.06)),
    _gluon('gluon_resnext101_64x4d-f9a8e184', (80.640, 95.000), (80.69, 95.17)),
    _gluon('gluon_seresnext50_32x4d-90cf2d6e', (79.916, 94.816)),
    _gluon('gluon_seresnext101_32x4d-cf52900d', (80.886, 95.268)),
    _gluon('gluon_seresnext101_64x4d-f9926f93', (80.884, 95.308)),
)

OPENMMLAB_FILES = (
    _mm_res2net('res2net50_14w_8s', 'res2net50-w14-s8', '20210927-bc967bf1', (78.14, 93.85)),
    _mm_res2net('res2net50_26w_8s', 'res2net50-w26-s8', '20210927-f547a94b', (79.20, 94.36)),
    _mm_res2net('res2net101_26w_4s', 'res2net101-w26-s4', '20210927-870b6c36', (79.19, 94.44)),
    _mm_resnext('resnext50_32x4d', '20210429-56066e27', (77.90, 93.66)),
    _mm_resnext('resnext101_32x4d', '20210506-e0fa3dd5', (78.61, 94.17)),
    _mm_resnext('resnext101_32x8d', '20210506-23a247d5', (79.27, 94.58)),
    _mm_resnext('resnext152_32x4d', '20210524-927787be', (78.88, 94.33)),
    _mm_resnest('resnest50d', '1ebf0afe', (81.13, 95.59)),
    _mm_resnest('resnest101e', '032caa52', (82.32, 96.24), 256),
    _mm_resnest('resnest200e', '581a60f2', (82.41, 96.22), 320),
    _mm_resnest('resnest269e', '59930960', (82.70, 96.28), 416),
)

WEIGHTS: tuple[Weights, ...] = (
    RES2NET + RESNEST + TIMM_TRAINED + TORCHVISION + FACEBOOK_TRAINED + GLUON + OPENMMLAB_FILES
)

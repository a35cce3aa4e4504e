"""The recipes: how the published weights were trained, as data.

`RECIPES`, below the functions that its entries share, is the table: a new recipe is an entry there, named as
its net. Above each function (or above an entry that calls none) stand the source, the command that ran the
recipe, and the ImageNet top-1 to expect (as the authors report it; in brackets what timm measures of the
released weights). docs/recipes.md says what is known and what is not, and where code, paper and PyTorch port
disagree.

`bn_images` and `mix_images` are the images on one GPU of the authors: their BatchNorm took its statistics
over these images, and their mixup drew one ratio for them.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from flaxnets.errors import FlaxnetsError
from flaxnets.zoo import ARCH_ALIASES, config, resolve

from .settings import Settings

OURS = ('digits', 'finetune')  # no published net's recipe; a name of these says what the recipe is for
# What a net's further recipe adds to its name. The PyTorch port's did not train the released weights.
ENDINGS = ('-torch',)
# Published weights with these tags (`resnest50d.in1k`) were trained by the recipes here, so that `get` takes
# their names for the recipes'. Weights with other tags were trained otherwise.
TAGS = ('in1k', 'gluon_in1k')


def _images(weights: str) -> dict[str, Any]:
    """Fields of `Settings`: training at 224 pixels, evaluation as these published weights expect it."""
    p = config(weights).preprocess
    return dict(
        image_size=224,
        eval_size=p.size,
        eval_crop_pct=p.crop_pct,
        eval_crop_mode=p.crop_mode,
        eval_interpolation=p.interpolation,
    )


# Res2Net and Res2NeXt (arXiv 1904.01169). Source: Res2Net/Res2Net-ImageNet-Training, res2net_pami/main.py and
# loss.py: torchvision's example script with label smoothing, DataParallel over 4 GPUs.
#   python main.py      (all in its defaults; the net is edited in)
#   res2net50_26w_4s 77.99 [77.994]   14w_8s 78.14 [78.142]   48w_2s 77.32 [77.528]   26w_6s 78.58 [78.586]
#   26w_8s 79.20 [78.950]   res2net101_26w_4s 79.19 [79.192]   res2next50 78.24 [78.238]
def _res2net(model: str, **changes: Any) -> Settings:
    settings = Settings(
        model,
        zero_init_last=False,
        bn_images=64,
        label_smoothing=0.1,
        batch_size=256,
        epochs=100,
        schedule='step',
        lr=0.1,
        step_epochs=30,
        step_rate=0.1,
        weight_decay=1e-4,
        decay='all',
        **_images(model),
    )
    return replace(settings, **changes)


# Res2Net v1b: NOT RELEASED. Known from issues only: CutMix "with its strategy", 300 epochs; a user reports
# 79.80 with 300 epochs, lr * 0.1 every 75, an author that mixup with a cosine does as well (issue 38 of
# Res2Net-PretrainedModels). CutMix's own ImageNet recipe (arXiv 1905.04899, clovaai/CutMix-PyTorch) has the
# same 300 and 75, with alpha 1. All else here is the first version's: a guess.
#   res2net50d 80.27 [80.280]   res2net101d 81.23 [81.236]
def _res2net_v1b(model: str) -> Settings:
    return _res2net(model, epochs=300, step_epochs=75, cutmix=1.0, mix_images=64)


# GluonCV's ResNeXts (arXiv 1611.05431). Source: dmlc/web-data, gluoncv/logs/classification/imagenet/
# resnext*.sh and .log, run by gluon-cv's scripts/classification/imagenet/train_imagenet.py on 8 GPUs.
#   train_imagenet.py --model resnext50_32x4d --lr 0.4 --lr-mode cosine --num-epochs 200 --batch-size 128
#     --num-gpus 8 --dtype float16 --warmup-epochs 5 --last-gamma --no-wd --label-smoothing --mixup
#   resnext50_32x4d 79.32 [79.354]   resnext101_32x4d 80.37 [80.336]   resnext101_64x4d 80.69 [80.640]
#   seresnext50_32x4d [79.916]   seresnext101_32x4d [80.886]   seresnext101_64x4d [80.884]   (--dtype float32)
# `--last-gamma` is inverted in gluoncv/model_zoo/resnext.py: given, the last scales start at 1.
def _gluon_resnext(model: str, **changes: Any) -> Settings:
    settings = Settings(
        model,
        zero_init_last=False,
        conv_init='prelu',
        bn_images=128,
        jitter=0.4,
        lighting=0.1,
        label_smoothing=0.1,
        mixup=0.2,
        mix_images=128,
        batch_size=1024,
        epochs=200,
        lr=0.4,
        warmup_epochs=5,
        nesterov=True,
        weight_decay=1e-4,
        decay='kernels',
        **_images(f'{model}.gluon_in1k'),
    )
    return replace(settings, **changes)


# ResNeSt (arXiv 2004.08955), as the released weights were trained: with MXNet, whatever the PyTorch code
# says. Source: dmlc/web-data, gluoncv/logs/classification/imagenet/resnest*.sh; zhanghang1989/ResNeSt,
# scripts/gluon/train.py and resnest/gluon; for 14 and 26 gluoncv/model_zoo/resnest.py and resnest14.log.
#   horovodrun -np 64 python train_horovod.py --model resnest50 --lr 0.05 --num-epochs 270 --batch-size 128
#     --dtype float32 --warmup-epochs 5 --last-gamma --no-wd --label-smoothing --mixup --auto_aug
#     --input-size 224
#   resnest101: --lr 0.025 --batch-size 64           resnest200: --lr 0.0125 --batch-size 32 --input-size 256
#   resnest269: --lr 0.0125 --batch-size 32 --input-size 320       resnest14, resnest26: as 50, with -np 8
#   resnest14d 75.75 [75.516]   resnest26d 78.68 [78.476]   resnest50d 81.04 [80.958]
#   resnest101e 82.83 [82.916]   resnest200e 83.86 [83.880]   resnest269e 84.53 [84.542]
def _resnest(model: str, gpus: int, images: int, **changes: Any) -> Settings:
    batch_size = gpus * images
    settings = Settings(
        model,
        conv_init='fan_in',
        drop_block_rate=0.1,
        bn_images=images,
        policy='resnest_autoaugment',
        jitter=0.4,
        lighting=0.1,
        label_smoothing=0.1,
        mixup=0.2,
        mix_images=images,
        batch_size=batch_size,
        epochs=270,
        lr=0.1 * batch_size / 256,
        warmup_epochs=5,
        nesterov=True,
        weight_decay=1e-4,
        decay='kernels',
        **_images(model),
    )
    return replace(settings, **changes)


# ResNeSt in PyTorch. Source: zhanghang1989/PyTorch-Encoding, docs/source/model_zoo/imagenet.rst and
# experiments/recognition/train_dist.py; zhanghang1989/ResNeSt, resnest/torch. No released weights came of it:
# its authors call it "slightly worse than the original implementation" and give no figure.
#   python train_dist.py --model resnest50 --lr-scheduler cos --epochs 270 --lr 0.025 --batch-size 64
#     --world-size 4 --label-smoothing 0.1 --mixup 0.2 --no-bn-wd --last-gamma --warmup-epochs 5 --rand-aug
#   resnest101: the same       resnest200, resnest269: --lr 0.0125 --batch-size 32 --world-size 8, --crop-size
#   256 and 320                                                                (world-size: nodes of 8 GPUs)
# `--last-gamma` does nothing: ResNet.__init__ sets every scale to 1 after the blocks have set theirs to 0.
def _resnest_torch(model: str, gpus: int, images: int, image_size: int) -> Settings:
    return _resnest(
        model,
        gpus,
        images,
        image_size=image_size,
        zero_init_last=False,
        conv_init='fan_out',
        drop_block_rate=0.0,
        crop='resnest',
        crop_area=(0.1, 1.0),
        policy='resnest_randaugment',
        policy_ops=2,
        policy_magnitude=12,
        nesterov=False,
        decay='encoding',
    )


_LARGE = dict(image_size=320, crop='resnest', crop_area=(0.1, 1.0), interpolation='bicubic')

RECIPES: dict[str, Settings] = {
    # The offline default, about a minute on a laptop: scikit-learn's 1797 digits, 360 of them for evaluation.
    #   python -m train --workdir runs/digits
    'digits': Settings(
        'res2net_tiny',
        in_chans=1,
        data='digits',
        image_size=32,
        crop='pad',
        crop_padding=2,
        flip=0.0,
        eval_size=32,
        eval_crop_pct=1.0,
        label_smoothing=0.1,
        batch_size=64,
        epochs=25,
        lr=0.1,
        nesterov=True,
        weight_decay=1e-4,
        log_steps=22,
        eval_epochs=5,
    ),
    # Published weights, a new classifier, other images. SGD with Nesterov and a cosine as Kornblith et al.
    # fine-tune (arXiv 1805.08974, their grid of rates is 1e-4 to 0.1), lower rates for earlier stages as
    # Howard and Ruder (arXiv 1801.06146); a start to search from, with no figure to expect.
    #   python -m train --recipe finetune --data folder:flowers --workdir runs/flowers model=res2net50d
    #   with few images: frozen_stages=2, or 5 for the classifier alone
    # Images are of the size, and are prepared in the way, that the weights expect.
    'finetune': Settings(
        'resnest50d',
        weights='resnest50d',
        layer_decay=0.75,
        label_smoothing=0.1,
        batch_size=64,
        epochs=20,
        lr=0.01,
        warmup_epochs=1,
        nesterov=True,
        weight_decay=1e-4,
    ),
    'res2net50_26w_4s': _res2net('res2net50_26w_4s'),
    'res2net50_48w_2s': _res2net('res2net50_48w_2s'),
    'res2net50_14w_8s': _res2net('res2net50_14w_8s'),
    'res2net50_26w_6s': _res2net('res2net50_26w_6s'),
    'res2net50_26w_8s': _res2net('res2net50_26w_8s'),
    'res2net101_26w_4s': _res2net('res2net101_26w_4s'),
    'res2next50': _res2net('res2next50'),
    'res2net50d': _res2net_v1b('res2net50d'),
    'res2net101d': _res2net_v1b('res2net101d'),
    'resnext50_32x4d': _gluon_resnext('resnext50_32x4d'),
    'resnext101_32x4d': _gluon_resnext('resnext101_32x4d'),
    'resnext101_64x4d': _gluon_resnext('resnext101_64x4d'),
    'seresnext50_32x4d': _gluon_resnext('seresnext50_32x4d'),
    'seresnext101_32x4d': _gluon_resnext('seresnext101_32x4d'),
    'seresnext101_64x4d': _gluon_resnext('seresnext101_64x4d'),
    'resnest14d': _resnest('resnest14d', 8, 128, drop_block_rate=0.0),
    'resnest26d': _resnest('resnest26d', 8, 128),
    'resnest50d': _resnest('resnest50d', 64, 128),
    'resnest101e': _resnest('resnest101e', 64, 64),
    'resnest200e': _resnest('resnest200e', 64, 32, image_size=256, drop_rate=0.2),
    'resnest269e': _resnest('resnest269e', 64, 32, drop_rate=0.2, **_LARGE),
    'resnest50d-torch': _resnest_torch('resnest50d', 32, 64, 224),
    'resnest101e-torch': _resnest_torch('resnest101e', 32, 64, 224),
    'resnest200e-torch': _resnest_torch('resnest200e', 64, 32, 256),
    'resnest269e-torch': _resnest_torch('resnest269e', 64, 32, 320),
}


def get(name: str) -> Settings:
    """A recipe by its name, which is its net's.

    Args:
      name: a key of `RECIPES`, or any other name of the net or of the weights that it made (`resnest50`,
        `resnest50-torch`, `gluon_resnext50_32x4d`, `resnext50_32x4d.gluon_in1k`). Upper and lower case are
        the same.

    Raises:
      FlaxnetsError: there is no such recipe; the nearest are named.

    Examples:
      >>> settings = get('resnest50d')
      >>> settings.batch_size, settings.epochs, settings.policy
      (8192, 270, 'resnest_autoaugment')
    """
    key = name.strip().lower()
    ending = next((ending for ending in ENDINGS if key.endswith(ending)), '')
    stem = key.removesuffix(ending)
    key = ARCH_ALIASES.get(stem, stem) + ending
    if key in RECIPES:
        return RECIPES[key]
    try:
        arch, row = resolve(stem)
    except FlaxnetsError:
        arch, row = '', None
    if row and row.tag in TAGS and arch + ending in RECIPES:
        return RECIPES[arch + ending]
    near = difflib.get_close_matches(key, RECIPES, 3, 0.7)
    if row and arch in RECIPES and not ending:
        hint = (
            f'how {row.name} was trained is not among them; {arch} is the recipe of other weights of this net'
        )
    elif arch:
        hint = f'how {arch} was trained is not among them' + f'; near it is {near[0]}' * bool(near)
    else:
        hint = f'did you mean {" or ".join(near)}?' if near else f'they are {", ".join(RECIPES)}'
    raise FlaxnetsError(f'no recipe {name!r}: {hint}')

"""All settings of a training run: one flat, frozen dataclass, each field declared once, and their checks."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import (
    CHANNEL_ORDERS,
    CROP_MODES,
    INTERPOLATIONS,
    MOST,
    OF_BYTES,
    Preprocess,
)
from flaxnets.zoo import resolve

from .fields import (
    ABOVE_0,
    ALL_ABOVE_0,
    BELOW_1,
    FROM_0,
    FROM_1,
    HALF,
    RATIOS,
    SHARE,
    SHARES,
    SIZES,
    UP_TO_1,
    Numbers,
    Pair,
    Size,
    between,
    fields_of,
    setting,
)

SCHEDULES = ('cosine', 'step', 'constant')
CROPS = ('random_resized', 'resnest', 'pad', 'resize')
POLICIES = ('', 'resnest_autoaugment', 'autoaugment', 'randaugment', 'resnest_randaugment')
DECAYS = ('all', 'kernels', 'encoding')
CONV_INITS = ('fan_out', 'fan_in', 'prelu')

PLAIN = Preprocess()
_OPEN = 'what the weights expect'  # where a field is left open; `OPEN` lists these fields


@dataclass(frozen=True)
class Settings:
    model: str = setting('name of the architecture', chapter='The net')
    weights: str = setting(
        "where to start from: anything that `flaxnets.load` opens; '' starts from random numbers", ''
    )
    num_classes: int = setting('outputs; 0 takes the number that the data has', 0, FROM_0)
    in_chans: int = setting(
        'input channels: 3 are RGB, 1 is grey; images of any other number come from `arrays:`', 3, FROM_1
    )
    dtype: str = setting(
        'dtype in which the net computes; parameters and statistics stay float32',
        'float32',
        ('float32', 'bfloat16'),
    )
    remat: bool = setting('recompute each block in the backward pass: less memory, a third more work', False)
    zero_init_last: bool = setting('the last BatchNorm scale of each branch starts at 0', True)
    conv_init: str = setting(
        'variance of the normal distribution from which kernels [k, k, in / groups, out] start: fan_out is '
        '2/(k*k*out) (He et al., as in PyTorch, whatever the groups), fan_in is 2/(k*k*in/groups), prelu is '
        "MXNet's MSRAPrelu",
        'fan_out',
        CONV_INITS,
    )
    drop_rate: float = setting('rate of the dropout before the classifier', 0.0, BELOW_1)
    drop_path_rate: float = setting(
        'rate of stochastic depth in the last block; it grows linearly from 0 in the first block',
        0.0,
        BELOW_1,
    )
    drop_block_rate: float = setting(
        'rate of DropBlock in the last two stages in the last epoch; it grows linearly by epoch', 0.0, BELOW_1
    )
    frozen_stages: int = setting(
        '0 trains everything; 1 freezes the stem, 2 also layer1, ... 5 all but the classifier. Parameters '
        'and running statistics of what is frozen do not change',
        0,
        between(0, 5),
    )
    layer_decay: float = setting(
        "factor from each stage's learning rate to that of the stage before it; 1 gives all the same",
        1.0,
        UP_TO_1,
    )

    bn_images: int = setting(
        'images over which each BatchNorm takes its statistics; 0 is the global batch',
        0,
        FROM_0,
        chapter='BatchNorm',
    )
    freeze_bn: bool = setting(
        'uses the running statistics of the weights and does not change them, while scales, biases and '
        "kernels learn, as after torch's `.eval()` of its BatchNorms (mmdetection's `norm_eval`)",
        False,
    )

    data: str = setting(
        'where the images are (`train.data.sources.open_source`); '
        'at a resume those of training must be the same',
        '',
        may_change=True,
        chapter='The data',
    )
    train_split: str = setting(
        "part to train on, as 'train' or 'train[:80%]'; '' takes the data's training part", ''
    )
    eval_split: str = setting("part to evaluate on, as 'val'; '' takes the data's evaluation part", '')
    image_size: Size = setting(
        "side of the training images in pixels, or height and width; 0 takes the weights' own size, 224 "
        'where there are none',
        0,
        SIZES,
    )
    crop: str = setting(
        "crop of training images: random_resized (torchvision's, MXNet's), resnest (the ResNeSt authors', "
        '`ERandomCrop`), pad (the whole image resized and padded with zeros, then a random window), resize '
        '(the whole image)',
        'random_resized',
        CROPS,
    )
    crop_area: Pair = setting("share of the image's area that a random crop takes", (0.08, 1.0), SHARES)
    crop_ratio: Pair = setting('width / height of a random crop', (3 / 4, 4 / 3), RATIOS)
    crop_padding: int = setting("pixels of the 'pad' crop on each side", 0, FROM_0)
    interpolation: str = setting(
        "filter with which training images are resized (Pillow's, antialiased)", 'bilinear', INTERPOLATIONS
    )
    decoding: str = setting(
        'exact, or scaled: JPEG files of training are decoded at a half, a quarter or an eighth of their '
        'size where the crop is resized to that or less; pixels of photographs differ by half a level of 255',
        'exact',
        ('exact', 'scaled'),
    )
    flip: float = setting('probability that an image is mirrored', 0.5, SHARE)
    policy: str = setting(
        "automatic augmentation before the crop; '' is none: resnest_autoaugment (25 sub-policies as the "
        "ResNeSt authors ran them), autoaugment (torchvision's ImageNet policy), randaugment "
        "(torchvision's), resnest_randaugment (the authors' PyTorch variant)",
        '',
        POLICIES,
    )
    policy_ops: int = setting('operations of a RandAugment', 2, FROM_1)
    policy_magnitude: int = setting('strength of the operations of a RandAugment', 12, between(0, 30))
    jitter: float = setting(
        'strength of changes of brightness, contrast and saturation; 0.4 draws factors from 0.6 to 1.4',
        0.0,
        FROM_0,
    )
    hue: float = setting('largest change of the hue, as a share of the full circle', 0.0, HALF)
    lighting: float = setting(
        'standard deviation of the PCA noise (Krizhevsky et al. have 0.1); 0 is off', 0.0, FROM_0
    )
    erasing: float = setting(
        'probability that a random rectangle is replaced by noise (Zhong et al., arXiv 1708.04896)',
        0.0,
        SHARE,
    )
    eval_size: Size = setting(f'size of the evaluation, as `Preprocess.size`; 0 takes {_OPEN}', 0, SIZES)
    eval_crop_pct: float = setting(
        f'crop of the evaluation, as `Preprocess.crop_pct`; 0 takes {_OPEN}', 0.0, FROM_0
    )
    eval_crop_mode: str = setting(
        f"crop of the evaluation, as `Preprocess.crop_mode`; '' takes {_OPEN}", '', ('', *CROP_MODES)
    )
    eval_interpolation: str = setting(
        f"filter of the evaluation, as `Preprocess.interpolation`; '' takes {_OPEN}",
        '',
        ('', *INTERPOLATIONS),
    )
    mean: Numbers = setting(
        'mean of each channel, or one for all, of values from 0 to 1, by which images are normalised in '
        f"training and evaluation. Where none is given: {_OPEN}, ImageNet's without weights",
        (),
    )
    std: Numbers = setting('standard deviation of each channel, given as `mean` is', (), ALL_ABOVE_0)
    channel_order: str = setting(
        f"order of the colours in the net's input; '' takes {_OPEN}", '', ('', *CHANNEL_ORDERS)
    )

    label_smoothing: float = setting(
        'share of each label that is spread over all classes', 0.0, BELOW_1, chapter='The loss'
    )
    mixup: float = setting(
        'alpha of the Beta distribution of the mixing ratio; 0 is off. If cutmix is on too, one of the two '
        'is drawn for each group of images',
        0.0,
        FROM_0,
    )
    cutmix: float = setting('alpha of CutMix, as `mixup`', 0.0, FROM_0)
    mix_images: int = setting(
        'images in a group, which share one mixing ratio; the first is mixed with the last, the second with '
        'the last but one, and so on. 0, or more than a device has, takes all images of a device',
        0,
        FROM_0,
    )
    mix_off_epochs: int = setting('epochs without mixing at the end of the run', 0, FROM_0)

    batch_size: int = setting(
        'images of an update, on all devices together',
        256,
        FROM_1,
        chapter='The optimizer, SGD with momentum',
    )
    accumulation: int = setting(
        'parts in which a device computes its images of an update, one after the other', 1, FROM_1
    )
    epochs: int = setting('length of the whole run, in epochs', 100, FROM_1)
    schedule: str = setting(
        'how the learning rate changes: cosine (falls to 0 step by step), step (falls every `step_epochs`) '
        'or constant',
        'cosine',
        SCHEDULES,
    )
    lr: float = setting('highest learning rate, for this batch size', 0.1, ABOVE_0)
    warmup_epochs: int = setting('epochs in which the learning rate grows linearly from 0', 0, FROM_0)
    step_epochs: int = setting("for schedule 'step': epochs of one learning rate", 30, FROM_1)
    step_rate: float = setting("for schedule 'step': factor from one learning rate to the next", 0.1, UP_TO_1)
    momentum: float = setting('momentum of SGD', 0.9, BELOW_1)
    nesterov: bool = setting("whether the momentum is Nesterov's", False)
    weight_decay: float = setting(
        'this times the parameter is added to its gradient, before the momentum', 1e-4, FROM_0
    )
    decay: str = setting(
        'which parameters decay: all, kernels (no bias, no BatchNorm), encoding (those that PyTorch-Encoding '
        'chose by name: kernels, and the BatchNorm scales of shortcuts and of the deep stem)',
        'kernels',
        DECAYS,
    )
    clip_norm: float = setting(
        'largest norm of the gradient, to which a longer one is scaled down; 0 is off', 0.0, FROM_0
    )
    ema_decay: float = setting(
        'decay of the averages of parameters and statistics, which are then evaluated and written as the '
        "run's weights; 0 is off",
        0.0,
        BELOW_1,
    )
    ema_warmup: bool = setting(
        'the decay grows towards `ema_decay` (`train.step.schedule.ema_decay`), so that the averages of a '
        'short run forget the initial parameters',
        True,
    )

    seed: int = setting(
        'seed of the initial parameters, the order of the images and their augmentation',
        0,
        between(0, 2**31 - 1),
        chapter='The run',
    )
    eval_epochs: int = setting(
        'epochs from one evaluation to the next; there is always one at the end', 1, FROM_1, may_change=True
    )
    save_steps: int = setting(
        'steps from one checkpoint to the next; there is always one at the end. 0 is off',
        0,
        FROM_0,
        may_change=True,
    )
    save_minutes: float = setting(
        'minutes from one checkpoint to the next; there is always one at the end. 0 is off',
        10.0,
        FROM_0,
        may_change=True,
    )
    keep_last: int = setting('newest checkpoints that are kept', 2, FROM_1, may_change=True)
    keep_best: int = setting('best checkpoints that are kept', 1, FROM_0, may_change=True)
    log_steps: int = setting('steps from one line of the log to the next', 50, FROM_1, may_change=True)
    on_non_finite: str = setting(
        'what to do where a loss or gradient is not finite: stop the run, or skip the update',
        'stop',
        ('stop', 'skip'),
        may_change=True,
    )
    on_failed_save: str = setting(
        'what to do where a checkpoint cannot be saved: continue with the earlier ones, or stop',
        'continue',
        ('continue', 'stop'),
        may_change=True,
    )
    max_bad_images: float = setting(
        'share of unreadable images above which training stops; it is taken of 10,000 images at least',
        0.001,
        SHARE,
        may_change=True,
    )
    workers: int = setting(
        'threads or processes that decode and augment; 0 takes one for each core', 0, FROM_0, may_change=True
    )
    feed: str = setting(
        'who decodes and augments: threads, or processes, which many cores need; auto takes processes where '
        'more than four would work, and not for a few thousand images alone',
        'auto',
        ('auto', 'threads', 'processes'),
        may_change=True,
    )
    max_steps: int = setting(
        'step after which the run ends early, with its schedules unchanged; 0 is off',
        0,
        FROM_0,
        may_change=True,
    )


FIELDS = fields_of(Settings)
# Fields that may have other values when a run is resumed: none of them changes a parameter or a sample.
# `data` may, since the images may have moved; the run compares fingerprints: they must be the same images.
MAY_CHANGE = frozenset(name for name, field in FIELDS.items() if field.may_change)


def explained() -> str:
    """All fields in their chapters, each with its meaning, as the docstring of `Settings` lists them."""
    lines = []
    for field in FIELDS.values():
        if field.chapter:
            lines += ['', f'{field.chapter}:']
        lines.append(f'  {field.name}: {field.what}.')
    return '\n'.join(lines).strip()


Settings.__doc__ = f"""One training run. Every field can be given on the command line as `field=value`.

Images are counted over all devices of all hosts; an epoch is `len(data) // batch_size` steps, and a step is
one update of the parameters.

{explained()}
"""

# Names that other trainers have for some fields, where the nearest spelling is not what is meant.
_ALSO_KNOWN_AS = {
    'aa': 'policy',
    'amp': 'dtype',
    'arch': 'model',
    'auto_augment': 'policy',
    'bf16': 'dtype',
    'bs': 'batch_size',
    'crop_pct': 'eval_crop_pct',
    'drop': 'drop_rate',
    'ema': 'ema_decay',
    'fp16': 'dtype',
    'freeze': 'frozen_stages',
    'grad_accum': 'accumulation',
    'img_size': 'image_size',
    'init': 'weights',
    'input_size': 'image_size',
    'learning_rate': 'lr',
    'max_epochs': 'epochs',
    'model_ema_decay': 'ema_decay',
    'nag': 'nesterov',
    'net': 'model',
    'num_epochs': 'epochs',
    'precision': 'dtype',
    'pretrained': 'weights',
    'reprob': 'erasing',
    'resolution': 'image_size',
    'size': 'image_size',
    'train_size': 'image_size',
    'wd': 'weight_decay',
}


def validate(settings: Settings) -> None:
    """Checks what can be checked without the data and the devices.

    Raises:
      FlaxnetsError: every bad field and combination of fields, in one message.
    """
    problems = _bad_values(settings) or _bad_combinations(settings)
    if problems:
        raise FlaxnetsError('these settings cannot be trained with:\n  ' + '\n  '.join(problems))


def _bad_values(settings: Settings) -> list[str]:
    values = {name: getattr(settings, name) for name in FIELDS}
    bad = {name: problem for name, value in values.items() if (problem := FIELDS[name].problem(value))}
    problems = [f'{name}={values[name]!r} {problem}' for name, problem in bad.items()]
    if 'model' not in bad:
        try:
            resolve(settings.model)
        except FlaxnetsError as error:
            problems.append(f'model: {_not_a_net(settings.model) or error}')
    return problems


def _not_a_net(model: str) -> str:
    """What is wrong with a model that is a file or folder of weights; '' if it is not one."""
    if not os.path.exists(model):
        return ''
    return f'{model!r} is no name of a net; to start from the weights in it, say weights={model}'


def _bad_combinations(s: Settings) -> list[str]:
    """Fields whose values are each allowed, but cannot be combined."""
    problems = [
        f'batch_size={s.batch_size} must be a multiple of {field}={getattr(s, field)}'
        for field in ('accumulation', 'bn_images', 'mix_images')
        if getattr(s, field) and s.batch_size % getattr(s, field)
    ]
    if s.schedule != 'constant' and s.warmup_epochs >= s.epochs:
        problems.append(f'warmup_epochs={s.warmup_epochs} must be fewer than epochs={s.epochs}')
    if s.mix_off_epochs > s.epochs:
        problems.append(f'mix_off_epochs={s.mix_off_epochs} must not be more than epochs={s.epochs}')
    if s.nesterov and not s.momentum:
        problems.append('nesterov=True needs a momentum above 0')
    if s.crop == 'pad' and not s.crop_padding:
        problems.append("crop='pad' needs a crop_padding of 1 pixel or more")
    if s.frozen_stages and not s.weights:
        problems.append(
            f'frozen_stages={s.frozen_stages} would keep random numbers: give weights to start from'
        )
    if s.freeze_bn and not s.weights:
        problems.append(
            'freeze_bn=True would keep statistics that are of no images: give weights to start from'
        )
    if (s.mixup or s.cutmix) and s.mix_images == 1:
        problems.append('mix_images=1 mixes each image with itself: give 2 or more, or 0')
    return problems + _bad_channels(s)


def _bad_channels(s: Settings) -> list[str]:
    """Fields that do not fit the number of channels."""
    problems = [
        f'{field}={getattr(s, field)!r} must be one number, or one for each of in_chans={s.in_chans}'
        for field in ('mean', 'std')
        if len(getattr(s, field)) not in (0, 1, 3 if s.in_chans == 1 else s.in_chans)
    ]
    problems += [
        f'{field}={getattr(s, field)!r} {OF_BYTES}'
        for field in ('mean', 'std')
        if max(getattr(s, field), default=0) > MOST
    ]
    if s.in_chans not in (1, 3):
        problems += [
            f'{field}={getattr(s, field)!r} is made for colours: in_chans={s.in_chans} needs {field}={off!r}'
            for field, off in (('policy', ''), ('jitter', 0.0), ('hue', 0.0), ('lighting', 0.0))
            if getattr(s, field)
        ]
        if s.channel_order == 'bgr':
            problems.append(f"channel_order='bgr' is for three channels, and not in_chans={s.in_chans}")
    return problems


def complete(settings: Settings, expected: Preprocess = PLAIN) -> Settings:
    """The settings with the fields that were left open (`OPEN`) filled in from `expected`.

    Args:
      settings: of a run.
      expected: what its weights expect.
    """
    values = _expected(expected, settings.in_chans)
    return dataclasses.replace(settings, **{f: v for f, v in values.items() if not getattr(settings, f)})


def _expected(images: Preprocess, channels: int) -> dict[str, Any]:
    """Values for the fields that may be left open (0, '' or nothing), from what weights expect."""
    return {
        'image_size': images.size,
        'eval_size': images.size,
        'eval_crop_pct': images.crop_pct,
        'eval_crop_mode': images.crop_mode,
        'eval_interpolation': images.interpolation,
        'mean': _of_channels(images.mean, channels),
        'std': _of_channels(images.std, channels),
        'channel_order': images.channel_order if channels == 3 else 'rgb',
    }


def _of_channels(values: Numbers, channels: int) -> Numbers:
    """Values for so many channels: those of R, G and B repeated in turn, as `load` adapts a first kernel."""
    if 1 in (len(values), channels):  # one for all channels; for grey images the average is taken later
        return values
    return tuple(values[i % len(values)] for i in range(channels))


OPEN = tuple(_expected(PLAIN, 3))


def preprocess(settings: Settings) -> Preprocess:
    """How a run prepares images for its evaluation; it normalises them so in training too."""
    s = complete(settings)
    return Preprocess(
        size=s.eval_size,
        crop_pct=s.eval_crop_pct,
        crop_mode=s.eval_crop_mode,
        interpolation=s.eval_interpolation,
        mean=s.mean,
        std=s.std,
        channel_order=s.channel_order,
    )


def continued(settings: Settings, earlier: Settings) -> Settings:
    """The settings of a resumed run: what they leave open is taken from those that it began with."""
    began = complete(earlier)
    return dataclasses.replace(settings, **{f: getattr(settings, f) or getattr(began, f) for f in OPEN})


def apply(settings: Settings, changes: Iterable[str]) -> Settings:
    """The settings with some fields changed: `apply(settings, ['lr=0.2', 'crop_area=0.25,1'])`.

    Numbers may be fractions (`crop_ratio=3/4,4/3`). If only the model is changed and the run starts from
    the published weights of its model, it then starts from those of the new model. If only the weights are
    changed, the model becomes theirs.

    Args:
      settings: the settings to change.
      changes: `field=value` each; of two for one field the last counts.

    Raises:
      FlaxnetsError: every unknown field (with the nearest name) and ill-typed value, in one message. What
        the values mean is left to `validate`.

    Examples:
      >>> from train import recipes
      >>> settings = apply(recipes.get('finetune'), ['model=resnest101e', 'lr=0.02', 'eval_size=224,320'])
      >>> settings.lr, settings.weights, settings.eval_size
      (0.02, 'resnest101e', (224, 320))
    """
    values: dict[str, Any] = {}
    problems = []
    for change in changes:
        field, equals, text = change.partition('=')
        field = field.strip()
        if not equals:
            problems.append(f'{change!r} is not of the form field=value')
        elif field not in FIELDS:
            problems.append(f'{field!r} is not a field: {_nearest(field)}')
        else:
            try:
                values[field] = FIELDS[field].parse(text)
            except ValueError:
                problems.append(f'{field}={text!r} must be {FIELDS[field].type_words}')
    if problems:
        raise FlaxnetsError('bad changes to the settings:\n  ' + '\n  '.join(problems))
    return dataclasses.replace(settings, **{**_follow(settings, values), **values})


def _follow(settings: Settings, values: Mapping[str, Any]) -> dict[str, str]:
    """The model of weights, or the weights of a model, where only one of the two was changed."""
    model, weights = values.get('model'), values.get('weights')
    if model and weights is None and settings.weights == settings.model:
        return {'weights': model}
    if weights and model is None:
        try:
            return {'model': flaxnets.config(weights).name}
        except FlaxnetsError:
            return {}  # they cannot be opened: that is said when the run starts
    return {}


def _nearest(field: str) -> str:
    key = field.lstrip('-').replace('-', '_').lower()
    near = [_ALSO_KNOWN_AS[key]] if key in _ALSO_KNOWN_AS else difflib.get_close_matches(key, FIELDS, 2)
    if near:
        return f'did you mean {" or ".join(near)}?'
    return f'the fields are {", ".join(FIELDS)}'


def to_json(settings: Settings) -> dict[str, Any]:
    """All fields, as `json.dumps` takes them."""
    return dataclasses.asdict(settings)


def from_json(data: Mapping[str, Any]) -> Settings:
    """The settings that `to_json` made `data` from; a field that is missing has its default.

    Raises:
      FlaxnetsError: `data` has other fields, or values of other types.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    wrong = [k for k, v in values.items() if k not in FIELDS or not FIELDS[k].is_type_of(v)]
    if wrong or 'model' not in values:
        found = ', '.join(f'{k}={values[k]!r}' for k in wrong) or 'no model'
        raise FlaxnetsError(f'not settings of this version of flaxnets: {found}')
    if values.get('ema_decay') and 'ema_warmup' not in values:
        values['ema_warmup'] = False  # as it was before there was a warm-up
    return Settings(**values)


def difference(old: Settings, new: Settings) -> list[str]:
    """`field: old -> new` for each field that differs, without those that a resumed run may change."""
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in FIELDS if name not in MAY_CHANGE)
    return [f'{name}: {a!r} -> {b!r}' for name, a, b in pairs if a != b]

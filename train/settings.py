"""What a training run is, as data: one flat, frozen, validated table of fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, get_type_hints

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import CHANNEL_ORDERS, CROP_MODES, INTERPOLATIONS, Preprocess
from flaxnets.zoo import resolve

SCHEDULES = ('cosine', 'step', 'constant')
CROPS = ('random_resized', 'resnest', 'pad', 'resize')
POLICIES = ('', 'resnest_autoaugment', 'autoaugment', 'randaugment', 'resnest_randaugment')
DECAYS = ('all', 'kernels', 'encoding')
CONV_INITS = ('fan_out', 'fan_in', 'prelu')

# What a run may be resumed with other values of: nothing of it reaches a parameter or a sample. Where the
# images are (`data`) may change, which images they are may not: the run compares their fingerprints.
_SAVING = ('save_steps', 'save_minutes', 'keep_last', 'keep_best', 'on_failed_save')
_WATCHING = ('eval_epochs', 'log_steps', 'max_bad_images', 'on_non_finite')
MAY_CHANGE = frozenset(('data', 'workers', 'max_steps', *_SAVING, *_WATCHING))

Size = int | tuple[int, int]
Numbers = tuple[float, ...]
PLAIN = Preprocess()


@dataclass(frozen=True)
class Settings:
    """One training run. Every field can be given on the command line as `field=value`.

    Images are counted over all devices of all hosts; an epoch is `len(data) // batch_size` steps, and a
    step is one update of the parameters.

    The net:
      model: name of the architecture.
      weights: where to start from: anything that `flaxnets.load` opens; '' starts from random numbers.
      num_classes: outputs; 0 takes the number that the data has.
      in_chans: input channels: 3 are RGB, 1 is grey; images of any other number come from `arrays:`.
      dtype: of the computation, 'float32' or 'bfloat16'; parameters and statistics stay float32.
      remat: recompute each block in the backward pass: less memory, a third more work.
      zero_init_last: the last BatchNorm scale of each branch starts at 0.
      conv_init: normal distribution that kernels [k, k, in / groups, out] start from, by its variance:
        'fan_out' 2/(k*k*out) (He et al., as PyTorch takes it: whatever the groups), 'fan_in'
        2/(k*k*in/groups), 'prelu' MXNet's MSRAPrelu.
      drop_rate: dropout before the classifier.
      drop_path_rate: stochastic depth, at the last block.
      drop_block_rate: DropBlock, reached at the end of training, linearly from 0 by epoch.
      frozen_stages: 0 trains everything; 1 keeps the stem, 2 also layer1, ... 5 all but the classifier:
        parameters and running statistics do not change.
      layer_decay: learning rate of a stage over that of the next one, towards the stem; 1 is the same.

    BatchNorm:
      bn_images: images over which statistics are taken; 0 takes the global batch.
      freeze_bn: the statistics of the weights are used and kept, while scales, biases and kernels learn, as
        after torch's `.eval()` of its BatchNorms (mmdetection's `norm_eval`).

    The data:
      data: where the images are; see `train.data.sources.open_source`.
      train_split, eval_split: parts of it, as 'val' or 'train[:80%]'; '' takes the data's own.
      image_size: side of the training images in pixels, or height and width; 0 takes the weights' own size,
        224 where there are none.
      crop: 'random_resized' (torchvision's, MXNet's), 'resnest' (the ResNeSt authors' own, `ERandomCrop`),
        'pad' (the whole image resized, zeros around, a window anywhere), 'resize' (the whole image).
      crop_area, crop_ratio: share of the image's area and width / height of what is cut.
      crop_padding: pixels of the 'pad' crop on each side.
      interpolation: 'bilinear' or 'bicubic', antialiased (Pillow's).
      flip: probability of a mirrored image.
      policy: '' or an automatic augmentation, before the crop: 'resnest_autoaugment' (25 sub-policies as the
        ResNeSt authors ran them), 'autoaugment' (torchvision's ImageNet policy), 'randaugment'
        (torchvision's), 'resnest_randaugment' (the authors' PyTorch variant).
      policy_ops, policy_magnitude: of a RandAugment.
      jitter: strength of brightness, contrast and saturation changes, 0.4: factors in 0.6..1.4.
      hue: strength of hue changes, at most 0.5.
      lighting: standard deviation of the PCA noise (Krizhevsky et al.), 0.1.
      erasing: probability of a random rectangle of noise (Zhong et al., arXiv 1708.04896).
      eval_size, eval_crop_pct, eval_crop_mode, eval_interpolation: of the evaluation, as
        `flaxnets.Preprocess` has them; 0 and '' take what the weights expect, its defaults where
        there are none.
      mean, std: of each channel, or one for all, of values in 0..1: by them images are normalised in
        training and evaluation. None given takes what the weights expect, ImageNet's where there are none.
      channel_order: in which the net takes colours, 'rgb' or 'bgr'; '' takes what the weights expect.

    The loss:
      label_smoothing: share of each label spread over all classes.
      mixup, cutmix: alpha of the Beta distribution; 0 is off. With both, each group of images takes one.
      mix_images: images that share one mixing ratio, partners reversed in the group; 0, or more than a
        device has, takes those of a device.
      mix_off_epochs: last epochs without mixing.

    The optimizer, SGD with momentum:
      batch_size: images of an update.
      accumulation: parts in which a device takes its images of an update, one after the other.
      epochs: of the whole run.
      schedule: 'cosine' (to 0, by iteration), 'step' (by epoch) or 'constant'.
      lr: highest learning rate, for this batch size.
      warmup_epochs: linear from 0, by iteration.
      step_epochs, step_rate: of 'step': every so many epochs times so much.
      momentum, nesterov: of SGD.
      weight_decay: added to the gradient before the momentum.
      decay: what decays: 'all' parameters, 'kernels' (no bias, no BatchNorm), 'encoding' (as PyTorch-Encoding
        chose by name: also the BatchNorm scales of shortcuts and of the deep stem).
      clip_norm: largest norm of the gradient; 0 is off.
      ema_decay: of the average of parameters and statistics that is evaluated; 0 is off.
      ema_warmup: the decay grows towards `ema_decay` (`train.step.schedule.ema_decay`), so that the averages
        of a short run do not stay near the net of its start.

    The run:
      seed: of initial numbers, order of images and augmentation.
      eval_epochs: an evaluation every so many epochs, and at the end.
      save_steps, save_minutes: a checkpoint every so many steps or minutes, and at the end; 0 is off.
      keep_last, keep_best: checkpoints that stay.
      log_steps: a line of the log every so many steps.
      on_non_finite: 'stop', or 'skip' the update.
      on_failed_save: 'continue' with the earlier checkpoints, or 'stop'.
      max_bad_images: share of unreadable images at which training stops.
      workers: threads that decode and augment; 0 takes one for each core.
      max_steps: ends the run early, schedules unchanged; 0 is off.
    """

    model: str
    weights: str = ''
    num_classes: int = 0
    in_chans: int = 3
    dtype: str = 'float32'
    remat: bool = False
    zero_init_last: bool = True
    conv_init: str = 'fan_out'
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_block_rate: float = 0.0
    frozen_stages: int = 0
    layer_decay: float = 1.0

    bn_images: int = 0
    freeze_bn: bool = False

    data: str = ''
    train_split: str = ''
    eval_split: str = ''
    image_size: Size = 0
    crop: str = 'random_resized'
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    interpolation: str = 'bilinear'
    flip: float = 0.5
    policy: str = ''
    policy_ops: int = 2
    policy_magnitude: int = 12
    jitter: float = 0.0
    hue: float = 0.0
    lighting: float = 0.0
    erasing: float = 0.0
    eval_size: Size = 0
    eval_crop_pct: float = 0.0
    eval_crop_mode: str = ''
    eval_interpolation: str = ''
    mean: Numbers = ()
    std: Numbers = ()
    channel_order: str = ''

    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_images: int = 0
    mix_off_epochs: int = 0

    batch_size: int = 256
    accumulation: int = 1
    epochs: int = 100
    schedule: str = 'cosine'
    lr: float = 0.1
    warmup_epochs: int = 0
    step_epochs: int = 30
    step_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: str = 'kernels'
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    ema_warmup: bool = True

    seed: int = 0
    eval_epochs: int = 1
    save_steps: int = 0
    save_minutes: float = 10.0
    keep_last: int = 2
    keep_best: int = 1
    log_steps: int = 50
    on_non_finite: str = 'stop'
    on_failed_save: str = 'continue'
    max_bad_images: float = 0.001
    workers: int = 0
    max_steps: int = 0


_CHOICES: dict[str, tuple[Any, ...]] = {
    'dtype': ('float32', 'bfloat16'),
    'conv_init': CONV_INITS,
    'crop': CROPS,
    'interpolation': INTERPOLATIONS,
    'policy': POLICIES,
    'eval_crop_mode': ('', *CROP_MODES),
    'eval_interpolation': ('', *INTERPOLATIONS),
    'channel_order': ('', *CHANNEL_ORDERS),
    'schedule': SCHEDULES,
    'decay': DECAYS,
    'on_non_finite': ('stop', 'skip'),
    'on_failed_save': ('continue', 'stop'),
}
_FROM_0 = (
    'num_classes bn_images crop_padding policy_magnitude jitter lighting mixup cutmix mix_images '
    'mix_off_epochs warmup_epochs weight_decay clip_norm save_steps save_minutes keep_best workers max_steps '
    'eval_crop_pct'
)
_FROM_1 = 'in_chans policy_ops batch_size accumulation epochs step_epochs eval_epochs keep_last log_steps'
_BELOW_1 = 'drop_rate drop_path_rate drop_block_rate label_smoothing momentum ema_decay'
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (_FROM_0, 'at least 0', lambda x: x >= 0),
    (_FROM_1, 'at least 1', lambda x: x >= 1),
    (_BELOW_1, 'at least 0 and below 1', lambda x: 0 <= x < 1),
    ('lr', 'above 0', lambda x: x > 0),
    ('hue', 'from 0 to 0.5', lambda x: 0 <= x <= 0.5),
    ('flip erasing max_bad_images', 'from 0 to 1', lambda x: 0 <= x <= 1),
    ('frozen_stages', 'from 0 to 5', lambda x: 0 <= x <= 5),
    ('seed', 'from 0 to 2147483647', lambda x: 0 <= x < 2**31),
    ('layer_decay step_rate', 'above 0 and at most 1', lambda x: 0 < x <= 1),
)
# What other trainers call some fields, where the spelling alone would not lead to ours.
_ALSO_KNOWN_AS = {
    'arch': 'model',
    'bs': 'batch_size',
    'learning_rate': 'lr',
    'nag': 'nesterov',
    'pretrained': 'weights',
    'wd': 'weight_decay',
}
_TRUTH = dict.fromkeys(('true', 'yes', 'on', '1'), True) | dict.fromkeys(('false', 'no', 'off', '0'), False)


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Settings)


def validate(settings: Settings) -> None:
    """Checks what can be checked without the data and the devices.

    Raises:
      FlaxnetsError: every bad field and combination of fields, in one message.
    """
    problems = _bad_values(settings) or _bad_combinations(settings)
    if problems:
        raise FlaxnetsError('these settings cannot be trained with:\n  ' + '\n  '.join(problems))


def _bad_values(settings: Settings) -> list[str]:
    values, bad = dataclasses.asdict(settings), {}
    for field, value in values.items():
        if not _is_of_type(value, _types()[field]):
            bad[field] = f'must be {_described(_types()[field])}'
    for field, choices in _CHOICES.items():
        if values[field] not in choices:
            bad[field] = f'is not one of {", ".join(map(repr, choices))}'
    for fields, text, inside in _RANGES:
        for field in fields.split():
            if field not in bad and not inside(values[field]):
                bad[field] = f'must be {text}'
    for field, top in (('crop_area', 1.0), ('crop_ratio', math.inf)):
        if field not in bad and not 0 < values[field][0] <= values[field][1] <= top:
            bad[field] = f'must be the smallest and the largest{" share, within 0..1" if top == 1 else ""}'
    for field in ('image_size', 'eval_size'):
        if field not in bad and values[field] != 0 and min(sides(values[field])) < 1:
            bad[field] = 'must be at least 1, or 0 for the size of the weights'
    if 'std' not in bad and min(values['std'], default=1) <= 0:
        bad['std'] = 'must be above 0'
    problems = [f'{field}={values[field]!r} {bad[field]}' for field in values if field in bad]
    if 'model' not in bad:
        try:
            resolve(settings.model)
        except FlaxnetsError as error:
            problems.append(f'model: {error}')
    return problems


def _bad_combinations(s: Settings) -> list[str]:
    """Fields that are good one by one and not together."""
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
    if s.in_chans not in (1, 3):
        problems += [
            f'{field}={getattr(s, field)!r} is made for colours: in_chans={s.in_chans} needs {field}={off!r}'
            for field, off in (('policy', ''), ('jitter', 0.0), ('hue', 0.0), ('lighting', 0.0))
            if getattr(s, field)
        ]
        if s.channel_order == 'bgr':
            problems.append(f"channel_order='bgr' is for three channels, and not in_chans={s.in_chans}")
    return problems


def sides(size: Size) -> tuple[int, int]:
    """Height and width of images of a size."""
    return (size, size) if isinstance(size, int) else size


# What is left open (0, '' or nothing) is as the weights expect.
OPEN = (
    *('image_size', 'eval_size', 'eval_crop_pct', 'eval_crop_mode', 'eval_interpolation'),
    *('mean', 'std', 'channel_order'),
)


def complete(settings: Settings, expected: Preprocess = PLAIN) -> Settings:
    """The settings with nothing of `OPEN` left open: what they do not say is as `expected`.

    Args:
      settings: of a run.
      expected: what its weights expect.
    """
    values: dict[str, Any] = {
        'image_size': expected.size,
        'eval_size': expected.size,
        'eval_crop_pct': expected.crop_pct,
        'eval_crop_mode': expected.crop_mode,
        'eval_interpolation': expected.interpolation,
        'mean': _of_channels(expected.mean, settings.in_chans),
        'std': _of_channels(expected.std, settings.in_chans),
        'channel_order': expected.channel_order if settings.in_chans == 3 else 'rgb',
    }
    return dataclasses.replace(settings, **{f: v for f, v in values.items() if not getattr(settings, f)})


def _of_channels(values: Numbers, channels: int) -> Numbers:
    """Values for any number of channels: RGB's in turn, as `load` fits a first kernel to them."""
    if 1 in (len(values), channels):  # one for all; and grey takes their average
        return values
    return tuple(values[i % len(values)] for i in range(channels))


def preprocess(settings: Settings) -> Preprocess:
    """How a run prepares images for its evaluation, and normalises them in training too."""
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
    """The settings of a run that goes on: what they leave open is as it began."""
    began = complete(earlier)
    return dataclasses.replace(settings, **{f: getattr(settings, f) or getattr(began, f) for f in OPEN})


def apply(settings: Settings, changes: Iterable[str]) -> Settings:
    """The settings with some fields changed: `apply(settings, ['lr=0.2', 'crop_area=0.25,1'])`.

    Numbers may be fractions (`crop_ratio=3/4,4/3`). Where weights to start from are the model's own
    published ones, they stay so if the model alone is changed; and if the weights alone are changed, the
    model follows.

    Args:
      settings: to begin with.
      changes: `field=value` each; of two for one field the last counts.

    Raises:
      FlaxnetsError: every unknown field (with the nearest name) and ill-typed value, in one message. What
        the values mean is left to `validate`.
    """
    values: dict[str, Any] = {}
    problems = []
    for change in changes:
        field, equals, text = change.partition('=')
        field = field.strip()
        if not equals:
            problems.append(f'{change!r} is not of the form field=value')
        elif field not in _types():
            problems.append(f'{field!r} is not a field: {_nearest(field)}')
        else:
            kind = _types()[field]
            try:
                values[field] = _parsed(text.strip(), kind)
                if not _is_of_type(values[field], kind):
                    raise ValueError(text)
            except (ValueError, ZeroDivisionError, OverflowError, IndexError):
                problems.append(f'{field}={text!r} must be {_described(kind)}')
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


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.lower()]
    if kind is int:
        return int(text)
    if kind is float:
        return float(Fraction(text))  # neither 'nan' nor 'inf'
    parts = [part.strip() for part in text.strip('()[]').split(',') if part.strip()]
    if kind == Size:
        return int(parts[0]) if len(parts) == 1 else tuple(int(part) for part in parts)
    return tuple(_parsed(part, float) for part in parts)


def _is_of_type(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind in (str, int, bool):
        return type(value) is kind
    if kind == Size and type(value) is int:
        return True
    if not isinstance(value, tuple) or (kind != Numbers and len(value) != 2):
        return False
    return all(_is_of_type(v, int if kind == Size else float) for v in value)


def _described(kind: Any) -> str:
    names: dict[Any, str] = {
        str: 'text',
        int: 'a whole number',
        float: 'a number',
        bool: 'true or false',
        Size: 'a whole number, or two as in 224,320',
        Numbers: 'one number, or one for each channel as in 0.5,0.5,0.5',
    }
    return names.get(kind, 'two numbers, as in 0.25,1')


def _nearest(field: str) -> str:
    key = field.lstrip('-').replace('-', '_').lower()
    near = [_ALSO_KNOWN_AS[key]] if key in _ALSO_KNOWN_AS else difflib.get_close_matches(key, _types(), 2)
    if near:
        return f'did you mean {" or ".join(near)}?'
    return f'the fields are {", ".join(_types())}'


def to_json(settings: Settings) -> dict[str, Any]:
    """All fields, as `json.dumps` takes them."""
    return dataclasses.asdict(settings)


def from_json(data: Mapping[str, Any]) -> Settings:
    """The settings that `to_json` made `data` from; a field that is missing has its default.

    Raises:
      FlaxnetsError: `data` has other fields, or values of other types.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    wrong = [k for k, v in values.items() if k not in _types() or not _is_of_type(v, _types()[k])]
    if wrong or 'model' not in values:
        found = ', '.join(f'{k}={values[k]!r}' for k in wrong) or 'no model'
        raise FlaxnetsError(f'not settings of this version of flaxnets: {found}')
    if values.get('ema_decay') and 'ema_warmup' not in values:
        values['ema_warmup'] = False  # as it was before there was a warm-up
    return Settings(**values)


def difference(old: Settings, new: Settings, ignore: Iterable[str] = MAY_CHANGE) -> list[str]:
    """`field: old -> new` for each field with two values, but for those that a resumed run may change."""
    ignored = frozenset(ignore)
    pairs = ((f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(Settings))
    return [f'{name}: {a!r} -> {b!r}' for name, a, b in pairs if a != b and name not in ignored]

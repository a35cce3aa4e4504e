"""Notes on a run before it begins: what it takes from its weights, and which settings will do nothing.

A field that cannot do what it says is refused (`train.settings.validate`). One that does nothing in this
run, or less than its name says, is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from flaxnets.images.preprocess import Preprocess

from .data.planes import PILLOWS
from .fields import as_text
from .settings import OPEN, Settings, complete
from .step.schedule import ema_decay

# Fields that have an effect in some runs only: their names, whether a run is such a one, what they need.
_NEEDS: tuple[tuple[str, Callable[[Settings], Any], str], ...] = (
    ('crop_area crop_ratio', lambda s: s.crop in ('random_resized', 'resnest'), 'a crop that is random'),
    ('crop_padding', lambda s: s.crop == 'pad', "crop='pad'"),
    ('policy_ops policy_magnitude', lambda s: 'randaugment' in s.policy, 'a RandAugment as policy'),
    (
        'decoding',
        lambda s: not s.policy and s.in_chans in PILLOWS,
        'no policy, and files of images',
    ),
    ('hue lighting', lambda s: s.in_chans != 1, 'colours, which in_chans=1 has not'),
    ('bn_images', lambda s: not s.freeze_bn, 'statistics of batches: freeze_bn=True takes none'),
    ('mix_images mix_off_epochs', lambda s: s.mixup or s.cutmix, 'mixup or cutmix'),
    ('step_epochs step_rate', lambda s: s.schedule == 'step', "schedule='step'"),
    ('decay', lambda s: s.weight_decay, 'a weight_decay'),
    ('ema_warmup', lambda s: s.ema_decay, 'an ema_decay'),
    ('conv_init zero_init_last', lambda s: not s.weights, 'a net that starts from random numbers'),
)
INITIAL_SHARE = 0.01  # of the initial net in the averages at the end; more is worth a warning
_DEFAULTS = {field.name: field.default for field in fields(Settings)}


@dataclass(frozen=True)
class Note:
    """A note on a run.

    Attributes:
      kind: 'note', or 'warning' of what is likely to spoil the run.
      message: its text.
    """

    kind: str
    message: str


def about_images(given: Settings, settings: Settings, expected: Preprocess | None) -> Iterator[Note]:
    """Notes on what was taken from the weights, and where the run departs from what they expect.

    Args:
      given: the settings before they were completed.
      settings: the same, completed.
      expected: what the weights expect; None without weights.
    """
    open_fields = [field for field in OPEN if not getattr(given, field)]
    if expected is None:
        if given.in_chans not in (1, 3) and {'mean', 'std'} & set(open_fields):
            values = ', '.join(f'{field}={as_text(getattr(settings, field))}' for field in ('mean', 'std'))
            yield Note(
                'note',
                f"images of {given.in_chans} channels are normalised with {values}, ImageNet's in turn; "
                'mean and std give others',
            )
        return
    if open_fields:
        values = ', '.join(f'{field}={as_text(getattr(settings, field))}' for field in open_fields)
        yield Note('note', f'as weights={given.weights} expect: {values}')
    theirs = complete(Settings(given.model, in_chans=given.in_chans), expected)
    other = [field for field in OPEN if getattr(settings, field) != getattr(theirs, field)]
    if other:
        values = ', '.join(
            f'{field}={as_text(getattr(settings, field))} and not {as_text(getattr(theirs, field))}'
            for field in other
        )
        yield Note('note', f'other than weights={given.weights} expect: {values}')
    for what in expected.approximations:
        yield Note('note', f'weights={given.weights}: {what}')
    if expected.unsupported:
        what = '; '.join(expected.unsupported)
        yield Note('warning', f'weights={given.weights} expect what images here do not get: {what}')


def without_effect(s: Settings, epoch_steps: int, total_steps: int, devices: int = 1) -> Iterator[Note]:
    """Notes on fields that do nothing in this run, or less than their names say."""
    for names, used, need in _NEEDS:
        idle = [name for name in names.split() if getattr(s, name) != _DEFAULTS[name]]
        if idle and not used(s):
            values = ', '.join(f'{name}={as_text(getattr(s, name))}' for name in idle)
            yield Note('note', f'{values} does nothing: it needs {need}')
    yield from _averages(s, total_steps)
    warmup = s.warmup_epochs * epoch_steps
    if warmup >= total_steps:
        yield Note('warning', f'the run ends at step {total_steps}, within its warm-up of {warmup} steps')
    if s.schedule == 'step' and s.step_epochs * epoch_steps >= total_steps:
        yield Note('note', f'step_epochs={s.step_epochs}: the run ends before the learning rate falls')
    if (s.mixup or s.cutmix) and s.mix_off_epochs == s.epochs:
        yield Note('note', f'mix_off_epochs={s.mix_off_epochs}: no epoch is left for mixup or cutmix')
    local = s.batch_size // devices
    if (s.mixup or s.cutmix) and s.mix_images > local:
        yield Note('note', f'mix_images={s.mix_images}: a device has {local} images, which share a ratio')
    if s.save_steps > total_steps:
        yield Note('note', f'save_steps={s.save_steps} is more than the {total_steps} steps of the run')


def _averages(s: Settings, total_steps: int) -> Iterator[Note]:
    """Warnings about averages that reach further back than the run."""
    if not s.ema_decay:
        return
    span = 1 / (1 - s.ema_decay)
    if s.ema_warmup and span > total_steps:
        last = ema_decay(s)(total_steps)
        yield Note(
            'warning',
            f'ema_decay={s.ema_decay:g} averages over {span:.0f} steps, and the run has {total_steps}: with '
            f'the warm-up it ends at a decay of {last:.4g}, which is {1 / (1 - last):.0f} steps',
        )
    left = s.ema_decay**total_steps
    if not s.ema_warmup and left > INITIAL_SHARE:
        yield Note(
            'warning',
            f'ema_decay={s.ema_decay:g} without a warm-up leaves {100 * left:.1f} % of the net that the run '
            f'began with in the averages after its {total_steps} steps, and they are what is evaluated and '
            'published: take ema_warmup=True or a smaller ema_decay',
        )

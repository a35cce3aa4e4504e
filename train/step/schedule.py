"""Numbers that change during a run: the learning rate by step, DropBlock's rate by epoch.

Why not optax's schedules: computed in float32, its cosine loses digits where it nears 0 (in the published
ResNeSt-50 run it is off by 0.07 % a hundred steps before the end, and by its whole value at the last step),
and on the host it gives no float64. The forms here are right to 3e-7 at every step, and runs that were begun
with them go on bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxnets.errors import FlaxnetsError

from ..settings import Settings

Schedule = Callable[[Any], Any]


def _schedule(formula: Callable[[Any, Any], Any]) -> Schedule:
    """A function of the step (an int, or an array) from a formula of (`numpy` or `jax.numpy`, step)."""

    def value(step: Any) -> Any:
        result = formula(jnp if isinstance(step, jax.Array) else np, step)
        return float(result) if isinstance(step, int) else result

    return value


def count_steps(settings: Settings, examples: int) -> tuple[int, int]:
    """How many steps an epoch has, and the run; images left over at an epoch's end begin the next one.

    Raises:
      FlaxnetsError: there are fewer images than a batch takes.
    """
    epoch_steps = examples // settings.batch_size
    if not epoch_steps:
        raise FlaxnetsError(
            f'batch_size={settings.batch_size} is more than the {examples} images that there are; take less'
        )
    total = settings.epochs * epoch_steps
    return epoch_steps, min(total, settings.max_steps) if settings.max_steps else total


def learning_rate(settings: Settings, epoch_steps: int) -> Schedule:
    """The learning rate of a step, counted from 0.

    With N steps in all, of which the first W warm up, and the step t:

        t < W:       lr * t / W
        'cosine':    lr * (1 + cos(pi * (t - W) / (N - W))) / 2
        'step':      lr * step_rate^(epoch // step_epochs)
        'constant':  lr

    These are GluonCV's formulas (`gluoncv/utils/lr_scheduler.py`), PyTorch-Encoding's and the Res2Net
    authors' (`main.py`). MXNet's own `CosineScheduler`, with which the ResNeSts were trained, is the same
    but counts updates from 1.

    Args:
      settings: of the run.
      epoch_steps: steps of an epoch.

    Returns:
      A function of the step: an int gives a float, an array of NumPy float64, one of JAX (or traced) float32
      that is right to a few units in the last place, the small rates at the end included.
    """
    s = settings
    total, warmup = s.epochs * epoch_steps, s.warmup_epochs * epoch_steps
    levels = [s.lr * s.step_rate**k for k in range((s.epochs - 1) // s.step_epochs + 1)]

    @_schedule
    def rate(xp: Any, step: Any) -> Any:
        if s.schedule == 'cosine':
            # (1 + cos(x)) / 2 = sin((pi - x) / 2)^2, which loses no digits where it nears 0.
            left = xp.asarray(xp.clip(total - step, 0, total - warmup), float) / (total - warmup)
            high = s.lr * xp.square(xp.sin(0.5 * np.pi * left))
        elif s.schedule == 'step':
            epoch = xp.minimum(step // epoch_steps, s.epochs - 1)
            high = xp.asarray(levels)[epoch // s.step_epochs]
        else:
            high = xp.full(xp.shape(step), s.lr)
        return xp.where(step < warmup, s.lr * xp.asarray(step, float) / max(1, warmup), high)

    return rate


def ema_decay(settings: Settings) -> Schedule:
    """The decay of the averages at an update, `average = decay * average + (1 - decay) * new`.

    With `ema_warmup` it is `min(ema_decay, (1 + n) / (10 + n))` at the n-th update, counted from 1, as
    TensorFlow's `tf.train.ExponentialMovingAverage(num_updates=n)` and the package torch-ema have it: until
    the decay is reached the averages span about the last ninth of all updates, and the net of the start is
    soon forgotten. timm's `ModelEmaV3(use_warmup=True)` has the same purpose and another curve,
    1 - n^(-2/3), which reaches 0.9999 after a million updates and not after 90,000.

    Args:
      settings: of the run.

    Returns:
      A function of the number of the update: an int gives a float, an array float32.
    """

    @_schedule
    def decay(xp: Any, update: Any) -> Any:
        start = (1 + update) / (10 + update) if settings.ema_warmup else 1.0
        return xp.minimum(settings.ema_decay, start)

    return decay


def drop_block(settings: Settings, epoch_steps: int) -> Schedule:
    """DropBlock's rate at a step: `drop_block_rate * (epoch + 1) / epochs`, epochs counted from 0.

    This is what `DropBlockScheduler` of zhanghang1989/ResNeSt (`resnest/gluon/dropblock.py`) sets.

    Args:
      settings: of the run.
      epoch_steps: steps of an epoch.

    Returns:
      A function of the step, as `learning_rate` returns it.
    """
    s = settings

    @_schedule
    def rate(xp: Any, step: Any) -> Any:
        epoch = xp.minimum(step // epoch_steps, s.epochs - 1)
        return s.drop_block_rate * xp.asarray(epoch + 1, float) / s.epochs

    return rate

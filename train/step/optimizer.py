"""SGD with momentum as PyTorch and MXNet compute it, and which parameters decay or are frozen.

A parameter is known by its path, which mirrors its name in PyTorch: ('layer1', '0', 'downsample', '2',
'scale') is `layer1.0.downsample.2.weight`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..settings import Settings
from .schedule import Schedule, learning_rate

STAGES = ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'fc')
Path = tuple[str, ...]


def make_optimizer(
    settings: Settings, epoch_steps: int, params: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run.

    For a gradient g of a parameter w, with the momentum m that starts at 0:

        g = g + weight_decay * w        if w decays
        m = momentum * m + g
        w = w - lr * m                  or, with `nesterov`, w - lr * (g + momentum * m)

    as `torch.optim.SGD` and MXNet's `nag` do; `clip_norm` comes first, `lr` is the schedule's for the step
    times the stage's `layer_decay`. Frozen parameters get updates of 0 and keep no momentum.

    `update` takes the step, counted from 0, as `step=`; skipped steps count too.

    Args:
      settings: of the run.
      epoch_steps: steps of an epoch.
      params: of the net; shapes are enough.
    """
    s = settings
    parts = []
    if s.clip_norm:
        parts.append(optax.clip_by_global_norm(s.clip_norm))
    if s.weight_decay:
        parts.append(optax.add_decayed_weights(s.weight_decay, _by_path(lambda path: decays(s.decay, path))))
    if s.momentum:
        parts.append(optax.trace(s.momentum, s.nesterov))
    if s.layer_decay != 1:
        parts.append(_scale_by_path(lambda path: s.layer_decay ** (len(STAGES) - 1 - stage_of(path))))
    parts.append(_scale_by_learning_rate(learning_rate(s, epoch_steps)))
    optimizer = optax.with_extra_args_support(optax.chain(*parts))
    if not s.frozen_stages:
        return optimizer
    labels = _by_path(lambda path: 'frozen' if is_frozen(s, path) else 'trained')(params)
    kinds = {'trained': optimizer, 'frozen': optax.set_to_zero()}
    return optax.with_extra_args_support(optax.partition(kinds, labels))


def decays(kind: str, path: Path) -> bool:
    """Whether a parameter decays, by `Settings.decay`.

    'encoding' is PyTorch-Encoding's `'bn' in name or 'bias' in name` (`train_dist.py --no-bn-wd`), which
    misses the BatchNorms that have a number for a name.
    """
    if kind == 'kernels':
        return path[-1] == 'kernel'
    return kind == 'all' or not (path[-1] == 'bias' or any('bn' in part for part in path))


def stage_of(path: Path) -> int:
    """Which of `STAGES` a parameter belongs to: 0 for the stem, 5 for the classifier."""
    return STAGES.index(path[0]) if path[0] in STAGES else 0


def is_frozen(settings: Settings, path: Path) -> bool:
    """Whether a parameter or statistic is of a stage that `frozen_stages` freezes."""
    return stage_of(path) < settings.frozen_stages


def path_of(keys: Any) -> Path:
    """The path of a leaf, from the keys that `jax.tree_util` gives."""
    return tuple(key.key for key in keys)


def _by_path(what: Any) -> Any:
    """A function of a tree that gives `what(path)` in each leaf's place."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda keys, _: what(path_of(keys)), tree)


def _scale_by_path(factor: Any) -> optax.GradientTransformation:
    """Multiplies each update by `factor(path)`."""

    def scale(updates: Any, params: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, u: u * factor(path_of(keys)), updates)

    return optax.stateless(scale)


def _scale_by_learning_rate(rate: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of the step.

    Optax's own form counts the updates that it makes, and so falls behind at each step that is skipped.
    """

    def scale(updates: Any, state: Any, params: Any = None, *, step: Any, **others: Any) -> Any:
        factor = -rate(step)
        return jax.tree.map(lambda u: jnp.asarray(factor, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, scale)

"""The state that a training step changes, and how it starts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int32, Key

from flaxnets.nets.resnet import ResNet

Variables = dict[str, Any]

_VARIANCES = {
    'fan_out': jax.nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
    'fan_in': jax.nn.initializers.variance_scaling(2.0, 'fan_in', 'normal'),
    # MXNet's MSRAPrelu(): slope 0.25, the average of both fans.
    'prelu': jax.nn.initializers.variance_scaling(2 / (1 + 0.25**2), 'fan_avg', 'normal'),
}


@struct.dataclass
class TrainState:
    """All that a step changes; no array has a device axis.

    Attributes:
      step: updates done so far.
      params, batch_stats: the net's variables.
      opt_state: the optimizer's.
      ema: averages of params and batch_stats, {'params': ..., 'batch_stats': ...}; empty if none are kept.
      skipped: steps that changed nothing because a number was not finite.
    """

    step: Int32[Array, '']
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    skipped: Int32[Array, '']

    @property
    def variables(self) -> Variables:
        """What is evaluated and kept in the end: the averages, if there are any."""
        return dict(self.ema) or {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
    variables: Variables, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
      variables: the net's, {'params': ..., 'batch_stats': ...}.
      optimizer: whose state is made.
      ema: whether averages are kept.
    """
    params, batch_stats = variables['params'], variables['batch_stats']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats}) if ema else {},
        skipped=jnp.zeros((), jnp.int32),
    )


def initial_variables(model: ResNet, seed: int, conv_init: str = 'fan_out') -> Variables:
    """Random variables of a net, the kernels of its convolutions as `Settings.conv_init` says.

    With 'fan_out' the classifier starts as PyTorch's. With the others its kernel starts by the same rule as
    the convolutions', and all biases start at 0, as in Gluon.
    """

    def init(key: Key[Array, '']) -> Any:
        variables = model.init(key, jnp.zeros((1, 64, 64, model.in_chans)))
        if conv_init == 'fan_out':
            return variables
        leaves, structure = jax.tree_util.tree_flatten_with_path(variables['params'])
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        drawn = [_drawn(path, leaf, k, conv_init) for (path, leaf), k in zip(leaves, keys, strict=True)]
        return {**variables, 'params': jax.tree_util.tree_unflatten(structure, drawn)}

    return jax.jit(init)(jax.random.key(seed))


def _drawn(
    path: Any, leaf: Float[Array, '*shape'], key: Key[Array, ''], conv_init: str
) -> Float[Array, '*shape']:
    if path[-1].key == 'kernel':
        return _VARIANCES[conv_init](key, leaf.shape, leaf.dtype)
    return jnp.zeros_like(leaf) if path[-1].key == 'bias' else leaf

"""One training step, pure: what is trained, the loss, the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from flaxnets.resnet import ResNet

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count): what adds up over batches and devices
Step = Callable[['TrainState', Array, Array, Array], tuple['TrainState', Metrics]]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: updates done so far.
      params, batch_stats: the net's variables.
      opt_state: the optimizer's.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def create_state(variables: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from the net's variables."""
    params = variables['params']
    return TrainState(jnp.zeros((), jnp.int32), params, variables['batch_stats'], optimizer.init(params))


def make_train_step(
    model: ResNet, optimizer: optax.GradientTransformation, *, label_smoothing: float = 0.0
) -> Step:
    """The step of a net and an optimizer on one device, ready to be compiled.

    Args:
      model: the net.
      optimizer: its updates are added to the parameters.
      label_smoothing: share of each label's weight that is spread evenly over all classes.

    Returns:
      step(state, images [N, H, W, C], labels [N] int, key) -> (state, {'loss': ..., 'top1': ...}). The
      random numbers of dropout, drop path and DropBlock come from the key and the state's step, so that
      one key serves a whole run.
    """

    def step(state: TrainState, images: Array, labels: Array, key: Array) -> tuple[TrainState, Metrics]:
        def mean_loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
            logits, changed = model.apply(
                {'params': params, 'batch_stats': state.batch_stats},
                images,
                train=True,
                mutable=['batch_stats'],
                rngs={'dropout': jax.random.fold_in(key, state.step)},
            )
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, model.num_classes, dtype=logits.dtype), label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            return loss, (logits, changed['batch_stats'])

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = jnp.asarray(labels.shape[0])
        correct = (logits.argmax(-1) == labels).sum()
        metrics = {'loss': (loss * count, count), 'top1': (correct, count)}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step

"""Makes the training step (loss, gradient, update, a check that all is finite) and the evaluation step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Num

from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import ResNet

from ..settings import Settings
from .mixing import mix
from .optimizer import is_frozen, path_of
from .pixels import augment, normalise
from .schedule import drop_block, ema_decay
from .state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count): what adds up over steps
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: ResNet,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    preprocess: Preprocess,
    *,
    epoch_steps: int,
    axis_name: str | None = None,
) -> Step:
    """Makes the training step of one device, ready to be compiled, or mapped over `axis_name`.

    Args:
      model: the net, its `bn_span` chosen.
      optimizer: its updates are added to the parameters; it may ask for `step`, counted from 0.
      settings: of augmentation, loss and averages.
      preprocess: mean, std and channel order of the net's images.
      epoch_steps: steps of an epoch, for what changes by epoch.
      axis_name: mapped axis over whose devices gradients are averaged; None for a single device.

    Returns:
      step(state, {'image': uint8 [N, H, W, C], 'label': int [N]}) -> (state, metrics): 'loss' and 'top1'
      summed over the images of all devices, 'grad_norm' of the mean gradient, and 'non_finite', 1 for a
      step that found a number that is not finite and therefore changed nothing but its own count. Random
      numbers are a function of seed, step, and the image's place in the global batch; those of dropout,
      drop path and DropBlock of seed, step and device.

      Floating-point images are taken as they are, neither normalised nor changed.
    """
    task = _Task(model, settings, preprocess, epoch_steps, axis_name)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images, targets = task.prepare(batch, state.step)
        loss, logits, batch_stats, grads = task.gradient(state, images, targets)
        if axis_name:
            # Where BatchNorm's spans are smaller than the batch, statistics differ from device to device.
            loss, batch_stats, grads = lax.pmean((loss, batch_stats, grads), axis_name)
        # An average of equal numbers may differ from them by a rounding: what is frozen stays as it is.
        if model.freeze_bn:
            batch_stats = state.batch_stats
        elif settings.frozen_stages:
            batch_stats = jax.tree_util.tree_map_with_path(
                lambda keys, new, old: old if is_frozen(settings, path_of(keys)) else new,
                batch_stats,
                state.batch_stats,
            )
        norm = norm_of(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(norm_of(batch_stats))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema:
            new = {'params': params, 'batch_stats': batch_stats}
            # Updates are counted, and not steps: one that is skipped moves nothing.
            ema = moved(ema, new, ema_decay(settings)(state.step - state.skipped + 1))
        after = (params, batch_stats, opt_state, ema)
        before = (state.params, state.batch_stats, state.opt_state, state.ema)
        params, batch_stats, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), after, before
        )
        bad = 1 - finite.astype(jnp.int32)
        metrics = task.metrics(loss, logits, targets, finite, norm)
        metrics['non_finite'] = (bad, jnp.ones((), jnp.int32))
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.skipped + bad), metrics

    return step


def norm_of(tree: Any) -> Float[Array, '']:
    """The Euclidean norm of all numbers of a tree.

    Its vectors are taken as one: a program for each of a net's hundreds takes seconds to compile on a CPU.
    """
    leaves = jax.tree.leaves(tree)
    vectors = [leaf for leaf in leaves if leaf.ndim == 1]
    others = [leaf for leaf in leaves if leaf.ndim != 1]
    return optax.tree.norm([jnp.concatenate(vectors), *others] if vectors else others)


def moved(averages: Any, new: Any, decay: Any) -> Any:
    """`decay * averages + (1 - decay) * new`, in a form that leaves what is equal as it is, to the bit."""
    return jax.tree.map(lambda old, to: old + jnp.asarray(1 - decay, old.dtype) * (to - old), averages, new)


@dataclass(frozen=True)
class _Task:
    """The parts of a step that depend on the settings and the device; fields as in `make_train_step`."""

    model: ResNet
    settings: Settings
    preprocess: Preprocess
    epoch_steps: int
    axis_name: str | None

    def prepare(
        self, batch: Batch, step: Int[Array, '']
    ) -> tuple[Float[Array, 'n h w c'], Float[Array, 'n classes']]:
        """Augmented images and their targets."""
        s, images, labels = self.settings, batch['image'], batch['label']
        exact = jnp.promote_types(self.model.dtype, jnp.float32)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, self.model.num_classes, dtype=exact), s.label_smoothing
        )
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images, targets
        n, device = images.shape[0], self._device()
        image_key, group_key, _ = self._keys(step)
        places = device * n + jnp.arange(n) + jnp.zeros_like(labels)  # sharded as the batch is
        keys = jax.vmap(jax.random.fold_in, (None, 0))(image_key, places)
        images = augment(images, keys, self.preprocess, flip=s.flip, lighting=s.lighting, erasing=s.erasing)
        if s.mixup or s.cutmix:
            groups = max(1, n // s.mix_images) if s.mix_images else 1
            keys = jax.vmap(jax.random.fold_in, (None, 0))(group_key, device * groups + jnp.arange(groups))
            on = step < (s.epochs - s.mix_off_epochs) * self.epoch_steps
            images, targets = mix(images, targets, keys, mixup=s.mixup, cutmix=s.cutmix, on=on)
        return images, targets

    def gradient(
        self, state: TrainState, images: Float[Array, 'n h w c'], targets: Float[Array, 'n classes']
    ) -> tuple[Float[Array, ''], Float[Array, 'n classes'], Any, Any]:
        """Mean loss of the device's images, their logits, new statistics, gradient of the mean loss."""
        parts = self.settings.accumulation
        key = jax.random.fold_in(self._keys(state.step)[2], self._device())
        rate = drop_block(self.settings, self.epoch_steps)(state.step)
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        if parts == 1:
            (loss, (logits, stats)), grads = value_and_grad(
                state.params, state.batch_stats, images, targets, key, rate
            )
            return loss, logits, stats, grads

        def part(carry: Any, this: Any) -> Any:
            stats, total = carry
            (loss, (logits, stats)), grads = value_and_grad(state.params, stats, *this, rate)
            return (stats, jax.tree.map(jnp.add, total, (loss, grads))), logits

        def split(x: Float[Array, 'n ...']) -> Float[Array, 'parts part ...']:
            return x.reshape(parts, -1, *x.shape[1:])

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros((), targets.dtype), state.params))
        (stats, (loss, grads)), logits = lax.scan(
            part,
            (state.batch_stats, zeros),
            (split(images), split(targets), jax.random.split(key, parts)),
        )
        loss, grads = jax.tree.map(lambda x: x / parts, (loss, grads))
        return loss, logits.reshape(-1, logits.shape[-1]), stats, grads

    def _loss(
        self,
        params: Any,
        stats: Any,
        images: Float[Array, 'n h w c'],
        targets: Float[Array, 'n classes'],
        key: Key[Array, ''],
        rate: Float[Array, ''],
    ) -> tuple[Float[Array, ''], tuple[Float[Array, 'n classes'], Any]]:
        model = self.model.clone(drop_block_rate=rate) if self.settings.drop_block_rate else self.model
        logits, changed = model.apply(
            {'params': params, 'batch_stats': stats},
            images,
            train=True,
            mutable=['batch_stats'],
            rngs={'dropout': key},
        )
        logits = logits.astype(targets.dtype)
        return optax.softmax_cross_entropy(logits, targets).mean(), (logits, changed['batch_stats'])

    def metrics(
        self,
        loss: Float[Array, ''],
        logits: Float[Array, 'n classes'],
        targets: Float[Array, 'n classes'],
        finite: Bool[Array, ''],
        norm: Float[Array, ''],
    ) -> Metrics:
        """Sums over the images of all devices; a step that is not finite counts nothing."""
        correct = (logits.argmax(-1) == targets.argmax(-1)).sum(dtype=jnp.int32)
        count = jnp.asarray(logits.shape[0], jnp.int32)
        if self.axis_name:
            correct, count = lax.psum((correct, count), self.axis_name)
        count, steps = (jnp.where(finite, n, 0) for n in (count, jnp.ones((), jnp.int32)))
        return {
            'loss': (jnp.where(finite, loss, 0) * count.astype(loss.dtype), count),
            'top1': (jnp.where(finite, correct, 0), count),
            'grad_norm': (jnp.where(finite, norm, 0), steps),
        }

    def _device(self) -> Int[Array, ''] | int:
        return lax.axis_index(self.axis_name) if self.axis_name else 0

    def _keys(self, step: Int[Array, '']) -> Key[Array, 3]:
        """Random keys of a step: of the images, the mixing groups and the net; the same on all devices."""
        return jax.random.split(jax.random.fold_in(jax.random.key(self.settings.seed), step), 3)


def make_eval_step(
    model: ResNet,
    preprocess: Preprocess,
    *,
    axis_name: str | None = None,
    among: Sequence[int] | None = None,
    flip: bool = False,
    scores: bool = False,
) -> Callable[[Any, Batch], Batch]:
    """Makes the evaluation step: the results of each image of a batch, gathered from all devices.

    Several views of an image, crops ([N, views, H, W, C]) and with `flip` their mirror images, count as one
    by the average of their probabilities.

    Args:
      model: the net.
      preprocess: mean, std and channel order of its images.
      axis_name: mapped axis of the devices; None for a single one.
      among: outputs among which the net is judged, every label one of them; None for all.
      flip: average with the mirror image.
      scores: give the logarithms of all probabilities too.

    Returns:
      evaluate(variables, {'image': uint8 [N, H, W, C], 'label': int [N], 'mask': bool [N]}) -> {'label',
      'mask', 'prediction': int, 'rank': int, 'loss': float, 'confidence': float, 'top': int [N, 5]}, each of
      the length of the global batch. The rank of the true label is 0 for a correct top-1; among equal logits
      the lower class comes first, as in `argmax`. Where a logit is not finite the prediction is -1 and the
      rank the largest int32. The confidence is the largest probability, 'top' the outputs of the five largest
      (fewer if there are fewer). With `scores` also 'scores': float [N, outputs judged among].
    """

    chosen = None if among is None else np.array(sorted(among))

    def seen(variables: Any, images: Num[Array, 'n *views h w c']) -> Float[Array, 'n outputs']:
        """The logits of images, or the logarithms of the average probabilities of their views."""
        views = images.reshape(-1, *images.shape[-3:])
        views = jnp.concatenate([views, views[:, :, ::-1]]) if flip else views
        logits: Any = model.apply(variables, normalise(views, preprocess), train=False)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        logits = logits if chosen is None else logits[:, chosen]
        if len(views) == len(images):
            return logits
        logs = jax.nn.log_softmax(logits).reshape(1 + flip, len(images), -1, logits.shape[-1])
        return jax.nn.logsumexp(logs, axis=(0, 2)) - jnp.log(logs.shape[0] * logs.shape[2])

    def evaluate(variables: Any, batch: Batch) -> Batch:
        logits = seen(variables, batch['image'])
        label = batch['label'] if chosen is None else jnp.searchsorted(chosen, batch['label'])
        own = jnp.take_along_axis(logits, label[:, None], axis=1)
        before = (logits > own) | ((logits == own) & (jnp.arange(logits.shape[1]) < label[:, None]))
        finite = jnp.isfinite(logits).all(-1)  # comparisons with NaN are false: every label would be first
        best = logits.argmax(-1)
        top = lax.top_k(logits, min(5, logits.shape[1]))[1]
        found = {
            'label': batch['label'],
            'mask': batch['mask'],
            'prediction': jnp.where(finite, best if chosen is None else jnp.asarray(chosen)[best], -1),
            'rank': jnp.where(finite, before.sum(-1), jnp.iinfo(jnp.int32).max),
            'loss': optax.softmax_cross_entropy_with_integer_labels(logits, label),
            'confidence': jax.nn.softmax(logits).max(-1),
            'top': top if chosen is None else jnp.asarray(chosen)[top],
        }
        if scores:
            found['scores'] = jax.nn.log_softmax(logits)
        return lax.all_gather(found, axis_name, tiled=True) if axis_name else found

    return evaluate

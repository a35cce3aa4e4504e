"""What people do to checkpoints: average them, take the head off, change their dtype, fold BatchNorm.

Each is a function on canonical states (timm's names, PyTorch's order of axes, NumPy arrays); below them are
the same for a `Checkpoint`, and changes to its classes and images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from flaxnets.checks import all_finite
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.nets.layers import BN_EPSILON
from flaxnets.store import weights

from .checkpoint import Checkpoint
from .names.tree import COUNTER, State, is_floating

DTYPES = ('float32', 'float16', 'bfloat16')


def average(states: Sequence[State], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The mean of several checkpoints of one net, taken in float64 and given in the first one's dtypes.

    Args:
      states: at least two, with the same names and shapes.
      names: what to call each of them in an error.

    Returns:
      The mean of every floating-point tensor; counters are the first checkpoint's.

    Raises:
      FlaxnetsError: there are fewer than two states.
      CheckpointError: names or shapes differ; the message lists all of them.
    """
    if len(states) < 2:
        raise FlaxnetsError(f'averaging takes at least two checkpoints, got {len(states)}')
    first = states[0]
    problems = []
    for state, name in zip(states[1:], names[1:], strict=True):
        problems += [f'{key} is only in {names[0]}' for key in first.keys() - state.keys()]
        problems += [f'{key} is only in {name}' for key in state.keys() - first.keys()]
        problems += [
            f'{key} has shape {first[key].shape} in {names[0]} and {state[key].shape} in {name}'
            for key in first.keys() & state.keys()
            if first[key].shape != state[key].shape
        ]
    if problems:
        raise CheckpointError('cannot average: ' + '; '.join(sorted(problems)))
    mean = {}
    for key, tensor in first.items():
        if is_floating(tensor):
            total = np.zeros(tensor.shape, np.float64)
            for state in states:
                total += state[key].astype(np.float64)
            tensor = (total / len(states)).astype(tensor.dtype)
        mean[key] = tensor
    return mean


def drop_head(state: State) -> dict[str, np.ndarray]:
    """The state without its classifier: weights of a net with num_classes=0.

    Raises:
      CheckpointError: there is no classifier.
    """
    rest = {key: tensor for key, tensor in state.items() if not key.startswith('fc.')}
    if len(rest) == len(state):
        raise CheckpointError('there is no classifier (fc.weight, fc.bias) to drop')
    return rest


def cast(state: State, dtype: str) -> dict[str, np.ndarray]:
    """Casts every floating-point tensor to a dtype, except BatchNorm's running statistics, to float32.

    Raises:
      FlaxnetsError: `dtype` is not float32, float16 or bfloat16.
      CheckpointError: tensors have values that are NaN, infinite or too large for the dtype; the message
        names them all.
    """
    if dtype not in DTYPES:
        raise FlaxnetsError(f'dtype {dtype!r} is not one of {", ".join(DTYPES)}')
    out, problems = {}, []
    for key, tensor in state.items():
        if is_floating(tensor):
            statistics = key.endswith(('.running_mean', '.running_var'))
            before = tensor
            with np.errstate(over='ignore'):  # reported below
                tensor = tensor.astype(np.dtype('float32' if statistics else dtype))
            if not all_finite(tensor):
                fault = f'is too large for {tensor.dtype}' if all_finite(before) else 'is not finite'
                problems.append(f'{key} {fault}')
        out[key] = tensor
    if problems:
        raise CheckpointError(f'cannot cast to {dtype}: {"; ".join(problems)}')
    return out


def fold_batch_norm(state: State) -> dict[str, np.ndarray]:
    """Folds every BatchNorm into the convolution before it, for inference.

    conv(x) * a + b, with a = weight / sqrt(running_var + eps) and b = bias - running_mean * a, is a
    convolution with the kernel times a and the bias b. Computed in float64, kept in the kernel's dtype.

    Returns:
      The state of a net with `folded=True`: convolutions with a bias, no BatchNorm.
    """
    out = {key: tensor for key, tensor in state.items() if not key.endswith(COUNTER)}
    norms = [key.removesuffix('.running_var') for key in state if key.endswith('.running_var')]
    for norm in norms:
        conv = convolution_of(norm, state)
        kernel = out[f'{conv}.weight']
        scale, shift, mean, var = (
            out.pop(f'{norm}.{leaf}').astype(np.float64)
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        )
        factor = scale / np.sqrt(var + BN_EPSILON)
        before = out.get(f'{conv}.bias')  # the first layer of a split attention's gate has one already
        offset = -mean if before is None else before.astype(np.float64) - mean
        out[f'{conv}.weight'] = (kernel.astype(np.float64) * factor[:, None, None, None]).astype(kernel.dtype)
        out[f'{conv}.bias'] = (shift + offset * factor).astype(kernel.dtype)
    return out


def convolution_of(norm: str, state: Mapping[str, object]) -> str:
    """The convolution whose result a BatchNorm normalises: `layer1.0.bn2` -> `layer1.0.conv2`."""
    parent, _, last = norm.rpartition('.')
    prefix = f'{parent}.' if parent else ''
    if last.isdigit():
        if parent.endswith('bns'):  # Res2Net: bns.1 follows convs.1
            return f'{parent.removesuffix("bns")}convs.{last}'
        return f'{prefix}{int(last) - 1}'  # deep stem and shortcut: conv1.1 follows conv1.0
    if f'{prefix}fc1.weight' in state and f'{prefix}conv.weight' in state:  # split attention
        return prefix + {'bn0': 'conv', 'bn1': 'fc1'}[last]
    conv = prefix + last.replace('bn', 'conv')
    return conv if f'{conv}.weight' in state else f'{conv}.6'  # the stem's norm follows a deep stem's end


# Functions on checkpoints.


def averaged(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of several checkpoints of one net (`average`).

    Raises:
      FlaxnetsError: there are fewer than two checkpoints.
      CheckpointError: they are of different nets or classes, or their tensors do not match.
    """
    files = [checkpoint.source.file or '?' for checkpoint in checkpoints]
    nets = {checkpoint.config.name for checkpoint in checkpoints}
    if len(nets) > 1:
        raise CheckpointError(f'cannot average different nets: {", ".join(sorted(nets))}')
    configs = [checkpoint.config for checkpoint in checkpoints]
    named = {config.classes for config in configs} - {None}
    orders = {config.class_order for config in configs} - {None}
    if len(named) > 1 or (len(orders) > 1 and not named):
        raise CheckpointError('cannot average nets of different classes, or of the same in different orders')
    state = average([checkpoint.state for checkpoint in checkpoints], files)
    first = checkpoints[0]
    images = [str(config.preprocess) for config in configs]
    notes = [
        f'images: {file} expects {said}'
        for file, said in zip(files, images, strict=True)
        if said != images[0]
    ]
    if notes:
        notes.insert(0, f'images: {images[0]} (as of {files[0]})')
    source = weights.Source(
        layout=first.source.layout,
        notes=(f'the mean of {", ".join(files)}', *notes),
        num_batches_tracked=first.source.num_batches_tracked,
    )
    classes = next(iter(named), None)
    order = None if classes else next(iter(orders), None)
    config = replace(first.config, weights=None, classes=classes, class_order=order)
    return Checkpoint(config, state, source, 'the average')


def without_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its classifier."""
    config = replace(checkpoint.config, num_classes=0, classes=None, class_order=None)
    state = drop_head(checkpoint.state)
    return replace(checkpoint, config=config, state=state, source=checkpoint.noted('dropped the head'))


def with_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> Checkpoint:
    """The checkpoint with other class names.

    Args:
      checkpoint: of a net with a classifier.
      classes: one name for each output, in order.

    Raises:
      FlaxnetsError: there are more or fewer names than outputs.
    """
    outputs = checkpoint.config.num_classes
    if len(classes) != outputs:
        raise FlaxnetsError(f'{checkpoint.where}: {len(classes)} names are given for its {outputs} outputs')
    config = replace(checkpoint.config, classes=tuple(classes), class_order=None)
    return replace(checkpoint, config=config, source=checkpoint.noted('named the classes as given'))


def with_images(checkpoint: Checkpoint, changes: Sequence[str]) -> Checkpoint:
    """The checkpoint with changes to how its images are prepared.

    Args:
      checkpoint: any.
      changes: 'field=value' each, as `flaxnets.Preprocess.changed` takes them.

    Raises:
      FlaxnetsError: there is no such field, or it cannot have this value; or mean or std are for another
        number of channels.
    """
    before = checkpoint.config.preprocess
    config = replace(checkpoint.config, preprocess=before.changed(changes))
    preprocess = config.preprocess
    if any(change.startswith(('mean=', 'std=')) for change in changes):
        preprocess.channel_values(config.in_chans)
    notes = [note for note in checkpoint.source.notes if not note.startswith('images: ')]
    notes += [f'images: {note}' for note in before.overruled]
    source = replace(checkpoint.source, notes=(*notes, f'images: {preprocess} (as asked for)'))
    return replace(checkpoint, config=config, source=source)


def as_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint with its parameters in another dtype (`cast`)."""
    state = cast(checkpoint.state, dtype)
    return replace(checkpoint, state=state, source=checkpoint.noted(f'cast to {dtype}'))


def folded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every BatchNorm folded into its convolution, for inference (`fold_batch_norm`).

    Raises:
      FlaxnetsError: it is folded already.
    """
    if checkpoint.config.folded:
        raise FlaxnetsError(f'{checkpoint.where}: BatchNorm is folded already')
    state = fold_batch_norm(checkpoint.state)
    source = replace(checkpoint.noted('folded BatchNorm'), num_batches_tracked=None)
    config = replace(checkpoint.config, folded=True)
    return replace(checkpoint, config=config, state=state, source=source)

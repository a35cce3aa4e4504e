"""From a PyTorch checkpoint to a directory of weights, and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.pth import read_state_dict
from convert.pth_write import write_pth
from convert.tree import COUNTER, State, to_state, to_variables
from flaxnets import weights, zoo
from flaxnets.config import Config, Weights
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.resnet import build


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the nets take it.

    Attributes:
      config: the net, and the published file if this is one.
      variables: {'params': ..., 'batch_stats': ...}: views of the file, dtypes kept.
      source: file name, hash, BatchNorm's step counters.
    """

    config: Config
    variables: weights.Variables
    source: weights.Source


def read_checkpoint(path: str | os.PathLike[str], model: str | None) -> Checkpoint:
    """Reads a `.pth` file of a net that the zoo knows.

    The number of classes and of input channels are those of the file's own tensors, so that fine-tuned
    weights need no further word.

    Args:
      path: a file that `torch.save` wrote, zip or legacy.
      model: the net's name, or None to go by the name of a published file.

    Raises:
      FlaxnetsError: unknown name, unreadable file, or tensors that do not fit the net, all of them named.
    """
    path = Path(path)
    if model is None:
        published = zoo.find_file(path.name)
        if published is None:
            raise CheckpointError(f'{path}: which net is it? Name it (--model; `python -m flaxnets list`)')
        model = published.name
    arch_name, named = zoo.resolve(model)
    state = read_state_dict(path)
    digest = _sha256(path)
    _check_download(path, digest)
    config = Config(
        arch_name,
        zoo.ARCHS[arch_name],
        num_classes=_length(state, 'fc.weight', axis=0, default=1000 if 'fc.bias' in state else 0),
        in_chans=_length(state, _first_weight(arch_name), axis=1, default=3),
    )
    published = _published(arch_name, digest)
    row = published or named
    if row:
        config = replace(config, weights=published, preprocess=row.preprocess)
    net = build(config.arch, config.num_classes, config.in_chans)
    try:
        variables = to_variables(state, net)
    except CheckpointError as error:
        raise CheckpointError(f'{path} as {arch_name}: {error}') from None
    source = weights.Source(path.name, digest, _counters(state))
    return Checkpoint(config, variables, source)


def convert(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    model: str | None = None,
    *,
    overwrite: bool = False,
) -> Checkpoint:
    """Converts a `.pth` file to a directory that `flaxnets.load` opens, written whole or not at all.

    Raises:
      FlaxnetsError: as of `read_checkpoint` and `flaxnets.weights.save`.
    """
    weights.check_target(directory, overwrite)
    checkpoint = read_checkpoint(path, model)
    weights.save(directory, checkpoint.variables, checkpoint.config, checkpoint.source, overwrite=overwrite)
    return checkpoint


def export(
    directory: str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, np.ndarray]:
    """Writes a directory of weights as a `.pth` file with timm's names, which any torch loads.

    Tensors that came from a file go back bit by bit, BatchNorm's step counters included.

    Returns:
      What was written: PyTorch's names and tensors, in PyTorch's order.

    Raises:
      FlaxnetsError: `directory` is damaged or holds no weights, or `path` exists.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f'{path} exists; choose another file or overwrite it (--force)')
    config, source = weights.read_config(directory)
    net = build(config.arch, config.num_classes, config.in_chans)
    state = to_state(weights.read_variables(directory), net)
    state = add_counters(state, source.num_batches_tracked)
    write_pth(path, state)
    return state


def add_counters(state: State, counters: Mapping[str, int] | None) -> dict[str, np.ndarray]:
    """The step counter of each BatchNorm put back behind its running variance, where PyTorch lists it."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        out[name] = tensor
        layer, _, leaf = name.rpartition('.')
        if leaf == 'running_var' and counters is not None and layer in counters:
            out[layer + COUNTER] = np.array(counters[layer], np.int64)
    return out


def _counters(state: State) -> dict[str, int] | None:
    found = {name.removesuffix(COUNTER): t for name, t in state.items() if name.endswith(COUNTER)}
    for layer, tensor in found.items():
        if tensor.shape != () or tensor.dtype.kind not in 'iu':
            raise CheckpointError(
                f'{layer}{COUNTER}: must be one whole number, got {tensor.dtype} {tensor.shape}'
            )
    return {layer: int(tensor) for layer, tensor in found.items()} or None


def _published(arch_name: str, digest: str) -> Weights | None:
    """The published file with this hash."""
    for row in zoo.weights_of(arch_name):
        if row.sha256 and digest.startswith(row.sha256):
            return row
    return None


def _check_download(path: Path, digest: str) -> None:
    published = zoo.find_file(path.name)
    if published and published.sha256 and not digest.startswith(published.sha256):
        raise CheckpointError(
            f'{path}: bears the name of published weights, but its SHA-256 starts with '
            f'{digest[: len(published.sha256)]}, not {published.sha256}: a damaged or altered download; '
            'fetch it again, or rename it if it is your own'
        )


def _sha256(path: Path) -> str:
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise FlaxnetsError(f'{path}: {error.strerror}') from error


def _first_weight(arch_name: str) -> str:
    return 'conv1.0.weight' if zoo.ARCHS[arch_name].deep_stem else 'conv1.weight'


def _length(state: State, name: str, axis: int, default: int) -> int:
    """A size that the tensor `name` decides; `default` where it is missing or has no such axis."""
    tensor = state.get(name)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]

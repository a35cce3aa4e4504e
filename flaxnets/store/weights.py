"""Reads and writes directories of weights, which describe themselves and are checked when read.

    DIR/config.json            the net and how its images are prepared (`flaxnets.Config`)
    DIR/certificate.json       where the weights came from, the versions that wrote them, what a
                               verification measured, shape, dtype and SHA-256 of every array
    DIR/variables.safetensors  the arrays, by names such as 'params/layer1/0/conv1/kernel'

A safetensors file has no checksums. The certificate has one for every array, and each is checked when the
arrays are read. The first versions wrote an Orbax folder `variables/` in place of the file; it can still be
read.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..errors import CheckpointError, FlaxnetsError
from ..nets.resnet import ResNet, abstract_variables, initial_head
from ..version import versions
from ..words import some
from ..zoo.records import Config, config_from_json, to_json
from .digest import Description, describe_all
from .files import check_space, folder_written_whole
from .remote import StoreError, StorePath, is_remote, place, staged_as
from .safetensors_file import check_tensors, read_safetensors, write_into

FORMAT = 'flaxnets'
FORMAT_VERSION = 1
ARRAYS = 'variables.safetensors'
EARLIER_ARRAYS = 'variables'  # a folder
METADATA = {'format': 'flax'}  # as transformers marks files of Flax's names and layouts

Variables = dict[str, Any]  # {'params': {...}, 'batch_stats': {...}}, nested by layer, arrays at the leaves


@dataclass(frozen=True)
class Source:
    """Where a directory's weights came from.

    Attributes:
      file: name of the file they were converted from, without its folder; None if they were made here.
      sha256: SHA-256 of that file.
      layout: the publisher whose tensor names the file had (`convert.names.layouts`).
      notes: what the conversion chose, stripped, renamed or computed, in words.
      num_batches_tracked: the step counters that torch keeps in every BatchNorm, by layer, so that they
        can be written back; None if the file had none.
    """

    file: str | None = None
    sha256: str | None = None
    layout: str | None = None
    notes: tuple[str, ...] = ()
    num_batches_tracked: dict[str, int] | None = None


def save(
    directory: str | os.PathLike[str],
    variables: Mapping[str, Any],
    config: Config,
    source: Source = Source(),
    *,
    verification: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path | StorePath:
    """Writes a directory of weights.

    Args:
      directory: a path that does not exist yet, or an earlier directory of weights if `overwrite` is True.
        May be in a bucket (`gs://`), where files are replaced one by one.
      variables: {'params': ..., 'batch_stats': ...} with NumPy or JAX arrays.
      config: describes them.
      source: where they came from.
      verification: what a comparison with PyTorch's net measured, for the certificate.
      overwrite: replace an earlier directory of weights once the new one is complete.

    Returns:
      The directory, as an absolute path.

    Raises:
      CheckpointError: the directory exists, or cannot be written.
    """
    check_target(directory, overwrite)
    with staged_as(directory) as here, folder_written_whole(here) as work:
        arrays = _named(variables)
        check_tensors(str(directory), arrays, METADATA)
        check_space(work, sum(array.nbytes for array in arrays.values()))
        with (work / ARRAYS).open('xb') as file:
            described = write_into(file, arrays, METADATA)
            file.flush()
            os.fsync(file.fileno())
        write_json(work / 'certificate.json', certificate(source, described, verification))
        header = {'format': FORMAT, 'format_version': FORMAT_VERSION, 'config': to_json(config)}
        write_json(work / 'config.json', header)
    return StorePath(directory) if is_remote(directory) else here.absolute()


def check_target(directory: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks, before long work, that `save` would write to this directory.

    Raises:
      CheckpointError: it exists, and `overwrite` is False or it is not a directory of weights.
    """
    directory = place(directory)
    if not directory.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f'{directory} exists; choose another directory or overwrite it (overwrite=True)'
        )
    if not is_directory(directory):
        raise CheckpointError(f'{directory} is not a directory of weights, so it is not overwritten')


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory of weights that flaxnets wrote. Damage is not looked for."""
    try:
        return _read_json(place(path) / 'config.json').get('format') == FORMAT
    except (CheckpointError, AttributeError):
        return False


def certificate(
    source: Source, arrays: Mapping[str, Description], verification: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of a certificate. `arrays` has the description (`flaxnets.store.digest`) of each array."""
    return {
        'source': dataclasses.asdict(source),
        'versions': versions('jax', 'flax'),
        'verification': verification,
        'arrays': arrays,
    }


def read_config(directory: str | os.PathLike[str]) -> Config:
    """Describes the net of a directory of weights without reading the arrays.

    Raises:
      CheckpointError: not a directory of weights, or written by a later flaxnets.
    """
    path = place(directory) / 'config.json'
    header = _read_json(path)
    if not isinstance(header, dict) or header.get('format') != FORMAT:
        raise CheckpointError(f'{path}: not a directory of weights written by flaxnets')
    if header.get('format_version') != FORMAT_VERSION:
        raise CheckpointError(
            f'{path}: format version {header.get("format_version")!r}, this flaxnets reads '
            f'{FORMAT_VERSION}; update flaxnets'
        )
    try:
        return config_from_json(header['config'])
    except (FlaxnetsError, KeyError, TypeError) as error:
        raise CheckpointError(f'{path}: {error}') from error


def read_source(directory: str | os.PathLike[str]) -> Source:
    """Where the weights of a directory came from.

    Raises:
      CheckpointError: there is no certificate, or it is damaged.
    """
    path = Path(directory) / 'certificate.json'
    try:
        source = dict(_read_json(path)['source'])
        counters = source['num_batches_tracked']
        if counters is not None:
            counters = {str(layer): operator.index(number) for layer, number in counters.items()}
        return Source(**{**source, 'notes': tuple(source['notes']), 'num_batches_tracked': counters})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: not a certificate of flaxnets: {error!r}') from error


def read_variables(directory: str | os.PathLike[str]) -> Variables:
    """Reads the arrays of a directory of weights and checks every digest.

    Returns:
      {'params': ..., 'batch_stats': ...}, with read-only views of the file.

    Raises:
      CheckpointError: a file is missing, or arrays are not those that were written (the message names them).
    """
    directory = Path(directory)
    path, file = directory / 'certificate.json', directory / ARRAYS
    if not path.exists() and (directory / 'arrays.json').exists():
        raise CheckpointError(
            f'{directory}: written by a flaxnets that had no certificates yet, and no longer read; convert '
            'the weights again'
        )
    try:
        expected = dict(_read_json(path)['arrays'])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'{path}: not a certificate of flaxnets: {error!r}') from error
    if not file.exists() and (directory / EARLIER_ARRAYS).is_dir():
        from .arrays import read_arrays  # here, as Orbax takes a second to import

        arrays = read_arrays(directory.absolute(), expected, EARLIER_ARRAYS)
    else:
        arrays, _ = read_safetensors(file)
        found = describe_all(arrays)
        wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
        if wrong:
            raise CheckpointError(
                f'{file}: damaged, or not the file that {path.name} describes: {some(wrong)}; '
                'convert the weights again'
            )
    variables: Variables = traverse_util.unflatten_dict(arrays, sep='/')
    return variables


def merge(variables: Variables, model: ResNet, *, seed: int = 0) -> Variables:
    """Fits weights to a net of the same architecture, which may have another head or other inputs.

    - If the net has another number of classes (or of pooled features), it gets a new random classifier.
    - If the weights take 3 input channels and the net another number, the first kernel is adapted by timm's
      rule: one channel takes the sum over RGB; n channels take R, G, B in turn, scaled by 3/n.
    - Arrays that the net does not use, such as those of a classifier, are left out.
    - Parameters are converted to `model.param_dtype`, running statistics to float32.

    Args:
      variables: arrays of a net of `model.arch`.
      model: the net to fit.
      seed: seed of the random numbers of a new classifier.

    Returns:
      The variables of `model`, as JAX arrays.

    Raises:
      CheckpointError: arrays are missing or have another shape (the message names them).
    """
    have, wanted = _named(variables), _named(abstract_variables(model))
    head = [name for name in wanted if name.startswith('params/fc/')]
    if any(name not in have or have[name].shape != wanted[name].shape for name in head):
        have |= {f'params/fc/{leaf}': array for leaf, array in initial_head(model, seed).items()}
    merged: dict[str, Any] = {}
    problems = []
    for name, want in wanted.items():
        array: Any = have.get(name)
        if name == _first_kernel(model) and array is not None and array.shape[2] != want.shape[2]:
            array = adapt_input_kernel(array, model.in_chans)
        if array is None:
            problems.append(f'{name} is missing')
        elif array.shape != want.shape:
            problems.append(f'{name} has shape {array.shape}, the net {want.shape}')
        else:
            merged[name] = jnp.array(array, want.dtype)
    if problems:
        raise CheckpointError(f'the weights do not fit the net: {"; ".join(problems)}')
    fitted: Variables = traverse_util.unflatten_dict(merged, sep='/')
    return fitted


def _first_kernel(model: ResNet) -> str:
    return 'params/conv1/0/kernel' if model.arch.deep_stem else 'params/conv1/kernel'


def adapt_input_kernel(kernel: np.ndarray, in_chans: int) -> np.ndarray:
    """Adapts a net's first kernel to another number of input channels, as timm's `adapt_input_conv`.

    Args:
      kernel: [H, W, 3, O].
      in_chans: the new number of input channels.

    Returns:
      [H, W, in_chans, O], of the same dtype.

    Raises:
      CheckpointError: the kernel is not one for RGB images.
    """
    if kernel.shape[2] != 3:
        raise CheckpointError(
            f'the weights take images of {kernel.shape[2]} channels; only weights for 3 channels can be '
            f'adapted to in_chans={in_chans}'
        )
    wide = kernel.astype(np.float32)
    if in_chans == 1:
        return wide.sum(2, keepdims=True).astype(kernel.dtype)
    repeats = -(-in_chans // 3)
    wide = np.tile(wide, (1, 1, repeats, 1))[:, :, :in_chans] * (3 / in_chans)
    return wide.astype(kernel.dtype)


def _named(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by names such as 'params/conv1/kernel', sorted by name."""
    return dict(sorted(traverse_util.flatten_dict(dict(tree), sep='/').items()))


def as_json(data: Any) -> bytes:
    """JSON with line breaks, which people can read too."""
    return (json.dumps(data, indent=1) + '\n').encode()


def write_json(path: Path, data: Any) -> None:
    """Writes data as JSON, and waits until it is on the disk."""
    with path.open('wb') as file:
        file.write(as_json(data))
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path | StorePath) -> Any:
    try:
        return json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise CheckpointError(
            f'{path}: no such file; not a directory of weights written by flaxnets'
        ) from None
    except StoreError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error

"""Writes nets as files for other programs: `flaxnets.export` and the command `flaxnets export`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ..api import load_with_config
from ..errors import FlaxnetsError
from ..store.files import written_whole
from ..store.remote import StorePath, check_free, is_remote, staged_as
from .description import BATCH, Description, Size, describe
from .onnx_file import check_onnx, write_onnx
from .stablehlo import stablehlo

STABLEHLO, ONNX = '.stablehlo', '.onnx'
DTYPES = ('float32', 'bfloat16')
PYTORCH = ('.pth', '.pt', '.ckpt', '.bin', '.safetensors')


@dataclass(frozen=True)
class Exported:
    """The result of `export`: the files written, and what is in them.

    Attributes:
      files: paths of all files; the first is the one to open.
      size: size of all files together, in bytes.
      description: describes the net.
      input_shape: shape of the images; a dimension that may be any number has a name in its place.
      outputs: number of outputs for each image.
    """

    files: tuple[str, ...]
    size: int
    description: Description
    input_shape: tuple[int | str, ...]
    outputs: int

    def as_json(self) -> dict[str, Any]:
        return {
            'files': list(self.files),
            'bytes': self.size,
            'architecture': self.description.config.name,
            'input': list(self.input_shape),
            'output': [BATCH, self.outputs],
            'notes': list(self.description.notes),
        }

    def __str__(self) -> str:
        said = self.description
        what = said.config.weights.name if said.config.weights else said.config.name
        shape = ', '.join(map(str, self.input_shape))
        return (
            f'{" and ".join(self.files)} ({self.size / 1e6:.1f} MB): {what}, images [{shape}] to '
            f'{said.output} [{BATCH}, {self.outputs}]'
        )


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: Size = None,
    model: str | None = None,
    dtype: str = 'float32',
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a net with its weights as a file that other programs run without flaxnets.

    `net.stablehlo` is for JAX on CPUs, CUDA and TPUs (`flaxnets.exporting.stablehlo` says how to open it);
    its images are [N, H, W, C]. `net.onnx` is for ONNX Runtime, OpenVINO, TensorRT and browsers; its images
    are [N, C, H, W]. Both take any number of float32 images, prepared as the file says, and give float32
    logits (features, if the weights have no classifier).

    Args:
      source: anything that `load` opens.
      out: file to write, ending in `.stablehlo` or `.onnx`; may be in a bucket (`gs://`).
      size: size of the images in pixels: one side of a square, (height, width), 'free' for any, or None for
        the size that the weights expect.
      model: as in `load`.
      dtype: type of a StableHLO program's weights and computation: 'float32' or 'bfloat16'.
      classes: names of the outputs, in place of those that the weights have.
      overwrite: replace a file that exists.

    Returns:
      The paths and a description of what was written. Weights beyond 1.9 GB are in a second file beside an
      ONNX file.

    Raises:
      FlaxnetsError: another suffix, bad values, no such weights, `out` exists or cannot be written.

    Examples:
      >>> made = flaxnets.export('weights/resnest50d', 'resnest50d.onnx', size='free')
      >>> made.input_shape, made.outputs
      (('batch', 3, 'height', 'width'), 1000)
    """
    kind = _kind(out, dtype)
    check_free(out, overwrite)
    width = jnp.dtype(dtype)
    config, net, variables = load_with_config(source, model=model, dtype=width, param_dtype=width)
    description = describe(config, size, classes)
    sides = (description.height, description.width)
    outputs = net.num_classes or net.num_features
    with staged_as(out) as path:
        if kind == ONNX:
            files = write_onnx(path, net, variables, description)
            shape: tuple[int | str, ...] = (BATCH, net.in_chans, *sides)
        else:
            content = stablehlo(net, variables, description)
            with written_whole(path) as file:
                file.write(content)
            files, shape = (path,), (BATCH, *sides, net.in_chans)
        written = sum(file.stat().st_size for file in files)
    beside = StorePath(out).parent if is_remote(out) else path.parent
    names = tuple(os.fspath(beside / file.name) for file in files)
    return Exported(names, written, description, shape, outputs)


def _kind(out: str | os.PathLike[str], dtype: str) -> str:
    """The suffix of `out`, after checking that it is known and can be written with this dtype."""
    suffix = Path(out).suffix.lower()
    if suffix not in (STABLEHLO, ONNX):
        other = f' (python -m convert writes {suffix} files)' if suffix in PYTORCH else ''
        raise FlaxnetsError(f'{os.fspath(out)}: must end in {STABLEHLO} or {ONNX}{other}')
    if dtype not in DTYPES:
        raise FlaxnetsError(f'dtype={dtype!r} is not one of {", ".join(DTYPES)}')
    if suffix == ONNX:
        if dtype != 'float32':
            raise FlaxnetsError(
                f'dtype={dtype!r}: ONNX files are written in float32, since runtimes have no convolutions '
                f'in {dtype} on CPUs; a {STABLEHLO} file takes it'
            )
        check_onnx()
    return suffix

"""Writes a net as a StableHLO program with its weights inside, which `jax.export` opens without flaxnets.

The file is a header of JSON, an empty line, and what `jax.export` serialised:

    from jax import export
    header, _, program = open('net.stablehlo', 'rb').read().partition(b'\\n\\n')
    net = export.deserialize(bytearray(program))  # net.call(images) gives logits

The header has one line for each entry, and no empty line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from ..errors import FlaxnetsError
from ..nets.resnet import ResNet
from ..store.weights import Variables
from ..version import versions
from .description import BATCH, Description

FORMAT = 'flaxnets StableHLO 1'
PLATFORMS = ('cpu', 'cuda', 'tpu')
OPEN = (
    'from jax import export',
    "header, _, program = open(FILE, 'rb').read().partition(b'\\n\\n')",
    'net = export.deserialize(bytearray(program))  # then net.call(images)',
)
MAX_BYTES = 2_000_000_000  # the serialised program holds sizes as 31-bit numbers


def stablehlo(model: ResNet, variables: Variables, description: Description) -> bytes:
    """The content of a StableHLO file.

    The program runs on CPUs, CUDA and TPUs. It takes float32 images [N, height, width, C], prepared as the
    header says, and gives float32 [N, num_classes], whatever dtype `model` computes in.

    Raises:
      FlaxnetsError: the weights are larger than the format allows.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if size > MAX_BYTES:
        raise FlaxnetsError(
            f'{size / 1e9:.1f} GB of weights do not fit into a StableHLO file, which holds '
            f"{MAX_BYTES / 1e9:.0f} GB: dtype='bfloat16' halves them, and an ONNX file holds any number"
        )

    @jax.jit
    def net(images: jax.Array) -> Any:
        logits: Any = model.apply(variables, images)
        return logits.astype(jnp.float32)

    shape = (BATCH, description.height, description.width, model.in_chans)
    free = export.symbolic_shape(', '.join(map(str, shape)))
    exported = export.export(net, platforms=PLATFORMS)(jax.ShapeDtypeStruct(free, jnp.float32))
    outputs = model.num_classes or model.num_features
    header = description.as_json(
        shape,
        'NHWC',
        outputs,
        computes_in=jnp.dtype(model.dtype).name,
        platforms=list(PLATFORMS),
        versions=versions('jax'),
    )
    return _lines({'format': FORMAT, 'open': OPEN, **header}) + b'\n\n' + exported.serialize()


def _lines(said: Mapping[str, Any]) -> bytes:
    lines = (f' {json.dumps(key)}: {json.dumps(value)}' for key, value in said.items())
    return '{{\n{}\n}}'.format(',\n'.join(lines)).encode()

"""Writes a graph as an ONNX file with the package `onnx`.

The weights of the largest nets are written to a second file beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import FlaxnetsError
from ..nets.resnet import ResNet
from ..store.files import written_whole
from ..store.weights import Variables
from ..version import VERSION, versions
from .description import BATCH, Description
from .onnx_graph import IR_VERSION, OPSET, Graph, net_graph

MAX_BYTES = 1_900_000_000  # the most bytes of weights in the file itself: protobuf holds up to 2 GiB
ALIGNMENT = 4096  # tensors in the second file start at multiples of this, so that they can be memory-mapped


def check_onnx() -> None:
    """Raises an error if the package `onnx` is missing. Call it before long work."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise FlaxnetsError(f'ONNX files need the package onnx: pip install onnx ({error})') from error


def write_onnx(path: Path, model: ResNet, variables: Variables, description: Description) -> tuple[Path, ...]:
    """Writes an ONNX file: float32 images [N, C, height, width] to [N, num_classes].

    `metadata_props` say what the net is, how images are prepared and what the outputs are called; each value
    is JSON.

    Returns:
      The paths: the ONNX file, and `net.onnx.data` with the weights if they do not fit into it.

    Raises:
      FlaxnetsError: it cannot be written, or `onnx` is missing.
    """
    check_onnx()
    graph = net_graph(model.arch, variables, 'images', description.output)
    total = sum(array.nbytes for array in graph.tensors.values())
    if total <= MAX_BYTES:
        with written_whole(path) as file:
            file.write(_model(graph, model, description, None))
        return (path,)
    beside = path.with_name(f'{path.name}.data')
    with written_whole(path) as file, written_whole(beside) as data:
        file.write(_model(graph, model, description, data, beside.name))
    return path, beside


def _model(
    graph: Graph, model: ResNet, description: Description, data: IO[bytes] | None, where: str = ''
) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    shape = (BATCH, model.in_chans, description.height, description.width)
    outputs = model.num_classes or model.num_features
    tensors = [_tensor(name, array, data, where) for name, array in graph.tensors.items()]
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(node.kind, node.inputs, node.outputs, node.outputs[0], **node.attributes)
                for node in graph.nodes
            ],
            description.config.name,
            [helper.make_tensor_value_info('images', TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(description.output, TensorProto.FLOAT, (BATCH, outputs))],
            tensors,
        ),
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=IR_VERSION,
        producer_name='flaxnets',
        producer_version=VERSION,
    )
    said = description.as_json(shape, 'NCHW', outputs, versions=versions('onnx'))
    onnx.helper.set_model_props(made, {key: json.dumps(value) for key, value in said.items()})
    content: bytes = made.SerializeToString()
    return content


def _tensor(name: str, array: np.ndarray, data: IO[bytes] | None, where: str) -> Any:
    """A constant tensor with its numbers inside, or appended to `data`, the file called `where`."""
    from onnx import TensorProto, external_data_helper, helper

    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    content = np.ascontiguousarray(array).tobytes()
    if data is None or len(content) < ALIGNMENT:
        return helper.make_tensor(name, kind, array.shape, content, raw=True)
    data.write(b'\0' * (-data.tell() % ALIGNMENT))
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=b'')
    external_data_helper.set_external_data(tensor, where, data.tell(), len(content))
    tensor.ClearField('raw_data')
    data.write(content)
    return tensor

"""Translates PyTorch's tensor names and order of axes to Flax's, and back.

The nets name their layers as PyTorch does, so a name is a path: `layer1.0.conv2.fc1.weight` is
`params/layer1/0/conv2/fc1/kernel`. What is left is four renamed leaves and the order of a kernel's axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxnets.checks import all_finite
from flaxnets.errors import CheckpointError
from flaxnets.nets.resnet import ResNet, abstract_variables

State = Mapping[str, np.ndarray]  # PyTorch's name -> tensor in PyTorch's layout

COUNTER = (
    '.num_batches_tracked'  # BatchNorm's count of training steps: torch keeps it, Flax has no use for it
)

# Leaf of a Flax variable -> last part of the torch name.
LEAVES = {
    ('params', 'kernel'): 'weight',
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a net on both sides.

    Attributes:
      name: its name in PyTorch: 'layer1.0.conv1.weight'.
      path: its path in Flax: ('params', 'layer1', '0', 'conv1', 'kernel').
      shape: its shape in Flax: [H, W, I, O] of a convolution, [I, O] of a linear layer.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def to_torch_axes(self) -> tuple[int, ...] | None:
        """Transposition of the Flax tensor that gives torch's: OIHW or [O, I]; None where both agree."""
        if self.path[-1] != 'kernel':
            return None
        return (3, 2, 0, 1) if len(self.shape) == 4 else (1, 0)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Its shape in PyTorch: [O, I, H, W] of a convolution, [O, I] of a linear layer."""
        axes = self.to_torch_axes
        return self.shape if axes is None else tuple(self.shape[a] for a in axes)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch's tensor as a view with Flax's order of axes."""
        axes = self.to_torch_axes
        return tensor if axes is None else tensor.transpose(np.argsort(axes))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Flax's array as a view with PyTorch's order of axes."""
        axes = self.to_torch_axes
        return array if axes is None else array.transpose(axes)


def entries(model: ResNet) -> dict[str, Entry]:
    """Every tensor of the net by its PyTorch name, in PyTorch's order."""
    found = []
    for path, leaf in flatten_dict(abstract_variables(model)).items():
        collection, *layer, last = path
        found.append(Entry('.'.join((*layer, LEAVES[collection, last])), path, leaf.shape))
    leaves = ('weight', 'bias', 'running_mean', 'running_var')
    found.sort(key=lambda e: (_layer_order(e.name), leaves.index(e.name.rpartition('.')[2])))
    return {entry.name: entry for entry in found}


def _layer_order(name: str) -> list[tuple[int, int, bool]]:
    return [_part_order(part) for part in name.split('.')[:-1]]


def _part_order(part: str) -> tuple[int, int, bool]:
    """Sorts the layers of one module as PyTorch lists them: by number, a convolution before its BatchNorm."""
    if part.isdigit():
        return 0, int(part), False
    rank = {'se': 2, 'downsample': 3, 'fc': 4}.get(part, 1 if part.startswith('layer') else 0)
    number = 2 if part in ('convs', 'bns') else int(part[-1]) if part[-1].isdigit() else 0
    return rank, number, part.startswith('bn')


def to_variables(state: State, model: ResNet) -> dict[str, Any]:
    """The Flax variables of `model` that hold these PyTorch tensors, dtypes kept, kernels not yet copied.

    Args:
      state: canonical names (timm's); `num_batches_tracked` may be there or not, and is left out.
      model: the net that the tensors must fit exactly.

    Returns:
      {'params': ..., 'batch_stats': ...}, nested by layer; kernels are transposed views of the input.

    Raises:
      CheckpointError: one message with every missing, unexpected, wrong-shaped, non-floating and
        non-finite tensor.
    """
    expected = entries(model)
    problems = Problems()
    problems.missing = [name for name in expected if name not in state]
    variables: dict[tuple[str, ...], np.ndarray] = {}
    for name, tensor in state.items():
        entry = expected.get(name)
        if entry is None:
            if not name.endswith(COUNTER) or name.removesuffix(COUNTER) + '.running_mean' not in expected:
                problems.unexpected.append(name)
        elif tensor.shape != entry.torch_shape:
            problems.unfit.append(f'{name}: shape {tensor.shape}, the net has {entry.torch_shape}')
        elif not is_floating(tensor):
            problems.unfit.append(f'{name}: {tensor.dtype} numbers, must be floating-point')
        elif not all_finite(tensor):
            count = int(tensor.size - np.isfinite(tensor).sum())
            problems.unfit.append(f'{name}: {count} of {tensor.size} values are NaN or infinite')
        else:
            variables[entry.path] = entry.from_torch(tensor)
    problems.raise_if_any()
    return unflatten_dict(variables)


def to_state(variables: Mapping[str, Any], model: ResNet) -> dict[str, np.ndarray]:
    """The way back: PyTorch's names and layouts, in PyTorch's order, from the variables of `model`.

    Raises:
      CheckpointError: a variable of the net is missing from `variables`.
    """
    flat = flatten_dict(dict(variables))
    expected = entries(model)
    missing = ['/'.join(entry.path) for entry in expected.values() if entry.path not in flat]
    if missing:
        raise CheckpointError(f'{len(missing)} variables are missing: {", ".join(missing)}')
    return {name: entry.to_torch(np.asarray(flat[entry.path])) for name, entry in expected.items()}


class Problems:
    """Everything that keeps a state dict from fitting a net, for one message.

    Attributes:
      missing: names in the net and not in the file.
      unexpected: names in the file and not in the net.
      unfit: names in both, each with what is wrong.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.unfit: list[str] = []

    def raise_if_any(self) -> None:
        """Raises `CheckpointError` with all problems, if there are any."""
        kinds = {
            'missing from the file': self.missing,
            'in the file but not in the net': self.unexpected,
            'in both but unfit': self.unfit,
        }
        if not any(kinds.values()):
            return
        summary = ', '.join(f'{len(names)} {kind}' for kind, names in kinds.items() if names)
        lines = [f'the tensors do not fit the net: {summary}.']
        for kind, names in kinds.items():
            if names:
                lines += [f'{kind}:', *(f'  {name}' for name in names)]
        raise CheckpointError('\n'.join(lines))


def is_floating(tensor: np.ndarray) -> bool:
    """True for NumPy's own floating types and for bfloat16, which NumPy files under 'V'."""
    return tensor.dtype.kind == 'f' or tensor.dtype.name == 'bfloat16'


def is_number(tensor: np.ndarray) -> bool:
    """True for whole and floating-point numbers."""
    return tensor.dtype.kind in 'iu' or is_floating(tensor)

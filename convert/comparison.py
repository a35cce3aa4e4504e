"""Where two checkpoints differ, block by block."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .names.tree import State, is_floating


@dataclass(frozen=True)
class BlockDifference:
    """The tensors of one block in two checkpoints.

    Attributes:
      block: 'conv1', 'bn1', 'layer1.0', ..., 'fc'.
      tensors: how many were compared: those that both checkpoints have, with the same shape.
      different: names of those that are not equal in every value.
      largest: the largest difference of a value.
      relative: the largest ratio, over the tensors, of the largest difference to the largest magnitude in the
        first checkpoint.
    """

    block: str
    tensors: int
    different: tuple[str, ...]
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      blocks: every block with tensors to compare, in the first checkpoint's order.
      only_in_first, only_in_second: names that the other lacks.
      shapes: names whose shapes differ, with both.
      dtypes: how many tensors are stored in different dtypes (values are compared all the same).
    """

    blocks: tuple[BlockDifference, ...]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: tuple[str, ...]
    dtypes: int

    @property
    def equal(self) -> bool:
        """The same names, shapes and values; dtypes may differ."""
        unequal = any(block.different for block in self.blocks)
        return not (unequal or self.only_in_first or self.only_in_second or self.shapes)


def compare(first: State, second: State) -> Comparison:
    """Compares two canonical states value by value; NaN equals NaN."""
    blocks: dict[str, list[str]] = {}
    shapes, dtypes = [], 0
    for name in first:
        if name not in second:
            continue
        if first[name].shape != second[name].shape:
            shapes.append(f'{name}: {first[name].shape} and {second[name].shape}')
            continue
        dtypes += first[name].dtype != second[name].dtype
        blocks.setdefault(_block(name), []).append(name)
    return Comparison(
        tuple(_compare_block(block, names, first, second) for block, names in blocks.items()),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
        tuple(shapes),
        dtypes,
    )


def _block(name: str) -> str:
    """'layer1.0.conv2.weight' -> 'layer1.0'; 'fc.bias' -> 'fc'."""
    match = re.match(r'layer\d+\.\d+|[^.]+', name)
    return match[0] if match else name


def _compare_block(block: str, names: list[str], first: State, second: State) -> BlockDifference:
    different, largest, relative = [], 0.0, 0.0
    for name in names:
        a, b = (_wide(state[name]) for state in (first, second))
        if np.array_equal(a, b, equal_nan=True):
            continue
        different.append(name)
        with np.errstate(invalid='ignore'):  # infinity minus infinity
            difference = float(np.max(np.abs(a - b)))
        scale = float(np.max(np.abs(a))) or 1.0
        # A NaN on one side counts as an infinite difference.
        largest = max(largest, difference if np.isfinite(difference) else np.inf)
        relative = max(relative, difference / scale if np.isfinite(difference) else np.inf)
    return BlockDifference(block, len(names), tuple(different), largest, relative)


def _wide(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float64) if is_floating(tensor) else tensor

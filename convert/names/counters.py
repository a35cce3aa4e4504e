"""BatchNorm's step counters (`num_batches_tracked`): Flax has none, so they are kept for the way back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flaxnets.words import count

from .tree import COUNTER, State, is_number


def add_counters(state: State, counters: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The state with each BatchNorm's step counter after its running variance, where PyTorch lists it."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        out[name] = tensor
        layer, _, leaf = name.rpartition('.')
        if leaf == 'running_var' and layer in counters:
            out[layer + COUNTER] = np.array(counters[layer], np.int64)
    return out


def take_counters(state: State) -> tuple[dict[str, np.ndarray], dict[str, int] | None, tuple[str, ...]]:
    """The state with BatchNorm's step counters as int64, the counters by layer, and notes.

    Averaging and `.half()` turn counters into floating-point numbers, which torch loads as whole ones. If any
    is not a whole number, or not finite (float16 ends at 65504), all are left out: no net computes with them.
    """
    found = {name: tensor for name, tensor in state.items() if name.endswith(COUNTER)}
    counters: dict[str, int] = {}
    for name, tensor in found.items():
        value = tensor.reshape(-1)[0] if tensor.size == 1 and is_number(tensor) else np.float64('nan')
        if not np.isfinite(value) or value != int(value):
            rest = {key: t for key, t in state.items() if key not in found}
            problem = f'{name} is {value}' if tensor.size == 1 else f'{name} has shape {tensor.shape}'
            return rest, None, (f'left out {count(len(found), "step counter")}: {problem}',)
        counters[name.removesuffix(COUNTER)] = int(value)
    dtypes = sorted({tensor.dtype.name for tensor in found.values()} - {'int64'})
    note = (f'took step counters of {", ".join(dtypes)} as int64',) if dtypes else ()
    kept = (
        {name: np.array(counters[name.removesuffix(COUNTER)], np.int64) for name in found} if dtypes else {}
    )
    return {**state, **kept}, counters or None, note

"""Exports the weights of a run as a directory of weights."""

from __future__ import annotations

from pathlib import Path

from flaxnets.errors import FlaxnetsError
from flaxnets.store import runs, weights


def export(workdir: str, out: str, which: str = 'last', *, ema: bool = True, overwrite: bool = False) -> int:
    """Writes the weights of a checkpoint as a directory that `flaxnets.load` opens.

    Args:
      workdir: folder of the run; `gs://` too.
      out: directory to write; `gs://` too.
      which: 'last', 'best' or a step.
      ema: take the moving averages, if the run kept them.
      overwrite: replace an earlier directory of weights.

    Returns:
      The step.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or `out` exists.
      FlaxnetsError: `out` names a file of another program.
    """
    if Path(out).suffix.lower() in ('.onnx', '.stablehlo'):
        raise FlaxnetsError(
            f'{out}: no directory of weights; such a file is written by flaxnets export {workdir} --out {out}'
        )
    weights.check_target(out, overwrite)
    checkpoint = runs.read(workdir, which, ema=ema)
    kind = ', averaged' if checkpoint.averaged else ''
    source = weights.Source(notes=(f'trained by flaxnets: step {checkpoint.step}{kind}',))
    weights.save(out, checkpoint.variables, checkpoint.config, source, overwrite=overwrite)
    return checkpoint.step

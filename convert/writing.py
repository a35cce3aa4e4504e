"""Writes a `Checkpoint`: a directory of weights, or a file for PyTorch with its certificate beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from flaxnets.errors import FlaxnetsError
from flaxnets.store import weights
from flaxnets.store.files import check_place, read_small, sha256_of, written_whole
from flaxnets.store.remote import check_free, is_remote, staged_as
from flaxnets.store.safetensors_file import write_safetensors
from flaxnets.zoo.records import Config, config_from_json, to_json

from .checkpoint import Checkpoint
from .formats.pth_write import write_pth
from .names.layouts_back import check_layout, difference, from_canonical
from .verification import Verification

FORMATS = ('pth', 'safetensors')
METADATA = {'format': 'pt'}  # tells transformers that names and layouts are PyTorch's
SUFFIXES = {'.pth': 'pth', '.pt': 'pth', '.ckpt': 'pth', '.bin': 'pth', '.safetensors': 'safetensors'}
_TORCH_TAR = '.pth.tar'  # what PyTorch's own examples call a file of torch.save, which is no tar archive


def write(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    layout: str | None = None,
    file_format: str | None = None,
    verification: Verification | None = None,
    approximate: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint to a directory of weights or to a file; the name of `out` decides which.

    A name that ends in .pth, .pth.tar, .pt, .ckpt, .bin or .safetensors is a file for PyTorch, with its
    certificate beside it (`net.pth.json`); any other a directory that `flaxnets.load` opens. Either is
    written whole or not at all.

    Args:
      checkpoint: what to write.
      out: path to write to; `gs://` too.
      layout: whose names a file has, one of `convert.names.layouts_back.LAYOUTS`; None means 'timm'.
      file_format: 'pth' or 'safetensors', in place of what the name of `out` says.
      verification: the proof that goes into the certificate, if there is one.
      approximate: write a file even if the other library's net of these names computes something else.
      overwrite: replace what is there.

    Raises:
      FlaxnetsError: tensors that do not fit the net (all named), or `out` cannot or must not be written.

    Examples:
      >>> from convert.conversion import open_checkpoint
      >>> checkpoint = open_checkpoint('weights/resnest50d')
      >>> write(checkpoint, 'resnest50d.pth')  # under timm's names
      >>> again = open_checkpoint('resnest50d.pth', 'resnest50d')
      >>> list(again.state)[0], list(again.state) == list(checkpoint.state)
      ('conv1.0.weight', True)
    """
    Target.of(out, layout, file_format, approximate, overwrite).write(checkpoint, verification)


@dataclass(frozen=True)
class Target:
    """Where and how a checkpoint is to be written.

    What can be told without the checkpoint is checked when a target is made. `difference` checks the rest:
    call it once the checkpoint is open, before work that takes long.

    Attributes:
      out: the path.
      kind: 'pth' or 'safetensors' for a file, None for a directory of weights.
      layout, approximate, overwrite: as `write` takes them.
    """

    out: str
    kind: str | None
    layout: str
    approximate: bool
    overwrite: bool

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        layout: str | None = None,
        file_format: str | None = None,
        approximate: bool = False,
        overwrite: bool = False,
    ) -> Target:
        """The target that `out` and the options mean.

        Raises:
          FlaxnetsError: no such format or layout, or what is there must not be overwritten.
        """
        kind = _kind(out, file_format)
        if layout is not None:
            check_layout(layout)
        if layout is not None and kind is None:
            raise FlaxnetsError(
                f'layout={layout!r} is for files, and {out} names a directory: end it in .pth, or give '
                "file_format='pth'"
            )
        target = cls(os.fspath(out), kind, layout or 'timm', approximate, overwrite)
        target.check()
        return target

    def check(self) -> None:
        """Raises `CheckpointError` if something is there that must not be overwritten."""
        if self.kind is None:
            weights.check_target(self.out, self.overwrite)
            return
        if not is_remote(self.out):
            check_place(self.out)
        for path in (self.out, _certificate_of(self.out)):
            check_free(path, self.overwrite)

    def difference(self, checkpoint: Checkpoint) -> str | None:
        """Why the other library's net with these names computes something else; None if it does not.

        Raises:
          FlaxnetsError: it does, and `approximate` is False; or that library has no net for these weights.
        """
        if self.kind is None:
            return None
        if checkpoint.config.folded:
            raise FlaxnetsError(f'{self.out}: folded weights have no BatchNorm, so no PyTorch net takes them')
        check_layout(self.layout, checkpoint.config.arch)
        differs = difference(self.layout, checkpoint.config.arch)
        if differs and not self.approximate:
            raise FlaxnetsError(f'{differs}; approximate=True writes them all the same')
        return differs

    def write(self, checkpoint: Checkpoint, verification: Verification | None = None) -> None:
        """Writes the checkpoint there, whole or not at all."""
        self.check()
        if is_remote(self.out):
            with staged_as(self.out) as here:
                replace(self, out=os.fspath(here)).write(checkpoint, verification)
            return
        proof = verification.to_json() if verification else None
        variables, config = checkpoint.variables, checkpoint.config
        if self.kind is None:
            weights.save(
                self.out, variables, config, checkpoint.source, verification=proof, overwrite=self.overwrite
            )
            return
        differs = self.difference(checkpoint)
        source = checkpoint.noted(differs) if differs else checkpoint.source
        tensors = from_canonical(checkpoint.state, self.layout, config.arch)
        with written_whole(_certificate_of(self.out)) as beside:  # in place only after the file is
            if self.kind == 'pth':
                described = write_pth(self.out, tensors)
            else:
                described = write_safetensors(self.out, tensors, METADATA)
            said = weights.certificate(source, described, proof)
            said |= {'sha256': sha256_of(Path(self.out)), 'config': to_json(config)}
            beside.write(weights.as_json(said))


def _kind(out: str | os.PathLike[str], file_format: str | None) -> str | None:
    """'pth' or 'safetensors' if `out` names a file, None if a directory."""
    if file_format is not None and file_format not in FORMATS:
        raise FlaxnetsError(f'format {file_format!r} is not one of {", ".join(FORMATS)}')
    name = Path(out).name.lower()
    if name.endswith('.tar') and not name.endswith(_TORCH_TAR) and file_format is None:
        raise FlaxnetsError(f'{out}: tar archives are not written; end the name in .pth or {_TORCH_TAR}')
    return file_format or ('pth' if name.endswith(_TORCH_TAR) else SUFFIXES.get(Path(name).suffix))


def certified(path: Path, digest: str) -> Config | None:
    """The `Config` in the certificate beside a file, if the certificate is of this very file."""
    beside = Path(_certificate_of(path))
    if not beside.is_file():
        return None
    try:
        said = json.loads(read_small(beside, 'certificate'))
        return config_from_json(said['config']) if said['sha256'] == digest else None
    except (ValueError, KeyError, TypeError, RecursionError):  # from another program or version
        return None


def _certificate_of(out: str | os.PathLike[str]) -> str:
    return f'{os.fspath(out)}.json'

"""Finds where among the names of a state dict a net is, by its anchor: a tensor that each net has once.

What that tensor is called depends on how a publisher names the stages (`convert.names.stages`):
`layer1.0.conv1.weight`, `4.0.conv1.weight` in a list of children, `res2.0.conv1.weight` in detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .stages import STAGE_NAMES, StageNames

# What DataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(
    r'^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+(?=.)'
    r'|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)'
)


@dataclass(frozen=True)
class Place:
    """Where among the names of a state dict a net is.

    Attributes:
      stage_names: what its stages are called.
      prefix: what stands before its names, without the parts that wrappers put there (`bare`).
      prefix_in_file: the prefix as it stands in the file, with these parts.
    """

    stage_names: StageNames
    prefix: str
    prefix_in_file: str

    def is_body(self, name: str) -> bool:
        """Whether a name (`bare`) is of the net itself, and not of its head or of what is beside it."""
        inner = name.removeprefix(self.prefix)
        return name.startswith(self.prefix) and self.stage_names.has_in_body(inner)

    def body(self, state: Mapping[Any, Any]) -> dict[str, Any]:
        """The net's own tensors by their names within it."""
        names = ((bare(name), value) for name, value in state.items() if isinstance(name, str))
        return {name[len(self.prefix) :]: value for name, value in names if self.is_body(name)}

    def beside(self, clean: Mapping[str, str]) -> dict[str, str]:
        """The names that are not of the net itself; `clean` is what `bare_names` gives."""
        return {name: new for name, new in clean.items() if not self.is_body(new)}


def places(names: Iterable[str]) -> list[Place]:
    """The nets among the names of a state dict, in order."""
    clean = {new: name for name, new in bare_names(names).items()}
    found: dict[tuple[str, str], Place] = {}
    for name, original in clean.items():
        for stage_names in STAGE_NAMES:
            anchor = stage_names.anchor
            prefix = name.removesuffix(anchor)
            if f'.{name}'.endswith(f'.{anchor}') and stage_names.is_complete(prefix, clean):
                in_file = original[: original.rfind(stage_names.stages[0])]
                found.setdefault((stage_names.layout, prefix), Place(stage_names, prefix, in_file))
    return list(found.values())


def bare_names(names: Iterable[Any]) -> dict[str, str]:
    """Name -> the name without what wrappers put into it (`bare`), for the names that are text."""
    return {name: bare(name) for name in names if isinstance(name, str)}


def bare(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    return WRAPPERS.sub('', name)


def bare_layer(name: str) -> str:
    """A layer's name without what wrappers put into it."""
    return bare(f'{name}.')[:-1]

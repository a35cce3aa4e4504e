"""Finds where among the names of a state dict a net is, by its anchor: a tensor that each net has once.

Stages are named in one of three forms: 'layers' as timm and nearly all others do
(`layer1.0.conv1.weight`), 'children' as a list of children (`nn.Sequential(*net.children())`:
`4.0.conv1.weight`), and 'detectron2' (`res2.0.conv1.weight`). Within a form publishers still differ in the
names of their other layers: `convert.names.layouts` translates those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Each of the nets has this tensor, once; what stands before it in a name is a wrapper's prefix.
ANCHOR = 'layer1.0.conv1.weight'

# What DataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(
    r'^(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+(?=.)'
    r'|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)'
)

# A form -> its anchor, what else must be there, and the first parts of the names of its layers. Elsewhere
# `_features` in layouts.py, and `_STAGES` and `_FIRST_STAGE` in whole_models.py, depend on the form.
_ANCHORS = {
    'layers': (ANCHOR, (), ('conv1', 'bn1', 'stem', 'layer0', 'layer1', 'layer2', 'layer3', 'layer4')),
    'children': ('4.0.conv1.weight', ('7.0.conv1.weight',), ('0', '1', '4', '5', '6', '7')),
    'detectron2': ('res2.0.conv1.weight', ('res5.0.conv1.weight',), ('stem', 'res2', 'res3', 'res4', 'res5')),
}
_STEMS = ('0.weight', '0.0.weight')  # the stem in a list of children


@dataclass(frozen=True)
class Place:
    """Where among the names of a state dict a net is.

    Attributes:
      form: how its stages are named: 'layers', 'children' or 'detectron2'.
      prefix: what stands before its names, without the parts that wrappers put there (`bare`).
      written: the prefix as it stands in the file, with these parts.
    """

    form: str
    prefix: str
    written: str

    def is_body(self, name: str) -> bool:
        """Whether a name (`bare`) is of the net itself, and not of its head or of what is beside it."""
        inner = name.removeprefix(self.prefix)
        return name.startswith(self.prefix) and inner.partition('.')[0] in _ANCHORS[self.form][2]

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
        for form, (anchor, more, _) in _ANCHORS.items():
            if not f'.{name}'.endswith(f'.{anchor}'):
                continue
            prefix = name[: len(name) - len(anchor)]
            stem = form != 'children' or any(prefix + first in clean for first in _STEMS)
            if stem and all(prefix + other in clean for other in more):
                written = original[: original.rfind('4' if form == 'children' else anchor[:4])]
                found.setdefault((form, prefix), Place(form, prefix, written))
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

"""Translates timm's names to those of another library, so that its own net loads the weights.

`LAYOUTS` has the layouts that are written; many more are read (`convert.names.layouts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flaxnets.errors import FlaxnetsError
from flaxnets.nets.arch import Arch

from .found import Tensors
from .layouts import MMPRETRAIN_SHORTCUT, MMPRETRAIN_STEM, check_distinct, translate


def from_canonical(state: Tensors, layout: str, arch: Arch) -> dict[str, np.ndarray]:
    """The tensors of a net of `arch` as another library's own net calls them.

    `convert.names.layouts.to_canonical` undoes it for every architecture; see `difference` for what the names
    alone do not promise.

    Args:
      state: timm's names.
      layout: one of `LAYOUTS`: 'timm'; 'torchvision', which calls everything as timm does; 'mmpretrain', the
        state dict of an `ImageClassifier` with a `LinearClsHead`.
      arch: the architecture, which decides the names.

    Raises:
      FlaxnetsError: unknown layout, or one that has no such net.
    """
    check_layout(layout, arch)
    return LAYOUTS[layout].names(state, arch)


def check_layout(layout: str, arch: Arch | None = None) -> None:
    """Raises `FlaxnetsError` if there is no such layout, or no net of `arch` in that library."""
    if layout not in LAYOUTS:
        raise FlaxnetsError(f'layout {layout!r} is not one of {", ".join(LAYOUTS)}')
    if arch is not None and (missing := LAYOUTS[layout].missing(arch)):
        others = ' or '.join(repr(name) for name, other in LAYOUTS.items() if not other.missing(arch))
        raise FlaxnetsError(f'{missing}, so no net that could load these weights; use layout {others}')


def difference(layout: str, arch: Arch) -> str | None:
    """Why the library's net computes something else than one of `arch`; None if it does not."""
    return LAYOUTS[layout].difference(arch)


def _same_names(state: Tensors, arch: Arch) -> dict[str, np.ndarray]:
    return dict(state)


def _mmpretrain(state: Tensors, arch: Arch) -> dict[str, np.ndarray]:
    translation: dict[str, str] = {}
    if arch.deep_stem:
        translation |= {timm: mm for mm, timm in MMPRETRAIN_STEM.items()}
    if arch.avg_down and arch.block != 'res2net':  # mmpretrain's Res2Layer has a pool in every shortcut
        translation |= {timm: mm for mm, timm in MMPRETRAIN_SHORTCUT.items()}
    for name in state:
        if gate := re.fullmatch(r'((layer\d+\.\d+)\.se\.fc([12]))\.\w+', name):
            translation[gate[1]] = f'{gate[2]}.se_layer.conv{gate[3]}.conv'
    names = translate({name: name for name in state}, translation)
    check_distinct(names)
    return {
        f'{"head" if new.startswith("fc.") else "backbone"}.{new}': state[name] for name, new in names.items()
    }


def _mmpretrain_differs(arch: Arch) -> str | None:
    if arch.avd_first:
        return (
            "mmpretrain's ResNeSt pools after its split attention, this net before: the weights load there, "
            'but compute something else'
        )
    if arch.block == 'res2net' and arch.cardinality > 1:
        return "mmpretrain's Res2Net has no grouped convolutions: no net of it takes these weights"
    return None


def _not_in_torchvision(arch: Arch) -> str | None:
    if arch.block == 'resnext' and not (arch.se or arch.deep_stem or arch.avg_down):
        return None
    return 'torchvision has plain ResNeXts only (one 7x7 stem, no SE gates, no pooled shortcuts)'


def _nothing(arch: Arch) -> None:
    return None


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Attributes:
      names: gives tensors under timm's names those of the library.
      missing: why the library has no net of an architecture; None if it has one.
      difference: why its net of an architecture computes something else; None if it does not.
    """

    names: Callable[[Tensors, Arch], dict[str, np.ndarray]] = _same_names
    missing: Callable[[Arch], str | None] = _nothing
    difference: Callable[[Arch], str | None] = _nothing


LAYOUTS = {
    'timm': Layout(),
    'torchvision': Layout(missing=_not_in_torchvision),
    'mmpretrain': Layout(_mmpretrain, difference=_mmpretrain_differs),
}

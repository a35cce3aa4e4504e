"""The zoo: every architecture, every published weights file, and all names for them.

Architectures and weights are named apart, as in timm: `resnext50_32x4d` is a net, and
`resnext50_32x4d.gluon_in1k` one of the files published for it.
"""

from __future__ import annotations

import difflib
import fnmatch
import re

from ..errors import FlaxnetsError
from ..images.preprocess import Preprocess
from .architectures import ARCH_ALIASES, ARCHS, NETS, TINY_ARCHS
from .classes import in_order
from .published import WEIGHTS
from .records import Config, Weights

__all__ = [
    'ARCHS',
    'ARCH_ALIASES',
    'NETS',
    'TINY_ARCHS',
    'WEIGHTS',
    'check_name',
    'config',
    'find_file',
    'list_models',
    'resolve',
    'weights_of',
]

_BY_ALIAS = {alias.lower(): row for row in WEIGHTS for alias in row.aliases}
_BY_FILE = {url.rpartition('/')[2]: row for row in WEIGHTS for url in row.urls}


def check_name(source: object, model: str | None, found: str) -> None:
    """Raises an error if weights are of the net `found`, but `model` (any name, or None) is another net."""
    if model is not None and resolve(model)[0] != found:
        raise FlaxnetsError(f'{source} holds weights of {found}, not of {model}')


def weights_of(arch: str) -> tuple[Weights, ...]:
    """The files published for an architecture (a key of `ARCHS`), the default first."""
    return tuple(row for row in WEIGHTS if row.arch == arch)


def resolve(name: str) -> tuple[str, Weights | None]:
    """Finds the architecture and the published file that a name stands for.

    Args:
      name: an architecture (`resnest101e`: the file is timm's default), `architecture.tag`, an alias of
        either, or timm's repository on the Hugging Face hub (`hf-hub:timm/resnest101e.in1k`). Upper and
        lower case are the same.

    Returns:
      The key in `NETS`, and the row of `WEIGHTS`, None if nothing is published for the architecture.

    Raises:
      FlaxnetsError: the name is unknown (the nearest ones are listed), or the architecture has no such
        tag (its tags are listed), or a tag follows a name that already means one file.

    Examples:
      >>> arch, weights = flaxnets.zoo.resolve('gluon_resnext50_32x4d')
      >>> arch, weights.name
      ('resnext50_32x4d', 'resnext50_32x4d.gluon_in1k')
    """
    if not isinstance(name, str):
        raise FlaxnetsError(f'a net is named by a string, not by {name!r}')
    key = re.sub(r'^(hf[-_]hub:)?timm/', '', name.strip().lower())
    if key in _BY_ALIAS:
        return _BY_ALIAS[key].arch, _BY_ALIAS[key]
    stem, dot, tag = key.partition('.')
    arch = ARCH_ALIASES.get(stem, stem)
    if arch in NETS:
        rows = weights_of(arch)
        if not dot:
            return arch, rows[0] if rows else None
        for row in rows:
            if row.tag == tag:
                return arch, row
        known = ', '.join(row.tag for row in rows) or 'none'
        raise FlaxnetsError(f'{name!r}: {arch} has no published weights tagged {tag!r}; its tags are {known}')
    if stem in _BY_ALIAS:
        raise FlaxnetsError(
            f'{name!r}: {stem} already means {_BY_ALIAS[stem].name}; leave the tag {tag!r} off'
        )
    raise FlaxnetsError(_unknown(name, key))


def _unknown(name: str, key: str) -> str:
    names = {n.lower(): n for n in (*NETS, *ARCH_ALIASES, *(a for row in WEIGHTS for a in row.aliases))}
    # torchvision's names contain a dot, so that the whole key is compared first. In all others what follows
    # the dot is a tag, which only makes similar names look different.
    stem = key.rpartition('/')[2].partition('.')[0]
    near = difflib.get_close_matches(key, names, 3, 0.9) or difflib.get_close_matches(stem, names, 3)
    hint = f'did you mean {" or ".join(names[n] for n in near)}?' if near else 'no name here is similar.'
    return f'unknown net {name!r}: {hint} `python -m flaxnets list` shows every name'


def config(name: str) -> Config:
    """Describes the net and the weights that a name stands for (`resolve` says which names there are).

    Raises:
      FlaxnetsError: as `resolve` does.
    """
    arch, weights = resolve(name)
    default = Preprocess(size=32, crop_pct=1.0) if arch in TINY_ARCHS else Preprocess()
    preprocess = weights.preprocess if weights else default
    return Config(arch, NETS[arch], preprocess, weights=weights)


def list_models(pattern: str = '*', weights: bool = False) -> list[str]:
    """Lists the names of the zoo that match a wildcard, in natural order (50 before 101).

    Args:
      pattern: shell wildcard (`fnmatch`); upper and lower case are the same.
      weights: list the published files instead, as `architecture.tag`, each architecture's default first.
        The pattern may then match the architecture or the full name.

    Returns:
      The names; an empty list if nothing matches. Aliases and the nets of `TINY_ARCHS` are not listed.

    Examples:
      >>> flaxnets.list_models('res2next*')
      ['res2next50']
      >>> flaxnets.list_models('resnest50d', weights=True)
      ['resnest50d.in1k', 'resnest50d.mm_in1k']
    """
    pattern = pattern.lower()
    archs = in_order(tuple(ARCHS), 'natural')
    if not weights:
        return fnmatch.filter(archs, pattern)
    rows = (row for arch in archs for row in weights_of(arch))
    return [r.name for r in rows if fnmatch.fnmatch(r.name, pattern) or fnmatch.fnmatch(r.arch, pattern)]


def find_file(filename: str) -> Weights | None:
    """The row of the published file with exactly this name (`resnest50-528c19ca.pth`), or None."""
    return _BY_FILE.get(filename)

"""The zoo: every architecture and every name by which its users know it.

Architectures and weights are named apart, as in timm: `resnext50_32x4d` is a net, and
`resnext50_32x4d.gluon_in1k` one of the files published for it. The arguments of each architecture are
those of its publishers' code (timm's `resnet.py`, `res2net.py` and `resnest.py`, the authors'
`ablation.md` for ResNeSt's `fast` variants, mmpretrain for `resnext152_32x4d`).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import Any

from flaxnets.config import Arch, Config, Preprocess, Weights
from flaxnets.errors import FlaxnetsError
from flaxnets.published import WEIGHTS

__all__ = [
    'ARCHS',
    'ARCH_ALIASES',
    'NETS',
    'TINY_ARCHS',
    'WEIGHTS',
    'config',
    'find_file',
    'list_models',
    'resolve',
    'weights_of',
]

_L50 = (3, 4, 6, 3)
_L101 = (3, 4, 23, 3)
_L152 = (3, 8, 36, 3)

Layers = tuple[int, int, int, int]


def _res2net(layers: Layers, width: int, scale: int, *, cardinality: int = 1, v1b: bool = False) -> Arch:
    stem = 32 if v1b else 64
    return Arch(
        'res2net', layers, cardinality, width, scale=scale, deep_stem=v1b, stem_width=stem, avg_down=v1b
    )


def _resnext(layers: Layers, cardinality: int, width: int, *, se: bool = False) -> Arch:
    return Arch('resnext', layers, cardinality, width, se=se)


def _resnest(layers: Layers, stem_width: int) -> Arch:
    return Arch('resnest', layers, radix=2, deep_stem=True, stem_width=stem_width, avg_down=True)


def _resnest_fast(radix: int, cardinality: int, width: int) -> Arch:
    """`<radix>s<cardinality>x<width>d` of the paper's ablation; it pools before the split attention."""
    return Arch(
        'resnest',
        _L50,
        cardinality,
        width,
        radix=radix,
        deep_stem=True,
        stem_width=32,
        avg_down=True,
        avd_first=True,
    )


ARCHS: dict[str, Arch] = {
    'res2net50_26w_4s': _res2net(_L50, 26, 4),
    'res2net50_48w_2s': _res2net(_L50, 48, 2),
    'res2net50_14w_8s': _res2net(_L50, 14, 8),
    'res2net50_26w_6s': _res2net(_L50, 26, 6),
    'res2net50_26w_8s': _res2net(_L50, 26, 8),
    'res2net101_26w_4s': _res2net(_L101, 26, 4),
    'res2net50d': _res2net(_L50, 26, 4, v1b=True),
    'res2net101d': _res2net(_L101, 26, 4, v1b=True),
    'res2next50': _res2net(_L50, 4, 4, cardinality=8),
    'resnext50_32x4d': _resnext(_L50, 32, 4),
    'resnext50d_32x4d': Arch('resnext', _L50, 32, 4, deep_stem=True, stem_width=32, avg_down=True),
    'resnext101_32x4d': _resnext(_L101, 32, 4),
    'resnext101_32x8d': _resnext(_L101, 32, 8),
    'resnext101_64x4d': _resnext(_L101, 64, 4),
    'resnext101_32x16d': _resnext(_L101, 32, 16),
    'resnext101_32x32d': _resnext(_L101, 32, 32),
    'resnext101_32x48d': _resnext(_L101, 32, 48),
    'resnext152_32x4d': _resnext(_L152, 32, 4),
    'seresnext50_32x4d': _resnext(_L50, 32, 4, se=True),
    'seresnext101_32x4d': _resnext(_L101, 32, 4, se=True),
    'seresnext101_64x4d': _resnext(_L101, 64, 4, se=True),
    'resnest14d': _resnest((1, 1, 1, 1), 32),
    'resnest26d': _resnest((2, 2, 2, 2), 32),
    'resnest50d': _resnest(_L50, 32),
    'resnest101e': _resnest(_L101, 64),
    'resnest200e': _resnest((3, 24, 36, 3), 64),
    'resnest269e': _resnest((3, 30, 48, 8), 64),
    'resnest50d_4s2x40d': _resnest_fast(4, 2, 40),
    'resnest50d_1s4x24d': _resnest_fast(1, 4, 24),
    'resnest50_fast_1s1x64d': _resnest_fast(1, 1, 64),
    'resnest50_fast_2s1x64d': _resnest_fast(2, 1, 64),
    'resnest50_fast_4s1x64d': _resnest_fast(4, 1, 64),
    'resnest50_fast_1s2x40d': _resnest_fast(1, 2, 40),
    'resnest50_fast_2s2x40d': _resnest_fast(2, 2, 40),
}

# One net of each kind for images of 32 pixels, to try things on a laptop: nobody's but ours.
_SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), deep_stem=True, stem_width=16, avg_down=True, planes=16)
TINY_ARCHS: dict[str, Arch] = {
    'resnext_tiny': Arch('resnext', cardinality=8, base_width=16, **_SMALL),
    'res2net_tiny': Arch('res2net', base_width=32, scale=4, **_SMALL),
    'resnest_tiny': Arch('resnest', radix=2, **_SMALL),
}

NETS = {**ARCHS, **TINY_ARCHS}

# Other names of an architecture, by its authors or by GluonCV: they take a tag, as its own name does.
# A name that means one file only (`gluon_resnext50_32x4d`) is in that file's `Weights.aliases` instead.
ARCH_ALIASES: dict[str, str] = {
    'res2net50': 'res2net50_26w_4s',
    'res2net50_v1b': 'res2net50d',
    'res2net50_v1b_26w_4s': 'res2net50d',
    'res2net101_v1b': 'res2net101d',
    'res2net101_v1b_26w_4s': 'res2net101d',
    'res2next50_4s': 'res2next50',
    'resnest14': 'resnest14d',
    'resnest26': 'resnest26d',
    'resnest50': 'resnest50d',
    'resnest101': 'resnest101e',
    'resnest200': 'resnest200e',
    'resnest269': 'resnest269e',
    'resnest50_fast_4s2x40d': 'resnest50d_4s2x40d',
    'resnest50_fast_1s4x24d': 'resnest50d_1s4x24d',
}

_BY_ALIAS = {alias.lower(): row for row in WEIGHTS for alias in row.aliases}
_BY_FILE = {url.rpartition('/')[2]: row for row in WEIGHTS for url in row.urls}


def weights_of(arch: str) -> tuple[Weights, ...]:
    """The files published for an architecture (a key of `ARCHS`), the default first."""
    return tuple(row for row in WEIGHTS if row.arch == arch)


def resolve(name: str) -> tuple[str, Weights | None]:
    """What a name stands for: the architecture's own name, and the published file.

    Args:
      name: an architecture (`resnest101e`: the file is timm's default), `architecture.tag`, an alias of
        either, or timm's repository on the Hugging Face hub (`hf-hub:timm/resnest101e.in1k`). Upper and
        lower case are the same.

    Returns:
      The key in `NETS`, and the row of weights, None if nothing is published for the architecture.

    Raises:
      FlaxnetsError: the name is unknown (the nearest ones are listed), or the architecture has no such
        tag (its tags are listed), or a tag follows a name that already means one file.
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
    # torchvision's names have a dot of their own; elsewhere the tag would only blur the comparison.
    stem = key.rpartition('/')[2].partition('.')[0]
    near = difflib.get_close_matches(key, names, 3, 0.9) or difflib.get_close_matches(stem, names, 3)
    hint = f'did you mean {" or ".join(names[n] for n in near)}?' if near else 'no name here is similar.'
    return f'unknown net {name!r}: {hint} `python -m flaxnets list` shows every name'


def config(name: str) -> Config:
    """The net that a name stands for and how its default preprocessing is; see `resolve` for names.

    Raises:
      FlaxnetsError: as `resolve` does.
    """
    arch, weights = resolve(name)
    default = Preprocess(size=32, crop_pct=1.0) if arch in TINY_ARCHS else Preprocess()
    preprocess = weights.preprocess if weights else default
    return Config(arch, NETS[arch], preprocess, weights=weights)


def list_models(pattern: str = '*', weights: bool = False) -> list[str]:
    """The names of the zoo that match a wildcard, in natural order (50 before 101).

    Args:
      pattern: shell wildcard (`fnmatch`); upper and lower case are the same.
      weights: list the published files instead, as `architecture.tag`, the default of each architecture
        first. The pattern may then match the architecture or the full name.

    Returns:
      The names, none if nothing matches. Aliases and the nets of `TINY_ARCHS` are not listed.
    """
    pattern = pattern.lower()
    archs = sorted(ARCHS, key=_natural)
    if not weights:
        return fnmatch.filter(archs, pattern)
    rows = (row for arch in archs for row in weights_of(arch))
    return [r.name for r in rows if fnmatch.fnmatch(r.name, pattern) or fnmatch.fnmatch(r.arch, pattern)]


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def find_file(filename: str) -> Weights | None:
    """The row whose published file is called exactly that (`resnest50-528c19ca.pth`), or None."""
    return _BY_FILE.get(filename)

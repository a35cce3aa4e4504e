"""The architectures by name, and their aliases.

Each is as in its publisher's code: timm's `resnet.py`, `res2net.py` and `resnest.py`, the authors'
`ablation.md` for ResNeSt's `fast` variants, and mmpretrain for `resnext152_32x4d`.
"""

from __future__ import annotations

from typing import Any

from ..nets.arch import Arch

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

# One small net of each kind for images of 32 pixels, to try things on a laptop. Only this project has them.
_SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), deep_stem=True, stem_width=16, avg_down=True, planes=16)
TINY_ARCHS: dict[str, Arch] = {
    'resnext_tiny': Arch('resnext', cardinality=8, base_width=16, **_SMALL),
    'res2net_tiny': Arch('res2net', base_width=32, scale=4, **_SMALL),
    'resnest_tiny': Arch('resnest', radix=2, **_SMALL),
}

NETS = {**ARCHS, **TINY_ARCHS}

# Names that an architecture has from its authors or GluonCV. A tag may follow them, as it may follow the
# zoo's own name. A name of one file only (`gluon_resnext50_32x4d`) is in that file's `Weights.aliases`.
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

"""The record that describes an architecture. Plain data, checked when it is made; JAX is not imported."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FlaxnetsError

BLOCKS = ('resnext', 'res2net', 'resnest')


@dataclass(frozen=True)
class Arch:
    """One architecture: a residual net of four stages, whose kind of block is a field.

    Attributes:
      block: 'resnext' (Xie et al., arXiv 1611.05431), 'res2net' (Gao et al., arXiv 1904.01169) or
        'resnest' (Zhang et al., arXiv 2004.08955).
      layers: blocks in each of the four stages.
      cardinality: number of groups of the 3x3 convolutions (in ResNeSt, of each radix split).
      base_width: channels per group when a stage has 64 planes.
      scale: number of channel splits of a Res2Net; 1 in the other nets.
      radix: number of splits per cardinal group of a ResNeSt, weighed by a softmax, or by a sigmoid if it
        is 1; 1 in the other nets.
      deep_stem: three 3x3 convolutions in place of one 7x7 (He et al., arXiv 1812.01187, "ResNet-C").
      stem_width: channels of the 7x7 stem, or of the first two convolutions of the deep stem, whose
        third one makes twice as many.
      avg_down: the shortcut shrinks by average pooling before its 1x1 convolution ("ResNet-D" there).
      avd_first: ResNeSt shrinks by average pooling before, not after, the split attention.
      se: a squeeze-and-excitation gate (reduction 16) ends each ResNeXt block.
      planes: the first stage's base number of channels. Each next stage has twice as many planes; the
        blocks of a stage make 4 * planes channels.
    """

    block: str
    layers: tuple[int, int, int, int]
    cardinality: int = 1
    base_width: int = 64
    scale: int = 1
    radix: int = 1
    deep_stem: bool = False
    stem_width: int = 64
    avg_down: bool = False
    avd_first: bool = False
    se: bool = False
    planes: int = 64

    def __post_init__(self) -> None:
        problems = []
        if self.block not in BLOCKS:
            problems.append(f'block={self.block!r} is not one of {", ".join(BLOCKS)}')
        if len(self.layers) != 4 or any(n < 1 for n in self.layers):
            problems.append(f'layers={self.layers!r} must be four positive numbers')
        for field in ('cardinality', 'base_width', 'scale', 'radix', 'stem_width', 'planes'):
            if getattr(self, field) < 1:
                problems.append(f'{field}={getattr(self, field)!r} must be at least 1')
        if min(self.planes, self.base_width) > 0 and self.planes * self.base_width < 64:
            problems.append(
                f'planes={self.planes} times base_width={self.base_width} must be at least 64: groups of the '
                'first stage have no channels'
            )
        for field, owner in (('scale', 'res2net'), ('radix', 'resnest')):
            if getattr(self, field) != 1 and self.block != owner:
                problems.append(f'{field}={getattr(self, field)!r} only means something with block={owner!r}')
        if self.avd_first and self.block != 'resnest':
            problems.append("avd_first=True only means something with block='resnest'")
        if self.se and self.block != 'resnext':
            problems.append("se=True is only built for block='resnext'")
        if self.se and 0 < self.planes < 4:
            problems.append(f'planes={self.planes} must be at least 4 with se=True: the gate has no channels')
        if problems:
            raise FlaxnetsError('not an architecture: ' + '; '.join(problems))

    @property
    def stage_planes(self) -> tuple[int, int, int, int]:
        """The planes of the four stages."""
        return self.planes, 2 * self.planes, 4 * self.planes, 8 * self.planes

    @property
    def stem_channels(self) -> int:
        """Channels of the stem's output, which is the first feature map (`act1` in timm's terms)."""
        return 2 * self.stem_width if self.deep_stem else self.stem_width

"""What a net is, what a published weights file is, and how its images are prepared: plain data.

Everything here is frozen, validated when made, and turns into JSON and back unchanged, so that a
directory of weights can describe itself. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flaxnets.errors import FlaxnetsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BLOCKS = ('resnext', 'res2net', 'resnest')
CROP_MODES = ('center', 'center_first')
INTERPOLATIONS = ('bilinear', 'bicubic')


@dataclass(frozen=True)
class Arch:
    """One architecture: a four-stage residual net whose block is a field.

    Attributes:
      block: 'resnext' (Xie et al., arXiv 1611.05431), 'res2net' (Gao et al., arXiv 1904.01169) or
        'resnest' (Zhang et al., arXiv 2004.08955).
      layers: blocks in each of the four stages.
      cardinality: groups of the 3x3 convolutions (for ResNeSt, of each radix split).
      base_width: channels per group when a stage has 64 planes.
      scale: Res2Net's number of channel splits; 1 elsewhere.
      radix: ResNeSt's number of splits per cardinal group; 1 is the sigmoid form. 1 elsewhere.
      deep_stem: three 3x3 convolutions in place of one 7x7 (the "D" of ResNet-D).
      stem_width: channels of the 7x7 stem, or of the first two convolutions of the deep stem, whose
        third one makes twice as many.
      avg_down: the shortcut shrinks by average pooling before its 1x1 convolution.
      avd_first: ResNeSt shrinks by average pooling before, not after, the split attention.
      se: a squeeze-and-excitation gate (reduction 16) ends each ResNeXt block.
      planes: of the first stage; each next stage has twice as many, and makes 4 * planes channels.
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
        for field, owner in (('scale', 'res2net'), ('radix', 'resnest')):
            if getattr(self, field) != 1 and self.block != owner:
                problems.append(f'{field}={getattr(self, field)!r} only means something with block={owner!r}')
        if self.avd_first and self.block != 'resnest':
            problems.append("avd_first=True only means something with block='resnest'")
        if self.se and self.block != 'resnext':
            problems.append("se=True is only built for block='resnext'")
        if problems:
            raise FlaxnetsError('not an architecture: ' + '; '.join(problems))

    @property
    def stage_planes(self) -> tuple[int, int, int, int]:
        """Planes of the four stages."""
        return self.planes, 2 * self.planes, 4 * self.planes, 8 * self.planes

    @property
    def stem_channels(self) -> int:
        """Channels that leave the stem, and the first feature map (`act1` in timm's terms)."""
        return 2 * self.stem_width if self.deep_stem else self.stem_width


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a net's input.

    Attributes:
      size: height and width of the square input, in pixels.
      crop_pct: side of the input over the side the image is resized to, in (0, 1].
      crop_mode: 'center': the short side is resized to floor(size / crop_pct), then the centre is
        cut (timm, torchvision). 'center_first': a centred square of crop_pct times the short side is
        cut, then resized to `size` (ResNeSt's authors, `ECenterCrop`).
      interpolation: Pillow's 'bilinear' or 'bicubic', both antialiased.
      mean, std: subtracted from, and divided into, the RGB values scaled to 0..1.
    """

    size: int = 224
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    interpolation: str = 'bilinear'
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        problems = []
        if self.size < 1:
            problems.append(f'size={self.size!r} must be at least 1')
        if not 0 < self.crop_pct <= 1:
            problems.append(f'crop_pct={self.crop_pct!r} must be above 0 and at most 1')
        if self.crop_mode not in CROP_MODES:
            problems.append(f'crop_mode={self.crop_mode!r} is not one of {", ".join(CROP_MODES)}')
        if self.interpolation not in INTERPOLATIONS:
            problems.append(f'interpolation={self.interpolation!r} is not one of {", ".join(INTERPOLATIONS)}')
        if len(self.mean) != 3 or len(self.std) != 3 or any(s <= 0 for s in self.std):
            problems.append(
                f'mean={self.mean!r} and std={self.std!r} must be three numbers each, std positive'
            )
        if problems:
            raise FlaxnetsError('not a preprocessing: ' + '; '.join(problems))

    def __str__(self) -> str:
        how = {'center': 'resize, then centre crop', 'center_first': 'centre crop, then resize'}
        return (
            f'{self.size} px, crop {self.crop_pct:g}, {self.interpolation}, {how[self.crop_mode]}, '
            f'mean {self.mean}, std {self.std}'
        )


@dataclass(frozen=True)
class Accuracy:
    """A published ImageNet-1k validation accuracy, in percent, at a square input of `size` pixels."""

    top1: float
    top5: float | None
    size: int
    source: str


@dataclass(frozen=True)
class Weights:
    """One published weights file.

    Attributes:
      arch: key of the architecture in `flaxnets.zoo.ARCHS`.
      tag: what tells this file from others of the same architecture, as timm tags them
        (`gluon_in1k`); with `arch` it is the file's full name, `resnext50_32x4d.gluon_in1k`.
      urls: where the file is, or was, published; the host most likely to answer comes first.
      hub_id: Hugging Face repository that holds it (`timm/resnest101e.in1k`), or None.
      sha256: leading hexadecimal digits of the file's SHA-256, as published in its name, or None.
      layout: the publisher's key names: 'canonical' (timm, torchvision, Gluon port, the Res2Net and
        ResNeSt authors) or 'mmpretrain'.
      preprocess: how the weights' own evaluation prepares images (timm's default input size).
      test_preprocess: the larger evaluation that the publisher recommends, or None.
      accuracy: published accuracies, the one that `preprocess` reaches first.
      licence: SPDX-like licence of the weights ('unknown' where the publisher names none).
      aliases: other names under which users know exactly this file.
    """

    arch: str
    tag: str
    urls: tuple[str, ...] = ()
    hub_id: str | None = None
    sha256: str | None = None
    layout: str = 'canonical'
    preprocess: Preprocess = Preprocess()
    test_preprocess: Preprocess | None = None
    accuracy: tuple[Accuracy, ...] = ()
    licence: str = 'unknown'
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`arch.tag`, timm's spelling of the full name."""
        return f'{self.arch}.{self.tag}'


@dataclass(frozen=True)
class Config:
    """A net together with what its weights expect: what `flaxnets.config` returns.

    Attributes:
      name: name of the architecture in the zoo.
      arch: the architecture itself.
      preprocess: how images must be prepared.
      num_classes: outputs of the classifier; 0 means none.
      in_chans: input channels.
      weights: the published file that the name stands for, or None where there is none (weights
        trained or fine-tuned by the user).
      classes: the class names of the outputs in order, or None for ImageNet-1k or unknown classes.
      folded: every BatchNorm has been folded into its convolution, for inference only.
    """

    name: str
    arch: Arch
    preprocess: Preprocess = Preprocess()
    num_classes: int = 1000
    in_chans: int = 3
    weights: Weights | None = None
    classes: tuple[str, ...] | None = None
    folded: bool = False


def to_json(value: Any) -> Any:
    """A dataclass of this module as dictionaries and lists that `json.dumps` takes."""
    return dataclasses.asdict(value)


def config_from_json(data: dict[str, Any]) -> Config:
    """The `Config` that `to_json` made `data` from.

    Raises:
      FlaxnetsError: an unknown, missing or ill-valued field, named.
    """
    try:
        weights = data.get('weights')
        return Config(
            **{
                **data,
                'arch': Arch(**_tuples(data['arch'])),
                'preprocess': Preprocess(**_tuples(data['preprocess'])),
                'weights': None if weights is None else _weights_from_json(weights),
                'classes': None if data.get('classes') is None else tuple(data['classes']),
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FlaxnetsError(f'not a configuration of flaxnets: {error}') from error


def _weights_from_json(data: dict[str, Any]) -> Weights:
    test = data.get('test_preprocess')
    return Weights(
        **{
            **_tuples(data),
            'preprocess': Preprocess(**_tuples(data['preprocess'])),
            'test_preprocess': None if test is None else Preprocess(**_tuples(test)),
            'accuracy': tuple(Accuracy(**a) for a in data['accuracy']),
        }
    )


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}

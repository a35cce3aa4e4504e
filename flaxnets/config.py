"""What a net is, what a published weights file is, and how its images are prepared: plain data.

Everything here is frozen, validated when made, and turns into JSON and back unchanged, so that a
directory of weights can describe itself. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from flaxnets.errors import FlaxnetsError, shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CLASS_ORDERS = ('text', 'natural', 'file')
BLOCKS = ('resnext', 'res2net', 'resnest')
CROP_MODES = ('center', 'squash', 'border', 'center_first')
INTERPOLATIONS = ('bilinear', 'bicubic', 'lanczos', 'nearest', 'hamming', 'box')
CHANNEL_ORDERS = ('rgb', 'bgr')


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ''


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, str) for value in values)


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
    """How an image becomes a net's input: what timm's `create_transform` does for evaluation, and more.

    Attributes:
      size: of the input in pixels: one side of a square, or (height, width).
      crop_pct: side of the input over that to which the image is resized; above 0. Above 1 the resized
        image is smaller than the input and stands in its middle.
      crop_mode: 'center': the image is resized, its shape kept, until it just covers size / crop_pct,
        then the centre is cut (timm, torchvision). 'squash': resized to size / crop_pct whatever its
        shape, then the centre is cut. 'border': resized, its shape kept, until it just fits into
        size / crop_pct, the rest filled with the mean colour. 'center_first': a centred part of the
        input's shape, crop_pct times the largest such, is cut, then resized to `size` (ResNeSt's
        authors, `ECenterCrop`).
      interpolation: Pillow's 'bilinear', 'bicubic', 'lanczos', 'hamming' or 'box', all antialiased, or
        'nearest'.
      mean, std: subtracted from, and divided into, the values scaled to 0..1; one for each channel of
        the net's input, in its order, or one for all.
      channel_order: in which the net takes colours, 'rgb' or 'bgr'.
      unsupported: what the weights expect of their images besides, in words, and cannot be given: such
        weights load, but nothing prepares images for them.
    """

    size: int | tuple[int, int] = 224
    crop_pct: float = 0.875
    crop_mode: str = 'center'
    interpolation: str = 'bilinear'
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = 'rgb'
    unsupported: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        sides = self.size if isinstance(self.size, tuple | list) else (self.size, self.size)
        if len(sides) != 2 or not all(_is_whole(side, 1) for side in sides):
            problems.append(f'size={self.size!r} must be at least 1, or (height, width) of such')
        if not _is_finite(self.crop_pct) or self.crop_pct <= 0:
            problems.append(f'crop_pct={self.crop_pct!r} must be above 0')
        for field, choices in (
            ('crop_mode', CROP_MODES),
            ('interpolation', INTERPOLATIONS),
            ('channel_order', CHANNEL_ORDERS),
        ):
            if getattr(self, field) not in choices:
                problems.append(f'{field}={getattr(self, field)!r} is not one of {", ".join(choices)}')
        for field in ('mean', 'std'):
            values = getattr(self, field)
            if not isinstance(values, tuple | list) or not values or not all(map(_is_finite, values)):
                problems.append(f'{field}={values!r} must be a number for each channel, or one for all')
            elif field == 'std' and min(values) <= 0:
                problems.append(f'std={values!r} must be positive')
        if problems:
            raise FlaxnetsError('not a preprocessing: ' + '; '.join(problems))
        plain = {
            'size': sides[0] if sides[0] == sides[1] else tuple(sides),
            'mean': tuple(self.mean),
            'std': tuple(self.std),
        }
        for field, value in plain.items():
            object.__setattr__(self, field, value)

    @property
    def height(self) -> int:
        """Of the net's input, in pixels."""
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        """Of the net's input, in pixels."""
        return self.size if isinstance(self.size, int) else self.size[1]

    def channel_values(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each of so many channels, in the net's order.

        Grey images take the averages of the values of colours.

        Raises:
          FlaxnetsError: there are values for another number of channels.
        """
        both = []
        for field, values in (('mean', self.mean), ('std', self.std)):
            if channels == 1:
                values = (math.fsum(values) / len(values),)
            elif len(values) == 1:
                values *= channels
            if len(values) != channels:
                raise FlaxnetsError(
                    f'{field}={values!r} has {len(values)} values for images of {channels} channels: '
                    'give one for each, or one for all'
                )
            both.append(values)
        return both[0], both[1]

    def changed(self, changes: Iterable[str]) -> Preprocess:
        """The same but for fields given as text: `preprocess.changed(['mean=0.5', 'size=24,48'])`.

        Whoever says how images are prepared knows it, so that nothing is `unsupported` afterwards.

        Args:
          changes: `field=value` each; several numbers with commas between them.

        Raises:
          FlaxnetsError: no such field, or a value that it cannot have.
        """
        values: dict[str, Any] = {'unsupported': ()}
        for change in changes:
            field, _, text = change.partition('=')
            try:
                if field in ('crop_mode', 'interpolation', 'channel_order'):
                    values[field] = text
                elif field == 'size':
                    sides = tuple(map(int, text.split(',')))
                    values[field] = sides[0] if len(sides) == 1 else sides
                elif field == 'crop_pct':
                    values[field] = float(Fraction(text))
                elif field in ('mean', 'std'):
                    values[field] = tuple(float(Fraction(number)) for number in text.split(','))
                else:
                    known = 'size, crop_pct, crop_mode, interpolation, mean, std and channel_order'
                    raise FlaxnetsError(f'{change!r}: images have no {field!r}; they have {known}')
            except (ValueError, ZeroDivisionError, OverflowError) as error:
                if isinstance(error, FlaxnetsError):
                    raise
                raise FlaxnetsError(f'{change!r}: {field} is made of numbers') from error
        return dataclasses.replace(self, **values)

    def __str__(self) -> str:
        how = {
            'center': 'resize, then centre crop',
            'squash': 'resize to the shape of the input, then centre crop',
            'border': 'resize into a border',
            'center_first': 'centre crop, then resize',
        }
        order = '' if self.channel_order == 'rgb' else f', channels {self.channel_order}'
        size = f'{self.size}' if isinstance(self.size, int) else f'{self.height} x {self.width}'
        return (
            f'{size} px, crop {self.crop_pct:g}, {self.interpolation}, {how[self.crop_mode]}, '
            f'mean {self.mean}, std {self.std}{order}'
        )


@dataclass(frozen=True)
class Accuracy:
    """A published ImageNet-1k validation accuracy, in percent, at a square input of `size` pixels."""

    top1: float
    top5: float | None
    size: int
    source: str

    def __post_init__(self) -> None:
        tops = [top for top in (self.top1, self.top5) if top is not None]
        if self.top1 is None or not all(_is_finite(top) and 0 <= top <= 100 for top in tops):
            raise FlaxnetsError(
                f'not an accuracy: top1={self.top1!r} and top5={self.top5!r} must be percentages'
            )
        if not _is_whole(self.size, 1):
            raise FlaxnetsError(f'not an accuracy: size={self.size!r} must be at least 1')


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

    def __post_init__(self) -> None:
        texts = {'arch': self.arch, 'tag': self.tag, 'layout': self.layout, 'licence': self.licence}
        problems = [
            f'{field}={value!r} must be text' for field, value in texts.items() if not _is_text(value)
        ]
        for field in ('urls', 'aliases'):
            if not _are_texts(getattr(self, field)):
                problems.append(f'{field}={getattr(self, field)!r} must be a tuple of texts')
        if self.sha256 is not None and not (
            _is_text(self.sha256) and set(self.sha256) <= set('0123456789abcdef')
        ):
            problems.append(f'sha256={self.sha256!r} must be hexadecimal digits')
        if not isinstance(self.preprocess, Preprocess):
            problems.append(f'preprocess={self.preprocess!r} must be a Preprocess')
        if problems:
            raise FlaxnetsError('not published weights: ' + '; '.join(problems))

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
      class_order: how the training of weights that do not name their classes sorted them: 'text'
        (torchvision, mmpretrain) or 'natural' (timm), see `flaxnets.classes.in_order`; 'file' if a file of
        its own said; None if that is not known.
      folded: every BatchNorm has been folded into its convolution, for inference only.
    """

    name: str
    arch: Arch
    preprocess: Preprocess = Preprocess()
    num_classes: int = 1000
    in_chans: int = 3
    weights: Weights | None = None
    classes: tuple[str, ...] | None = None
    class_order: str | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not _is_text(self.name):
            problems.append(f'name={self.name!r} must be text')
        for field, kind in (('arch', Arch), ('preprocess', Preprocess), ('weights', Weights | None)):
            if not isinstance(getattr(self, field), kind):
                problems.append(f'{field}={getattr(self, field)!r} is of another type')
        for field, least in (('num_classes', 0), ('in_chans', 1)):
            if not _is_whole(getattr(self, field), least):
                problems.append(f'{field}={getattr(self, field)!r} must be a whole number from {least} on')
        if self.classes is not None:
            if not _are_texts(self.classes):
                problems.append(f'classes={shown(self.classes)} must be a tuple of names')
            elif len(self.classes) != self.num_classes:
                problems.append(f'has {len(self.classes)} classes for num_classes={self.num_classes!r}')
        if self.class_order not in (None, *CLASS_ORDERS):
            problems.append(f'class_order={self.class_order!r} is not one of {", ".join(CLASS_ORDERS)}')
        if not isinstance(self.folded, bool):
            problems.append(f'folded={self.folded!r} must be True or False')
        if problems:
            raise FlaxnetsError('not a configuration: ' + '; '.join(problems))


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

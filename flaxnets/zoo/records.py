"""The records that describe published weights files, and nets with their weights.

They are frozen, checked when they are made, and can be turned into JSON and back, so that a directory of
weights can describe itself. JAX is not imported.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..checks import are_texts, is_finite, is_text, is_whole
from ..errors import FlaxnetsError, shown
from ..images.preprocess import Preprocess
from ..nets.arch import Arch

CLASS_ORDERS = ('text', 'natural', 'file')


@dataclass(frozen=True)
class Accuracy:
    """A published accuracy. Those of `Weights` are on ImageNet-1k's validation set.

    Attributes:
      top1, top5: accuracies in percent; top5 may be None.
      size: side of the square input in pixels.
      source: who published it, and in which file.
    """

    top1: float
    top5: float | None
    size: int
    source: str

    def __post_init__(self) -> None:
        tops = [top for top in (self.top1, self.top5) if top is not None]
        if self.top1 is None or not all(is_finite(top) and 0 <= top <= 100 for top in tops):
            raise FlaxnetsError(
                f'not an accuracy: top1={self.top1!r} and top5={self.top5!r} must be percentages'
            )
        if not is_whole(self.size, 1):
            raise FlaxnetsError(f'not an accuracy: size={self.size!r} must be at least 1')


@dataclass(frozen=True)
class Weights:
    """One published weights file.

    Attributes:
      arch: key of the architecture in `flaxnets.zoo.ARCHS`.
      tag: timm's tag (`gluon_in1k`), which tells this file from others of the same architecture. Together
        with `arch` it is the file's full name, `resnext50_32x4d.gluon_in1k`.
      urls: where the file is, or was, published; the host most likely to answer comes first.
      hub_id: Hugging Face repository that holds it (`timm/resnest101e.in1k`), or None.
      sha256: leading hexadecimal digits of the file's SHA-256, as published in its name, or None.
      layout: whose names the file's tensors have, as `convert` finds it: 'canonical' where they are timm's.
      preprocess: how the weights' own evaluation prepares images (timm's default input size).
      test_preprocess: preprocessing for the larger evaluation that the publisher recommends, or None.
      accuracy: published accuracies; the first is that of `preprocess`.
      licence: SPDX-like licence of the weights ('unknown' where the publisher names none).
      aliases: other names that users know for exactly this file.
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
        problems = [f'{field}={value!r} must be text' for field, value in texts.items() if not is_text(value)]
        for field in ('urls', 'aliases'):
            if not are_texts(getattr(self, field)):
                problems.append(f'{field}={getattr(self, field)!r} must be a tuple of texts')
        if self.sha256 is not None and not (
            is_text(self.sha256) and set(self.sha256) <= set('0123456789abcdef')
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
    """Describes a net and what its weights expect. `flaxnets.config` returns it.

    Attributes:
      name: name of the architecture in the zoo.
      arch: the architecture itself.
      preprocess: how images must be prepared; of a net with one channel, with the average of the colours'
        values.
      num_classes: outputs of the classifier; 0 means none.
      in_chans: input channels.
      weights: the published file that the name stands for, or None where there is none (weights
        trained or fine-tuned by the user).
      classes: the class names of the outputs in order, or None for ImageNet-1k or unknown classes.
      class_order: for weights without class names, the order of the classes in training: 'text'
        (torchvision, mmpretrain) or 'natural' (timm), see `flaxnets.zoo.classes.in_order`; 'file' if a
        separate file gave it; None if it is not known.
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
        if not is_text(self.name):
            problems.append(f'name={self.name!r} must be text')
        for field, kind in (('arch', Arch), ('preprocess', Preprocess), ('weights', Weights | None)):
            if not isinstance(getattr(self, field), kind):
                problems.append(f'{field}={getattr(self, field)!r} is of another type')
        for field, least in (('num_classes', 0), ('in_chans', 1)):
            if not is_whole(getattr(self, field), least):
                problems.append(f'{field}={getattr(self, field)!r} must be a whole number from {least} on')
        if self.classes is not None:
            if not are_texts(self.classes):
                problems.append(f'classes={shown(self.classes)} must be a tuple of names')
            elif len(self.classes) != self.num_classes:
                problems.append(f'has {len(self.classes)} classes for num_classes={self.num_classes!r}')
        if self.class_order not in (None, *CLASS_ORDERS):
            problems.append(f'class_order={self.class_order!r} is not one of {", ".join(CLASS_ORDERS)}')
        if not isinstance(self.folded, bool):
            problems.append(f'folded={self.folded!r} must be True or False')
        if problems:
            raise FlaxnetsError('not a configuration: ' + '; '.join(problems))
        if self.in_chans == 1:  # so that what is shown and written is what is applied
            mean, std = self.preprocess.channel_values(1)
            object.__setattr__(self, 'preprocess', dataclasses.replace(self.preprocess, mean=mean, std=std))


def to_json(value: Any) -> Any:
    """A record of this module as dictionaries and lists for `json.dumps`."""
    return dataclasses.asdict(value)


def config_from_json(data: dict[str, Any]) -> Config:
    """The inverse of `to_json`, for a `Config`.

    Raises:
      FlaxnetsError: a field is unknown or missing, or has a bad value.
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

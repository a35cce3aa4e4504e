"""Gathers the licence and the accuracy of weights, for the model card."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxnets import zoo
from flaxnets.checks import is_finite
from flaxnets.errors import FlaxnetsError, shown
from flaxnets.store.files import read_small
from flaxnets.zoo.records import Config

UNKNOWN = 'unknown'  # the hub's own word

# Nets of the zoo that timm has under no name (the tests ask it).
NOT_IN_TIMM = frozenset(
    [
        'resnext101_32x48d',
        'resnext152_32x4d',
        'resnest50_fast_1s1x64d',
        'resnest50_fast_2s1x64d',
        'resnest50_fast_4s1x64d',
        'resnest50_fast_1s2x40d',
        'resnest50_fast_2s2x40d',
        *zoo.TINY_ARCHS,
    ]
)


@dataclass(frozen=True)
class Measured:
    """A measured accuracy.

    Attributes:
      data: the name of the data set.
      top1, top5: in percent; `top5` is None if it is not known.
      images: how many were evaluated, if that is known.
      source: who measured it; None is this package.
    """

    data: str
    top1: float
    top5: float | None = None
    images: int | None = None
    source: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a model card says of weights beside the net itself.

    Attributes:
      licence: the hub's identifier of the weights' licence ('apache-2.0'), or 'unknown'.
      accuracy: the accuracies that are known; the first was measured with the weights' preprocessing.
    """

    licence: str = UNKNOWN
    accuracy: tuple[Measured, ...] = ()


def gather(config: Config, licence: str | None = None, report: str | Path | None = None) -> Facts:
    """Gathers the licence and the accuracy of weights.

    Args:
      config: the configuration of the weights.
      licence: the licence that the user states; published weights keep the one of their publisher.
      report: path of the result.json that `python -m train eval --out` wrote for them.

    Raises:
      FlaxnetsError: the licence is not that of the published weights, or is written unlike the hub's
        identifiers; the file is the report of another net, or no report.
    """
    published = config.weights
    if licence is not None and not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', licence):
        raise FlaxnetsError(
            f'licence={licence!r}: a licence is named as the hub does, as in apache-2.0 or cc-by-nc-4.0'
        )
    if published and licence and licence != published.licence:
        raise FlaxnetsError(
            f'licence={licence!r}: {published.name} was published under {published.licence}, which stays'
        )
    own = licence or (published.licence if published else UNKNOWN)
    if report:
        return Facts(own, (_of_report(Path(report), config),))
    accuracy = () if published is None or config.num_classes != 1000 else published.accuracy
    known = (Measured('ImageNet-1k', a.top1, a.top5, None, f'{a.source}, {a.size} px') for a in accuracy)
    return Facts(own, tuple(known))


def _of_report(path: Path, config: Config) -> Measured:
    content = read_small(path, 'report')
    try:
        said = json.loads(content)
        name, data, top1 = said['architecture'], said['data'], said['top1']
        top5, images = said.get('top5'), said.get('images')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FlaxnetsError(f'{path}: not the result.json of an evaluation: {_why(error)}') from error
    numbers = [top for top in (top1, top5) if top is not None]
    if top1 is None or not all(is_finite(top) and 0 <= top <= 100 for top in numbers):
        raise FlaxnetsError(f'{path}: top1={shown(top1)} and top5={shown(top5)} are no percentages')
    if name != config.name:
        raise FlaxnetsError(f'{path}: was written for {shown(name)}, these weights are of {config.name}')
    if (count := _outputs(said)) not in (None, config.num_classes):
        raise FlaxnetsError(f'{path}: judged among {count} classes, these weights have {config.num_classes}')
    return Measured(_data_name(str(data)), top1, top5 if config.num_classes > 5 else None, images)


def _data_name(data: str) -> str:
    """'folder:/home/me/flowers' as 'flowers': the card does not say where data lie."""
    return re.split(r'[:/\\]', data.rstrip('/\\'))[-1] or data


def _outputs(said: dict[str, Any]) -> Any:
    """How many outputs the evaluated net had, where the report says so."""
    return said.get('among_classes') if said.get('among') == 'all' else None


def _why(error: Exception) -> str:
    return f'no {error}' if isinstance(error, KeyError) else str(error)

"""The 1000 classes of ImageNet-1k, in the order of the nets' outputs."""

from __future__ import annotations

import functools
import importlib.resources


def class_names() -> tuple[str, ...]:
    """The WordNet synonyms of each class, the best known first (`tench, Tinca tinca`).

    They do not tell every class apart: 134 (the bird) and 517 (the machine) are both `crane`.
    """
    return tuple(names for _, names in _classes())


def wnids() -> tuple[str, ...]:
    """The WordNet id of each class (`n01440764`), which names its folder in ImageNet's train set."""
    return tuple(wnid for wnid, _ in _classes())


@functools.cache
def _classes() -> tuple[tuple[str, str], ...]:
    text = importlib.resources.files('flaxnets').joinpath('imagenet_classes.tsv').read_text('utf-8')
    rows = (line.partition('\t') for line in text.splitlines() if not line.startswith('#'))
    return tuple((wnid, names) for wnid, _, names in rows)

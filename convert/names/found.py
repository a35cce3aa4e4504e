"""`Found`: what is known of the weights in a file. Each stage of the converter fills in more of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .anchors import Place
from .class_names import Said
from .image_values import ImageSettings

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Found:
    """The tensors of one net, and what their file says of it.

    `convert.names.wrappers.unwrap` takes them out of what was saved; `convert.names.layouts.to_canonical`
    gives them timm's names and fills in what is known by then.

    Attributes:
      state: name -> tensor, in the file's order; the arrays are the file's own.
      notes: what was taken, stripped, renamed and left out, in words.
      said: what the file says of its classes, unchecked.
      named: what the file calls its net (`arch`), unchecked; None if nothing.
      differences: why the file's net computes something else than ours, by its configuration or its layers.
      head_differences: the same by the layers around the classifier in a pickled model.
      images: how the training prepared images for evaluation.
      author: `__author__` of a detectron2 file: whose weights its tools renamed.
      place: where in the file's names the net is; None if none of these nets is there.
      bare: layer name -> class, for the layers without tensors of a pickled model; else empty.
      kinds: layer name -> class with its Python module, for all layers of a pickled model; else empty.
      projection: True if the net is one of the two encoders of self-supervised training, whose heads are
        projections and no classifiers.
      layout: whose names they were: 'canonical' if they were timm's already, else one of the names that
        `_publisher` in layouts.py and the records of stages.py give.
      headless: True if the file has a classifier and it was left out.
      classes: the classifier's classes in order, where the file names them.
      class_order: as `flaxnets.Config.class_order`.
    """

    state: Tensors
    notes: tuple[str, ...] = ()
    said: Said = field(default_factory=Said)
    named: str | None = None
    differences: tuple[str, ...] = ()
    head_differences: tuple[str, ...] = ()
    images: ImageSettings = field(default_factory=ImageSettings)
    author: object = None
    place: Place | None = None
    bare: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    projection: bool = False
    layout: str = ''
    headless: bool = False
    classes: tuple[str, ...] | None = None
    class_order: str | None = None

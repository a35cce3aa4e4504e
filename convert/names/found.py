"""What is known of the weights in a file: one record, to which each stage of the converter adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .anchors import Place
from .class_names import Said
from .image_settings import ImageSettings

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
      differences: what makes its net compute something else than those here, by its own configuration.
      around: the same of what stands around its classifier in a pickled model.
      images: how its training prepared them for evaluation.
      author: whose weights detectron2's tools say that they have renamed.
      place: where in the file's names the net is; None if it is none that is known.
      bare: of a pickled model, its layers without tensors by name, and their classes.
      kinds: of a pickled model, all its layers by name, and their classes.
      projection: True if the net is one of the two of self-supervised training, whose heads project.
      layout: whose names they were: 'canonical' (timm, torchvision, the Gluon port, the Res2Net and
        ResNeSt authors, Facebook), 'mmpretrain', 'mmdetection', 'cadene', 'detectron2', or how they were
        listed.
      headless: True if there was a classifier, and it was left out.
      classes: the classifier's classes in order, where the file names them.
      class_order: as `flaxnets.Config.class_order`.
    """

    state: Tensors
    notes: tuple[str, ...] = ()
    said: Said = field(default_factory=Said)
    named: str | None = None
    differences: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
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

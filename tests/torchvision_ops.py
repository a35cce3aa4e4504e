"""Lets torchvision be imported beside a build of torch that its compiled part does not fit.

timm imports torchvision, which registers Python kernels for two operators when imported. Where its
compiled part does not load (the CPU build of torch), the operators do not exist and the import
fails, although nothing here uses them. Call `define_missing` before timm is imported.
"""

from __future__ import annotations

import contextlib

import torch

_libraries: list[torch.library.Library] = []  # an operator lives only as long as its library


def define_missing() -> None:
    """Declares `torchvision::nms` and `torchvision::qnms` if the real ones are absent."""
    with contextlib.suppress(Exception):
        import torchvision.extension  # noqa: F401  (loads the compiled operators where they fit)
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library('torchvision', 'FRAGMENT')
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            _libraries.append(library)

"""Nets that end after their first stage, for tests of what is done with a net.

Tracing and compiling a net is what takes the time of a short run, and more stages would prove nothing of it.
`python -m short_nets` is `python -m train` with such nets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from jax import Array

from flaxnets.nets.resnet import ResNet

_whole = ResNet.forward_maps


def _first_stage(net: ResNet, x: Array, train: bool = False, upto: int = 4) -> list[Array]:
    return _whole(net, x, train, min(upto, 1))


@contextmanager
def short_nets() -> Iterator[None]:
    """Within it every net has its stem, its first stage and its classifier only, and no other parameters."""
    with mock.patch.object(ResNet, 'forward_maps', _first_stage):
        yield


if __name__ == '__main__':
    from train.__main__ import main

    with short_nets():
        sys.exit(main(sys.argv[1:]))

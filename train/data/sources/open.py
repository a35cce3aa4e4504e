"""Opens the source that a description such as `folder:flowers` stands for.

A new kind is a module beside this one, with a `Labelled` and a function that opens it, and a row of `KINDS`.
The row makes it known to `open_source`, to its error and to the help of `--data`; tests ask for the kind in
the tables of docs/training.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from flaxnets.errors import FlaxnetsError

from . import parts, store
from .arrays import open_arrays, open_digits
from .base import Labelled, Source
from .folder import open_folder
from .tar import open_tar
from .tfds import open_tfds

_Open = Callable[[str, str, bool, bool], Labelled]


def _by_parts(open_part: Callable[[str, parts.Part], Labelled]) -> _Open:
    """Makes a `Kind.open` of a function that opens whole parts: reads `split`, and takes percents."""

    def opened(rest: str, split: str, training: bool, whole: bool) -> Labelled:
        part = parts.parse(split, training, whole)
        source = open_part(rest, part)
        return parts.percents(source, *part.percent) if part.percent else source

    return opened


class Kind(NamedTuple):
    """A kind of source.

    Attributes:
      form: how it is described: `NAME`, or `NAME:` and what `open` is given.
      open: given what stands after the colon, and `split`, `training` and `whole` of `open_source`.
      any_channels: whether its images may have any number of channels, as pixels in memory can. Image files
        have one or three.
    """

    form: str
    open: _Open
    any_channels: bool = False


KINDS = (
    Kind('digits', _by_parts(lambda _, part: open_digits(part))),
    Kind('folder:PATH', _by_parts(open_folder)),
    Kind('tar:PATTERN', _by_parts(open_tar)),
    Kind('arrays:FILE.npz', _by_parts(open_arrays), any_channels=True),
    # TensorFlow Datasets reads `split` itself, `train+test[:10%]` too.
    Kind('tfds:NAME', lambda rest, split, training, _: open_tfds(rest, split, training)),
)
ANY_CHANNELS = ' or '.join(kind.form for kind in KINDS if kind.any_channels)
FORMS = f'{", ".join(kind.form for kind in KINDS[:-1])} or {KINDS[-1].form}'


def open_source(spec: str, split: str, training: bool, *, whole: bool = False) -> Source:
    """Opens the images that a description stands for.

    Args:
      spec: of one of the forms in `KINDS`; docs/training.md says what each may hold and what is left out.
      split: the part: '' takes the usual one; `train[:80%]` takes 80 % of each class of a part (from TFDS,
        the first 80 % of its records), and `[:80%]` takes them of data without parts.
      training: whether the usual part is the one for training or for evaluation.
      whole: data without parts is taken as it is; otherwise that is an error.

    Raises:
      FlaxnetsError: there are no such images, or `spec` has none of the forms.
    """
    name, _, rest = spec.partition(':')
    for kind in KINDS:
        wanted, _, argument = kind.form.partition(':')
        if spec == kind.form or (name == wanted and rest and argument):
            try:
                return kind.open(os.path.expanduser(rest), split, training, whole)
            finally:
                store.forget()
    raise FlaxnetsError(f'data={spec!r} is not understood: it can be {FORMS}')

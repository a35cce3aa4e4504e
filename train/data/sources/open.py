"""From a description (`folder:flowers`) to the source that it stands for: here a new kind of source is added.

A new kind is a module beside this one with a `Labelled` and a function that opens it, an entry of `OPENERS`,
and its form in `KINDS`, in the docstring of `open_source` and in the help of `--data` (`train/__main__.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from flaxnets.errors import FlaxnetsError

from . import parts, store
from .arrays import open_arrays, open_digits
from .base import Labelled, Source
from .folder import open_folder
from .tar import open_tar
from .tfds import open_tfds

KINDS = 'digits, folder:PATH, tar:PATTERN, arrays:FILE.npz or tfds:NAME'
# By what stands before the colon. Each is given what stands after it and the part that is meant; percents of
# the part are taken here. `digits` has no colon, and `tfds` understands parts by itself.
OPENERS: dict[str, Callable[[str, parts.Part], Labelled]] = {
    'folder': open_folder,
    'tar': open_tar,
    'arrays': open_arrays,
}


def open_source(spec: str, split: str, training: bool, *, whole: bool = False) -> Source:
    """The images that a description stands for.

    - `digits`: 1797 handwritten digits of 8 x 8 pixels, bundled.
    - `folder:PATH`: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg; classes in the order of their names.
    - `tar:PATTERN`: tars of CLASS/NAME.jpg, one tar a class, or KEY.jpg with KEY.cls; {split} stands for the
      part.
    - `arrays:FILE.npz`: x_train, y_train, x_test, y_test.
    - `tfds:NAME`: a prepared data set in array_record files; TensorFlow is not needed.

    docs/training.md has tables of what opens and what is left out.

    Args:
      spec: one of these.
      split: the part: '' takes the usual one; `train[:80%]` takes a share of each class (of TFDS, of its
        order), and `[:80%]` that of data which has no parts.
      training: which part is the usual one.
      whole: data without parts is taken as it is; otherwise that is an error.

    Raises:
      FlaxnetsError: no such images, or not of that form.
    """
    try:
        return _opened(spec, split, training, whole)
    finally:
        store.forget()


def _opened(spec: str, split: str, training: bool, whole: bool) -> Source:
    kind, _, rest = spec.partition(':')
    rest = os.path.expanduser(rest)
    if kind == 'tfds' and rest:
        return open_tfds(rest, split, training)
    part = parts.parse(split, training, whole)
    if spec == 'digits':
        source = open_digits(part)
    elif kind in OPENERS and rest:
        source = OPENERS[kind](rest, part)
    else:
        raise FlaxnetsError(f'data={spec!r} is not understood: it can be {KINDS}')
    return parts.percents(source, *part.percent) if part.percent else source

"""From a description to the source that it stands for."""

from __future__ import annotations

import os
from collections.abc import Callable

from flaxnets.errors import FlaxnetsError

from .arrays import open_arrays, open_digits
from .base import SPLITS, Source
from .folder import open_folder
from .tar import open_tar
from .tfds import open_tfds

KINDS = 'digits, folder:PATH, tar:PATTERN, arrays:FILE.npz or tfds:NAME'


def open_source(spec: str, split: str, training: bool) -> Source:
    """The images that a description stands for.

    - `digits`: 1797 handwritten digits of 8 x 8 pixels, bundled.
    - `folder:PATH`: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg; classes in the order of their names.
    - `tar:PATTERN`: shards of CLASS/NAME.jpg, or of KEY.jpg with KEY.cls; {split} stands for the part.
    - `arrays:FILE.npz`: x_train, y_train, x_test, y_test.
    - `tfds:NAME`: a prepared data set in array_record files; TensorFlow is not needed.

    Args:
      spec: one of these.
      split: name of the part; '' takes the usual one.
      training: which part is the usual one.

    Raises:
      FlaxnetsError: no such images, or not of that form.
    """
    kind, _, rest = spec.partition(':')
    openers: dict[str, Callable[[str, tuple[str, ...]], Source]] = {
        'folder': open_folder,
        'tar': open_tar,
        'arrays': open_arrays,
        'tfds': open_tfds,
    }
    splits = (split,) if split else SPLITS[training]
    if spec == 'digits':
        return open_digits(splits)
    if kind not in openers or not rest:
        raise FlaxnetsError(f'data={spec!r} is not understood: it can be {KINDS}')
    return openers[kind](os.path.expanduser(rest), splits)

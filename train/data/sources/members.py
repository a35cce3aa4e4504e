"""`Member`: a file in a tar, and where it lies."""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      shard: path of the tar.
      name: its name in the tar; INNER.tar/NAME in a tar that lies in it.
      offset, size: where in the shard its bytes begin, and how many there are.
      image: whether it is an image.
      folder: the innermost folder that it lies in, '' if none.
      tar: the innermost tar that it lies in, without folder and ending.
    """

    shard: str
    name: str
    offset: int
    size: int
    image: bool
    folder: str
    tar: str

"""A file in a tar, by where it lies."""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      shard: path of the tar.
      name: in it; of a tar in the tar, INNER.tar/NAME.
      offset, size: where its bytes are in the shard, and how many.
      image: whether it is one.
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

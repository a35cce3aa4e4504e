"""The errors for input that cannot be used.

Their text says what is wrong, where, and what to do. The commands print it without a traceback. Any other
error is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import reprlib


class FlaxnetsError(ValueError):
    """A name, a value or a file cannot be used. The message is for the person who gave it."""


class CheckpointError(FlaxnetsError):
    """A weights file or directory is damaged, hostile, or not what it was taken for."""


class ImageError(FlaxnetsError):
    """An image cannot be read, or must not be (too large, not an image, no faithful RGB form)."""


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 120
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write very long integers as text.
        bits = value.bit_length()
        return super().repr_int(value, level) if bits <= 256 else f'an integer of {bits:,} bits'

    def repr_instance(self, value: object, level: int) -> str:
        # Only the type is shown: a file can hold a few lists that contain each other so often that their
        # repr() would never end.
        if isinstance(value, bytes):
            return repr(value[:60])
        return repr(value) if value is None or isinstance(value, (bool, float)) else type(value).__name__


_SHORT_REPR = _ShortRepr()


def shown(value: object) -> str:
    """`repr(value)` for a message: cut short, since the value may come from a hostile file."""
    return _SHORT_REPR.repr(value)

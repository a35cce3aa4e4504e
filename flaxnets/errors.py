"""The errors that mean "what you gave cannot be used", as opposed to a defect of ours.

Their text is the user's next step: what is wrong, where, and what to do. The command lines print it
without a traceback; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import reprlib


class FlaxnetsError(ValueError):
    """Bad input: a name, a value, a file. The message is written for the person who gave it."""


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
        # Python refuses to write very long ones as text.
        bits = value.bit_length()
        return super().repr_int(value, level) if bits <= 256 else f'an integer of {bits:,} bits'

    def repr_instance(self, value: object, level: int) -> str:
        # repr() of a container of ours could take for ever: a few shared lists nest without end.
        if isinstance(value, bytes):
            return repr(value[:60])
        return repr(value) if value is None or isinstance(value, (bool, float)) else type(value).__name__


_SHORT_REPR = _ShortRepr()


def shown(value: object) -> str:
    """`repr(value)` fit for a message: short, whatever a file put into it."""
    return _SHORT_REPR.repr(value)

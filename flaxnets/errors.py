"""The errors that mean "what you gave cannot be used", as opposed to a defect of ours.

Their text is the user's next step: what is wrong, where, and what to do. The command lines print it
without a traceback; everything else is a bug and keeps its traceback.
"""


class FlaxnetsError(ValueError):
    """Bad input: a name, a value, a file. The message is written for the person who gave it."""


class CheckpointError(FlaxnetsError):
    """A weights file or directory is damaged, hostile, or not what it was taken for."""


class ImageError(FlaxnetsError):
    """An image cannot be read, or must not be (too large, not an image, no faithful RGB form)."""

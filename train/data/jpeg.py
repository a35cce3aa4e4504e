"""Decodes JPEG files at the scale that a crop needs (the setting decoding='scaled').

Where the crop is at least twice as large as what it is resized to, the decoder makes an image of a half, a
quarter or an eighth of the size: it leaves frequencies out where Pillow filters pixels. All else is as in the
exact form.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from flaxnets.images.transforms import header, loaded

from .planes import PILLOWS, decoded

SCALES = (8, 4, 2)

Box = tuple[int, int, int, int]


class JpegPart:
    """A part of a JPEG file, not decoded yet, with what crops need of Pillow's own class."""

    def __init__(self, file: JpegImageFile, in_chans: int, name: str, box: Box) -> None:
        self._file, self._in_chans, self._name, self._box = file, in_chans, name, box

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        left, top, right, bottom = self._box
        return right - left, bottom - top

    def crop(self, box: Box) -> JpegPart:
        left, top, _, _ = self._box
        inner = (left + box[0], top + box[1], left + box[2], top + box[3])
        return JpegPart(self._file, self._in_chans, self._name, inner)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Decodes the file, which can be done once, and resizes the part."""
        file, box = self._file, self._box
        scale = next((s for s in SCALES if all(h >= s * w for h, w in zip(self.size, size, strict=True))), 1)
        if scale > 1:
            file.draft(file.mode, (file.width // scale, file.height // scale))
        image = loaded(file, self._in_chans, self._name)
        if scale == 1:
            return image.crop(box).resize(size, resample)
        left, top, right, bottom = (edge / scale for edge in box)
        within = (left, top, min(right, image.width), min(bottom, image.height))
        return image.resize(size, resample, box=within)


def decoded_late(image: Any, in_chans: int, name: str) -> Any:
    """As `decoded`, but a JPEG file is decoded only when a crop of it is resized.

    Raises:
      ImageError: as `decoded` raises it; damage inside a JPEG file is found only then.
    """
    if isinstance(image, bytes) and in_chans in PILLOWS:
        file = header(image, name)
        if isinstance(file, JpegImageFile) and len(file.tile) == 1:
            return JpegPart(file, in_chans, name, (0, 0, *file.size))
    return decoded(image, in_chans, name)

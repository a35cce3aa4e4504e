"""Images of any number of channels: bands of a satellite, slices of a scan, several stains.

Pillow has no such images. Each channel is one of its grey ones, cut and resized like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.images.preprocess import Preprocess
from flaxnets.images.transforms import Transform, decode

from .sources import ANY_CHANNELS, Source

PILLOWS = (1, 3)  # channels of the images that Pillow has: grey and RGB
Pixels = npt.NDArray[np.uint8]


class Planes:
    """An image as grey Pillow images, one for each channel, with what crops need of Pillow's own class."""

    def __init__(self, planes: Sequence[Image.Image]) -> None:
        self.planes = tuple(planes)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.planes[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        return Planes([plane.crop(box) for plane in self.planes])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Planes:
        return Planes([plane.resize(size, resample) for plane in self.planes])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.stack([np.asarray(plane) for plane in self.planes], -1).astype(dtype or np.uint8)


def decoded(image: bytes | npt.NDArray[Any], in_chans: int, name: str) -> Any:
    """A stored image: Pillow's where it has such images (`flaxnets.images.transforms.decode`), else `Planes`.

    Raises:
      ImageError: it cannot be read, or has another number of channels.
    """
    if in_chans in PILLOWS:
        return decode(image, in_chans, name)
    if isinstance(image, bytes):
        raise ImageError(
            f'{name}: a file has no images of {in_chans} channels; give arrays [N, H, W, {in_chans}]'
        )
    if image.ndim != 3 or image.shape[2] != in_chans or image.dtype != np.uint8:
        raise ImageError(f'{name}: {image.dtype}{list(image.shape)} is not uint8 [H, W, {in_chans}]')
    return Planes([Image.fromarray(np.ascontiguousarray(image[..., i])) for i in range(in_chans)])


def plane_pixels(preprocess: Preprocess, in_chans: int) -> Callable[[Planes], Pixels]:
    """What `Transform.pixels` does to grey images, for each channel with its own mean."""
    values = zip(*preprocess.channel_values(in_chans), strict=True)
    each = [
        Transform(replace(preprocess, mean=(mean,), std=(std,), channel_order='rgb'), 1)
        for mean, std in values
    ]

    def pixels(image: Planes) -> Pixels:
        return np.concatenate(
            [one.pixels(plane) for one, plane in zip(each, image.planes, strict=True)], axis=-1
        )

    return pixels


def check_channels(source: Source, in_chans: int) -> str | None:
    """Checks that a net of so many input channels can take a source's images.

    Returns:
      Which of the images' channels are not used, in words; None if all are.

    Raises:
      FlaxnetsError: the images have another number of channels.
    """
    channels = source.channels
    if channels is None and in_chans in PILLOWS:
        return None
    if channels is None:
        raise FlaxnetsError(
            f'in_chans={in_chans}: {source.name} are image files, which give 3 channels or 1; images of '
            f'{in_chans} channels come from {ANY_CHANNELS}, uint8 [N, H, W, {in_chans}]'
        )
    if channels not in ((1, 3, 4) if in_chans in PILLOWS else (in_chans,)):
        raise FlaxnetsError(f'in_chans={in_chans}, but the images of {source.name} have {channels} channels')
    if channels == 4 and in_chans != 4:
        return (
            f'the images of {source.name} have 4 channels: they are taken as RGB and transparency, which is '
            'dropped; in_chans=4 takes all'
        )
    return None

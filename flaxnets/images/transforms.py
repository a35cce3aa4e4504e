"""Turns images into the arrays that weights expect.

Pillow decodes and resizes, NumPy normalises; JAX is not imported. Pillow's antialiased 8-bit resizing is
what the published accuracies were measured with. The resizing of JAX, OpenCV and TensorFlow differs from it.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFile, ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import FlaxnetsError, ImageError
from .preprocess import INTERPOLATIONS, Preprocess

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 178_956_970  # Pillow, too, refuses larger pictures as decompression bombs

FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}

# How a file begins, and the decoder that opens it.
_DECODERS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb'\xff\xd8\xff'), JpegImageFile),
    (re.compile(rb'\x89PNG\r\n\x1a\n'), PngImageFile),
    (re.compile(rb'RIFF'), WebPImageFile),
    (re.compile(rb'GIF8[79]a'), GifImageFile),
    (re.compile(rb'BM'), BmpImageFile),
    (re.compile(rb'II[*+]\0|MM\0[*+]'), TiffImageFile),
    (re.compile(rb'P[1-6]'), PpmImageFile),
    (re.compile(rb'....ftyp(avif|avis|mif1|msf1)', re.DOTALL), AvifImageFile),
    (re.compile(rb'\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n'), Jpeg2KImageFile),
)
# Files that begin like images but are text or sounds. Only files without the name of an image are tested.
_LOOKALIKES = re.compile(rb'RIFF(?!....WEBP)|BM(?!....\0\0\0\0)|P[1-6](?!\s)', re.DOTALL)


@dataclass(frozen=True)
class Transform:
    """Turns images into the input of a net; `flaxnets.transform` makes one.

    An image is the path of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000 file (recognised by its
    content, not its name; of an animation, the first frame), a Pillow image, or an array: uint8 or uint16
    `[H, W]`, `[H, W, 1]`, `[H, W, 3]` (RGB) or `[H, W, 4]` (alpha last).

    Transparency is dropped, not blended, as in torchvision and timm. 16-bit grey values, which Pillow alone
    would clip to white, are scaled to 8 bits (65535 becomes 255). Damage that Pillow decodes without an
    error, such as changed bytes in the middle of a JPEG, is not noticed.

    Attributes:
      preprocess: size, crop, interpolation and normalisation.
      in_chans: 3, or 1 for grey: Pillow's 'L', normalised with the average of the three means and
        of the three standard deviations.
      exif: turn the picture as its EXIF orientation says. Off by default, because timm and torchvision
        do not turn it and the published accuracies were measured that way.
      max_pixels: a picture with more pixels, as stored or after resizing, is refused before it takes memory.
    """

    preprocess: Preprocess
    in_chans: int = 3
    exif: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.in_chans not in (1, 3):
            raise FlaxnetsError(
                f'no transform makes in_chans={self.in_chans} channels, only 3 (RGB) or 1 (grey): '
                f'prepare arrays [N, H, W, {self.in_chans}] yourself and give them to the net'
            )
        if self.preprocess.unsupported:
            reasons = '; '.join(self.preprocess.unsupported)
            raise FlaxnetsError(f'these weights expect images that flaxnets cannot prepare: {reasons}')
        if self.max_pixels < 1:
            raise FlaxnetsError(f'max_pixels={self.max_pixels!r} must be at least 1')

    def __call__(self, image: ImageLike) -> Float32[np.ndarray, 'height width {self.in_chans}']:
        """The net's input for one image.

        Returns:
          (value / 255 - mean) / std, with colours in the net's order.

        Raises:
          ImageError: the image cannot be read, or must not be.
        """
        mean, std = np.array(self.preprocess.channel_values(self.in_chans), np.float32)
        pixels = self.pixels(image)
        if self.preprocess.channel_order == 'bgr':
            pixels = pixels[..., ::-1]
        unit = pixels.astype(np.float32) / np.float32(255)
        normalised: npt.NDArray[np.float32] = (unit - mean) / std
        return normalised

    def batch(self, images: Iterable[ImageLike]) -> Float32[np.ndarray, 'n height width {self.in_chans}']:
        """The net's input for several images, in order.

        Raises:
          ImageError: an image cannot be read, or must not be; the message counts images from 0.
        """
        if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, 'ndim', 4) != 4:
            raise ImageError('a batch is a list of images, or an array [N, H, W, C]; this is one image')
        rows = []
        for index, image in enumerate(images):
            try:
                rows.append(self(image))
            except ImageError as error:
                raise ImageError(f'image {index} of the batch: {error}') from error
        if not rows:
            return np.empty((0, self.preprocess.height, self.preprocess.width, self.in_chans), np.float32)
        return np.stack(rows)

    def pixels(self, image: ImageLike) -> UInt8[np.ndarray, 'height width {self.in_chans}']:
        """The resized and cropped image before normalisation: RGB (also for a 'bgr' net) or grey.

        Raises:
          ImageError: the image cannot be read, or must not be.
        """
        height, width = self.preprocess.height, self.preprocess.width
        return np.array(self._shape(*self._opened(image))).reshape(height, width, self.in_chans)

    def five_crops(self, image: ImageLike) -> UInt8[np.ndarray, '5 height width {self.in_chans}']:
        """The four corners and the centre of the resized image, as torchvision's `FiveCrop` cuts them.

        Returns:
          The crops, before normalisation: top left, top right, bottom left, bottom right, centre.

        Raises:
          ImageError: the image cannot be read, or must not be.
          FlaxnetsError: the images that these weights expect have no corners (`check_corners`).
        """
        self.check_corners()
        p = self.preprocess
        whole, _ = self._opened(image)
        resized = whole.resize(self._resized(*whole.size), FILTERS[p.interpolation])
        right, bottom = resized.width - p.width, resized.height - p.height
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        crops = [_cut(resized, (x, y, x + p.width, y + p.height)) for x, y in corners]
        crops.append(self._centred(resized))
        shape = (p.height, p.width, self.in_chans)
        return np.stack([np.array(crop).reshape(shape) for crop in crops])

    def check_corners(self) -> None:
        """Checks that `five_crops` can be cut.

        Raises:
          FlaxnetsError: images are not resized to more than the input's size, so that they have no corners.
        """
        p = self.preprocess
        if p.crop_mode not in ('center', 'squash') or p.crop_pct >= 1:
            raise FlaxnetsError(
                f'several crops are cut of an image that is resized to more than the input; here {p}: '
                'crop_pct below 1 with crop_mode center or squash'
            )

    def _opened(self, image: ImageLike) -> tuple[Image.Image, str]:
        """The decoded image, at its own size, and its name in messages."""
        if isinstance(image, str | os.PathLike):
            name = os.fsdecode(image)
            with _open(name) as file:
                opened = _read_header(file, name)
                return loaded(opened, self.in_chans, name, self.max_pixels, self.exif), name
        if isinstance(image, Image.Image):
            name = str(getattr(image, 'filename', '')) or 'the image'
        else:
            image, name = _from_array(image), 'the array'
        return loaded(image, self.in_chans, name, self.max_pixels, self.exif), name

    def _shape(self, image: Image.Image, name: str) -> Image.Image:
        """Crops and resizes an image to the size of the net's input, and rounds as each mode's authors do."""
        p = self.preprocess
        resample = FILTERS[p.interpolation]
        if p.crop_mode == 'center_first':
            left, top, right, bottom = box = self._centre(*image.size)
            for sides in ((right - left, bottom - top), (p.width, p.height)):
                _check_pixels(sides, f'{name}, cut and resized to {p.width} x {p.height}', self.max_pixels)
            return _cut(image, box).resize((p.width, p.height), resample)
        width, height = self._resized(*image.size)
        resized = f'{name}, resized to {width} x {height}'
        _check_pixels((max(width, p.width), max(height, p.height)), resized, self.max_pixels)
        return self._centred(image.resize((width, height), resample))

    def _centre(self, width: int, height: int) -> tuple[int, int, int, int]:
        """left, top, right and bottom of the part that 'center_first' cuts out."""
        p = self.preprocess
        if p.height == p.width:
            cut_width = cut_height = p.crop_pct * min(width, height)
        else:
            scale = p.crop_pct * min(width / p.width, height / p.height)
            cut_width, cut_height = scale * p.width, scale * p.height
        left, top = round((width - cut_width) / 2), round((height - cut_height) / 2)
        return left, top, max(round(left + cut_width), left + 1), max(round(top + cut_height), top + 1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which a picture is resized before its middle is taken."""
        p = self.preprocess
        # timm rounds down. For a small input and a large crop_pct that would be 0.
        goal_width, goal_height = (max(1, math.floor(side / p.crop_pct)) for side in (p.width, p.height))
        if p.crop_mode == 'squash':
            return goal_width, goal_height
        if p.crop_mode == 'center' and goal_width == goal_height:  # torchvision's rounding
            short = min(width, height)
            return int(goal_width * width / short), int(goal_width * height / short)
        ratios = height / goal_height, width / goal_width
        ratio = max(ratios) if p.crop_mode == 'border' else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _centred(self, image: Image.Image) -> Image.Image:
        """The middle of a picture, of the input's size, filled up where the picture is smaller."""
        p = self.preprocess
        (left, right), (top, bottom) = (
            _middle(have, want) for have, want in zip(image.size, (p.width, p.height), strict=True)
        )
        fill: Any = 0
        if p.crop_mode == 'border':
            mean = p.channel_values(self.in_chans)[0]
            mean = mean[::-1] if p.channel_order == 'bgr' else mean
            colours = tuple(min(max(round(255 * value), 0), 255) for value in mean)
            fill = colours if self.in_chans == 3 else colours[0]
        return _cut(image, (left, top, right, bottom), fill)


def _middle(have: int, want: int) -> tuple[int, int]:
    """Where `want` pixels begin and end that share their middle with `have` pixels, as torchvision rounds."""
    start = -((want - have) // 2) if want > have else round((have - want) / 2)
    return start, start + want


def decode(image: bytes | npt.NDArray[Any], in_chans: int, name: str) -> Image.Image:
    """Decodes an image at its own size, to Pillow's mode 'RGB' (`in_chans=3`) or 'L' (1).

    Args:
      image: the bytes of a file, or an array as `Transform` takes it.
      in_chans: 3 or 1.
      name: its name in messages.

    Raises:
      ImageError: it cannot be read, or must not be; so is a picture of more than `MAX_PIXELS`.
    """
    opened = _read_header(io.BytesIO(image), name) if isinstance(image, bytes) else _from_array(image)
    return loaded(opened, in_chans, name)


def header(image: bytes, name: str) -> Image.Image:
    """Opens an image file but reads only its header; `loaded` decodes the rest.

    Args:
      image: the bytes of the file.
      name: its name in messages.

    Raises:
      ImageError: it is not an image, or must not be decoded: it has more than `MAX_PIXELS`.
    """
    opened = _read_header(io.BytesIO(image), name)
    _check_pixels(opened.size, name, MAX_PIXELS)
    return opened


def is_image(start: bytes) -> bool:
    """Whether a file that begins with these 16 bytes is an image that `decode` opens, unless damaged."""
    known = any(beginning.match(start) for beginning, _ in _DECODERS)
    return known and not _LOOKALIKES.match(start)


def loaded(
    image: Image.Image, in_chans: int, name: str, max_pixels: int = MAX_PIXELS, exif: bool = False
) -> Image.Image:
    """Decodes an image that is open, such as by `header`, to Pillow's mode 'RGB' or 'L'.

    Args:
      image: the image.
      in_chans: 3 or 1.
      name: its name in messages.
      max_pixels: pictures with more pixels are refused before they are decoded.
      exif: turn the picture as its EXIF orientation says.

    Raises:
      ImageError: it cannot be read, or must not be.
    """
    _check_pixels(image.size, name, max_pixels)
    try:
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise ImageError(_damaged(name, error)) from error
    return _to_mode(image, 'RGB' if in_chans == 3 else 'L', name)


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f'{name}: {width} x {height} pixels are more than max_pixels={max_pixels}; '
            'make the picture smaller, or raise max_pixels if you trust it'
        )


def _open(name: str) -> BinaryIO:
    try:
        regular = stat.S_ISREG(os.stat(name).st_mode)  # opening a FIFO would wait for ever
        file = open(name, 'rb') if regular else None  # noqa: SIM115 - the caller closes it
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, 'strerror', None) or error
        raise ImageError(f'{name}: cannot be opened ({reason}); check the path') from error
    if file is None:
        raise ImageError(f'{name}: not a file but a directory or a device; give the path of one image')
    return file


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """The image in `file`, not decoded yet.

    `Image.open` warns of large pictures, or refuses them, by a limit of the whole process, which cannot be
    changed safely while other threads run. Pillow's decoders have no limit when they are called directly.
    """
    start = file.read(16)
    file.seek(0)
    if not start:
        raise ImageError(f'{name}: the file is empty; fetch it again')
    decoder = next((d for beginning, d in _DECODERS if beginning.match(start)), None)
    if decoder is None:
        raise ImageError(
            f'{name}: not a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000 image: '
            f'it begins with {start!r}; fetch it again, or convert it'
        )
    try:
        image = decoder(file, name)
    except Exception as error:  # SyntaxError, OSError, ValueError, struct.error, Pillow's own, ...
        raise ImageError(_damaged(name, error)) from error
    if isinstance(image, TiffImageFile) and image.mode.startswith('I;16'):
        bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)
        if bits != (16,) or photometric != 1:  # Pillow would neither scale 12 bits nor invert the greys
            raise ImageError(
                f'{name}: a grey TIFF with BitsPerSample={bits} and PhotometricInterpretation={photometric} '
                'has no faithful 8-bit form here; convert it to 8 bits'
            )
    return image


def _damaged(name: str, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    return f'{name}: cannot be decoded, it is damaged or truncated ({reason}); replace it'


def _from_array(array: Any) -> Image.Image:
    if not hasattr(array, '__array__'):
        raise ImageError(
            f'{type(array).__name__} is not an image: give a path, a Pillow image or a uint8 array [H, W, 3]'
        )
    array = np.asarray(array)
    if array.dtype.kind != 'u' or array.dtype.itemsize > 2:
        raise ImageError(
            f'an array of {array.dtype} is not an image: give uint8 0..255 '
            '(of values in 0..1: np.round(255 * x).astype(np.uint8))'
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f'an array of shape {array.shape} is not an image: give [H, W, 3], [H, W, 1] or [H, W]'
        )
    if array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(_to_bytes(array) if array.dtype.itemsize == 2 else array)


def _to_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scales 0..65535 to 0..255: the value divided by 257 and rounded (257 is odd, so there are no ties)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    """`image` in the mode 'RGB' or 'L'; values are scaled or refused, never clipped."""
    if image.mode == 'F':
        raise ImageError(f'{name}: floating-point pixels have no agreed range; convert it to 8 bits')
    if image.mode.startswith('I'):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ImageError(
                f'{name}: 32-bit pixels in {low}..{high} have no agreed range (16 bits, 0..65535, do); '
                'convert it to 8 bits'
            )
        image = Image.fromarray(_to_bytes(values))
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.copy()  # it may be the caller's
        del image.info['transparency']  # dropped below anyway, but Pillow would warn
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise ImageError(f'{name}: {image.mode} pixels have no {mode} form ({error}); convert it') from error


def _cut(image: Image.Image, box: tuple[int, int, int, int], fill: Any = 0) -> Image.Image:
    """`image.crop(box)` without its warning about large pictures; `fill` is the colour outside the image."""
    left, top, right, bottom = box
    cut = Image.new(image.mode, (right - left, bottom - top), fill)
    cut.paste(image, (-left, -top))
    return cut

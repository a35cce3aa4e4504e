"""Preprocessing against timm (torchvision's Pillow path), Pillow and pixels written by hand."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import sklearn.datasets  # type: ignore[import-untyped]
from PIL import Image, ImageFile
from timm.data.transforms_factory import create_transform

from flaxnets import transform
from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Preprocess
from flaxnets.images.transforms import ImageLike, Transform
from flaxnets.nets.arch import Arch
from flaxnets.zoo.records import Config

BILINEAR = [(224, 0.875), (256, 0.875), (176, 0.875), (224, 0.965)]
BICUBIC = [(224, 0.875), (320, 0.909), (416, 0.928), (288, 0.95), (288, 1.0), (160, 0.95)]
SETTINGS = [(*s, 'bilinear') for s in BILINEAR] + [(*s, 'bicubic') for s in BICUBIC]

IDENTITY = Transform(Preprocess(size=8, crop_pct=1.0))  # leaves an 8 x 8 picture as it is
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


@cache
def photographs() -> dict[str, Image.Image]:
    """Real photographs, and cut-outs of them in sizes where rounding shows."""
    skimage_files = Path(skimage.data.__file__).parent
    sklearn_files = Path(sklearn.datasets.__file__).parent / 'images'
    files = [skimage_files / f for f in ('chelsea.png', 'coffee.png', 'astronaut.png', 'rocket.jpg')]
    files += [sklearn_files / f for f in ('china.jpg', 'flower.jpg')]
    files.append(Path(__file__).parents[1] / 'examples/cat.jpg')
    images = {file.stem: Image.open(file).convert('RGB') for file in files}
    for name in ('500x33', '97x131', '1x1', '2x3', '224x224', '300x224', '257x341'):
        width, height = map(int, name.split('x'))
        images[name] = images['coffee'].crop((40, 50, 40 + width, 50 + height))
    images['33x500'] = images['astronaut'].crop((200, 0, 233, 500))
    return images


def timm_array(image: Image.Image, preprocess: Preprocess, **options: Any) -> np.ndarray:
    """What timm's evaluation makes of `image`, as [H, W, C]."""
    evaluation = create_transform(
        input_size=(3, preprocess.height, preprocess.width),
        interpolation=preprocess.interpolation,
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        **{'mean': preprocess.mean, 'std': preprocess.std} | options,
    )
    array: np.ndarray = evaluation(image).permute(1, 2, 0).numpy()
    return array


@pytest.mark.parametrize(('size', 'crop_pct', 'interpolation'), SETTINGS)
def test_center_equals_timm(size: int, crop_pct: float, interpolation: str) -> None:
    preprocess = Preprocess(size, crop_pct, 'center', interpolation)
    make = transform(preprocess)
    for name, image in photographs().items():
        pixels = make.pixels(image)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, timm_array(image, preprocess, normalize=False), name)


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
def test_the_whole_product_equals_timm(crop_mode: str, interpolation: str) -> None:
    """4 sizes x 6 percentages here, 432 with all modes and filters, each on six of the pictures in turn."""
    pictures = list(photographs().items())
    sizes = (64, 7, (24, 48), (100, 101))  # the last is rounded to a square by some percentages
    turns = itertools.cycle(pictures)
    for size, crop_pct in itertools.product(sizes, (0.5, 0.875, 0.965, 1.0, 1.1, 1.5)):
        preprocess = Preprocess(size, crop_pct, crop_mode, interpolation, (0.485, 0.1, 1.0))
        make = transform(preprocess)
        for name, image in itertools.islice(turns, 6):
            if crop_mode == 'border' and max(image.size) > 9 * min(image.size):
                continue  # timm leaves a side without pixels
            expected = timm_array(image, preprocess, normalize=False)
            np.testing.assert_array_equal(make.pixels(image), expected, f'{preprocess} of {name}')


def test_a_thin_picture_keeps_a_line_inside_its_border() -> None:
    make = transform(Preprocess(8, 1.0, 'border', mean=(0, 0, 0)))
    pixels = make.pixels(np.full((1, 100, 3), 255, np.uint8))
    assert (pixels.max(axis=(1, 2)) > 0).tolist() == [False] * 3 + [True] + [False] * 4


def test_channels_in_the_order_of_the_net() -> None:
    image = photographs()['33x500']
    bgr = Preprocess((64, 48), 1.0, 'border', mean=(0.1, 0.2, 0.9), std=(0.5, 0.6, 0.7), channel_order='bgr')
    rgb = dataclasses.replace(bgr, mean=bgr.mean[::-1], std=bgr.std[::-1], channel_order='rgb')
    np.testing.assert_array_equal(transform(bgr).pixels(image), transform(rgb).pixels(image))
    np.testing.assert_array_equal(transform(bgr)(image), timm_array(image, rgb)[..., ::-1])


@pytest.mark.parametrize('name', ['china', '97x131'])
def test_normalised_equals_timm(name: str) -> None:
    preprocess = Preprocess(224, 0.875, 'center', 'bicubic', (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    image = photographs()[name]
    array = transform(preprocess)(image)
    assert array.shape == (224, 224, 3)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, timm_array(image, preprocess), rtol=0, atol=1e-6)


def test_grey_net_equals_timm_on_grey_image() -> None:
    preprocess = Preprocess(160, 0.95, 'center', 'bicubic')
    image = photographs()['chelsea']
    make = transform(Config('net', Arch('resnext', (1, 1, 1, 1)), preprocess, in_chans=1))
    expected = timm_array(
        image.convert('L'), preprocess, mean=(sum(IMAGENET_MEAN) / 3,), std=(sum(IMAGENET_STD) / 3,)
    )
    assert make(image).shape == (160, 160, 1)
    np.testing.assert_allclose(make(image), expected, rtol=0, atol=1e-6)
    assert make.batch([image, image]).shape == (2, 160, 160, 1)


def test_config_gives_its_preprocess_and_options() -> None:
    preprocess = Preprocess(size=8, crop_pct=1.0)
    config = Config('net', Arch('resnext', (1, 1, 1, 1)), preprocess)
    assert transform(config, exif=True, max_pixels=9) == Transform(preprocess, 3, True, 9)
    assert transform(preprocess, exif=True, max_pixels=9) == Transform(preprocess, 3, True, 9)


# Boxes worked by hand: side = crop_pct * short, left = round((width - side) / 2), ties to even,
# right = round(left + side).
@pytest.mark.parametrize(
    ('width', 'height', 'size', 'crop_pct', 'box'),
    [
        (300, 224, 224, 224 / 256, (52, 14, 248, 210)),  # side 196
        (101, 75, 256, 256 / 288, (17, 4, 84, 71)),  # side 66.67: 17.17, 83.67; 4.17, 70.67
        (99, 98, 32, 0.5, (25, 24, 74, 73)),  # side 49: left 25, top 24.5 -> 24
        (500, 33, 320, 320 / 352, (235, 2, 265, 32)),  # side 30
        (1, 1, 224, 0.875, (0, 0, 1, 1)),
        (1, 1, 8, 0.3, (0, 0, 1, 1)),  # round(0.3) would leave nothing
    ],
)
def test_center_first(
    width: int, height: int, size: int, crop_pct: float, box: tuple[int, int, int, int]
) -> None:
    image = photographs()['coffee'].crop((0, 0, width, height))
    expected = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    make = transform(Preprocess(size, crop_pct, 'center_first', 'bicubic'))
    np.testing.assert_array_equal(make.pixels(image), np.asarray(expected))


def test_batch() -> None:
    make = transform(Preprocess(size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1)))
    images: list[ImageLike] = [RGB, Image.fromarray(GREY)]
    batch = make.batch(iter(images))
    assert batch.dtype == np.float32
    expected = np.stack([RGB, np.stack([GREY] * 3, axis=-1)]) / 255
    np.testing.assert_allclose(batch, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(make.batch(np.stack([RGB, RGB])), np.stack([batch[0], batch[0]]))
    assert make.batch([]).shape == (0, 8, 8, 3)


@pytest.mark.parametrize('images', ['a.jpg', Path('a.jpg'), Image.new('RGB', (8, 8)), RGB])
def test_batch_of_one_image_is_refused(images: Any) -> None:
    with pytest.raises(ImageError, match='a batch is a list'):
        IDENTITY.batch(images)


def test_batch_names_the_bad_image() -> None:
    with pytest.raises(ImageError, match=r'image 1 of the batch: gone\.jpg: cannot be opened'):
        IDENTITY.batch([RGB, 'gone.jpg'])


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


SIXTEEN = np.full((8, 8), 65535, np.uint16)
SIXTEEN[0] = [0, 128, 129, 257, 385, 386, 32768, 65406]
SIXTEEN_AS_8 = np.full((8, 8), 255, np.uint8)
SIXTEEN_AS_8[0] = [0, 0, 1, 1, 1, 2, 128, 254]  # over 257, rounded: 127.5 -> 128, 254.498 -> 254


@pytest.mark.parametrize(
    ('array', 'expected'),
    [
        (RGB, RGB),
        (GREY, as_rgb(GREY)),
        (GREY[..., None], as_rgb(GREY)),
        (np.dstack([RGB, GREY]), RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (SIXTEEN, as_rgb(SIXTEEN_AS_8)),
        (SIXTEEN.astype('>u2')[..., None], as_rgb(SIXTEEN_AS_8)),
        (RGB.astype(np.uint16) * 257, RGB),
    ],
    ids=['RGB', 'HW', 'HW1', 'RGBA', 'strided', 'uint16', 'big-endian', 'RGB16'],
)
def test_arrays(array: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(IDENTITY.pixels(array), expected)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (RGB.astype(np.float32) / 255, r'float32 is not an image: give uint8 0\.\.255'),
        (RGB.astype(np.int64), 'int64 is not an image'),
        (RGB.astype(np.uint32), 'uint32 is not an image'),
        (GREY > 9, 'bool is not an image'),
        (RGB[..., :2], r'shape \(8, 8, 2\) is not an image: give \[H, W, 3\]'),
        (RGB[None], r'shape \(1, 8, 8, 3\)'),
        (RGB.transpose(2, 0, 1), r'shape \(3, 8, 8\)'),
        (RGB[:0], r'shape \(0, 8, 3\)'),
        (b'\xff\xd8\xff', 'bytes is not an image: give a path'),
        (None, 'NoneType is not an image'),
    ],
)
def test_bad_arrays_are_refused(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        IDENTITY.pixels(image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file written by hand; `rows` is the uncompressed data, filter bytes included."""
    header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


PALETTED = Image.fromarray(GREY // 64).convert('L')
PALETTED.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
PALETTED_RGB = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)[GREY // 64]
BILEVEL = Image.fromarray(GREY).convert('1', dither=Image.Dither.NONE)
TRANSPARENT = np.dstack([RGB, np.zeros_like(GREY)])


@pytest.mark.parametrize(
    ('file', 'image', 'options', 'expected'),
    [
        ('rgb.png', Image.fromarray(RGB), {}, RGB),
        ('rgb.bmp', Image.fromarray(RGB), {}, RGB),
        ('rgb.tif', Image.fromarray(RGB), {'compression': 'tiff_lzw'}, RGB),
        ('rgb.ppm', Image.fromarray(RGB), {}, RGB),
        ('rgb.webp', Image.fromarray(RGB), {'lossless': True}, RGB),
        ('png-inside.JPEG', Image.fromarray(RGB), {'format': 'PNG'}, RGB),
        ('grey.png', Image.fromarray(GREY), {}, as_rgb(GREY)),
        ('grey-transparent.png', Image.fromarray(GREY), {'transparency': 4}, as_rgb(GREY)),
        ('bilevel.png', BILEVEL, {}, as_rgb(np.where(GREY > 127, 255, 0))),
        ('palette.png', PALETTED, {}, PALETTED_RGB),
        ('palette-one-transparent.png', PALETTED, {'transparency': 1}, PALETTED_RGB),
        ('palette-alpha.png', PALETTED, {'transparency': bytes([0, 99, 255, 3])}, PALETTED_RGB),
        ('palette-transparent.gif', PALETTED, {'transparency': 1}, PALETTED_RGB),
        ('rgba.png', Image.fromarray(TRANSPARENT), {}, RGB),
        ('la.png', Image.fromarray(np.dstack([GREY, GREY])), {}, as_rgb(GREY)),
        ('grey16.png', Image.fromarray(SIXTEEN), {}, as_rgb(SIXTEEN_AS_8)),
        ('grey16.tif', Image.fromarray(SIXTEEN), {}, as_rgb(SIXTEEN_AS_8)),
        ('int32.tif', Image.fromarray(SIXTEEN.astype(np.int32)), {}, as_rgb(SIXTEEN_AS_8)),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_files(
    file: str, image: Image.Image, options: dict[str, Any], expected: np.ndarray, tmp_path: Path
) -> None:
    image.save(tmp_path / file, **options)
    np.testing.assert_array_equal(IDENTITY.pixels(tmp_path / file), expected)
    np.testing.assert_array_equal(IDENTITY.pixels(str(tmp_path / file)), expected)


def test_files_written_by_hand(tmp_path: Path) -> None:
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in RGB.astype(np.uint16) * 257)
    (tmp_path / 'rgb16.png').write_bytes(png(8, 8, 16, 2, rows))
    np.testing.assert_array_equal(IDENTITY.pixels(tmp_path / 'rgb16.png'), RGB)
    (tmp_path / 'grey16.pgm').write_bytes(b'P5 8 8 65535\n' + SIXTEEN.astype('>u2').tobytes())
    np.testing.assert_array_equal(IDENTITY.pixels(tmp_path / 'grey16.pgm'), as_rgb(SIXTEEN_AS_8))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(IDENTITY.pixels(tmp_path / 'a.gif')[0, 0], [255, 0, 0])


@pytest.mark.parametrize('channels', [1, 3])
def test_cmyk_jpeg_is_not_inverted(channels: int, tmp_path: Path) -> None:
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path / 'red.jpg')  # with Adobe's marker
    pixels = Transform(IDENTITY.preprocess, channels).pixels(tmp_path / 'red.jpg')
    expected = [255, 0, 0] if channels == 3 else [76]  # 0.299 * 255
    np.testing.assert_allclose(pixels.reshape(-1, channels), np.tile(expected, (64, 1)), atol=2)


@pytest.mark.parametrize(
    ('mode', 'expected'),
    [('YCbCr', RGB), ('I;16B', as_rgb(SIXTEEN_AS_8)), ('RGBX', RGB), ('P', PALETTED_RGB)],
)
def test_modes_of_pillow_images(mode: str, expected: np.ndarray) -> None:
    if mode == 'I;16B':
        image = Image.frombytes(mode, (8, 8), SIXTEEN.astype('>u2').tobytes())
    else:
        image = PALETTED.copy() if mode == 'P' else Image.fromarray(RGB).convert(mode)
        image.info['transparency'] = bytes(4)
    np.testing.assert_allclose(IDENTITY.pixels(image), expected, atol=4 if mode == 'YCbCr' else 0)
    assert mode == 'I;16B' or image.info == {'transparency': bytes(4)}  # the caller's, left alone


def test_exif_orientation_is_off_by_default(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(RGB).save(tmp_path / 'turned.png', exif=exif)
    np.testing.assert_array_equal(IDENTITY.pixels(tmp_path / 'turned.png'), RGB)
    turned = Transform(IDENTITY.preprocess, exif=True).pixels(tmp_path / 'turned.png')
    np.testing.assert_array_equal(turned, np.rot90(RGB, -1))


@cache
def encoded(format_name: str) -> bytes:
    buffer = io.BytesIO()
    photographs()['300x224'].save(buffer, format_name)
    return buffer.getvalue()


def test_corrupt_middle_decodes_as_pillow_decodes_it(tmp_path: Path) -> None:
    data = bytearray(encoded('JPEG'))
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    (tmp_path / 'a.jpg').write_bytes(data)
    with Image.open(tmp_path / 'a.jpg') as image:
        expected = timm_array(image.convert('RGB'), Preprocess(), normalize=False)
    np.testing.assert_array_equal(transform(Preprocess()).pixels(tmp_path / 'a.jpg'), expected)


BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    'truncated.jpg': (lambda: encoded('JPEG')[:5000], r'damaged or truncated \(image file is truncated'),
    'header-only.jpg': (lambda: encoded('JPEG')[:100], 'damaged or truncated'),
    'truncated.png': (lambda: encoded('PNG')[:50_000], r'damaged or truncated \(image file is truncated'),
    'truncated.webp': (lambda: encoded('WEBP')[:2000], 'damaged or truncated'),
    'truncated.gif': (lambda: encoded('GIF')[:20_000], 'damaged or truncated'),
    'truncated.bmp': (lambda: encoded('BMP')[:20_000], 'damaged or truncated'),
    'truncated.tif': (lambda: encoded('TIFF')[:20_000], 'damaged or truncated'),
    'truncated.ppm': (lambda: encoded('PPM')[:20_000], 'damaged or truncated'),
    'empty.jpg': (lambda: b'', 'the file is empty'),
    'page.jpg': (lambda: b'<!DOCTYPE html><html>404', r"not a JPEG, PNG.*begins with b'<!DOCTYPE html>"),
    'text.ppm': (lambda: b'P5rose is a rose is a rose', 'damaged or truncated'),
    'sound.webp': (lambda: b'RIFF\x24\0\0\0WAVEfmt ' + bytes(32), 'damaged or truncated'),
    'noise.bmp': (lambda: b'BM' + bytes(range(100)), 'damaged or truncated'),
    'noise.tif': (lambda: b'II*\0' + bytes(range(100)), 'damaged or truncated'),
    'noise.gif': (lambda: b'GIF89a' + bytes(100), 'damaged or truncated'),
    'bomb.png': (
        lambda: png(20000, 20000, 1, 0, bytes(9)),
        '20000 x 20000 pixels are more than max_pixels=178956970',
    ),
    'float.pfm': (lambda: b'Pf 2 2 -1.0\n' + bytes(16), 'not a JPEG, PNG'),
    'vector.svg': (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not a JPEG, PNG'),
    'fake.eps': (lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9', 'not a JPEG, PNG'),
}


@pytest.mark.parametrize('file', BAD_FILES)
def test_bad_files_are_refused_by_name(file: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[file]
    (tmp_path / file).write_bytes(content())
    with pytest.raises(ImageError, match=message) as caught:
        IDENTITY(tmp_path / file)
    assert str(caught.value).startswith(f'{tmp_path / file}: ')
    assert '\n' not in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.jpg')
    for path in (tmp_path, tmp_path / 'pipe.jpg'):
        with pytest.raises(ImageError, match=f'{path}: not a file but a directory or a device'):
            IDENTITY(path)
    for path in (tmp_path / 'gone.jpg', tmp_path / 'a\0b.jpg'):
        with pytest.raises(ImageError, match=r'cannot be opened \(.+\); check the path'):
            IDENTITY(path)


@pytest.mark.parametrize(
    ('array', 'message'),
    [
        (np.full((8, 8), 65536, np.int32), r'32-bit pixels in 65536\.\.65536 have no agreed range'),
        (np.full((8, 8), -1, np.int32), r'32-bit pixels in -1\.\.-1'),
        (np.zeros((8, 8), np.float32), 'floating-point pixels have no agreed range'),
    ],
)
def test_ranges_nobody_agreed_on_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f'the image: {message}'):
        IDENTITY(Image.fromarray(array))
    Image.fromarray(array).save(tmp_path / 'a.tif')
    with pytest.raises(ImageError, match=rf'a\.tif: {message}'):
        IDENTITY(tmp_path / 'a.tif')


def test_grey_tiff_that_pillow_would_misread_is_refused(tmp_path: Path) -> None:
    Image.fromarray(SIXTEEN).save(tmp_path / 'a.tif')
    data = (tmp_path / 'a.tif').read_bytes()
    entry = struct.pack('<HHIHH', 262, 3, 1, 1, 0)  # PhotometricInterpretation: 1, black is zero
    assert data.count(entry) == 1
    (tmp_path / 'a.tif').write_bytes(data.replace(entry, struct.pack('<HHIHH', 262, 3, 1, 0, 0)))
    with pytest.raises(ImageError, match=r'a\.tif: a grey TIFF with .*PhotometricInterpretation=0'):
        IDENTITY(tmp_path / 'a.tif')


def test_mode_without_rgb_form_is_refused() -> None:
    with pytest.raises(ImageError, match='the image: La pixels have no RGB form'):
        IDENTITY(Image.new('La', (8, 8)))


@pytest.mark.parametrize('crop_mode', ['center', 'center_first'])
@pytest.mark.parametrize('extension', ['jpg', 'png', 'webp', 'bmp', 'gif', 'ppm'])
def test_pixel_limit_is_ours_not_pillows(
    crop_mode: str, extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f'a.{extension}'
    photographs()['300x224'].save(file)
    preprocess = Preprocess(crop_mode=crop_mode)
    # So that Pillow would warn of this picture, as of one of 100 million pixels, and of its crop.
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 35_000)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(file):
        pass
    assert transform(preprocess, max_pixels=90_000).pixels(file).shape == (224, 224, 3)
    with pytest.raises(ImageError, match='300 x 224 pixels are more than max_pixels=67199'):
        transform(preprocess, max_pixels=67_199).pixels(file)


def test_pixel_limit_holds_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs()['300x224'].save(tmp_path / 'a.png')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: pytest.fail('decoded'))
    with Image.open(tmp_path / 'a.png') as image, pytest.raises(ImageError, match=r'a\.png: 300 x 224'):
        transform(Preprocess(), max_pixels=1000)(image)
    with pytest.raises(ImageError, match='300 x 224'):
        transform(Preprocess(), max_pixels=1000)(tmp_path / 'a.png')


def test_line_that_would_be_resized_beyond_the_limit_is_refused() -> None:
    line = np.zeros((1, 5000, 3), np.uint8)
    with pytest.raises(ImageError, match='resized to 1280000 x 256'):
        transform(Preprocess())(line)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [({'in_chans': 4}, r'in_chans=4 .*prepare arrays \[N, H, W, 4\]'), ({'max_pixels': 0}, 'max_pixels=0')],
)
def test_bad_transforms_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FlaxnetsError, match=message):
        Transform(Preprocess(), **fields)


def test_images_that_cannot_be_prepared_are_refused() -> None:
    with pytest.raises(FlaxnetsError, match='five crops'):
        transform(Preprocess(unsupported=('five crops',)))

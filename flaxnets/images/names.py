"""Which files in a folder or a tar are images by their names, and which are left out."""

from __future__ import annotations

# A file with one of these suffixes counts as an image, damaged or not; of any other the first bytes decide.
IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.jp2', '.j2k'),
)
SNIFFED = 16  # bytes that `flaxnets.images.transforms.is_image` needs
# What systems and programs put into folders unasked, besides names that begin with a dot; in lower case.
CLUTTER = frozenset(
    {
        '__macosx',
        '@eadir',
        '@recycle',
        '#recycle',
        '$recycle.bin',
        'system volume information',
        'lost+found',
        '__pycache__',
        'thumbs.db',
        'ehthumbs.db',
        'desktop.ini',
    }
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: hidden, or a system's own."""
    return name.lower() in CLUTTER or (name.startswith('.') and name not in ('.', '..'))


def named_as_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def natural(name: str) -> str:
    """A name as text that can be written anywhere: bytes that are not UTF-8 are escaped."""
    return name.encode('utf-8', 'backslashreplace').decode()

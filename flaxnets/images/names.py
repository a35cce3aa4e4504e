"""Decides by their names which files of a folder or a tar are images, and which are ignored."""

from __future__ import annotations

# A file with one of these suffixes counts as an image, even if damaged; otherwise its first bytes decide.
IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.jp2', '.j2k'),
)
SNIFFED = 16  # bytes that `flaxnets.images.transforms.is_image` needs
# Files and folders that systems and programs create by themselves, in lower case.
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
    """Whether a file or folder of this name is ignored: it begins with a dot, or belongs to a system."""
    return name.lower() in CLUTTER or (name.startswith('.') and name not in ('.', '..'))


def named_as_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def natural(name: str) -> str:
    """A name as valid UTF-8: bytes that are not are escaped."""
    return name.encode('utf-8', 'backslashreplace').decode()

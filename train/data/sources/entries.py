"""Which of the names in a folder or a tar are images, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence

# What is an image by its name alone, damaged or not; anything else is asked for its first bytes.
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
EXAMPLES = 3  # of what is left out


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out: hidden, or a system's own."""
    return name.lower() in CLUTTER or (name.startswith('.') and name not in ('.', '..'))


def named_as_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def natural(name: str) -> str:
    """A name as text that can be written anywhere: bytes that are not UTF-8 are escaped."""
    return name.encode('utf-8', 'backslashreplace').decode()


def some(names: Sequence[str], most: int = EXAMPLES) -> str:
    """The first of several names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(natural, names[:most])) + more


class LeftOut:
    """Counts what is left out, by reason, and remembers a few names."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def notes(self) -> tuple[str, ...]:
        return tuple(f'{len(names)} {reason}: {some(names)}' for reason, names in sorted(self._names.items()))

"""Sheets of images with captions, as PNG files. Matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import FlaxnetsError
from ..store.files import check_place

DPI = 110


class Tile(NamedTuple):
    """One small picture on a sheet.

    Attributes:
      pixels: [H, W, 1 or 3], uint8 or floats from 0 to 1.
      caption: text below it.
      colour: matplotlib's name of the caption's colour.
    """

    pixels: npt.NDArray[Any]
    caption: str = ''
    colour: str = 'black'


def figure(width: float, height: float) -> Any:
    """Makes an empty matplotlib figure of this size in inches.

    Raises:
      FlaxnetsError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlaxnetsError(
            'pictures need matplotlib, which is not installed: pip install matplotlib'
        ) from error
    made = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(made)
    return made


def check_picture(path: str) -> None:
    """Checks that a picture can be written to `path`.

    Raises:
      FlaxnetsError: another suffix than `.png`, a folder, no such parent folder, or no matplotlib.
    """
    if Path(path).suffix.lower() != '.png':
        raise FlaxnetsError(f'{path}: a picture is written as .png')
    check_place(path)
    figure(1, 1)


def sheet(
    rows: Sequence[Sequence[Tile | None]], path: str, *, heads: Sequence[str] = (), side: float = 1.7
) -> None:
    """Draws rows of tiles to a PNG.

    Args:
      rows: the tiles. None leaves a place empty; shorter rows are filled up with empty places.
      path: the PNG to write.
      heads: a heading for each column.
      side: side of a tile in inches.
    """
    columns = max(map(len, rows))
    below = _lines([tile.caption for row in rows for tile in row if tile])
    made = figure(columns * side, len(rows) * (side + 0.17 * below) + 0.2 * _lines(heads))
    made.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    grid = made.subplots(len(rows), columns, squeeze=False)
    for i, line in enumerate(grid):
        for j, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            tile = rows[i][j] if j < len(rows[i]) else None
            if i == 0 and j < len(heads):
                axes.set_title(heads[j], fontsize=9)
            if tile is not None:
                pixels = tile.pixels[..., 0] if tile.pixels.shape[-1] == 1 else tile.pixels
                top = 255 if pixels.dtype == np.uint8 else 1
                axes.imshow(pixels, cmap='gray', vmin=0, vmax=top)
                axes.set_xlabel(tile.caption, fontsize=8, color=tile.colour, labelpad=3)
    made.savefig(path, dpi=DPI)


def _lines(texts: Sequence[str]) -> int:
    """The largest number of lines of a text."""
    return max((text.count('\n') + 1 for text in texts if text), default=0)

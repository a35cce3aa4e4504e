"""The images that lie nearest by a net's features, as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FlaxnetsError
from ..images.listing import ImageFile
from ..images.transforms import Transform
from .features import Embedder, nearest
from .pictures import Tile, sheet, short

QUERIES = 8  # images of the set whose neighbours are drawn if none are asked for


def draw_neighbours(
    embed: Embedder, features: str, rows: Sequence[ImageFile], queries: Sequence[ImageFile], k: int, path: str
) -> list[dict[str, Any]]:
    """Draws the k nearest images of each query, the nearest first, with their cosine similarities.

    Args:
      embed: what made the features.
      features: `.npy`, [N, size].
      rows: the N images.
      queries: whose neighbours are sought; none takes 8 of the images themselves.
      k: how many.
      path: of the PNG.

    Returns:
      For each query {'image': name, 'neighbours': [{'image', 'similarity'}, ...]}.

    Raises:
      FlaxnetsError: a query cannot be read, or there are no neighbours.
    """
    there = np.load(features, mmap_mode='r')
    if queries:
        results = list(embed(queries))
        bad = [result.problem for result in results if result.problem]
        if bad:
            raise FlaxnetsError(f'the query cannot be read: {bad[0]}')
        found, similar = nearest(np.stack([r.value for r in results if r.value is not None]), there, k)
    else:
        places = np.unique(np.linspace(0, len(rows) - 1, min(QUERIES, len(rows)), dtype=int))
        queries = [rows[i] for i in places]
        found, similar = nearest(there[places], there, k, leave_out=places)
    tiles = [
        [
            _tile(embed.transform, query, 'query\n' + _name(query)),
            *(
                _tile(embed.transform, rows[i], f'{s:.3f}\n{_name(rows[i])}')
                for i, s in zip(line, values, strict=True)
            ),
        ]
        for query, line, values in zip(queries, found, similar, strict=True)
    ]
    sheet(tiles, path, side=1.3)
    return [
        {
            'image': query.name,
            'neighbours': [
                {'image': rows[i].name, 'similarity': float(s)} for i, s in zip(line, values, strict=True)
            ],
        }
        for query, line, values in zip(queries, found, similar, strict=True)
    ]


def _tile(transform: Transform, file: ImageFile, caption: str) -> Tile:
    return Tile(transform.pixels(file.open(transform.in_chans)), caption)


def _name(file: ImageFile) -> str:
    """The end of a name: beginnings are often alike."""
    folder, name = os.path.split(file.name.rpartition(': ')[2])
    both = os.path.join(os.path.basename(folder), name)
    return both if len(both) <= 22 else short(name, 22)

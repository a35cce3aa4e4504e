"""Draws images and their nearest neighbours by a net's features (`flaxnets embed --neighbours`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FlaxnetsError
from ..images.listing import ImageFile
from ..images.transforms import Transform
from .features import Embedder, nearest
from .pictures import Tile, sheet

LETTERS = 18  # the longest name that fits below a picture
QUERIES = 8  # how many of the images are taken as queries if none are given


def draw_neighbours(
    embed: Embedder, features: str, rows: Sequence[ImageFile], queries: Sequence[ImageFile], k: int, path: str
) -> list[dict[str, Any]]:
    """Draws the k nearest images of each query, the nearest first, with their cosine similarities.

    Args:
      embed: the embedder that made the features.
      features: path of a `.npy` file, [N, size].
      rows: the N images of these features.
      queries: images whose neighbours are drawn; if empty, 8 of `rows`.
      k: how many neighbours to draw for each query.
      path: the PNG to write.

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
        asked = np.stack([result.value for result in results if result.value is not None])
        places = {_place(row): i for i, row in enumerate(rows)}
        own = np.array([places.get(_place(query), -1) for query in queries])
    else:
        own = np.unique(np.linspace(0, len(rows) - 1, min(QUERIES, len(rows)), dtype=int))
        queries, asked = [rows[i] for i in own], there[own]
    found, similar = nearest(asked, there, k, leave_out=own)
    shown = [[query, *(rows[i] for i in line)] for query, line in zip(queries, found, strict=True)]
    names = iter(_names([file for line in shown for file in line]))
    words = [['query', *(f'{s:.3f}' for s in values)] for values in similar]
    tiles = [
        [
            _tile(embed.transform, file, f'{word}\n{next(names)}')
            for file, word in zip(line, said, strict=True)
        ]
        for line, said in zip(shown, words, strict=True)
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


def _place(file: ImageFile) -> tuple[str, int]:
    """Where an image is stored, so that the same image is recognised under two names."""
    return os.path.realpath(file.path), file.offset


def _tile(transform: Transform, file: ImageFile, caption: str) -> Tile:
    return Tile(transform.pixels(file.open(transform.in_chans)), caption)


def _names(files: Sequence[ImageFile]) -> list[str]:
    """Short names for captions, without the folders that all have in common; long ones lose their start."""
    plain = [file.name.rpartition(': ')[2] for file in files]
    common = os.path.commonpath([os.path.dirname(name) for name in plain]) if len(plain) > 1 else ''
    ends = [os.path.relpath(name, common) if common else name for name in plain]
    return [end if len(end) <= LETTERS else '…' + end[1 - LETTERS :] for end in ends]

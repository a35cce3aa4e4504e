"""Draws class activation maps over images (`flaxnets explain`).

`activation_maps.py` computes the maps.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from ..api import load_with_config, transform
from ..errors import FlaxnetsError
from ..images.listing import ImageFile
from ..words import short, some
from ..zoo import imagenet
from ..zoo.classes import output_names
from .activation_maps import class_activation_map
from .pictures import Tile, check_picture, sheet

MOST = 32  # the most images in one picture
COLOURS = 'turbo'
ALIKE = 4  # inputs with a smaller mean difference (of 255) are drawn once; resizing filters differ slightly
OVERLAID = 0.5  # opacity of the map over the picture


def explain(
    files: Sequence[ImageFile],
    sources: Sequence[str],
    path: str,
    methods: Sequence[str] = ('gradcam',),
    stages: Sequence[int] = (4,),
    wanted: str | None = None,
) -> list[dict[str, Any]]:
    """Draws a row for each image: the image, then a map for each net, stage and method.

    Args:
      files: the images.
      sources: anything that `flaxnets.load` opens.
      path: the PNG to write.
      methods, stages: methods and stages of `class_activation_map`; each pair gives a map.
      wanted: name or output number of the class to explain; None takes each net's most probable class.

    Returns:
      For each image and net {'image', 'model', 'class', 'index', 'probability'}, with the class explained.

    Raises:
      FlaxnetsError: unusable weights, images or values, or too many images for a picture.
    """
    check_picture(path)
    if len(files) > MOST:
        raise FlaxnetsError(f'{len(files)} images are too many for a picture; it has up to {MOST}')
    rows: list[list[Tile | None]] = [[] for _ in files]
    heads: list[str] = []
    found: list[dict[str, Any]] = []
    for source in sources:
        columns, facts = _of_net(files, source, methods, stages, wanted)
        for row, tiles in zip(rows, columns, strict=True):
            # The image is drawn again only where the next net crops it differently.
            again = row and row[0] is not None and _same(row[0].pixels, tiles[0].pixels)
            row += [None, *tiles[1:]] if again else tiles
        heads += ['image', *_heads(source, methods, stages)]
        found += facts
    rows, heads = _without_gaps(rows, heads)
    sheet(rows, path, heads=heads, side=2.0)
    return found


def _same(a: UInt8[np.ndarray, '_h _w _c'], b: UInt8[np.ndarray, '_h _w _c']) -> bool:
    return a.shape == b.shape and bool(np.abs(a.astype(int) - b).mean() < ALIKE)


def _without_gaps(
    rows: list[list[Tile | None]], heads: list[str]
) -> tuple[list[list[Tile | None]], list[str]]:
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in rows)]
    return [[row[i] for i in kept] for row in rows], [heads[i] for i in kept]


def _heads(source: str, methods: Sequence[str], stages: Sequence[int]) -> list[str]:
    name = short(os.path.join(*Path(source).parts[-2:]), 26)
    each = []
    for stage in stages:
        for method in methods:
            more = [method] + ([f'stage {stage}' if stage else 'stem'] if list(stages) != [4] else [])
            each.append('\n'.join([name, ', '.join(more)]))
    return each


def _of_net(
    files: Sequence[ImageFile],
    source: str,
    methods: Sequence[str],
    stages: Sequence[int],
    wanted: str | None,
) -> tuple[list[list[Tile]], list[dict[str, Any]]]:
    """One net's tiles for each image (the net's input, then the maps over it), and its rows of `explain`."""
    config, net, variables = load_with_config(source)
    if config.num_classes == 0:
        raise FlaxnetsError(f'{source}: these weights have no classifier, so there are no classes to explain')
    to_input = transform(config)
    names, _ = output_names(config)
    index = None if wanted is None else _class_number(wanted, names, source)
    probabilities = jax.jit(lambda variables, image: jax.nn.softmax(net.apply(variables, image)[0]))
    columns, facts = [], []
    for file in files:
        opened = file.open(config.in_chans)
        pixels, image = to_input.pixels(opened), to_input(opened)[None]
        shares = np.asarray(probabilities(variables, image))
        place = int(shares.argmax()) if index is None else index
        caption = f'{short(names[place], 22)} {shares[place]:.0%}'
        tiles = [Tile(pixels, short(Path(file.name).name, 24))]
        for stage in stages:
            for method in methods:
                maps, _ = class_activation_map(net, variables, image, [place], method=method, stage=stage)
                cam = np.asarray(maps[0])
                words = caption if cam.any() else f'{caption}\n(no part speaks for it)'
                tiles.append(Tile(overlaid(pixels, cam), words))
        columns.append(tiles)
        fact = {'class': names[place], 'index': place, 'probability': float(shares[place])}
        facts.append({'image': file.name, 'model': source, **fact})
    return columns, facts


def _class_number(wanted: str, names: Sequence[str], source: str) -> int:
    if wanted.isascii() and wanted.isdigit() and wanted not in names:
        if int(wanted) < len(names):
            return int(wanted)
        raise FlaxnetsError(f'{source} has {len(names)} outputs, 0 to {len(names) - 1}; {wanted} is none')
    for form in (str.strip, imagenet.folded):
        for key in (lambda name: [name], lambda name: name.split(', ')):  # the name, or one of its synonyms
            found = [i for i, name in enumerate(names) if form(wanted) in map(form, key(name))]
            if len(found) == 1:
                return found[0]
            if found:
                raise FlaxnetsError(f'{wanted!r} means several outputs of {source}: {found}; give the number')
    near = difflib.get_close_matches(wanted, names, 3)
    hint = f'did you mean {" or ".join(map(repr, near))}?' if near else f'it has {some(names, 5)}'
    raise FlaxnetsError(f'{source} has no class {wanted!r}; {hint}')


def overlaid(pixels: UInt8[np.ndarray, 'h w c'], cam: Float[np.ndarray, 'h w']) -> Float[np.ndarray, 'h w 3']:
    """Lays a map, in colours, over the image that it explains.

    Args:
      pixels: the image, grey or RGB.
      cam: the map, from 0 to 1.

    Returns:
      RGB, from 0 to 1.
    """
    from matplotlib import colormaps

    colours = colormaps[COLOURS](cam)[..., :3]
    mixed: np.ndarray = (1 - OVERLAID) * (pixels / 255) + OVERLAID * colours
    return mixed

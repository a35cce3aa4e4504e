"""The whole way once, offline: a PyTorch checkpoint to Flax and back, and a photograph classified.

Published weights cannot be fetched without a network, so the checkpoint is made here, in the layout in
which resnest14d is published, from a net that nobody has trained: what it says of the photograph means
nothing. Everything else is as it is with real weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flaxnets
from convert.conversion import add_counters
from convert.pth import read_state_dict
from convert.pth_write import write_pth
from convert.tree import to_state
from flaxnets.predict import predict

NET = 'resnest14d'
PHOTO = Path(os.path.relpath(Path(__file__).parent / 'cat.jpg'))  # Chelsea, by Stefan van der Walt (CC0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('demo-output'), help='folder to write to')
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    published, directory, back = out / f'{NET}-untrained.pth', out / NET, out / f'{NET}-back.pth'

    say(f'1. An UNTRAINED {NET}, saved as its publishers save theirs: {published}')
    make_checkpoint(published)

    say('2. PyTorch to Flax')
    run('convert', str(published), '--model', NET, '--out', str(directory))

    say('3. Flax to PyTorch')
    run('convert', str(directory), '--out', str(back))
    compare(published, back, directory)

    say('4. A photograph, classified by the converted net (untrained: its answer means nothing)')
    run('flaxnets', 'predict', str(PHOTO), '--model', str(directory))
    picture = out / 'prediction.png'
    draw(predict([PHOTO], directory)[0]['top'], picture)
    print(f'\nThe same as a picture: {picture}')


def say(what: str) -> None:
    print(f'\n{what}', flush=True)


def run(*command: str) -> None:
    print(f'$ python -m {" ".join(command)}', flush=True)
    subprocess.run([sys.executable, '-m', *command], check=True)


def make_checkpoint(path: Path) -> None:
    model = flaxnets.create(NET)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    state = to_state(variables, model)
    layers = {name.rpartition('.')[0]: 0 for name in state if name.endswith('.running_mean')}
    write_pth(path, add_counters(state, layers))


def compare(published: Path, back: Path, directory: Path) -> None:
    first, second = read_state_dict(published), read_state_dict(back)
    assert list(first) == list(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    print(f'{len(first)} tensors: the same names in the same order, bit for bit')
    image = flaxnets.transform(NET)(PHOTO)[None]
    logits = []
    for source, net in ((published, NET), (directory, None), (back, NET)):
        model, variables = flaxnets.load(source, model=net)
        logits.append(np.asarray(jax.jit(model.apply)(variables, image)))
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])
    print('logits of the photograph from the file, the directory and the file written back: equal')


def draw(top: list[dict[str, Any]], path: Path) -> None:
    """The photograph with its most probable classes beside it."""
    photo = Image.open(PHOTO)
    line, margin, width = 44, 20, 420
    canvas = Image.new('RGB', (photo.width + width, photo.height), 'white')
    canvas.paste(photo, (0, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    left = photo.width + margin
    pen.text((left, margin), f'{NET}, untrained: these classes mean nothing', 'firebrick', font)
    highest = max(guess['probability'] for guess in top)
    for i, guess in enumerate(top):
        y = margin + 40 + i * line
        share = guess['probability']
        name = str(guess['class']).partition(',')[0]
        pen.text((left, y), f'{share:.2%}  {name}', 'black', font)
        full = width - 2 * margin
        pen.rectangle((left, y + 22, left + full, y + 30), fill='gainsboro')
        pen.rectangle((left, y + 22, left + full * share / highest, y + 30), fill='steelblue')
    canvas.save(path)


if __name__ == '__main__':
    main()

"""Trains a net, evaluates it, converts it to PyTorch and back, and classifies images with it, all offline.

A small Res2Net learns to read handwritten digits (1437 images for training, 360 for evaluation) in about a
minute. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import flaxnets
from convert.formats.pth import read_pth
from flaxnets.inference.pictures import Tile, sheet
from train.data.sources import open_source

SHOWN = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=Path('demo-output'), help='folder to write to')
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run, trained = out / 'digits', out / 'digits' / 'weights'
    file, again, back = out / 'digits.pth', out / 'digits-again', out / 'digits-back.pth'

    say('1. Train: the digits recipe')
    command('train', '--recipe', 'digits', '--workdir', str(run))

    say('2. Evaluate: every image once')
    command('train', 'eval', '--model', str(trained), '--data', 'digits', '--out', str(out / 'evaluation'))

    say('3. To PyTorch, and back')
    command('convert', str(trained), '--out', str(file))
    command('convert', str(file), '--out', str(again))
    command('convert', str(again), '--out', str(back))
    command('convert', '--compare', str(trained), str(again))
    compare(file, back)

    say('4. Verify: PyTorch computes the same')
    if subprocess.run([sys.executable, '-c', 'import timm'], capture_output=True).returncode == 0:
        command('convert', str(file), '--out', str(out / 'digits-verified'), '--verify')
    else:
        print('left out: it needs PyTorch and timm (pip install torch timm)')

    say('5. Read some digits')
    picture = out / 'digits.png'
    right = read_digits(again, picture)
    print(f'{right} of {SHOWN} right; the picture: {picture}')
    print(f'the curves of the training: {run / "curves.png"}')


def say(what: str) -> None:
    print(f'\n{what}', flush=True)


def command(*words: str) -> None:
    print(f'$ python -m {" ".join(words)}', flush=True)
    subprocess.run([sys.executable, '-m', *words], check=True)


def compare(first: Path, second: Path) -> None:
    a, b = read_pth(first), read_pth(second)
    assert list(a) == list(b)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    print(f'{first.name} and {second.name}: {len(a)} tensors, the same names in the same order, bit for bit')


def read_digits(weights: Path, picture: Path) -> int:
    """Classifies digits that the net has not seen, draws them, and counts the right answers."""
    model, variables = flaxnets.load(weights)
    transform = flaxnets.transform(weights)
    source = open_source('digits', '', training=False)
    records = [source[i] for i in range(0, len(source), len(source) // SHOWN)][:SHOWN]
    pictures = [np.asarray(record.image) for record in records]
    images = transform.batch(pictures)
    logits = jax.jit(model.apply)(variables, images)
    sure = np.asarray(jax.nn.softmax(logits)).max(1)
    answers = np.asarray(logits).argmax(1)
    truth = np.array([record.label for record in records])
    captions = [f'{answer} ({share:.0%})' for answer, share in zip(answers, sure, strict=True)]
    colours = np.where(answers == truth, 'darkgreen', 'firebrick')
    tiles = [Tile(p[..., None], *rest) for p, *rest in zip(pictures, captions, colours, strict=True)]
    sheet([tiles[i : i + 8] for i in range(0, len(tiles), 8)], str(picture), side=1.25)
    return int((answers == truth).sum())


if __name__ == '__main__':
    main()

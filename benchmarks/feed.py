"""Images a second that the input makes from JPEG files: flaxnets' threads beside timm's loader.

    python benchmarks/feed.py [--workers 2] [--images 600]

Photographs of 500 x 375 pixels (quality 90, about what ImageNet has) are written to a temporary folder, a
class folder each for both loaders; both crop at random to 224 pixels (area 0.08 to 1, bilinear) and mirror.
flaxnets mirrors and normalises on the device, timm in its workers, as each does in training. Without PyTorch
only flaxnets is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.augment import train_transform
from train.data.batches import train_batches
from train.data.sources import open_source
from train.settings import Settings

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2, help='threads of flaxnets, processes of timm')
    parser.add_argument('--images', type=int, default=600)
    parser.add_argument('--jitter', type=float, default=0.0, help='of the colours, on both sides')
    parser.add_argument('--policy', default='', help='an automatic augmentation, of flaxnets alone')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.images)
        rates = {'flaxnets': rate(ours(folder, options))}
        reference = timms(folder, options)
        if reference is not None:
            rates['timm'] = rate(reference)
            # Once more in the other order: the machine's mood changes.
            rates['timm'] = max(rates['timm'], rate(timms(folder, options) or reference))
            rates['flaxnets'] = max(rates['flaxnets'], rate(ours(folder, options)))
    for name, value in rates.items():
        print(f'{name:10} {value:8.0f} images/s  {value / rates["flaxnets"]:6.2f} x flaxnets')


def write_photographs(folder: Path, count: int) -> None:
    """Crops of a real photograph, all different, so that no cache of pixels helps."""
    photo = (
        Image.open(Path(__file__).parent.parent / 'examples' / 'cat.jpg').convert('RGB').resize((1000, 750))
    )
    rng = np.random.default_rng(0)
    where = folder / 'train' / 'cat'
    where.mkdir(parents=True)
    for i in range(count):
        left, top = int(rng.integers(0, 500)), int(rng.integers(0, 375))
        photo.crop((left, top, left + 500, top + 375)).save(where / f'{i:04}.jpg', quality=90)


def ours(folder: str, options: argparse.Namespace) -> Iterator[Any]:
    settings = Settings('resnext50_32x4d', jitter=options.jitter, policy=options.policy)
    source = open_source(f'folder:{folder}', '', training=True)
    return train_batches(
        source, train_transform(settings), batch_size=BATCH, seed=0, start_step=0, threads=options.workers
    )


def timms(folder: str, options: argparse.Namespace) -> Iterator[Any] | None:
    try:
        sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
        import torchvision_ops

        torchvision_ops.define_missing()
        import timm.data
    except ImportError:
        return None

    def endless() -> Iterator[Any]:
        data: Any = timm.data
        loader = data.create_loader(
            data.create_dataset('', root=folder, split='train'),
            (3, 224, 224),
            BATCH,
            is_training=True,
            color_jitter=options.jitter or None,
            interpolation='bilinear',
            num_workers=options.workers,
            use_prefetcher=False,
            persistent_workers=True,
        )
        while True:
            yield from loader

    return endless()


def rate(batches: Iterator[Any], seconds: float = 8.0) -> float:
    for _ in range(4):  # workers start
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        images += BATCH
    result = images / (time.perf_counter() - start)
    close = getattr(batches, 'close', None)
    if close:
        close()
    return result


if __name__ == '__main__':
    main()

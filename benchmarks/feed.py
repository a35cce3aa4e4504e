"""Measures how many images a second flaxnets' threads and processes and timm's loader make from JPEG files.

    python benchmarks/feed.py [--workers 2] [--images 600] [--rounds 5]

Photographs of 500 x 375 pixels and some 110 kB, as ImageNet's are on average, are written to a temporary
folder, a class folder each for both loaders; all crop at random to 224 pixels (area 0.08 to 1, bilinear).
timm mirrors and normalises in its workers, as it does without a GPU; "timm, bytes" only mirrors and gives
bytes, as it does for one. flaxnets mirrors and normalises on the device. Without PyTorch only flaxnets is
measured.

The contestants take turns, each with so many workers. "a core" is images for each second that all processes
of the machine's cores worked for them, which is what a busy machine changes least; "main" is what the main
thread itself works for an image.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from train.data.augment import train_transform
from train.data.batches import TrainBatches, train_batches
from train.data.sources import open_source
from train.settings import Settings

BATCH = 32
ROOT = Path(__file__).parent.parent


@dataclass
class Contestant:
    """A loader, and what was measured of it in each round."""

    name: str
    batches: Any
    rates: list[float] = field(default_factory=list)
    per_core: list[float] = field(default_factory=list)
    main: list[float] = field(default_factory=list)

    def turn(self, seconds: float, warm: int) -> None:
        for _ in range(warm):  # skips batches that were made during the others' turns
            next(self.batches)
        images, start, cores, main = 0, time.perf_counter(), worked(), time.thread_time()
        while time.perf_counter() - start < seconds:
            next(self.batches)
            images += BATCH
        self.rates.append(images / (time.perf_counter() - start))
        self.per_core.append(images / (worked() - cores))
        self.main.append((time.thread_time() - main) / images * 1e6)

    def line(self, reference: Contestant) -> str:
        pairs = zip(self.per_core, reference.per_core, strict=True)
        ratio = statistics.median(own / other for own, other in pairs)
        rate, core, main = (statistics.median(v) for v in (self.rates, self.per_core, self.main))
        spread = f'{min(self.per_core):.0f} to {max(self.per_core):.0f}'
        return f'{self.name:20} {rate:9.0f} {core:9.0f} {spread:>14} {main:9.1f} {ratio:9.2f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2, help='threads or processes of each contestant')
    parser.add_argument('--images', type=int, default=600)
    parser.add_argument('--size', type=int, nargs=2, default=(500, 375), help='of the photographs')
    parser.add_argument('--kilobytes', type=float, default=110, help='of a photograph, about')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=4.0, help='of a turn')
    parser.add_argument('--jitter', type=float, default=0.0, help='of the colours, on both sides')
    parser.add_argument('--scaled', action='store_true', help="flaxnets with decoding='scaled' too")
    parser.add_argument('--policy', default='', help='an automatic augmentation, of flaxnets alone')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mean = write_photographs(Path(folder), options)
        contestants = [Contestant(kind, ours(folder, options, kind)) for kind in ('processes', 'threads')]
        if options.scaled:
            contestants.append(Contestant('processes, scaled', ours(folder, options, 'processes', True)))
        contestants += timms(folder, options)
        measure(contestants, options)
        for contestant in contestants:
            contestant.batches.close()
    print(f'{options.workers} workers, {options.size[0]} x {options.size[1]} pixels, {mean / 1e3:.0f} kB')
    print(f'{"":20} {"images/s":>9} {"a core":>9} {"(spread)":>14} {"main, us":>9} {"x timm":>9}')
    reference = next((one for one in contestants if one.name == 'timm'), contestants[0])
    for contestant in contestants:
        print(contestant.line(reference))


def measure(contestants: list[Contestant], options: argparse.Namespace) -> None:
    warm = 4 + 2 * options.workers
    order = list(contestants)
    for _ in range(options.rounds):
        for contestant in order:
            contestant.turn(options.seconds, warm)
        order.append(order.pop(0))


def worked() -> float:
    """Processor seconds of this process and of those that it has started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def write_photographs(folder: Path, options: argparse.Namespace) -> float:
    """Crops of a real photograph, all different, so that no cache of pixels helps; returns their mean bytes.

    Noise, as sensors have it, makes up what the enlarged photograph lacks of detail.
    """
    width, height = options.size
    photo = Image.open(ROOT / 'examples' / 'cat.jpg').convert('RGB').resize((2 * width, 2 * height))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (2 * height, 2 * width, 3))
    low, high = 0.0, 60.0
    for _ in range(8):
        strength = (low + high) / 2
        noisy = Image.fromarray(np.clip(np.asarray(photo) + strength * noise, 0, 255).astype(np.uint8))
        small = len(_jpeg(noisy.crop((0, 0, width, height)))) < 1000 * options.kilobytes
        low, high = (strength, high) if small else (low, strength)
    where = folder / 'train' / 'cat'
    where.mkdir(parents=True)
    for i in range(options.images):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        (where / f'{i:04}.jpg').write_bytes(_jpeg(noisy.crop((left, top, left + width, top + height))))
    return statistics.mean(path.stat().st_size for path in where.iterdir())


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'jpeg', quality=90)
    return file.getvalue()


def ours(folder: str, options: argparse.Namespace, kind: str, scaled: bool = False) -> TrainBatches:
    settings = Settings('resnext50_32x4d', jitter=options.jitter, policy=options.policy)
    source = open_source(f'folder:{folder}', '', training=True)
    asked: dict[str, Any] = {kind: options.workers}
    return train_batches(
        source, train_transform(settings), batch_size=BATCH, seed=0, start_step=0, scaled=scaled, **asked
    )


def timms(folder: str, options: argparse.Namespace) -> list[Contestant]:
    try:
        sys.path.insert(0, str(ROOT / 'tests'))
        import torchvision_ops

        torchvision_ops.define_missing()
        import timm.data
        import torch
    except ImportError:
        return []

    def endless(prefetcher: bool) -> Iterator[Any]:
        data: Any = timm.data
        loader = data.create_loader(
            data.create_dataset('', root=folder, split='train'),
            (3, 224, 224),
            BATCH,
            is_training=True,
            color_jitter=options.jitter or None,
            interpolation='bilinear',
            num_workers=options.workers,
            use_prefetcher=prefetcher,
            device=torch.device('cpu'),
            persistent_workers=True,
        )
        while True:
            yield from loader.loader if prefetcher else loader

    return [Contestant('timm', endless(False)), Contestant('timm, bytes', endless(True))]


if __name__ == '__main__':
    main()

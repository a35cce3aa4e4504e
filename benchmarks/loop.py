"""Measures what the training loop costs beyond its compiled step, and whether its memory grows.

    python benchmarks/loop.py [--model resnext50_32x4d] [--batch 8] [--epochs 50]

1. A net of ordinary size is trained by the loop (images augmented, metrics read, log written), then the same
   compiled step is called by itself on a batch that is there: the share of a step that the loop adds.
2. The digits are learned for many epochs: resident memory at the start and at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.machine import memory_mb
from flaxnets.onednn import ask_for_onednn
from train import parallel, recipes
from train.fields import sides
from train.job import initial_state, make_job
from train.loop import train
from train.settings import Settings

STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='resnext50_32x4d')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--epochs', type=int, default=50)
    options = parser.parse_args()
    ask_for_onednn()  # as `python -m train` does
    with tempfile.TemporaryDirectory() as folder:
        share_of_the_loop(options, Path(folder))
        memory_over_epochs(options.epochs, Path(folder))


def share_of_the_loop(options: argparse.Namespace, folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS * options.batch, 256, 256, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % 10
    few: dict[str, Any] = dict(x_test=images[: options.batch], y_test=np.arange(options.batch) % 10)
    np.savez(folder / 'data.npz', x_train=images, y_train=labels, classes=list('0123456789'), **few)
    settings = Settings(
        options.model,
        data=f'arrays:{folder}/data.npz',
        image_size=options.size,
        batch_size=options.batch,
        epochs=2,
        log_steps=STEPS - 1,
        eval_epochs=2,  # once, at the end
        jitter=0.4,
        lighting=0.1,
        mixup=0.2,
    )
    train(dataclasses.replace(settings, max_steps=STEPS), str(folder / 'run'), quiet=True)
    records = [json.loads(line) for line in (folder / 'run' / 'log.jsonl').read_text().splitlines()]
    record = next(record for record in records if record['kind'] == 'train')
    loop = options.batch / record['images_per_second']
    bare = bare_step(settings)
    print(
        f'{options.model}, batch {options.batch}: {1e3 * loop:.0f} ms in the loop, {1e3 * bare:.0f} ms alone'
    )
    outside, waiting = 100 * (loop - bare) / loop, 100 * record['wait_share']
    print(f'outside the compiled step: {outside:.1f} %; waiting for images: {waiting:.1f} %')


def bare_step(settings: Settings) -> float:
    """Seconds of the compiled step on a batch that is already in memory."""
    job = make_job(settings)
    state = parallel.replicate(initial_state(job))
    step = parallel.map_train_step(job.train_step())
    shape = (settings.batch_size, *sides(settings.image_size), 3)
    batch: dict[str, Any] = {
        'image': np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        'label': np.zeros(settings.batch_size, np.int32),
    }
    batch = parallel.shard(batch)
    state, _ = step(state, batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(STEPS - 1):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - start) / (STEPS - 1)


def memory_over_epochs(epochs: int, folder: Path) -> None:
    settings = dataclasses.replace(recipes.get('digits'), epochs=epochs, eval_epochs=1, log_steps=100)
    sizes = []
    for last in (5, epochs):  # goes on in the same process
        train(dataclasses.replace(settings, max_steps=last * 22), str(folder / 'digits'), quiet=True)
        sizes.append(memory_mb('VmRSS'))
    growth = 100 * (sizes[1] / sizes[0] - 1)
    print(f'digits: {sizes[0]:.0f} MB after 5 epochs, {sizes[1]:.0f} MB after {epochs}: {growth:+.1f} %')


if __name__ == '__main__':
    main()

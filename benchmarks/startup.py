"""Measures the time from the start of a process to the first logits, for flaxnets and timm.

    python -m benchmarks.startup [--net resnext50_32x4d] [--rounds 3]

Random weights are written as a directory of flaxnets and as a state dict of PyTorch. Then processes that each
open them and classify one image take turns: flaxnets with an empty compilation cache, flaxnets with that of
an earlier start, and timm (eager). Seconds are from the start of the process, the interpreter's included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
STEPS = ('imported', 'weights', 'logits')
CONTESTANTS = ('flaxnets, cold', 'flaxnets, warm', 'timm')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--net', default='resnext50_32x4d')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--contestant', help=argparse.SUPPRESS)
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant == 'write':
        write(options.net, Path(options.folder))
    elif options.contestant:
        run = timm if options.contestant == 'timm' else flaxnets
        print(json.dumps(run(options.net, options.size, Path(options.folder))))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        start('write', options, folder)
        for _ in range(options.rounds):
            for name in CONTESTANTS:
                if name == 'flaxnets, cold':
                    shutil.rmtree(f'{folder}/compiled', ignore_errors=True)
                found[name].append(json.loads(start(name, options, folder)))
    print(f'{options.net}, one image of {options.size} x {options.size} pixels; seconds from the start')
    print(f'{"":16}' + ''.join(f'{step:>10}' for step in STEPS) + f'{"MB":>10}')
    for name, rounds in found.items():
        medians = [statistics.median(one[key] for one in rounds) for key in (*STEPS, 'megabytes')]
        print(f'{name:16}' + ''.join(f'{value:10.2f}' for value in medians[:-1]) + f'{medians[-1]:10.0f}')


def start(name: str, options: argparse.Namespace, folder: str) -> str:
    asked = ['--net', options.net, '--size', str(options.size), '--contestant', name, '--folder', folder]
    environment = {
        **os.environ,
        'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
        'FLAXNETS_HOME': folder,
        'STARTED': str(time.time()),
    }
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    result = subprocess.run(
        [sys.executable, '-m', 'benchmarks.startup', *asked],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return result.stdout


def clock() -> tuple[dict[str, float], Callable[[str], None]]:
    """Where seconds since the start are noted, and what notes them."""
    begun = float(os.environ['STARTED'])
    noted: dict[str, float] = {}

    def note(step: str) -> None:
        noted[step] = time.time() - begun

    return noted, note


def memory() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flaxnets(net: str, size: int, folder: Path) -> dict[str, float]:
    noted, note = clock()
    from flaxnets.onednn import ask_for_onednn

    ask_for_onednn()  # as the package's commands do
    import jax

    import flaxnets
    from flaxnets.store.compiled import keep_compiled

    keep_compiled(on_cpus=True)
    _ = flaxnets.load
    note('imported')
    model, variables = flaxnets.load(folder / 'weights')
    jax.block_until_ready(variables)
    note('weights')
    images = np.zeros((1, size, size, 3), np.float32)
    classify = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    np.asarray(classify(variables, images))
    note('logits')
    return {**noted, 'megabytes': memory()}


def timm(net: str, size: int, folder: Path) -> dict[str, float]:
    noted, note = clock()
    import torch
    import torchvision_ops

    torchvision_ops.define_missing()
    import timm

    note('imported')
    model = timm.create_model(net).eval()
    model.load_state_dict(torch.load(folder / 'weights.pth'))
    note('weights')
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size)).numpy()
    note('logits')
    return {**noted, 'megabytes': memory()}


def write(net: str, folder: Path) -> None:
    """Writes the same random weights for both."""
    import torch
    import torchvision_ops

    torchvision_ops.define_missing()
    import timm

    from convert.__main__ import main as convert

    torch.manual_seed(0)
    torch.save(timm.create_model(net).state_dict(), folder / 'weights.pth')
    asked = [str(folder / 'weights.pth'), '--model', net, '--out', str(folder / 'weights')]
    if convert(asked):
        raise SystemExit('the weights cannot be converted')


if __name__ == '__main__':
    main()

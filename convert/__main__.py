"""python -m convert: a PyTorch checkpoint to a directory of Flax weights, and back."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from convert.conversion import convert, export
from convert.tree import COUNTER
from flaxnets.errors import FlaxnetsError

EXAMPLES = """examples:
  python -m convert resnest50-528c19ca.pth --model resnest50d --out weights/resnest50d
  python -m convert weights/resnest50d --out resnest50d.pth

The net's number of classes and of input channels are read from the tensors. Nothing in the file is
executed, torch is not needed, and what is written is complete or absent."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m convert',
        description='Converts a PyTorch checkpoint (.pth) to a directory that flaxnets.load opens, or such a '
        'directory back to a .pth file.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('source', help='a .pth file, or a directory of weights')
    parser.add_argument('--out', required=True, help='the directory, or the .pth file, to write')
    parser.add_argument('--model', help='name of the net (python -m flaxnets list)')
    parser.add_argument('--force', action='store_true', help='overwrite what stands at --out')
    options = parser.parse_args(arguments)
    try:
        if Path(options.source).is_dir():
            _export(options)
        else:
            _convert(options)
    except FlaxnetsError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


def _convert(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    checkpoint = convert(options.source, options.out, options.model, overwrite=options.force)
    config, counters = checkpoint.config, checkpoint.source.num_batches_tracked
    what = config.weights.name if config.weights else f'{config.name} (not a published file of it)'
    print(f'{options.source}: {what}, {config.num_classes} classes, {config.in_chans} input channels')
    if counters:
        print(f'{len(counters)} num_batches_tracked counters kept aside for the way back')
    print(f'sha256 {checkpoint.source.sha256}')
    _wrote(options.out, start, 'flaxnets.load')


def _export(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    if options.model:
        raise FlaxnetsError(f'--model {options.model}: a directory knows its own net; leave it out')
    state = export(options.source, options.out, overwrite=options.force)
    counters = sum(name.endswith(COUNTER) for name in state)
    print(f'{options.source}: {len(state) - counters} tensors, {counters} num_batches_tracked counters')
    _wrote(options.out, start, 'torch.load')


def _wrote(out: str, start: float, opener: str) -> None:
    print(f'wrote {out} in {time.perf_counter() - start:.1f} s; open it with {opener}({out!r})')


if __name__ == '__main__':
    sys.exit(main())

"""The command `python -m convert`: converts PyTorch weights of any publisher, and writes them back."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flaxnets import command_line, zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.store import weights
from flaxnets.zoo.classes import read_classes

from .arithmetic import DTYPES, as_dtype, averaged, folded, with_classes, with_images
from .checkpoint import Checkpoint
from .comparison import Comparison, compare
from .conversion import kept, named, open_checkpoint
from .names.layouts_back import LAYOUTS
from .names.tree import COUNTER
from .verification import Verification, verify
from .writing import FORMATS, Target

PROG = 'python -m convert'
DESCRIPTION = """Converts weights: PyTorch checkpoints (.pth, .safetensors, Hugging Face folders) of any
publisher to directories that flaxnets.load opens, and back. Nothing in a file is executed, torch is only
needed for --verify, and what is written is complete or absent."""

EXAMPLES = """examples:
  python -m convert resnest50-528c19ca.pth --out weights/resnest50d
  python -m convert resnest101e                     download, convert and keep published weights
  python -m convert net.pth.tar --out weights/net --verify
  python -m convert weights/net --out net.pth       back to PyTorch
  python -m convert weights/net --out net.safetensors --layout mmpretrain
  python -m convert --average a.pth b.pth c.pth --out weights/mean
  python -m convert --compare a.pth weights/net
  python -m convert --all 'res2net*' --out weights

A SOURCE is a file, a directory of weights, a Hugging Face folder, a published name (python -m flaxnets
list --weights), hf-hub:org/repository or a URL. An OUT that ends in .pth, .pth.tar, .pt, .ckpt, .bin or
.safetensors is a file for PyTorch, with its certificate beside it; any other is a directory.

exit codes: 0 done (or equal), 1 an error, 2 a wrong option, 3 --verify or --compare found a difference"""

DIFFERENT = 3  # the exit code
# Arguments in messages of the library -> the options of the command line.
_AS_TYPED = {
    'ema=False': '--no-ema',
    'ema=True': 'the default',
    'approximate=True': '--approximate',
    'overwrite=True': '--force',
    'drop_head=True': '--drop-head',
}
# Options that change what is written.
_WORK = ('classes', 'drop_head', 'dtype', 'fold_bn', 'format', 'images', 'layout')


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command and returns its exit code; `arguments` are those of the process unless given."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    jobs = [options.source is not None, bool(options.compare), bool(options.average), bool(options.all)]
    if sum(jobs) != 1:
        parser.error('give one SOURCE, or one of --average, --compare and --all')
    if options.image and not options.verify:
        parser.error('--image is for --verify')
    if options.compare and (given := _given(options, ('out', 'force', 'verify', *_WORK))):
        parser.error(f'--compare writes nothing: it takes no {given}')
    try:
        if options.compare:
            return _compare(options)
        if options.all:
            return _all(options)
        return _convert(options)
    except FlaxnetsError as error:
        print(f'error: {_as_typed(str(error))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'interrupted; nothing {"half-" if options.all else "was "}written', file=sys.stderr)
        return 130


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_line.parser(prog, DESCRIPTION, EXAMPLES.replace(PROG, prog))
    add = parser.add_argument
    add('source', nargs='?', metavar='SOURCE', help='the weights to convert')
    add('--out', metavar='OUT', help='what to write; without it, published weights are kept in the cache')
    add('--model', metavar='NAME', help='the net, where the tensors leave a choice (python -m flaxnets list)')
    add('--force', action='store_true', help='overwrite what is at OUT')
    add(
        '--verify', action='store_true', help="compare with PyTorch's net, block by block (needs torch, timm)"
    )
    add('--image', metavar='FILE', help='the image that --verify uses, instead of a random pattern')
    add('--key', metavar='KEY', help='which of several state dicts in a file to take, such as state.model')
    add('--prefix', metavar='PREFIX', help='which of several nets to take, by what its names start with')
    add('--no-ema', action='store_true', help='take the weights that were not averaged, if a file has both')
    add(
        '--approximate',
        action='store_true',
        help='read weights of a net that computes something else, or write them for one',
    )
    add('--layout', choices=LAYOUTS, help='whose names a written file has (default: timm)')
    add('--format', choices=FORMATS, help='the format of a written file, whatever its name ends in')
    add('--classes', metavar='FILE', help='keep these names of the outputs: one on each line, or JSON')
    add('--images', nargs='+', metavar='FIELD=VALUE', help='prepare images so: mean=0.5 std=0.5 size=224')
    add('--drop-head', action='store_true', help='leave the classifier out')
    add('--dtype', choices=DTYPES, help='store the parameters in this dtype')
    add('--fold-bn', action='store_true', help='fold BatchNorm into the convolutions, for inference')
    add('--average', nargs='+', metavar='SOURCE', help='convert the mean of several checkpoints of a net')
    add('--compare', nargs=2, metavar='SOURCE', help='where two checkpoints differ; writes nothing')
    add('--all', metavar='PATTERN', help='convert all published weights whose names match, below OUT')
    return parser


def _convert(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    out = options.out or _own_place(options)
    target = Target.of(out, options.layout, options.format, options.approximate, options.force)
    for source in options.average or [options.source]:
        if Path(source).exists() and Path(out).resolve() in Path(source).resolve().parents:
            raise FlaxnetsError(f'{source} is inside {out}, which would be overwritten; choose another --out')
    if options.average:
        sources = [_open(source, options) for source in options.average]
        checkpoint = averaged(sources)
    else:
        checkpoint = _open(options.source, options)
    if options.classes:
        checkpoint = with_classes(checkpoint, read_classes(options.classes))
    if options.images:
        checkpoint = with_images(checkpoint, options.images)
    if options.dtype:
        checkpoint = as_dtype(checkpoint, options.dtype)
    original = checkpoint  # --verify compares with the numbers that --dtype has rounded already
    if options.fold_bn:
        checkpoint = folded(checkpoint)
    _describe(checkpoint)
    if difference := target.difference(checkpoint):
        print(f'  {difference}')
    verification = None
    if options.verify:
        verification = verify(original.state, checkpoint.variables, checkpoint.config, options.image)
        _print_verification(verification)
    target.write(checkpoint, verification)
    opener = '' if target.kind else f'; open it with flaxnets.load({str(out)!r})'
    print(f'wrote {out} in {time.perf_counter() - start:.1f} s{opener}')
    return DIFFERENT if verification and verification.first_outside else 0


def _own_place(options: argparse.Namespace) -> Path:
    """Where published weights are kept that are converted without --out, and so without any changes."""
    if given := _given(options, ('model', 'no_ema', 'key', 'prefix', 'approximate', *_WORK)):
        raise FlaxnetsError(f'--out is missing: say what to write with {given}')
    row = named(options.source) if options.source and not Path(options.source).exists() else None
    if row is None:
        raise FlaxnetsError('--out is missing: say what to write')
    return kept(row)


def _as_typed(message: str) -> str:
    return command_line.as_typed(message, _AS_TYPED, ('key', 'prefix', 'model', 'layout', 'file_format'))


def _given(options: argparse.Namespace, names: Sequence[str]) -> str:
    """Those of these options that the user gave, as they are typed: '--model, --dtype'; '' if none."""
    return ', '.join('--' + name.replace('_', '-') for name in names if getattr(options, name))


def _open(source: str, options: argparse.Namespace) -> Checkpoint:
    checkpoint = open_checkpoint(
        source,
        options.model,
        ema=not options.no_ema,
        approximate=options.approximate,
        key=options.key,
        prefix=options.prefix,
        drop_head=options.drop_head,
    )
    _ = checkpoint.variables  # raises now if a tensor does not fit the net
    return checkpoint


def _describe(checkpoint: Checkpoint) -> None:
    config, source = checkpoint.config, checkpoint.source
    what = config.weights.name if config.weights else config.name
    print(
        f'{checkpoint.where}: {what}, {len(checkpoint.state)} tensors, {config.num_classes} classes, '
        f'{config.in_chans} input channels'
    )
    for note in source.notes:
        print(f'  {_as_typed(note)}')
    if source.num_batches_tracked:
        print(f'  kept {len(source.num_batches_tracked)} {COUNTER[1:]} counters for the way back')
    if source.sha256:
        published = config.weights.sha256 if config.weights else None
        known = ', as published' if published and source.sha256.startswith(published) else ''
        origin = f'from {source.file}, ' if source.file and source.file != Path(checkpoint.where).name else ''
        print(f'  {origin}sha256 {source.sha256}{known}')


def _print_verification(verification: Verification) -> None:
    print(f'verified against {verification.reference}, on {verification.image}:')
    print('  layer         largest difference   of the largest value')
    first = verification.first_outside
    for layer in verification.layers:
        mark = '' if layer.within else '   <- first outside tolerance' if layer is first else '   outside'
        print(f'  {layer.layer:12} {layer.largest:19.2e} {layer.relative:22.2e}{mark}')
    print('  all within tolerance' if first is None else f'  DIFFERENT from {first.layer} on')


def _compare(options: argparse.Namespace) -> int:
    first, second = (_open(source, options) for source in options.compare)
    for checkpoint in (first, second):
        _describe(checkpoint)
    names = first.config.name, second.config.name
    if names[0] != names[1]:
        print(f'  different nets: {names[0]} and {names[1]}')
    result = compare(first.state, second.state)
    _print_comparison(result)
    equal = result.equal and names[0] == names[1]
    print('equal' if equal else 'DIFFERENT')
    return 0 if equal else DIFFERENT


def _print_comparison(result: Comparison) -> None:
    for names, where in ((result.only_in_first, 'first'), (result.only_in_second, 'second')):
        for name in names:
            print(f'  only in the {where}: {name}')
    for shape in result.shapes:
        print(f'  shapes differ: {shape}')
    if result.dtypes:
        print(f'  {result.dtypes} tensors are stored in different dtypes')
    different = [block for block in result.blocks if block.different]
    if different:
        print('  block         tensors that differ   largest difference   of the largest value')
    for block in different:
        count = f'{len(block.different)} of {block.tensors}'
        print(f'  {block.block:12} {count:>20} {block.largest:20.2e} {block.relative:22.2e}')


def _all(options: argparse.Namespace) -> int:
    names = zoo.list_models(options.all, weights=True)
    if not names:
        raise FlaxnetsError(f'no published weights match {options.all!r}; python -m flaxnets list --weights')
    if not options.out:
        raise FlaxnetsError('--out is missing: the folder to write the directories of weights to')
    outcomes = []
    for i, name in enumerate(names, 1):
        print(f'[{i}/{len(names)}] {name}', flush=True)
        outcomes.append((name, *_one_of_all(name, Path(options.out) / name, options)))
    print(f'\n{"weights":46} {"outcome":10} seconds')
    for name, outcome, seconds in outcomes:
        print(f'{name:46} {outcome:10} {seconds:7.1f}')
    failed = sum(outcome not in ('converted', 'there') for _, outcome, _ in outcomes)
    print(f'{len(names) - failed} of {len(names)} are in {options.out}')
    return 1 if failed else 0


def _one_of_all(name: str, out: Path, options: argparse.Namespace) -> tuple[str, float]:
    start = time.perf_counter()
    if weights.is_directory(out) and not options.force:
        return 'there', 0.0
    try:
        code = _convert(argparse.Namespace(**{**vars(options), 'source': name, 'out': str(out)}))
        outcome = 'converted' if code == 0 else 'DIFFERENT'
    except FlaxnetsError as error:
        print(f'error: {_as_typed(str(error))}', file=sys.stderr)
        outcome = 'failed'
    return outcome, time.perf_counter() - start


if __name__ == '__main__':
    command_line.heed_interrupts()
    sys.exit(command_line.ended(main()))

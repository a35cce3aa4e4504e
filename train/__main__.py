"""The command `python -m train`: trains or resumes; with subcommands from evaluation to export."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from flaxnets import command_line
from flaxnets.errors import FlaxnetsError

PROG = 'python -m train'
DESCRIPTION = """Trains Res2Net, Res2NeXt, ResNeXt and ResNeSt by their published recipes, on one device or on
all devices of many hosts, and goes on exactly where a run was stopped."""

EXAMPLES = """examples:
  python -m train --workdir runs/digits                      the offline recipe, about a minute
  python -m train --recipe resnest50d --data tfds:imagenet2012 --workdir runs/resnest50d
  python -m train --recipe finetune --data folder:flowers --workdir runs/flowers model=resnest50d lr=0.02
  python -m train --recipe resnest50d --data tfds:imagenet2012 --print
  python -m train --recipe resnest50d --plan v5e:4x4         does it fit, how fast, without a TPU
  python -m train recipes                                    list the recipes
  python -m train fields                                     what every field means
  python -m train eval --model resnest50d --data folder:imagenet
  python -m train probe --model resnest50d --data folder:flowers
  python -m train export runs/flowers --out weights/flowers

The same command goes on with a workdir that holds a run. A field=value changes one field of the recipe;
python -m train recipes NAME prints them all.

exit codes: 0 done, 1 an error, 2 a wrong option, 75 stopped (SIGTERM, ctrl-C, preemption): run again"""

NEEDED = ('optax', 'grain')  # of the packages that the nets alone do without
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the command and returns its exit code; `arguments` are those of the process unless given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        'eval': _eval,
        'probe': _probe,
        'export': _export,
        'recipes': _recipes,
        'fields': _fields,
    }
    try:
        if arguments and arguments[0] in commands:
            own = prog.endswith(' train')  # `flaxnets evaluate` and others are named as their commands are
            return commands[arguments[0]](arguments[1:], f'{prog} {arguments[0]}' if own else prog)
        return _train(arguments, prog)
    except FlaxnetsError as error:
        message = command_line.as_typed(str(error), {'overwrite=True': '--force'})
        print(f'error: {message}', file=sys.stderr, flush=True)
        _leave(1, error)
        return 1
    except KeyboardInterrupt as error:
        print('interrupted', file=sys.stderr, flush=True)
        _leave(130, error)
        return 130
    except Exception as error:
        if _is_one_of_many():
            traceback.print_exc()
            _leave(1, error)
        raise


def _leave(code: int, error: BaseException) -> None:
    """Ends this process of a job at once, unless all of them end.

    At an ordinary exit JAX waits minutes for the other processes, which wait for this one.
    """
    if _is_one_of_many():
        from .parallel import JobError

        if not isinstance(error, JobError):
            sys.stdout.flush()
            os._exit(code)


def _is_one_of_many() -> bool:
    """Whether this process belongs to a job of several."""
    jax = sys.modules.get('jax')
    return jax is not None and jax.distributed.is_initialized()


def _train(arguments: Sequence[str], prog: str) -> int:
    from . import recipes
    from .settings import apply, validate

    options = _train_parser(prog).parse_intermixed_args(arguments)
    _check_packages()
    settings = recipes.get(options.recipe)
    changes = [f'data={options.data}'] if options.data else []
    settings = apply(settings, changes + options.changes)
    if options.print:
        return _print(settings)
    if options.plan:
        from .tools.planning import plan

        found = plan(settings, options.plan)
        print(found.text())
        return 0 if found.fits else 1
    validate(settings)
    if not options.workdir:
        raise FlaxnetsError('--workdir is missing: the folder for checkpoints, logs and the trained weights')
    _connect(options, training=True)
    from .loop import train

    outcome = train(settings, options.workdir, quiet=options.quiet, profile=_window(options.profile))
    if outcome.stopped:
        return STOPPED
    if outcome.evaluation and outcome.weights:
        result = outcome.evaluation
        print(f'{result.images} images: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %')
        print(f'weights in {outcome.weights}; open them with flaxnets.load({outcome.weights!r})')
    return 0


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise FlaxnetsError(f'this needs {" and ".join(missing)}: pip install {" ".join(missing)}')


def _train_parser(prog: str) -> argparse.ArgumentParser:
    from .data.sources.open import FORMS

    parser = command_line.parser(prog, DESCRIPTION, EXAMPLES.replace(PROG, prog))
    add = parser.add_argument
    add('changes', nargs='*', metavar='field=value', help='a field of the recipe, changed')
    add('--recipe', default='digits', metavar='NAME', help='where the settings come from (digits)')
    add('--data', metavar='DATA', help=f'where the images are: {FORMS}')
    add('--workdir', metavar='DIR', help='folder of the run; one that holds a run is continued')
    add('--print', action='store_true', help='show all that would happen, and do nothing')
    add(
        '--plan', metavar='SLICE', help='compile for a TPU slice (v4:2x2x4) and say whether it fits, how fast'
    )
    add('--profile', metavar='FIRST:LAST', help='profile these steps into WORKDIR/profile')
    add('--quiet', action='store_true', help='no progress bar')
    _add_hosts(parser)
    return parser


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('several hosts (one command on each)')
    add = group.add_argument
    add('--distributed', action='store_true', help='find the others: TPU pods, Slurm, Open MPI')
    add('--coordinator', metavar='HOST:PORT', help='address of the first process, where it cannot be found')
    add('--processes', type=int, metavar='N', help='how many there are')
    add('--process', type=int, metavar='I', help='which one this is, from 0')


def _connect(options: argparse.Namespace, *, training: bool) -> None:
    """Joins the other processes if the options ask for it, and keeps compiled programs."""
    from flaxnets.store.compiled import keep_compiled

    explicit = (options.coordinator, options.processes, options.process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise FlaxnetsError('--coordinator, --processes and --process go together')
        _join(*explicit)
    elif options.distributed:
        _join()
    keep_compiled(on_cpus=not training)


def _join(*others: Any) -> None:
    import jax

    try:
        jax.distributed.initialize(*others)
    except (ValueError, RuntimeError) as error:
        raise FlaxnetsError(
            f'cannot join the other processes: {error} (--distributed finds them on TPU pods, with Slurm and '
            'Open MPI; elsewhere give --coordinator, --processes and --process)'
        ) from error


def _window(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(':')
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise FlaxnetsError(f'--profile {text!r} must be two steps, as in 100:110')
    return int(first), int(last)


def _print(settings: Any) -> int:
    import jax

    from .data.sources import open_source
    from .tools.description import describe
    from .tools.planning import IMAGENET

    if settings.data:
        source = open_source(settings.data, settings.train_split, training=True)
        examples, classes = len(source), source.num_classes
        for note in source.notes:
            print(f'note: {note}', file=sys.stderr)
    else:
        examples, classes = IMAGENET, settings.num_classes or 1000
        print("no --data: counted with ImageNet's", f'{examples:,} images')
    print(describe(dataclasses.replace(settings, num_classes=classes), examples, jax.device_count()))
    return 0


def _recipes(arguments: Sequence[str], prog: str) -> int:
    from . import recipes
    from .settings import to_json

    parser = argparse.ArgumentParser(prog=prog, description='Lists the recipes, or one.')
    parser.add_argument('name', nargs='?', help='print all fields of this one')
    options = parser.parse_args(arguments)
    if options.name:
        for field, value in to_json(recipes.get(options.name)).items():
            print(f'{field}={",".join(map(str, value)) if isinstance(value, list | tuple) else value}')
        return 0
    for name, settings in recipes.RECIPES.items():
        print(f'{name:24} {settings.model:22} {settings.epochs:4} epochs, batch {settings.batch_size}')
    return 0


def _fields(arguments: Sequence[str], prog: str) -> int:
    from .tools.description import fields_as_markdown, fields_as_text

    parser = argparse.ArgumentParser(prog=prog, description='What every field of the settings means.')
    parser.add_argument('--markdown', action='store_true', help='in the form of docs/settings.md')
    options = parser.parse_args(arguments)
    print(fields_as_markdown() if options.markdown else fields_as_text())
    return 0


def _eval(arguments: Sequence[str], prog: str) -> int:
    from flaxnets.zoo.classes import ORDERS, ClassesError

    from .evaluation.benchmarks import BENCHMARKS

    parser = argparse.ArgumentParser(
        prog=prog, description='Top-1, top-5 and loss of weights over every image once.'
    )
    add = parser.add_argument
    what = 'anything that flaxnets.load opens; of several nets the probabilities are averaged'
    add('--model', required=True, nargs='+', help=what)
    sets = ', '.join(BENCHMARKS)
    add('--data', required=True, help=f'as for python -m train; or {sets}, each with :FOLDER')
    add('--split', default='', help='part of the data (its evaluation part)')
    add('--classes', metavar='FILE', help='names of the outputs: one a line, or JSON')
    add('--class-order', choices=ORDERS, help='how training sorted the classes of weights without names')
    add('--among', choices=('all', 'data'), help='outputs to judge among: all, or classes of the data')
    add('--images', nargs='+', metavar='FIELD=VALUE', help='prepare images so: mean=0.5 std=0.5 size=224')
    add('--flip', action='store_true', help='average with the mirror image')
    add('--crops', type=int, default=1, choices=(1, 5), help='5 averages the corners and the centre')
    add('--out', help='folder for result.json, tables and pictures: confusion, mistakes, reliability')
    add('--real-labels', metavar='FILE', help="real.json of ImageNet's reassessed labels")
    _add_work(add)
    _add_hosts(parser)
    options = parser.parse_args(arguments)
    _check_packages()
    _connect(options, training=False)
    from .evaluation.report import run

    try:
        report = run(options)
    except ClassesError as error:
        raise FlaxnetsError(f'{error} (here: --classes FILE, --class-order {"|".join(ORDERS)})') from error
    if options.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print(report.text())
    return 0


def _probe(arguments: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description='Accuracy of k nearest neighbours and of a linear probe on frozen features.',
    )
    add = parser.add_argument
    add('--model', required=True, help='anything that flaxnets.load opens')
    add('--data', required=True, help='as for python -m train')
    add('--train-split', default='', help='part to learn from (the training part)')
    add('--split', default='', help='part to be judged on (the evaluation part)')
    add('--neighbours', type=int, default=20, metavar='K', help='how many vote (20)')
    add('--strength', type=float, default=1.0, metavar='C', help='inverse of the L2 penalty (1)')
    _add_work(add)
    options = parser.parse_args(arguments)
    _check_packages()
    from flaxnets.store.compiled import keep_compiled

    from .evaluation.probes import run

    keep_compiled(on_cpus=True)
    found = run(options)
    print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else found.text())
    return 0


def _add_work(add: Callable[..., Any]) -> None:
    """Adds the options of all commands that apply a net to the images of a data set."""
    add('--batch', type=_count(1), default=64, help='images of a device at a time (64)')
    add('--dtype', default='float32', help='in which the net computes (float32)')
    what = 'threads or processes that decode images (one for each core)'
    add('--workers', '--threads', type=_count(0), default=0, metavar='N', help=what)
    what = 'who decodes: threads, processes, or auto: processes where many would work (auto)'
    add('--feed', default='auto', choices=('auto', 'threads', 'processes'), help=what)
    add('--json', action='store_true', help='print JSON')
    add('--quiet', action='store_true', help='no progress bar')


def _count(least: int) -> Callable[[str], int]:
    """Reads a whole number that is not too small."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'must be a whole number, at least {least}, not {text!r}')
        return int(text)

    return read


def _export(arguments: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description='The weights of a run as a directory, for flaxnets.load and python -m convert.',
    )
    add = parser.add_argument
    add('workdir', help='folder of the run')
    add('--out', required=True, help='directory to write')
    add('--checkpoint', default='last', help='last, best or a step (last)')
    add('--no-ema', action='store_true', help='the weights that were not averaged')
    add('--force', action='store_true', help='overwrite an earlier directory of weights')
    options = parser.parse_args(arguments)
    from .tools.exporting import export

    step = export(
        options.workdir, options.out, options.checkpoint, ema=not options.no_ema, overwrite=options.force
    )
    print(f'wrote the weights of step {step} to {options.out}; open them with flaxnets.load({options.out!r})')
    return 0


if __name__ == '__main__':
    from flaxnets.onednn import ask_for_onednn

    command_line.start_with_huge_pages()
    command_line.heed_interrupts()
    ask_for_onednn()
    sys.exit(command_line.ended(main()))

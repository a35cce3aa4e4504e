"""The command `flaxnets`, or `python -m flaxnets`: its own commands, and those of `convert` and `train`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import zoo
from .command_line import as_typed, ended, heed_interrupts, start_with_huge_pages
from .errors import FlaxnetsError
from .nets.arch import Arch
from .siblings import sibling
from .zoo.records import Weights, to_json

if TYPE_CHECKING:
    from .images.preprocess import Preprocess
    from .inference.prediction import Prediction

DESCRIPTION = """Res2Net, Res2NeXt, ResNeXt and ResNeSt in JAX: the nets by name, their published
weights, and all that is done with them."""

# Commands of the other packages: name -> module, arguments that come first, what the command does.
_ELSEWHERE = {
    'convert': ('convert.__main__', (), 'weights in from any publisher, and back to PyTorch'),
    'train': ('train.__main__', (), 'train by a recipe, or go on with a run'),
    'evaluate': ('train.__main__', ('eval',), 'accuracy of weights over a data set'),
    'probe': ('train.__main__', ('probe',), 'nearest neighbours and a linear probe on features'),
    'recipes': ('train.__main__', ('recipes',), 'the training recipes'),
    'push': ('convert.publishing.command', (), 'weights to the Hugging Face hub, where timm opens them too'),
}


# What computes with nets here. What `export` writes runs where nobody may ask for oneDNN.
_COMPUTING = ('predict', 'embed', 'explain', 'train', 'evaluate', 'probe')


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in _ELSEWHERE:
        module, first, _ = _ELSEWHERE[arguments[0]]
        command: Callable[..., int] = sibling(module).main
        return command([*first, *arguments[1:]], prog=f'flaxnets {arguments[0]}')
    parser = argparse.ArgumentParser(prog='flaxnets', description=DESCRIPTION)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    add = commands.add_parser('list', help='names of the nets')
    add.add_argument('pattern', nargs='?', default='*', help="wildcard, such as 'resnest*'")
    add.add_argument('--weights', action='store_true', help='the published weights in place of the nets')
    add.set_defaults(run=_list)

    add = commands.add_parser('info', help='a net: architecture, size, published weights')
    add.add_argument('name', help='a net, published weights, or a directory of weights')
    add.add_argument('--plot', metavar='FILE.png', help='draw its stages, its block and what each part costs')
    add.set_defaults(run=_info)

    add = commands.add_parser('predict', help='classify images')
    _add_images(add)
    add.add_argument('--classes', metavar='FILE', help='names of the outputs: one a line, or JSON')
    add.add_argument('--topk', type=int, default=5, metavar='K', help='how many classes to give (5)')
    add.add_argument('--out', metavar='FILE', help='write a table: .csv, .jsonl (JSON lines) or .parquet')
    add.set_defaults(run=_predict)

    add = commands.add_parser('embed', help='features of images before the classifier, nearest images')
    _add_images(add)
    add.add_argument('--out', required=True, metavar='FILE.npy', help='write float32 [images, features]')
    add.add_argument('--names', metavar='FILE', help='write the names of the rows: .txt (default) or .json')
    add.add_argument(
        '--neighbours', type=int, default=0, metavar='K', help='draw queries and their K nearest images'
    )
    add.add_argument('--query', nargs='+', default=[], metavar='IMAGE', help='the queries (8 of the images)')
    add.set_defaults(run=_embed)
    _add_export(commands.add_parser('export', help='a net with its weights as a file for other programs'))

    add = commands.add_parser('explain', help='where in an image a net sees its class, as a picture')
    add.add_argument('images', nargs='+', metavar='IMAGE', help='as predict takes them')
    add.add_argument('--model', nargs='+', required=True, help='weights of one net, or of several to compare')
    add.add_argument('--out', default='explained.png', metavar='FILE.png', help='the picture (explained.png)')
    what = 'gradcam (default), gradcam++, hirescam, layercam, eigencam; several side by side'
    add.add_argument('--method', nargs='+', default=['gradcam'], metavar='METHOD', help=what)
    what = 'where in the net: 0 the stem, 1 to 4 the stages (4); several side by side'
    add.add_argument('--stage', nargs='+', type=int, default=[4], metavar='STAGE', help=what)
    what = 'class to explain, by name or output number (the most probable one of each image)'
    add.add_argument('--class', dest='wanted', metavar='CLASS', help=what)
    add.set_defaults(run=_explain)

    for own in commands.choices.values():
        own.add_argument('--json', action='store_true', help='machine-readable output')
    for name, (_, _, what) in _ELSEWHERE.items():
        commands.add_parser(name, help=what, add_help=False)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except FlaxnetsError as error:
        print(f'error: {as_typed(str(error), {"overwrite=True": "--force"})}', file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        where = f'{error.filename}: ' if error.filename else ''
        print(f'error: {where}{error.strerror or error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of all commands that take many images."""
    add = parser.add_argument
    what = "images, folders, patterns ('photos/*.jpg'), tars, lists (.txt, or - for standard input)"
    add('images', nargs='+', metavar='IMAGE', help=what)
    add('--model', required=True, help='a directory of weights, a published name, or a .pth file')
    add('--arch', help='name of the net, for a .pth file whose name does not tell')
    add('--batch', type=int, default=32, metavar='N', help='images of a device at a time (32)')
    add('--quiet', action='store_true', help='no progress bar')


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('name', metavar='NAME', help='published weights, a directory of weights, or whatever else loads')
    add('--out', required=True, metavar='FILE', help='net.stablehlo for JAX, net.onnx for other runtimes')
    add('--size', type=_size, metavar='PX', help="of the images: 224, or 96,128, or 'free' for any size")
    add('--arch', metavar='NET', help='name of the net, for a file whose tensors leave a choice')
    add('--dtype', default='float32', metavar='TYPE', help='float32, or bfloat16 for a .stablehlo file')
    add('--classes', metavar='FILE', help='names of the outputs: one a line, or JSON')
    add('--force', action='store_true', help='overwrite what stands at FILE')
    parser.set_defaults(run=_export)


def _check_counts(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise FlaxnetsError(f'--{name} {getattr(options, name)}: must be at least 1')


def _list(options: argparse.Namespace) -> int:
    names = zoo.list_models(options.pattern, weights=options.weights)
    if not names:
        raise FlaxnetsError(f'no name matches {options.pattern!r}; `python -m flaxnets list` shows all')
    if options.json:
        print(json.dumps(names))
        return 0
    for name in names:
        arch, row = zoo.resolve(name)
        if options.weights:
            print(f'{name:44} {_accuracy(row)}')
        else:
            print(f'{name:26} {_describe_arch(zoo.NETS[arch])}')
    return 0


def _describe_arch(arch: Arch) -> str:
    parts = [arch.block, '-'.join(map(str, arch.layers)), f'{arch.cardinality}x{arch.base_width}d']
    if arch.block == 'res2net':
        parts.append(f'scale {arch.scale}')
    if arch.block == 'resnest':
        parts.append(f'radix {arch.radix}, avd {"first" if arch.avd_first else "last"}')
    parts += (
        ['SE'] * arch.se + [f'deep stem {arch.stem_width}'] * arch.deep_stem + ['avg_down'] * arch.avg_down
    )
    return ', '.join(parts)


def _accuracy(row: Weights | None) -> str:
    if row is None or not row.accuracy:
        return 'no published accuracy'
    best = row.accuracy[0]
    top5 = '' if best.top5 is None else f'/{best.top5:.2f}'
    return f'top-1{"/5" if top5 else ""} {best.top1:.2f}{top5} % at {best.size} px ({best.source})'


def _info(options: argparse.Namespace) -> int:
    from .api import config
    from .nets.resnet import abstract_variables, build, count_macs, count_parameters

    conf = config(options.name)
    if options.plot:
        from .inference.diagram import draw_net

        draw_net(conf, options.plot)
    net = build(conf.arch, conf.num_classes, conf.in_chans, folded=conf.folded)
    # Somebody's weights are one published file at most; a name stands for all those of its net.
    own = (conf.weights,) if conf.weights else ()
    rows = zoo.weights_of(conf.name) if _is_a_name(options.name) else own
    facts: dict[str, Any] = {
        'name': conf.name,
        'architecture': _describe_arch(conf.arch) + (', BatchNorm folded' if conf.folded else ''),
        'classes': conf.num_classes,
        'input channels': conf.in_chans,
        'parameters': count_parameters(abstract_variables(net)),
        'MACs': count_macs(net, conf.preprocess.size),
        'input': str(conf.preprocess),
        'default weights': conf.weights.name if conf.weights else None,
        'weights': [_weights_facts(row) for row in rows],
    }
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    _print_info(facts)
    return 0


def _is_a_name(source: str) -> bool:
    """Whether it stands for a net or published weights, and not for a file, a folder or a repository."""
    return not Path(source).exists() and ':' not in source


def _weights_facts(row: Weights) -> dict[str, Any]:
    return {
        'name': row.name,
        'accuracy': [to_json(accuracy) for accuracy in row.accuracy],
        'licence': row.licence,
        'input': str(row.preprocess),
        'layout': row.layout,
        'sha256': row.sha256,
        'urls': list(row.urls),
        'hub': row.hub_id,
        'aliases': list(row.aliases),
    }


def _print_info(facts: dict[str, Any]) -> None:
    print(f'{facts["name"]}: {facts["architecture"]}')
    print(f'{facts["parameters"]:,} parameters, {facts["MACs"]:,} MACs at the input size')
    print(f'{facts["classes"]} classes, {facts["input channels"]} input channels')
    print(f'input: {facts["input"]}')
    for row in facts['weights']:
        default = (
            ' (default)' if row['name'] == facts['default weights'] and len(facts['weights']) > 1 else ''
        )
        print(f'\n{row["name"]}{default}')
        for accuracy in row['accuracy']:
            top5 = '' if accuracy['top5'] is None else f', top-5 {accuracy["top5"]:.2f} %'
            print(f'  top-1 {accuracy["top1"]:.2f} %{top5} at {accuracy["size"]} px ({accuracy["source"]})')
        if row['input'] != facts['input']:
            print(f'  input: {row["input"]}')
        print(f'  licence {row["licence"]}, {row["layout"]} key names, sha256 {row["sha256"] or "unknown"}')
        for place in (*row['urls'], *([f'hf-hub:{row["hub"]}'] if row['hub'] else [])):
            print(f'  {place}')


def _predict(options: argparse.Namespace) -> int:
    from .images.listing import find_images
    from .inference.prediction import Classifier
    from .inference.tables import check_table, open_table
    from .store.compiled import keep_compiled
    from .zoo.classes import PRESUMED, read_classes

    _check_counts(options, 'topk', 'batch')
    if options.out:
        check_table(options.out)
    files = find_images(options.images)
    classes = read_classes(options.classes) if options.classes else None
    keep_compiled(on_cpus=True)
    classify = Classifier(options.model, arch=options.arch, classes=classes)
    named_by = {'named_by': classify.named_by}
    _print_approximations(classify.preprocess)
    counted = _Counted(len(files), options.quiet)
    with counted, open_table(options.out, options.topk) if options.out else nullcontext() as table:
        kept = []
        for prediction in classify(files, topk=options.topk, batch=options.batch):
            if not counted.add(prediction.image, prediction.problem) and options.json:
                kept.append(prediction.as_json() | named_by)
            elif not prediction.problem and not table:
                if counted.good == 1 and classify.named_by == PRESUMED:
                    counted.print(f'the classes are named by {PRESUMED}')
                counted.print(_for_people(prediction, short=len(files) > SHOWN_WHOLE))
            if table:
                table.write(prediction)
    if options.json and kept:
        print(json.dumps(kept, indent=1))
    if options.out:
        print(f'{counted.good} images are in {options.out}', file=sys.stderr if options.json else sys.stdout)
    return counted.outcome()


def _print_approximations(images: Preprocess) -> None:
    for what in images.approximations:
        print(f'note: {what}', file=sys.stderr)


SHOWN_WHOLE = 10  # the most images for which all top classes are printed; for more only the best one is


def _for_people(prediction: Prediction, short: bool) -> str:
    if short:
        best = prediction.top[0]
        return f'{best.probability:7.2%}  {best.name.partition(",")[0]:28}  {prediction.image}'
    rows = [f'  {guess.probability:7.2%}  {guess.name}' for guess in prediction.top]
    return '\n'.join([prediction.image, *rows])


def _embed(options: argparse.Namespace) -> int:
    from .images.listing import find_images
    from .inference.features import Embedder, check_features, save_features
    from .inference.pictures import check_picture
    from .store.compiled import keep_compiled

    names = options.names or f'{Path(options.out).with_suffix(".txt")}'
    _check_counts(options, 'batch', *(['neighbours'] if options.neighbours else []))
    check_features(options.out, names)
    if options.query and not options.neighbours:
        raise FlaxnetsError('--query IMAGE asks for neighbours: give --neighbours K too')
    picture = f'{Path(options.out).with_suffix("")}-neighbours.png'
    if options.neighbours:
        check_picture(picture)
    files, queries = find_images(options.images), find_images(options.query) if options.query else ()
    keep_compiled(on_cpus=True)
    embed = Embedder(options.model, arch=options.arch)
    _print_approximations(embed.transform.preprocess)
    counted = _Counted(len(files), options.quiet)
    with counted:
        results = embed(files, batch=options.batch)
        rows = save_features(
            results, options.out, names, embed.size, lambda r: counted.add(r.file.name, r.problem)
        )
    report: dict[str, Any] = {
        'features': options.out,
        'names': names,
        'images': len(rows),
        'size': embed.size,
    }
    if options.neighbours:
        from .inference.neighbours import draw_neighbours

        report['neighbours'] = draw_neighbours(embed, options.out, rows, queries, options.neighbours, picture)
        report['picture'] = picture
    if options.json:
        print(json.dumps(report, indent=1))
        return counted.outcome()
    print(f'{len(rows)} images: float32 [{len(rows)}, {embed.size}] in {options.out}, names in {names}')
    if options.neighbours:
        print(f'nearest images: {picture}')
    return counted.outcome()


def _explain(options: argparse.Namespace) -> int:
    from .images.listing import find_images
    from .inference.map_pictures import explain
    from .store.compiled import keep_compiled

    files = find_images(options.images)
    keep_compiled(on_cpus=True)
    found = explain(files, options.model, options.out, options.method, options.stage, options.wanted)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for row in found:
        print(f'{row["image"]}: {row["class"]} ({row["probability"]:.2%}, {row["model"]})')
    print(f'the picture: {options.out}')
    return 0


class _Counted:
    """A progress bar over images. It names and counts those that cannot be read, on stderr."""

    def __init__(self, total: int, quiet: bool) -> None:
        from tqdm import tqdm

        self.good = self.bad = 0
        self._bar = tqdm(total=total, unit=' images', disable=quiet or None, leave=False)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, name: str, problem: str | None) -> bool:
        """Counts an image, and returns whether it cannot be read."""
        self._bar.update()
        if problem:
            self.bad += 1
            self._bar.write(f'error: {problem}', file=sys.stderr)
        else:
            self.good += 1
        return bool(problem)

    def print(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def outcome(self) -> int:
        """Prints how many images cannot be read, and returns the exit status."""
        if self.bad:
            print(f'{self.bad} of {self.good + self.bad} images cannot be read', file=sys.stderr)
        return 1 if self.bad else 0


def _size(text: str) -> int | tuple[int, ...] | str:
    sides = text.split(',')
    if text == 'free' or not all(side.strip().isdecimal() for side in sides):
        return text
    return int(text) if len(sides) == 1 else tuple(map(int, sides))


def _export(options: argparse.Namespace) -> int:
    from .exporting.files import export
    from .zoo.classes import read_classes

    found = export(
        options.name,
        options.out,
        size=options.size,
        model=options.arch,
        dtype=options.dtype,
        classes=read_classes(options.classes) if options.classes else None,
        overwrite=options.force,
    )
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
        return 0
    for note in found.description.notes:
        print(f'note: {note}', file=sys.stderr)
    print(f'wrote {found}')
    return 0


def command() -> int:
    """The process of the command `flaxnets`."""
    heed_interrupts()
    if sys.argv[1:2] == ['train']:  # the others are too short to be worth a second start of Python
        start_with_huge_pages()
    if sys.argv[1:2] and sys.argv[1] in _COMPUTING:  # to ask takes the others a third of their time
        from .onednn import ask_for_onednn

        ask_for_onednn()
    return ended(main())


if __name__ == '__main__':
    sys.exit(command())

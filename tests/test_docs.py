"""The documentation does what it says: its Python runs, its commands exist, its examples give what they show.

Pages use the names of the zoo. Here these are shallow nets with random weights, kept as published ones are.
A block that cannot be run has a comment `<!-- not run: the reason -->` on the line before it, which no reader
sees.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import doctest
import functools
import importlib
import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cells
import check
import numpy as np
import pytest
import zoo_table
from file_server import isolate
from nets import random_variables, timm_net
from PIL import Image
from short_nets import short_nets

import convert.__main__
import flaxnets
import flaxnets.__main__
import train.__main__
from flaxnets import zoo
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from train import Outcome, recipes
from train.job import make_job
from train.settings import apply

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text('utf-8') for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))}
NOTEBOOK = json.loads((ROOT / 'docs' / 'finetune.ipynb').read_text('utf-8'))
FENCED = re.compile(r'(<!-- not run: \S[^>]+-->\n)?^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
ELSEWHERE = {'serving.md': 'test_serving.py'}  # a test of its own runs the Python of the page


class Block(NamedTuple):
    """A fenced block of a page, which is to be run."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    for found in FENCED.finditer(PAGES[page]):
        if not found[1]:
            yield Block(found[2], found[3], PAGES[page].count('\n', 0, found.start(3)))


# --- the site and the notebook; these come first, while the zoo is as it is


def test_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built without a warning, its links lead somewhere, and it asks nothing of other hosts."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    row = zoo_table.Row(zoo.WEIGHTS[0], 25_000_000, 4_000_000_000)
    monkeypatch.setattr(zoo_table, 'rows', lambda: (row,))
    monkeypatch.setenv('NO_MKDOCS_2_WARNING', '1')
    monkeypatch.chdir(ROOT)
    build_site(load_config('mkdocs.yml', site_dir=str(tmp_path)))
    assert check.problems(tmp_path) == []
    assert '<td>25.0</td><td>4.0</td>' in (tmp_path / 'zoo.html').read_text('utf-8')
    index, checked = ((tmp_path / f'{name}.html').read_text('utf-8') for name in ('index', 'checked'))
    assert 'bit-identical' in index and 'timm 1.0.31' in checked and 'timm 1.0.31' not in index
    shown = (tmp_path / 'finetune.html').read_text('utf-8')
    assert shown.count('src="finetune-') == json.dumps(NOTEBOOK).count('"image/png"') == 3


def test_what_is_wrong_with_a_site_is_found(tmp_path: Path) -> None:
    (tmp_path / 'a.html').write_text(
        '<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a><a href="#x"></a>'
        '<a href="https://elsewhere.org"></a><img src="data:,"><p id="x"><script src="//host/x.js"></script>'
    )
    (tmp_path / 'b.html').write_text('<p id="there"><link href="https://host/x.css">')
    (tmp_path / 'x.css').write_text('@font-face { src: url("https://host/font.woff") } p { src: url(a.png) }')
    assert check.problems(tmp_path) == [
        'a.html loads //host/x.js',
        'a.html: no b.html#gone',
        'a.html: no c.html',
        'b.html loads https://host/x.css',
        'x.css loads https://host/font.woff',
    ]


def test_the_table_of_the_zoo_counts_what_timm_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for all: `tests/test_zoo.py` compares the counting itself, net by net."""
    monkeypatch.setattr(zoo_table, 'KEPT', tmp_path / 'costs.json')
    monkeypatch.setattr(zoo_table, 'list_models', lambda weights: ['resnest14d.gluon_in1k'])
    (row,) = zoo_table.rows.__wrapped__()
    expected = sum(parameter.numel() for parameter in timm_net('resnest14d').parameters())
    assert (row.parameters, row.family, row.more_data) == (expected, 'ResNeSt', False)
    assert json.loads((tmp_path / 'costs.json').read_text('utf-8')) == {
        f'{zoo.NETS["resnest14d"]} 224': [row.parameters, row.macs]
    }


def test_the_notebook(tmp_path: Path) -> None:
    """Its cells run and show what is kept in it: the same kinds of things, and nearly the same accuracies."""
    with short_nets():
        now = cells.run(NOTEBOOK, tmp_path)
    kept = [cell['outputs'] for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']

    def kinds(outputs: list[list[dict[str, Any]]]) -> list[list[list[str]]]:
        return [[sorted(output.get('data', ['text'])) for output in cell] for cell in outputs]

    assert kinds(now) == kinds(kept)
    for found, expected in zip(_accuracies(now), _accuracies(kept), strict=True):
        assert abs(found - expected) < 20 and found > 40  # of 6 classes


def _accuracies(outputs: list[list[dict[str, Any]]]) -> list[float]:
    return [float(number) for number in re.findall(r'top-1 +([\d.]+) %', json.dumps(outputs))]


# --- Python


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with what pages name: weights, published and in directories, and pictures."""
    folder = tmp_path_factory.mktemp('docs')
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder)
        patch.setenv('FLAXNETS_OFFLINE', '1')
        patch.chdir(folder)
        for name, arch in zoo.NETS.items():
            shallow = dataclasses.replace(arch, layers=(1, 1, 1, 1), cardinality=1)
            patch.setitem(zoo.NETS, name, shallow)
        rows = tuple(dataclasses.replace(row, preprocess=Preprocess(64)) for row in zoo.WEIGHTS)
        patch.setattr(zoo, 'WEIGHTS', rows)
        shutil.copy(ROOT / 'examples' / 'cat.jpg', 'photo.jpg')
        for part in ('train', 'val'):
            for name in ('rose', 'tulip'):
                Path('flowers', part, name).mkdir(parents=True)
                for i in range(2):
                    Image.new('RGB', (40, 32), 'red').save(Path('flowers', part, name, f'{i}.png'))
        for name in ('resnest50d', 'resnest101e', 'resnext50_32x4d'):
            config = zoo.config(name)
            assert config.weights
            variables = random_variables(build(config.arch))
            weights.save(Path('home', 'converted', config.weights.name), variables, config)
            weights.save(Path('weights', name), variables, dataclasses.replace(config, weights=None))
        yield folder


def run_page(page: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs the Python of a page from top to bottom; a traceback has the lines of the page."""
    for block in blocks(page):
        if block.language == 'python':
            exec(compile('\n' * block.line + block.text, page, 'exec'), namespace)
    return namespace


def test_every_page_with_python_is_run() -> None:
    pages = {page for page in PAGES if any(block.language == 'python' for block in blocks(page))}
    assert pages == {'README.md', 'jax.md', 'detection.md', 'training.md', *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / 'tests' / test).read_text('utf-8')
    languages = {found[2] for page in PAGES for found in FENCED.finditer(PAGES[page])}
    assert languages == {'python', ''}  # all others would be left out


def test_readme(place: Path) -> None:
    found = run_page('README.md', {})
    assert found['logits'].shape == (1, 10)
    assert found['variables']['params']['fc']['kernel'].shape == (2048, 7)
    assert [info.channels for info in found['backbone'].feature_info] == [256, 512, 1024, 2048]


def test_in_jax(place: Path) -> None:
    found = run_page('jax.md', {})
    np.testing.assert_allclose(found['nnx_logits'], found['logits'], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found['nnx_value'], found['value'], rtol=1e-5)
    np.testing.assert_allclose(found['many_value'], found['value'], rtol=1e-5)
    assert len(found['many_logits'].sharding.device_set) > 1
    assert set(found['changed']['batch_stats']) == set(found['variables']['batch_stats'])
    assert found['half_logits'].dtype == 'bfloat16'
    assert f'`{found["shapes"]}`' in ' '.join(PAGES['jax.md'].split('\n'))
    for info, x in zip(found['backbone'].feature_info, found['maps'], strict=True):
        assert x.shape == (1, 64 // info.reduction, 64 // info.reduction, info.channels)


def test_detection(place: Path) -> None:
    found = run_page('detection.md', {})
    assert f'`{found["sizes"]}`' in PAGES['detection.md']
    before, after = found['before']['fpn'], found['params']['fpn']
    frozen = [tree['backbone']['conv1']['0']['kernel'] for tree in (before, after)]
    np.testing.assert_array_equal(*frozen)
    for learnt in (
        lambda tree: tree['backbone']['layer4']['0']['conv1']['kernel'],
        lambda tree: tree['lateral0']['kernel'],
    ):
        assert np.abs(learnt(before) - learnt(after)).max() > 0


def test_training_from_python(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's settings make a job; the example in the docstring of `train` is a whole run."""
    short = functools.partial(train.Settings, batch_size=4, image_size=32)
    jobs = []

    def prepared(settings: train.Settings, workdir: str) -> SimpleNamespace:
        jobs.append(make_job(settings))
        return SimpleNamespace(evaluation=SimpleNamespace(top1=50.0), weights=workdir)

    monkeypatch.setattr(train, 'Settings', short, raising=False)
    monkeypatch.setattr(train, 'train', prepared, raising=False)
    run_page('training.md', {})
    (job,) = jobs
    assert job.settings.num_classes == 2 and job.settings.lr == 0.02
    assert {field.name for field in dataclasses.fields(Outcome)} >= {'evaluation', 'weights'}


# --- commands


class Command(NamedTuple):
    """One command of a shell block or within a sentence."""

    page: str
    words: tuple[str, ...]
    inline: bool


def commands() -> Iterator[Command]:
    for page, text in PAGES.items():
        for block in blocks(page):
            if block.language == '':
                lines = block.text.replace('\\\n', ' ').splitlines()
                prompts = [line.removeprefix('$ ') for line in lines if line.startswith('$ ')]
                for line in prompts or lines:
                    yield from (Command(page, words, False) for words in split(line))
        for code in re.findall(r'`([^`]+)`', FENCED.sub('', text)):
            if re.match(r'(python|flaxnets|make|pip) [a-z.-]', code) and '...' not in code:
                yield from (Command(page, words, True) for words in split(code.replace('\\|', '|')))


def split(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line of the shell, without what is set for them and where their output goes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;<>')
    lexer.whitespace_split = True
    words: list[str] = []
    kept = True
    for word in [*lexer, ';']:
        if word[0] in '|&;<>':
            while words and (words[0] == 'srun' or re.match(r'[A-Z_]+=', words[0])):
                del words[0]
            if words and kept:
                yield tuple(words)
            kept, words = word[0] not in '<>', []
        else:
            words.append(word)


class Parsed(BaseException):
    """Thrown in place of running a command whose arguments have been parsed: the `Namespace`."""


class Refused(BaseException):
    """Thrown for arguments that a command does not take."""


@contextlib.contextmanager
def parsing_alone() -> Iterator[None]:
    def parsed(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_alone(self: Any, *arguments: Any, **options: Any) -> Any:
            raise Parsed(parse(self, *arguments, **options))

        return parse_alone

    def refuse(self: Any, message: str) -> None:
        raise Refused(message)

    parser = argparse.ArgumentParser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, 'parse_args', parsed(parser.parse_args))
        patch.setattr(parser, 'parse_intermixed_args', parsed(parser.parse_intermixed_args))
        patch.setattr(parser, 'error', refuse)
        yield


def check_command(words: Sequence[str], inline: bool = False) -> None:
    """Raises an error unless a command is one, and takes these arguments."""
    match list(words):
        case ['flaxnets', *rest] | ['python', '-m', 'flaxnets', *rest]:
            check_arguments(flaxnets.__main__.main, rest, inline)
        case ['python', '-m', 'convert', *rest]:
            check_arguments(convert.__main__.main, rest, inline)
        case ['python', '-m', 'train', *rest]:
            check_arguments(train.__main__.main, rest, inline)
        case ['python', '-m', 'pytest', *rest]:
            assert all(
                (ROOT / word.partition('::')[0]).exists() for word in rest if word.startswith('tests/')
            )
        case ['python', ('examples/serve.py' | 'examples/demo.py') as program, *rest]:
            check_arguments(runpy.run_path(str(ROOT / program))['main'], rest, inline, by_argv=program)
        case ['python', '-m', program, *rest] if program.startswith('benchmarks.'):
            check_arguments(importlib.import_module(program).main, rest, inline, by_argv=program)
        case ['python', program, *_] if program.startswith(('tests/', 'docs/')):
            assert (ROOT / program).exists()
        case ['make', *targets]:
            names = [name for name in targets if '=' not in name]
            makefile = (ROOT / 'Makefile').read_text('utf-8')
            assert names and all(re.search(rf'^{name}:', makefile, re.MULTILINE) for name in names)
        case ['pip', 'install', *packages]:
            extras = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))['project'][
                'optional-dependencies'
            ]
            for package in packages:
                if found := re.fullmatch(r'\.\[(.+)\]', package):
                    assert set(found[1].split(',')) <= set(extras)
        case [('export' | 'curl' | 'sed' | 'find'), *_]:
            pass
        case _:
            raise AssertionError(f'an unknown command: {words}')


def check_arguments(
    main: Callable[..., Any], arguments: list[str], inline: bool, by_argv: str | None = None
) -> None:
    names_only = inline and all(re.fullmatch(r'[a-z]+', word) for word in arguments)
    with parsing_alone(), pytest.MonkeyPatch.context() as patch:
        try:
            if by_argv:
                patch.setattr('sys.argv', [by_argv, *arguments])
                main()
            else:
                main([*arguments, *(['--help'] if names_only else [])])
        except Parsed as parsed:
            (options,) = parsed.args
            if hasattr(options, 'changes'):
                recipe = 'digits' if options.recipe == 'NAME' else options.recipe
                apply(recipes.get(recipe), [c for c in options.changes if c != 'field=value'])
            return
        except Refused as refused:
            assert inline and 'arguments are required' in str(refused), f'{arguments}: {refused}'
            return
        except SystemExit as stop:
            assert (names_only or '--help' in arguments) and stop.code == 0
            return
    raise AssertionError(f'{arguments}: not parsed')


def test_commands_take_the_options_that_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(commands())
    for command in found:
        try:
            check_command(command.words, command.inline)
        except (AssertionError, flaxnets.FlaxnetsError) as error:
            raise AssertionError(f'{command.page}: {" ".join(command.words)}: {error}') from error
    assert len([command for command in found if not command.inline]) > 50
    for line in (
        'python -m convert net.pth --oot x',
        'flaxnets predict a.jpg --model x --topn 5',
        'flaxnets pradict a.jpg --model x',
        'python -m train --recipe finetune momentun=0.9',
        'python -m train --recipe finetun',
        'python -m train eval --data digits',
        'python examples/serve.py net.stablehlo --prt 1',
        "pip install '.[trian]'",
        'make tests',
        'flax list',
    ):
        with pytest.raises((AssertionError, flaxnets.FlaxnetsError)):
            check_command(next(split(line)))


def test_cheap_commands_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cheap = {'list', 'info', 'recipes', 'fields'}
    found = {c.words for c in commands() if not c.inline and cheap & set(c.words) and 'push' not in c.words}
    assert len(found) >= 3
    for words in found:
        main = train.__main__.main if 'train' in words else flaxnets.__main__.main
        first = next(i for i, word in enumerate(words) if word in cheap)
        assert main(list(words[first:])) == 0
        assert capsys.readouterr().out
    assert Path('net.png').stat().st_size > 10_000


# --- docstrings

EXAMPLES = (  # these must have some
    'flaxnets.create',
    'flaxnets.load',
    'flaxnets.config',
    'flaxnets.transform',
    'flaxnets.list_models',
    'flaxnets.export',
    'convert.conversion.open_checkpoint',
    'convert.writing.write',
    'train.train',
    'train.settings.apply',
)


def reference() -> list[str]:
    return re.findall(r'^::: ([\w.]+)$', PAGES['reference.md'], re.MULTILINE)


def found_at(name: str) -> Any:
    module, _, attribute = name.rpartition('.')
    return getattr(importlib.import_module(module), attribute)


def test_the_reference_has_every_public_name() -> None:
    names = reference()
    assert len(set(names)) == len(names)
    public = {f'flaxnets.{name}' for name in flaxnets.__all__ if name != '__version__'}
    assert public | {f'train.{name}' for name in train.__all__} <= set(names)
    assert all(found_at(name).__doc__ for name in names)


def test_examples_of_docstrings(place: Path) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    finder = doctest.DocTestFinder(recurse=False, exclude_empty=True)
    with_examples = set()
    for name in reference():
        thing = found_at(name)
        own = {'flaxnets': flaxnets, thing.__name__: thing}
        for example in finder.find(thing, name, globs=own):
            said: list[str] = []
            assert runner.run(example, out=said.append).failed == 0, ''.join(said)
            with_examples.add(name)
    assert set(EXAMPLES) <= with_examples

"""The command `flaxnets push`: puts weights on the Hugging Face hub, or into a folder of the same form."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flaxnets import command_line
from flaxnets.errors import FlaxnetsError

from ..checkpoint import Checkpoint
from ..conversion import open_checkpoint
from .facts import UNKNOWN, Facts, gather
from .folder import check_folder, check_publishable, remarks, write_folder
from .hub import find_repository, upload

DESCRIPTION = """Puts weights on the Hugging Face hub as a repository that timm opens as its own: safetensors
under timm's names, timm's config.json, the certificate and a model card. flaxnets opens it too."""

EXAMPLES = """examples:
  flaxnets push weights/flowers me/resnest50d-flowers --licence apache-2.0 --report eval/result.json
  flaxnets push weights/flowers --folder flowers-timm         the same files, without network
  flaxnets push weights/flowers me/resnest50d-flowers --private

The token is taken from HF_TOKEN, or from `hf auth login`. HF_ENDPOINT names another hub."""

# Words in messages of the library -> the options of the command line.
_AS_TYPED = {'overwrite=True': '--force', 'write_folder': '--folder FOLDER'}


def main(arguments: Sequence[str] | None = None, prog: str = 'flaxnets push') -> int:
    """Runs the command and returns its exit code; `arguments` are those of the process unless given."""
    parser = command_line.parser(prog, DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add('source', metavar='SOURCE', help='what flaxnets.load opens: a directory of weights, a run, ...')
    add('repository', nargs='?', metavar='ORG/NAME', help='the repository to upload to')
    add('--folder', metavar='FOLDER', help='write the files there and upload nothing')
    add('--model', metavar='NAME', help='the net, where the tensors leave a choice')
    add('--licence', '--license', metavar='ID', help="the weights' licence, such as apache-2.0")
    add('--report', metavar='FILE', help='result.json of python -m train eval --out, for the card')
    add('--private', action='store_true', help='make a new repository private')
    add('--message', metavar='TEXT', help='the message of the commit')
    add('--force', action='store_true', help='commit over the files of a repository, or replace a folder')
    options = parser.parse_args(arguments)
    if not options.repository and not options.folder:
        parser.error('give ORG/NAME, or --folder FOLDER')
    try:
        return _to_folder(options) if options.folder else _to_hub(options)
    except FlaxnetsError as error:
        print(f'error: {command_line.as_typed(str(error), _AS_TYPED, ("licence", "model"))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def _opened(options: argparse.Namespace) -> tuple[Checkpoint, Facts]:
    checkpoint = open_checkpoint(options.source, options.model)
    check_publishable(checkpoint)
    facts = gather(checkpoint.config, options.licence, options.report)
    for remark in remarks(checkpoint.config):
        print(f'note: {remark}', file=sys.stderr)
    if facts.licence == UNKNOWN:
        print(
            'note: the card says that the licence is unknown; --licence names one, as apache-2.0',
            file=sys.stderr,
        )
    return checkpoint, facts


def _to_folder(options: argparse.Namespace) -> int:
    check_folder(options.folder, options.force)
    checkpoint, facts = _opened(options)
    write_folder(checkpoint, options.folder, facts, repository=options.repository, overwrite=options.force)
    print(f'wrote {options.folder}; it opens with flaxnets.load({options.folder!r})')
    return 0


def _to_hub(options: argparse.Namespace) -> int:
    name = options.repository
    repository = find_repository(name, private=options.private, overwrite=options.force)
    checkpoint, facts = _opened(options)
    with tempfile.TemporaryDirectory() as here:
        folder = write_folder(checkpoint, Path(here, 'repository'), facts, repository=name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f'{name}: uploading {size / 1e6:.1f} MB', flush=True)
        message = options.message or f'{checkpoint.config.name}, by flaxnets'
        names = upload(repository, folder, message, private=options.private)
        left = sorted({file.name for file in folder.iterdir()} - set(names))
    for file in left:
        print(f'note: {file} stays as it is there', file=sys.stderr)
    print(f'{", ".join(names)} are at {repository.url}; open them with flaxnets.load("hf-hub:{name}")')
    return 0

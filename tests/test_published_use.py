"""Published weights by name, end to end: fetched, converted, kept, loaded; from a server of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from file_server import Server, isolate, send
from nets import randomise, timm_net, to_flax

import flaxnets
from convert.__main__ import main
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.store import weights
from flaxnets.zoo.records import Weights

NET = 'resnest14d'
FILE = 'gluon_resnest14-{}.pth'


@pytest.fixture(scope='module')
def published() -> Iterator[tuple[torch.nn.Module, bytes]]:
    import io

    net = randomise(timm_net(NET))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer, _use_new_zipfile_serialization=False)
    yield net, buffer.getvalue()


@pytest.fixture
def row(
    published: tuple[torch.nn.Module, bytes],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Weights:
    """The only published weights there are, on the server."""
    isolate(monkeypatch, tmp_path)
    content = published[1]
    digest = hashlib.sha256(content).hexdigest()[:8]
    name = FILE.format(digest)
    server.routes[f'/{name}'] = [send(content, cut=1_000_000, ranges=True, etag='"1"'), send(content)]
    preprocess = Preprocess(160, 0.95, interpolation='bicubic')
    only = Weights(NET, 'mine', (f'{server.url}/{name}',), sha256=digest, preprocess=preprocess)
    monkeypatch.setattr(zoo, 'WEIGHTS', (only,))
    return only


def test_load_by_name_fetches_and_converts_once(
    row: Weights, server: Server, published: tuple[torch.nn.Module, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, variables = flaxnets.load(NET)
    expected = to_flax(published[0], model)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    requests = len(server.seen)
    monkeypatch.setenv('FLAXNETS_OFFLINE', '1')
    again = flaxnets.load(row.name)[1]
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert len(server.seen) == requests == 2  # the download was cut off once


def test_convert_by_name_keeps_what_load_finds(
    row: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([NET]) == 0
    output = capsys.readouterr().out
    assert row.name in output and 'as published' in output
    directory = tmp_path / 'home' / 'converted' / row.name
    assert str(directory) in output
    config = weights.read_config(directory)
    assert config.weights == row and config.preprocess == row.preprocess
    assert flaxnets.load(NET)[0] == flaxnets.create(NET)


@pytest.mark.parametrize(
    'option', ['--drop-head', '--fold-bn', '--format=pth', '--dtype=bfloat16', '--model=x']
)
def test_what_load_finds_is_as_published(
    row: Weights, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([NET, option]) == 1
    assert f'say what to write with {option.partition("=")[0]}' in capsys.readouterr().err
    assert not (tmp_path / 'home').exists()


def test_what_a_hash_says_is_not_overruled(
    row: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([NET, '--model', 'resnest26d', '--out', str(tmp_path / 'net')]) == 1
    assert f'is {row.name}, not resnest26d' in capsys.readouterr().err


def test_two_processes_may_convert_at_once(row: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    save = weights.save

    def second(*arguments: Any, **options: Any) -> Path:
        save(*arguments, **options)  # the other one was faster
        return save(*arguments, **options)

    monkeypatch.setattr(weights, 'save', second)
    assert flaxnets.load(NET)[0] == flaxnets.create(NET)


def test_all_ends_in_a_table(
    row: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Weights(NET, 'gone', (row.urls[0].replace('gluon', 'no'),), sha256='00000000')
    monkeypatch.setattr(zoo, 'WEIGHTS', (row, gone))
    assert main(['--all', 'resnest*', '--out', str(tmp_path / 'out')]) == 1
    output = capsys.readouterr()
    table = {line.split()[0]: line.split()[1] for line in output.out.splitlines()[-4:-1] if line.strip()}
    assert table[row.name] == 'converted' and table[gone.name] == 'failed'
    assert '404' in output.err
    assert [p.name for p in (tmp_path / 'out').iterdir()] == [row.name]
    monkeypatch.setattr(zoo, 'WEIGHTS', (row,))
    assert main(['--all', 'resnest*', '--out', str(tmp_path / 'out')]) == 0
    assert 'there' in capsys.readouterr().out
    assert main(['--all', 'vit*', '--out', str(tmp_path / 'out')]) == 1


def test_offline_says_what_to_put_where(
    row: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('FLAXNETS_OFFLINE', '1')
    with pytest.raises(FlaxnetsError) as info:
        flaxnets.load(NET)
    for words in (row.urls[0], str(row.sha256), str(tmp_path / 'home' / 'files')):
        assert words in str(info.value)


def test_an_altered_file_is_refused(
    row: Weights, server: Server, published: tuple[torch.nn.Module, bytes], tmp_path: Path
) -> None:
    altered = bytearray(published[1])
    altered[len(altered) // 2] ^= 1
    path = '/' + row.urls[0].rpartition('/')[2]
    server.routes[path] = [send(bytes(altered))]
    with pytest.raises(FlaxnetsError, match=f'{row.sha256}'):
        flaxnets.load(NET)
    assert not (tmp_path / 'home' / 'converted').exists()

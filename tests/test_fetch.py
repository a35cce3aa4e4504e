"""Published weights by name: where they are sought, kept and found again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
from pathlib import Path

import pytest
from file_server import (
    CONTENT,
    NAME,
    SHA256,
    Publish,
    Server,
    assert_only,
    send,
)

from convert.download import published_files as fetching
from convert.download import web
from convert.download.published_files import fetch
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.store.home import home
from flaxnets.zoo.records import Weights

pytestmark = pytest.mark.usefixtures('isolated')


def test_a_name_is_fetched_once(server: Server, publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    server.routes['/' + NAME] = [send()]
    path = publish(f'{server.url}/{NAME}')
    assert fetch('net') == path == fetch('net')
    assert_only(path)
    assert len(server.seen) == 1 and server.seen[0][1]['accept-encoding'] == 'identity'
    out, err = capsys.readouterr()
    assert out == '' and err.splitlines()[0] == f'{NAME}: 3.0 MB from 127.0.0.1'
    assert err.splitlines()[1].startswith(f'{NAME}: 3.0 MB in ') and len(err.splitlines()) == 2


def test_quiet_is_quiet(server: Server, publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    server.routes['/' + NAME] = [send(cut=1000), send()]
    publish(f'{server.url}/{NAME}')
    fetch('net', quiet=True)
    assert capsys.readouterr() == ('', '')


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes['/' + NAME] = [send()]
    publish(f'{server.url}/{NAME}')
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setenv('COLUMNS', '120')
    fetch('net')
    begun, *drawn, ended = terminal.getvalue().split('\r')
    assert begun == f'{NAME}: 3.0 MB from 127.0.0.1\n' and ended.startswith(f'{NAME}: 3.0 MB in ')
    assert any(line.startswith(f'{NAME}: ') and '/3.00M [' in line for line in drawn)


def test_the_next_host_is_tried(server: Server, other: Server, publish: Publish) -> None:
    other.routes['/' + NAME] = [send()]
    path = publish(f'{server.url}/{NAME}', f'{other.url}/{NAME}')
    fetch('net')
    assert_only(path)
    assert len(server.seen) == len(other.seen) == 1


def test_a_wrong_file_is_removed_and_every_host_named(
    server: Server, other: Server, publish: Publish
) -> None:
    server.routes['/' + NAME] = [send(b'something else')]
    urls = f'{server.url}/{NAME}', f'{other.url}/{NAME}'
    path = publish(*urls)
    with pytest.raises(FlaxnetsError) as caught:
        fetch('net')
    wrong = hashlib.sha256(b'something else').hexdigest()[:8]
    assert f'{urls[0]}: sends another or a damaged file: its SHA-256 begins {wrong}, not {SHA256[:8]}' in str(
        caught.value
    )
    assert f'{urls[1]}: HTTP 404 Not Found' in str(caught.value)
    assert f'{NAME} (its SHA-256 begins {SHA256[:8]}) from {urls[0]} or {urls[1]} to {path}' in str(
        caught.value
    )
    assert os.listdir(path.parent) == [] and len(server.seen) == 1


@pytest.mark.parametrize('variable', ['FLAXNETS_OFFLINE', 'HF_HUB_OFFLINE'])
def test_offline(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    server.routes['/' + NAME] = [send()]
    url = f'{server.url}/{NAME}'
    path = publish(url)
    monkeypatch.setenv(variable, '1')
    with pytest.raises(FlaxnetsError, match=f'{variable} is set, and it is not in the cache') as caught:
        fetch('net')
    assert f'{NAME} (its SHA-256 begins {SHA256[:8]}) from {url} to {path}' in str(caught.value)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(FlaxnetsError, match='what is in the cache is damaged'):
        fetch('net')
    path.write_bytes(CONTENT)
    assert fetch('net') == path and not server.seen
    path.unlink()
    monkeypatch.setenv(variable, '0')
    assert fetch('net') == path and len(server.seen) == 1


def test_a_damaged_copy_is_replaced(
    server: Server, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    server.routes |= {f'/{NAME}': [send()], '/a.pth': [send()]}
    publish(f'{server.url}/{NAME}')
    for name in ('net', f'{server.url}/a.pth'):
        path = fetch(name)
        flipped = bytearray(CONTENT)
        flipped[1234] ^= 1
        path.write_bytes(flipped)
        assert fetch(name).read_bytes() == CONTENT
        assert 'what is in the cache is damaged; fetching it again' in capsys.readouterr().err
    assert len(server.seen) == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: Server, publish: Publish) -> None:
    (tmp_path / 'home').write_bytes(b'a file')
    publish(f'{server.url}/{NAME}')
    with pytest.raises(FlaxnetsError, match='cannot be written'):
        fetch('net')


@pytest.mark.parametrize(
    ('url', 'match'),
    [
        ('http://example.org/x.pth', 'http: is not fetched from, only https'),
        ('ftp://example.org/x.pth', 'ftp: is not'),
        ('file:///etc/passwd', 'file: is not'),
        ('https://me:secret@example.org/x.pth', 'user names and passwords'),
        ('https://example.org/', 'does not end in the name of a file'),
        ('https://example.org/..%2f..', 'does not end in the name of a file'),
        ('https://example.org:0/x.pth', 'not a URL'),
        ('https://example.org:port/x.pth', 'not a URL'),
        ('https://[::1/x.pth', 'not a URL'),
        ('https:///x.pth', 'not a URL'),
        ('https://example.org/x y.pth', 'not a URL'),
        ('https://example.org/x\r\nHost: y.pth', 'not a URL'),
        ('hf-hub:resnest50d', 'hf-hub:organisation/name'),
        ('hf-hub:../../etc', 'hf-hub:organisation/name'),
        ('hf-hub:timm/a@', 'hf-hub:organisation/name'),
        ('hf-hub:timm/a@../b', 'hf-hub:organisation/name'),
        ('resnest50dd', 'did you mean resnest50d'),
    ],
)
def test_names_that_mean_nothing(url: str, match: str) -> None:
    with pytest.raises(FlaxnetsError, match=match):
        fetch(url)
    assert not home().exists()


def test_a_strangers_file_does_not_pass_for_a_published_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight digits of a hash can be forged: only the publishers' own URLs lead to the published name."""
    server.routes['/' + NAME] = [send()]
    row = Weights('resnest50d', 'test', urls=(f'https://publisher.org/{NAME}',), sha256=SHA256[:8])
    monkeypatch.setattr(zoo, 'find_file', lambda name: row if name == NAME else None)
    path = fetch(f'{server.url}/{NAME}')
    assert path.name == NAME and path.parent.parent == home() / 'files' / 'url'
    assert os.listdir(path.parent) == [NAME]
    server.routes[f'/x/{NAME}'] = [send(b'something else')]
    with pytest.raises(FlaxnetsError, match=f'not {SHA256[:8]}'):
        fetch(f'{server.url}/x/{NAME}')
    path = home() / 'files' / NAME
    path.write_bytes(CONTENT)
    assert fetch(row.urls[0]) == path
    server.routes['/net-20240131.pth'] = [send()]  # a date, not a hash
    assert fetch(f'{server.url}/net-20240131.pth').read_bytes() == CONTENT


def test_names_of_the_zoo_lead_to_their_hosts_and_then_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(request: web.Request, target: Path, *, quiet: bool) -> None:
        asked.append((request.url, request.sha256, target))
        raise web.Unavailable('no')

    monkeypatch.setattr(fetching, 'download', refuse)
    with pytest.raises(FlaxnetsError, match=r'resnest101e\.in1k cannot be fetched'):
        fetch('resnest101e')
    github = 'https://github.com/{}/resnest101-22405ba7.pth'
    kept = home() / 'files' / 'resnest101-22405ba7.pth'
    assert asked == [
        (github.format('zhanghang1989/ResNeSt/releases/download/weights_step1'), '22405ba7', kept),
        (github.format('huggingface/pytorch-image-models/releases/download/v0.1-resnest'), '22405ba7', kept),
        (
            'https://huggingface.co/timm/resnest101e.in1k/resolve/main/config.json',
            None,
            home() / 'files' / 'hub' / 'timm' / 'resnest101e.in1k' / 'main' / 'config.json',
        ),
    ]
    asked.clear()
    for name in (
        'hf-hub:timm/resnest101e.in1k',
        'hf_hub:me/Net@v1/x',
        'res2net50-w14-s8_3rdparty_8xb32_in1k',
    ):
        with pytest.raises(FlaxnetsError):
            fetch(name)
    assert [url for url, _, _ in asked] == [
        'https://huggingface.co/timm/resnest101e.in1k/resolve/main/config.json',
        'https://huggingface.co/me/Net/resolve/v1%2Fx/config.json',
        'https://download.openmmlab.com/mmclassification/v0/res2net/'
        'res2net50-w14-s8_3rdparty_8xb32_in1k_20210927-bc967bf1.pth',
    ]
    assert asked[1][2].parent == home() / 'files' / 'hub' / 'me' / 'Net' / 'v1--x'


def test_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, 'resolve', lambda name: ('resnest50d', None))
    with pytest.raises(FlaxnetsError, match='no weights are published for resnest50d'):
        fetch('resnest50d')


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / 'home'
    monkeypatch.delenv('FLAXNETS_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    assert home() == tmp_path / 'xdg' / 'flaxnets'
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')  # to be ignored, says the XDG specification
    assert home() == tmp_path / '.cache' / 'flaxnets'
    monkeypatch.setenv('FLAXNETS_HOME', '~/nets')
    assert home() == tmp_path / 'nets'


def test_published_rows_have_names_of_their_own() -> None:
    names = [url.rpartition('/')[2] for row in zoo.WEIGHTS for url in row.urls[:1]]
    assert len(names) == len(set(names))
    for row in zoo.WEIGHTS:
        assert len({url.rpartition('/')[2] for url in row.urls}) == 1 and dataclasses.asdict(row)['sha256']

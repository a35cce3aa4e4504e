"""Downloads that break, stall, lie or are led astray, from a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from file_server import (
    CONTENT,
    NAME,
    SHA256,
    Handler,
    Publish,
    Server,
    assert_only,
    redirect,
    send,
)

from convert.download import web
from convert.download.published_files import fetch
from flaxnets.errors import FlaxnetsError
from flaxnets.store.home import home

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures('isolated')


@pytest.mark.parametrize('length', [True, False])
def test_a_broken_transfer_is_resumed(server: Server, publish: Publish, length: bool) -> None:
    first = send(cut=1_000_000, ranges=True, etag='"v1"')
    second = send(cut=1_500_000, ranges=True, etag='"v1"')
    server.routes['/' + NAME] = [first, second, send(ranges=True, etag='"v1"', length=length)]
    path = publish(f'{server.url}/{NAME}')
    fetch('net')
    assert_only(path)
    asked = [(headers.get('range'), headers.get('if-range')) for _, headers in server.seen]
    assert asked == [(None, None), ('bytes=1000000-', '"v1"'), ('bytes=2500000-', '"v1"')]


def test_last_modified_serves_where_the_etag_is_weak(server: Server, publish: Publish) -> None:
    date = 'Wed, 01 Jan 2025 00:00:00 GMT'
    server.routes['/' + NAME] = [send(cut=9, headers={'Last-Modified': date, 'ETag': 'W/"v1"'}), send()]
    publish(f'{server.url}/{NAME}')
    fetch('net')
    assert server.seen[1][1]['if-range'] == date


def test_a_server_that_ignores_ranges_starts_again(server: Server, publish: Publish) -> None:
    server.routes['/' + NAME] = [send(cut=2_000_000), send()]
    path = publish(f'{server.url}/{NAME}')
    fetch('net')
    assert server.seen[1][1]['range'] == 'bytes=2000000-'
    assert_only(path)


def test_a_file_that_changes_meanwhile_is_fetched_anew(server: Server) -> None:
    changed = CONTENT[::-1]
    server.routes['/a.pth'] = [
        send(cut=1_000_000, ranges=True, etag='"v1"'),
        send(changed, ranges=True, etag='"v2"'),
    ]
    path = fetch(f'{server.url}/a.pth')
    assert path.read_bytes() == changed and server.seen[1][1]['if-range'] == '"v1"'


def test_another_part_than_the_one_asked_for_is_not_taken(server: Server) -> None:
    wrong = send(CONTENT[500:], 206, headers={'Content-Range': f'bytes 500-2999999/{len(CONTENT)}'})
    server.routes['/a.pth'] = [send(cut=1000, etag='"v1"'), wrong, send()]
    assert fetch(f'{server.url}/a.pth').read_bytes() == CONTENT
    assert [headers.get('range') for _, headers in server.seen] == [None, 'bytes=1000-', None]


def test_a_server_that_hangs_up_is_asked_again_if_it_has_answered_before(server: Server) -> None:
    def hang_up(handler: Handler) -> None:
        pass

    server.routes['/a.pth'] = [send(cut=1000), hang_up, send()]
    assert fetch(f'{server.url}/a.pth').read_bytes() == CONTENT
    server.routes['/b.pth'] = [hang_up]
    with pytest.raises(FlaxnetsError, match='closed connection without response'):
        fetch(f'{server.url}/b.pth')
    assert len(server.seen) == 4


def test_breaks_without_end_end(server: Server, publish: Publish) -> None:
    server.routes['/' + NAME] = [send(cut=1000)]
    path = publish(f'{server.url}/{NAME}')
    with pytest.raises(FlaxnetsError, match=r'ended after 0\.0 MB of 3\.0 MB, 5 times in a row'):
        fetch('net')
    assert len(server.seen) == 5 and not path.exists()


def test_breaks_with_progress_do_not_count(server: Server, publish: Publish) -> None:
    content = CONTENT * 4
    name = f'net-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    server.routes['/' + name] = [send(content, cut=1_200_000, ranges=True)]
    publish(f'{server.url}/{name}', sha256=name[4:12])
    assert fetch('net').read_bytes() == content and len(server.seen) == 10


@pytest.mark.parametrize('remains', [b'x' * 5000, CONTENT[:5000], CONTENT + b'more', CONTENT])
def test_what_an_earlier_process_left_is_used_if_it_fits(
    server: Server, publish: Publish, remains: bytes
) -> None:
    server.routes['/' + NAME] = [send(ranges=True)]
    path = publish(f'{server.url}/{NAME}')
    path.parent.mkdir(parents=True)
    path.with_name(NAME + '.part').write_bytes(remains)
    fetch('net')
    assert_only(path)
    assert server.seen[0][1]['range'] == f'bytes={len(remains)}-'
    assert len(server.seen) == (1 if CONTENT.startswith(remains) else 2)


def test_remains_of_unknown_origin_are_not_resumed_without_a_hash(server: Server) -> None:
    server.routes['/a.pth'] = [send(ranges=True)]
    path = fetch(f'{server.url}/a.pth')
    path.unlink()
    path.with_name('a.pth.part').write_bytes(b'x' * 5000)
    assert fetch(f'{server.url}/a.pth').read_bytes() == CONTENT
    assert 'range' not in server.seen[1][1]


def in_a_process(url: str) -> subprocess.Popen[bytes]:
    code = f'from convert.download.published_files import fetch; fetch({url!r})'
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def test_killed_and_resumed(server: Server) -> None:
    server.routes['/a.pth'] = [send(stall=1_000_000, etag='"v1"'), send(ranges=True, etag='"v1"')]
    with in_a_process(f'{server.url}/a.pth') as process:
        part = None
        deadline = time.monotonic() + 30
        while not (part and part.stat().st_size == 1_000_000) and time.monotonic() < deadline:
            part = next(home().glob('files/url/*/a.pth.part'), None)
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert part and not part.with_name('a.pth').exists()
    path = fetch(f'{server.url}/a.pth')
    assert path.read_bytes() == CONTENT and sorted(os.listdir(path.parent)) == ['a.pth', 'a.pth.sha256']
    assert server.seen[1][1]['range'] == 'bytes=1000000-' and server.seen[1][1]['if-range'] == '"v1"'


def test_two_processes_and_four_threads_fetch_one_file_once(server: Server) -> None:
    go = threading.Event()

    def slow(handler: Handler) -> None:
        go.wait(30)
        send()(handler)

    server.routes['/a.pth'] = [slow]
    url = f'{server.url}/a.pth'
    with in_a_process(url) as one, in_a_process(url) as two:
        threads = [threading.Thread(target=fetch, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        messages = [process.stderr.readline().decode() for process in (one, two) if process.stderr]
        go.set()
        for thread in threads:
            thread.join()
        assert one.wait() == two.wait() == 0
    assert messages == ['a.pth: another process is fetching it: waiting\n'] * 2
    assert len(server.seen) == 1 and fetch(url).read_bytes() == CONTENT


def test_who_waits_for_a_download_that_fails_has_a_file_of_its_own(server: Server) -> None:
    """The first to fail removes its empty file, which the second has open already."""
    go = threading.Event()

    def missing(handler: Handler) -> None:
        go.wait(30)
        send(b'', 404)(handler)

    server.routes['/a.pth'] = [missing, send()]
    url = f'{server.url}/a.pth'
    failed: list[str] = []

    def try_to() -> None:
        try:
            fetch(url)
        except FlaxnetsError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=try_to) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # until both have opened it
    go.set()
    for thread in threads:
        thread.join()
    assert len(failed) == 1 and 'HTTP 404' in failed[0]
    assert fetch(url).read_bytes() == CONTENT and len(server.seen) == 2


@pytest.mark.parametrize(
    ('content', 'headers'),
    [
        (b'\n<!DOCTYPE html><title>Sign in</title>', {}),
        (b'Sign in', {'Content-Type': 'text/html; charset=utf-8'}),
    ],
)
def test_a_web_page_is_told_from_a_file(
    server: Server, publish: Publish, content: bytes, headers: dict[str, str]
) -> None:
    page = send(content, headers=headers)
    server.routes |= {f'/{NAME}': [page], '/a.pth': [page]}
    path = publish(f'{server.url}/{NAME}')
    for name in ('net', f'{server.url}/a.pth'):
        with pytest.raises(FlaxnetsError, match='a web page in place of the file'):
            fetch(name)
    assert os.listdir(path.parent) == ['url'] and not list(home().rglob('a.pth*'))


def test_a_busy_server_is_asked_again(server: Server, publish: Publish) -> None:
    server.routes['/' + NAME] = [send(b'', 503), send(b'', 429), send()]
    assert fetch(NAME if publish(f'{server.url}/{NAME}') else '').read_bytes() == CONTENT
    server.routes['/b.pth'] = [send(b'', 500)]
    with pytest.raises(FlaxnetsError, match='HTTP 500 Internal Server Error, 5 times in a row'):
        fetch(f'{server.url}/b.pth')


def test_a_stall_is_a_break(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, 'TIMEOUT', 0.3)
    server.routes['/' + NAME] = [send(stall=1_000_000, ranges=True), send(ranges=True)]
    path = publish(f'{server.url}/{NAME}')
    fetch('net')
    assert_only(path)
    assert server.seen[1][1]['range'] == 'bytes=1000000-'


def test_a_server_that_does_not_answer(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, 'TIMEOUT', 0.3)

    def say_nothing(handler: Handler) -> None:
        handler.server.closing.wait(20)

    server.routes['/' + NAME] = [say_nothing]
    publish(f'{server.url}/{NAME}')
    with pytest.raises(FlaxnetsError, match=r'nothing came for 0\.3 s'):
        fetch('net')
    assert len(server.seen) == 1


def test_no_network(publish: Publish) -> None:
    path = publish(f'http://127.0.0.1:1/{NAME}')
    with pytest.raises(
        FlaxnetsError, match=f'Connection refused(.|\n)*SHA-256 begins {SHA256[:8]}'
    ) as caught:
        fetch('net')
    assert str(path) in str(caught.value) and os.listdir(path.parent) == []


class Full(io.FileIO):
    """A file on a disk with room for a million bytes."""

    def write(self, data: Any) -> int:
        room = 1_000_000 - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:room])


def test_the_disk_fills_up(
    server: Server, other: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (server, other):
        each.routes['/' + NAME] = [send(ranges=True)]
    path = publish(f'{server.url}/{NAME}', f'{other.url}/{NAME}')
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, 'open', lambda p, m='r', *a, **k: Full(p, m) if m == 'ab' else real(p, m, *a, **k)
        )
        with pytest.raises(FlaxnetsError, match='no space left on the disk: .* FLAXNETS_HOME'):
            fetch('net')
    assert not path.exists() and other.seen == []
    fetch('net')
    assert_only(path)
    assert server.seen[1][1]['range'] == 'bytes=1000000-'


def test_a_file_for_which_there_is_no_room_is_not_begun(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.routes['/' + NAME] = [send()]
    path = publish(f'{server.url}/{NAME}')
    usage = shutil.disk_usage('.')._replace(free=2_999_999)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(FlaxnetsError, match='no space left on the disk, 3.0 MB are needed'):
        fetch('net')
    assert os.listdir(path.parent) == []


def test_redirections_are_followed(server: Server, other: Server, publish: Publish) -> None:
    server.routes |= {
        f'/{NAME}': [redirect('/there', 307)],
        '/there': [redirect(f'{other.url}/x?sig=1', 302)],
    }
    other.routes['/x'] = [send(cut=1_000_000, ranges=True), send(ranges=True)]
    path = publish(f'{server.url}/{NAME}')
    fetch('net')
    assert_only(path)
    assert other.seen[1][1]['range'] == 'bytes=1000000-'


@pytest.mark.parametrize(
    ('location', 'match'),
    [
        ('ftp://127.0.0.1/x.pth', 'sends its visitors on to .*ftp: is not fetched from'),
        ('http://example.org/x.pth', 'sends its visitors on to .*http: is not fetched from'),
        ('https://me:secret@127.0.0.1/x.pth', 'user names and passwords'),
        ('file:///etc/passwd', 'HTTP 302'),
        ('/' + NAME, 'infinite loop'),
    ],
)
def test_redirections_that_are_not_followed(
    server: Server, publish: Publish, location: str, match: str
) -> None:
    server.routes['/' + NAME] = [redirect(location)]
    publish(f'{server.url}/{NAME}')
    with pytest.raises(FlaxnetsError, match=match):
        fetch('net')


def test_many_redirections_are_too_many(server: Server, publish: Publish) -> None:
    server.routes['/' + NAME] = [redirect('/1')]
    server.routes |= {f'/{i}': [redirect(f'/{i + 1}')] for i in range(1, 50)}
    publish(f'{server.url}/{NAME}')
    with pytest.raises(FlaxnetsError, match='HTTP 302'):
        fetch('net')
    assert len(server.seen) == 1 + web.MAX_REDIRECTS


def test_https_is_not_left(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer over TLS is made up; the server it leads to must never be asked."""
    server.routes['/x.pth'] = [send()]

    class Pretended(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            headers = Message()
            headers['Location'] = f'{server.url}/x.pth'
            return self.parent.error('http', req, io.BytesIO(), 302, 'Found', headers)

    monkeypatch.setattr(urllib.request, 'HTTPSHandler', Pretended)
    publish(f'https://example.org/{NAME}')
    with pytest.raises(FlaxnetsError, match=f'sends its visitors on to .{server.url}/x.pth.: http: is not'):
        fetch('net')
    assert not server.seen


def test_a_file_in_a_strange_encoding(server: Server, publish: Publish) -> None:
    server.routes['/a.pth'] = [send(headers={'Content-Encoding': 'gzip'})]
    with pytest.raises(FlaxnetsError, match='compressed'):
        fetch(f'{server.url}/a.pth')

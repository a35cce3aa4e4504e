"""A server on this machine that behaves as real ones do, well and badly, for the tests of fetching."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import pytest

from convert.download import transfer as download
from flaxnets import zoo
from flaxnets.store.home import home
from flaxnets.zoo.records import Weights

CONTENT = hashlib.shake_256(b'weights').digest(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f'resnest50-{SHA256[:8]}.pth'

S = TypeVar('S', bound=ThreadingHTTPServer)
Answer = Callable[['Handler'], None]
Publish = Callable[..., Path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        self.close_connection = True
        answers = self.server.routes.get(self.path.partition('?')[0])
        answer = (
            send(b'no such thing', 404) if not answers else answers.pop(0) if len(answers) > 1 else answers[0]
        )
        answer(self)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers each path by the answers scripted for it in turn, the last of them again and again."""

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.routes: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def shutdown(self) -> None:
        self.closing.set()
        super().shutdown()

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests


def send(
    content: bytes = CONTENT,
    status: int = 200,
    *,
    headers: dict[str, str] | None = None,
    cut: int | None = None,
    stall: int | None = None,
    ranges: bool = False,
    etag: str | None = None,
    length: bool = True,
) -> Answer:
    """An answer: whole, `cut` off or `stall`ed after so many bytes; minding Range and If-Range or not."""

    def answer(handler: Handler) -> None:
        code, body, more = status, content, dict(headers or {})
        span = handler.headers.get('Range', '')
        if ranges and span and handler.headers.get('If-Range', etag) == etag:
            first = int(span.removeprefix('bytes=').removesuffix('-'))
            code, body = 206, content[first:]
            more['Content-Range'] = f'bytes {first}-{len(content) - 1}/{len(content)}'
            if first >= len(content):
                code, body = 416, b''
                more['Content-Range'] = f'bytes */{len(content)}'
        if etag:
            more['ETag'] = etag
        handler.send_response(code)
        for key, value in more.items():
            handler.send_header(key, value)
        if length:
            handler.send_header('Content-Length', str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: stall if cut is None else cut])
        handler.wfile.flush()
        if stall is not None:
            handler.server.closing.wait(20)

    return answer


def redirect(url: str, status: int = 302, **headers: str) -> Answer:
    linked = {key.replace('_', '-'): value for key, value in headers.items()}
    return send(b'', status, headers={'Location': url, **linked})


def running(server: S) -> Iterator[S]:
    """The server, answering in a thread until the generator goes on."""
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def isolate(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Keeps the user's settings and cache out of the tests."""
    for name in ('FLAXNETS_OFFLINE', 'HF_HUB_OFFLINE', 'HF_TOKEN', 'HF_ENDPOINT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('FLAXNETS_HOME', str(directory / 'home'))
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(download, 'RETRY_WAIT', 0)


def publisher(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Makes `fetch('net')` mean a file at given URLs; returns the place where it is to be kept."""

    def publish(*urls: str, sha256: str | None = SHA256[:8], hub_id: str | None = None) -> Path:
        row = Weights('resnest50d', 'test', urls=urls, hub_id=hub_id, sha256=sha256)
        monkeypatch.setattr(zoo, 'resolve', lambda name: (row.arch, row))
        return home() / 'files' / NAME

    return publish


def assert_only(path: Path, content: bytes = CONTENT) -> None:
    """The file is there, and nothing is left beside it."""
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]

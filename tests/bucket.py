"""A bucket on this machine: gcp-storage-emulator, in a thread, and what it lacks of Google's store."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

NAME = 'bucket'
# Of a request: its method, its path with the query. The status to answer with, 0 to hang up, None to do it.
Fault = Callable[[str, str], int | None]


class Bucket:
    """An empty bucket in memory, for this process and its children, by STORAGE_EMULATOR_HOST=`host`.

    Attributes:
      requests: what was asked, as 'GET /path?query bytes=0-9'.
      fault: decides which requests fail.
    """

    def __init__(self) -> None:
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(NAME, self.storage)
        self.requests: list[str] = []
        self.fault: Fault = lambda method, path: None
        self.lock = threading.Lock()  # the emulator was written for one request at a time
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.host = f'http://127.0.0.1:{self._server.server_port}'
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def names(self, prefix: str = '') -> list[str]:
        """Of the objects, in their order."""
        with self.lock:
            return sorted(name for name in self.storage.objects.get(NAME, {}) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        with self.lock:
            return bytes(self.storage.get_file(NAME, name))

    def put(self, name: str, content: bytes) -> None:
        """An object by its side door."""
        with self.lock:
            described = objects._make_object_resource('', NAME, name, 'x/y', str(len(content)))
            self.storage._store.write_bytes(f'{NAME}/{name}', content)  # create_file copies all that it knows
            self.storage.objects.setdefault(NAME, {})[name] = objects._checksums(content, described)

    def wipe(self) -> None:
        with self.lock:
            self.storage.wipe(keep_buckets=True)


class _Handler(RequestHandler):
    protocol_version = 'HTTP/1.1'  # connections stay open

    def __init__(self, bucket: Bucket, *arguments: Any) -> None:
        self.bucket = bucket
        super().__init__(bucket.storage, *arguments)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client was killed
            self.close_connection = True

    def parse_request(self) -> bool:
        """The request's first lines are there: does it fail?"""
        if not super().parse_request():
            return False
        self.bucket.requests.append(f'{self.command} {self.path} {self.headers.get("Range", "")}'.strip())
        status = self.bucket.fault(self.command, self.path)
        if status is None and 'uploadType=multipart' in self.path:
            self._keep_the_last_byte()
        if status is None and self._exists_already():
            status = 412
        if status is None:
            return True
        self.close_connection = True
        if status:
            self.rfile.read(int(self.headers.get('Content-Length', 0)))
            self.send_response(status)
            self.send_header('Content-Length', '0')
            self.send_header('Connection', 'close')
            self.end_headers()
        return False

    def _keep_the_last_byte(self) -> None:
        """Google's store keeps a content that ends with a carriage return, the emulator drops that byte.

        It reads an upload as e-mail, and gcsfs puts a bare line feed before the last boundary: with a return
        of its own there, the content stays as it is.
        """
        body = self._body()
        content, end, rest = body.rpartition(b'\n--')
        self._give_again(content + b'\r' + end + rest)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers['Content-Length']))

    def _give_again(self, body: bytes) -> None:
        self.headers.replace_header('Content-Length', str(len(body)))
        rest = self.rfile.rest if isinstance(self.rfile, _Again) else self.rfile  # all before has been read
        self.rfile = _Again(body, rest)  # type: ignore[assignment]

    def _exists_already(self) -> bool:
        """Google's store answers ifGenerationMatch=0 so, the emulator does not know it."""
        if parse_qs(urlparse(self.path).query).get('ifGenerationMatch') != ['0']:
            return False
        body = self._body()
        self._give_again(body)
        name = body.partition(b'"name": "')[2].partition(b'"')[0].decode()
        return unquote(name) in self.bucket.storage.objects.get(NAME, {})

    def _locked(self, method: Callable[[], None]) -> None:
        with self.bucket.lock:
            method()

    def do_GET(self) -> None:
        query = parse_qs(urlparse(self.path).query)
        if 'maxResults' in query and urlparse(self.path).path.endswith('/o'):
            self._list(int(query['maxResults'][0]), int(query.get('pageToken', ['0'])[0]))
        else:
            self._locked(super().do_GET)

    def _list(self, most: int, first: int) -> None:
        """In pages, as Google's store answers; the emulator gives all at once."""
        written, self.wfile = self.wfile, io.BytesIO()
        self._locked(super().do_GET)
        answer, self.wfile = self.wfile, written
        head, _, body = answer.getvalue().partition(b'\r\n\r\n')
        if b' 200 ' not in head.partition(b'\r\n')[0]:
            self.wfile.write(answer.getvalue())
            return
        found = json.loads(body)
        both = [*found.get('prefixes', []), *found.get('items', [])]
        page = both[first : first + most]
        found['prefixes'] = [entry for entry in page if isinstance(entry, str)]
        found['items'] = [entry for entry in page if not isinstance(entry, str)]
        if first + most < len(both):
            found['nextPageToken'] = str(first + most)
        body = json.dumps(found).encode()
        lines = [line for line in head.split(b'\r\n') if not line.lower().startswith(b'content-length')]
        self.wfile.write(b'\r\n'.join([*lines, b'Content-Length: %d' % len(body), b'', body]))

    def do_POST(self) -> None:
        self._locked(super().do_POST)

    def do_PUT(self) -> None:
        self._locked(super().do_PUT)

    def do_DELETE(self) -> None:
        self._locked(super().do_DELETE)

    def log_message(self, *_: Any) -> None:
        pass


class _Again:
    """A stream whose first bytes have been read, and are given once more."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self.rest = head, rest

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + (self.rest.read(size - len(head)) if len(head) < size else b'')

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rest, name)

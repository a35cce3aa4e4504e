"""A server on this machine that speaks the Hugging Face hub's API as far as uploads and downloads use it."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD, READING = 'hf_good', 'hf_reading'  # a token that may write, and one that may not


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition('?')[0]
        if path.startswith('/api/models/'):
            name = path.removeprefix('/api/models/')
            if not self._lets_in():
                return None
            if name in self.server.repositories:
                files = self.server.repositories[name]
                siblings = [{'rfilename': file} for file in files]
                private = name in self.server.private
                return self._json({'id': name, 'private': private, 'siblings': siblings, 'tags': []})
            return self._fail(404, 'Repository not found', **{'X-Error-Code': 'RepoNotFound'})
        name, _, file = path.strip('/').partition('/resolve/main/')
        content = self.server.repositories.get(name, {}).get(file)
        if content is None:
            return self._fail(404, 'Entry not found')
        return self._send(200, content, **{'X-Linked-Etag': f'"{hashlib.sha256(content).hexdigest()}"'})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        path = self.path.partition('?')[0]
        self.server.posted.append(path)
        if path == '/api/validate-yaml':
            return self._json({'errors': [], 'warnings': []})
        if not self._lets_in():
            return None
        if self.headers['Authorization'] == f'Bearer {READING}':
            return self._fail(403, 'You do not have the right to write here')
        if path == '/api/repos/create':
            said = json.loads(body)
            name = f'{said["organization"]}/{said["name"]}'
            self.server.repositories[name] = {'.gitattributes': b'*.safetensors filter=lfs'}
            if said.get('visibility') == 'private' or said.get('private'):
                self.server.private.add(name)
            return self._json({'url': f'{self.server.url}/{name}', 'name': name, 'id': name})
        if path.endswith('/info/lfs/objects/batch'):
            return self._json(
                {'transfer': 'basic', 'objects': [self._asked(o) for o in json.loads(body)['objects']]}
            )
        if path.startswith('/verify'):
            return self._json({})
        name, _, what = path.removeprefix('/api/models/').rpartition('/')[0].rpartition('/')
        if what == 'preupload':
            files = [
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular',
                    'shouldIgnore': False,
                    'oid': None,
                }
                for file in json.loads(body)['files']
            ]
            return self._json({'files': files})
        for line in body.splitlines():
            self._commit(name, json.loads(line))
        return self._json(
            {
                'success': True,
                'commitOid': '0' * 40,
                'commitUrl': f'{self.server.url}/{name}/commit/{"0" * 40}',
            }
        )

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers['Content-Length']))
        self.server.large[self.path.rpartition('/')[2]] = content
        self._send(200, b'')

    def _asked(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload, verify = (f'{self.server.url}/{what}/{wanted["oid"]}' for what in ('large', 'verify'))
        return {**wanted, 'actions': {'upload': {'href': upload}, 'verify': {'href': verify}}}

    def _commit(self, name: str, line: dict[str, Any]) -> None:
        value = line['value']
        if line['key'] == 'header':
            self.server.commits.append(value['summary'])
        elif line['key'] == 'file':
            self.server.repositories[name][value['path']] = base64.b64decode(value['content'])
        else:
            content = self.server.large[value['oid']]
            assert hashlib.sha256(content).hexdigest() == value['oid'] and len(content) == value['size']
            self.server.repositories[name][value['path']] = content

    def _lets_in(self) -> bool:
        if self.headers.get('Authorization') in (f'Bearer {GOOD}', f'Bearer {READING}'):
            return True
        self._fail(401, 'Invalid username or password.')
        return False

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), **{'Content-Type': 'application/json'})

    def _fail(self, status: int, message: str, **headers: str) -> None:
        body = json.dumps({'error': message}).encode()
        self._send(
            status, body, **{'X-Error-Message': message, 'Content-Type': 'application/json', **headers}
        )

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.posted: list[str] = []
        self.commits: list[str] = []
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the tests

"""Requests over HTTPS: which addresses are allowed, which server gets the token, what a failure means."""

from __future__ import annotations

import dataclasses
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import IO, cast

from flaxnets.errors import FlaxnetsError
from flaxnets.version import VERSION

TIMEOUT = 30.0  # seconds without an answer, or without a byte
MAX_REDIRECTS = 8

_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class Unavailable(FlaxnetsError):
    """A server does not give the file. The message is the reason; another server may have it.

    Attributes:
      status: the HTTP status that was the answer, or None.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A request for one file to one server.

    Attributes:
      url: the file's address.
      sha256: leading hexadecimal digits of the file's SHA-256, or None.
      hub: scheme, host and port of the Hugging Face hub ('https://huggingface.co'): the only server
        that is sent `token`, and whose word about its files is taken.
      token: for the hub, or None.
      max_bytes: a larger file is refused.
    """

    url: str
    sha256: str | None = None
    hub: str | None = None
    token: str | None = None
    max_bytes: int = 16 * 2**30  # five times the largest published file


@dataclass(frozen=True)
class Linked:
    """What the hub says of a large file when it redirects to the server that has it.

    Attributes:
      sha256: the file's SHA-256, 64 hexadecimal digits.
      size: in bytes.
    """

    sha256: str | None = None
    size: int | None = None


def check_url(url: str) -> None:
    """Raises unless a URL is plain HTTPS, or HTTP to this very machine.

    Raises:
      Unavailable: another scheme, credentials in the URL, no host.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0 and url.isprintable() and ' ' not in url
    except ValueError as error:
        raise Unavailable(f'not a URL: {error}') from error
    if parts.scheme != 'https' and not (parts.scheme == 'http' and parts.hostname in _LOOPBACK):
        raise Unavailable(f'{parts.scheme}: is not fetched from, only https')
    if '@' in parts.netloc:
        raise Unavailable('user names and passwords in URLs are not supported')
    if not sound:
        raise Unavailable('not a URL of a file')


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    return f'{parts.scheme}://{parts.netloc}'.lower()


def open_url(request: Request, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, Linked]:
    """Asks for a file and follows redirections, with certificates checked and proxies as the system has them.

    Returns:
      The response, and what the hub said of the file.

    Raises:
      Unavailable: a redirection to a URL that `check_url` refuses.
      urllib.error.HTTPError, OSError, http.client.HTTPException: as `urllib` raises them.
    """
    check_url(request.url)
    redirects = _Redirects(request)
    # Put together by hand, since urllib's own opener also follows redirections to ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        redirects,
    ):
        opener.add_handler(handler)
    asked = urllib.request.Request(request.url, headers={'User-Agent': f'flaxnets/{VERSION}', **headers})
    _authorise(asked, request)
    response = cast(http.client.HTTPResponse, opener.open(asked, timeout=TIMEOUT))
    redirects.note(response.url, response.headers)
    return response, redirects.linked


def reason(error: Exception) -> str:
    """Why there was no answer, in a few words."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f'nothing came for {TIMEOUT:g} s'
    text = getattr(error, 'strerror', None) or getattr(error, 'reason', None) or str(error)
    return str(text) or type(error).__name__


def _authorise(asked: urllib.request.Request, request: Request) -> None:
    """Adds the token if, and only if, the hub itself is asked."""
    if request.token and request.hub and origin_of(asked.full_url) == request.hub:
        # "Unredirected": urllib would otherwise hand it on to whatever host it is sent to.
        asked.add_unredirected_header('Authorization', f'Bearer {request.token}')


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to allowed addresses, and keeps in `linked` what the hub says of the file."""

    max_redirections = MAX_REDIRECTS

    def __init__(self, request: Request) -> None:
        self.linked = Linked()
        self._request = request

    def note(self, url: str, headers: Message) -> None:
        """Keeps what the hub says about the file it is asked for."""
        if not self._request.hub or origin_of(url) != self._request.hub:
            return
        digest, size = headers.get('X-Linked-Etag', '').strip('"'), headers.get('X-Linked-Size', '')
        if re.fullmatch('[0-9a-f]{64}', digest):  # a file outside of LFS has a Git hash there
            self.linked = dataclasses.replace(self.linked, sha256=digest)
        if re.fullmatch(r'\d{1,15}', size):
            self.linked = dataclasses.replace(self.linked, size=int(size))

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        self.note(req.full_url, headers)
        try:
            check_url(newurl)
            if req.type == 'https' and urllib.parse.urlsplit(newurl).scheme != 'https':
                raise Unavailable('http: is not fetched from, only https')
        except Unavailable as error:
            fp.close()
            raise Unavailable(f'sends its visitors on to {newurl[:200]!r}: {error}') from error
        new = super().redirect_request(req, fp, code, msg, cast(http.client.HTTPMessage, headers), newurl)
        if new is not None:
            _authorise(new, self._request)
        return new

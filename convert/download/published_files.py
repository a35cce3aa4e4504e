"""Downloads published weights by name, verifies them and keeps them.

Everything is kept below one folder, `FLAXNETS_HOME` (default: `~/.cache/flaxnets`, or `flaxnets` in
`XDG_CACHE_HOME`), and used from there without the network:

    files/resnest50-528c19ca.pth             a published file, under its published name
    files/hub/timm/resnest50d.in1k/main/     a repository of the Hugging Face hub: config.json and weights
    files/url/<digest of the URL>/net.pth    any other file

Besides `FLAXNETS_HOME` these environment variables count: `FLAXNETS_OFFLINE=1` or `HF_HUB_OFFLINE=1`
(use what is there and no network), `HF_ENDPOINT` (a mirror of the hub), `HF_TOKEN` (for repositories
that are not public; sent to the hub, or its mirror, alone), and `https_proxy` and the like.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.store.files import SMALL
from flaxnets.store.home import home
from flaxnets.zoo.records import Weights

from ..names.hub_folder import CONFIG_FILE, WEIGHTS_FILES
from .transfer import download, is_intact
from .web import Request, Unavailable, check_url, origin_of

HUB_PREFIX = re.compile(r'hf[-_]hub:', re.IGNORECASE)
_REPOSITORY = re.compile(r'(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?', re.ASCII)
# torch.hub's convention: resnest50-528c19ca.pth. Eight digits that could be a date (20240131) are no hash.
_HASH_IN_NAME = re.compile(
    r'-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)([0-9a-f]{8}|[0-9a-f]{64})\.[^/]+$'
)


@dataclass(frozen=True)
class _File:
    """One file, the servers that have it, and where it is kept.

    Attributes:
      label: what messages call it.
      urls: its addresses, tried in turn.
      path: where it is kept.
      sha256: leading hexadecimal digits of its SHA-256, or None.
    """

    label: str
    urls: tuple[str, ...]
    path: Path
    sha256: str | None

    def cached(self) -> Path | None:
        return self.path if is_intact(self.path, self.sha256) else None

    def has_remains(self) -> bool:
        """Whether there is a file here, intact or not."""
        return self.path.exists()

    def get(self, quiet: bool) -> Path:
        failures = []
        for url in self.urls:
            try:
                download(Request(url, self.sha256, _hub_origin(), hub_token()), self.path, quiet=quiet)
                return self.path
            except Unavailable as error:
                failures.append(f'{url}: {error}')
        raise Unavailable('\n  '.join(failures))

    def by_hand(self) -> str:
        """What a user can download by other means, and where to put it."""
        expected = f' (its SHA-256 begins {self.sha256})' if self.sha256 else ''
        return f'{self.path.name}{expected} from {" or ".join(self.urls)} to {self.path}'


@dataclass(frozen=True)
class _Repository:
    """A repository of the Hugging Face hub with `config.json` and weights."""

    id: str
    revision: str

    @property
    def label(self) -> str:
        return f'hf-hub:{self.id}' + ('' if self.revision == 'main' else f'@{self.revision}')

    @property
    def folder(self) -> Path:
        return home() / 'files' / 'hub' / self.id / self.revision.replace('/', '--')

    def url(self, name: str) -> str:
        return f'{hub_address()}/{self.id}/resolve/{urllib.parse.quote(self.revision, safe="")}/{name}'

    def cached(self) -> Path | None:
        has_weights = any(is_intact(self.folder / name, None) for name in WEIGHTS_FILES)
        return self.folder if has_weights and is_intact(self.folder / CONFIG_FILE, None) else None

    def has_remains(self) -> bool:
        return any((self.folder / name).exists() for name in WEIGHTS_FILES)

    def get(self, quiet: bool) -> Path:
        # The configuration first: it is small, and tells at once whether there is such a repository.
        self._get_one(CONFIG_FILE, SMALL, quiet=True)
        for name in WEIGHTS_FILES:
            try:
                self._get_one(name, Request.max_bytes, quiet)
                return self.folder
            except Unavailable as error:
                if error.status != 404 or name == WEIGHTS_FILES[-1]:
                    raise
        raise AssertionError('unreachable: WEIGHTS_FILES is not empty')

    def _get_one(self, name: str, max_bytes: int, quiet: bool) -> None:
        url = self.url(name)
        request = Request(url, hub=_hub_origin(), token=hub_token(), max_bytes=max_bytes)
        try:
            download(request, self.folder / name, quiet=quiet)
        except Unavailable as error:
            hint = ''
            if error.status in (401, 403):
                hint = ' (no such repository, or not a public one: set HF_TOKEN to a token that may read it)'
            raise Unavailable(f'{url}: {error}{hint}', error.status) from error

    def by_hand(self) -> str:
        names = f'{CONFIG_FILE} and {WEIGHTS_FILES[0]}'
        return f'{names} from {hub_address()}/{self.id}/tree/{self.revision} into {self.folder}'


def fetch(name_or_url: str, *, quiet: bool = False) -> Path:
    """The weights that a name or URL stands for, downloaded unless they are here already.

    Args:
      name_or_url: a name as `flaxnets.zoo.resolve` takes it ('resnest101e', 'resnext50_32x4d.gluon_in1k'),
        whose publishers' hosts are tried in turn, then timm's repository on the Hugging Face hub; any
        repository of the hub in timm's form ('hf-hub:org/name' or 'hf-hub:org/name@revision'); or the
        https URL of a file.
      quiet: show no progress on stderr.

    Returns:
      The file, verified by the SHA-256 in its name; or, if it came from the hub, the folder, verified by the
      SHA-256 that the hub gives (for `convert.names.hub_folder.read_hub_folder`).

    Raises:
      FlaxnetsError: an unknown name; no host gives the right file, or there is no network (every host
        with its reason, the expected hash, and where to put a file fetched by other means); the disk is
        full or not writable.
    """
    places = _places(name_or_url.strip())
    for place in places:
        if found := place.cached():
            return found
    remains = any(place.has_remains() for place in places)
    if variable := offline_variable():
        state = 'what is in the cache is damaged' if remains else 'it is not in the cache'
        raise FlaxnetsError(_failure(places, [f'{variable} is set, and {state}']))
    if remains and not quiet:
        print(f'{places[0].label}: what is in the cache is damaged; fetching it again', file=sys.stderr)
    failures = []
    for place in places:
        try:
            return place.get(quiet)
        except Unavailable as error:
            failures.append(str(error))
    raise FlaxnetsError(_failure(places, failures))


def _places(name: str) -> Sequence[_File | _Repository]:
    """Where to look for the weights of this name, in order."""
    if prefix := HUB_PREFIX.match(name):
        return [_repository(name, name[prefix.end() :])]
    if '://' in name:
        return [_any_file(name)]
    arch, row = zoo.resolve(name)
    if row is None or not (row.urls or row.hub_id):
        raise FlaxnetsError(f'{name}: no weights are published for {arch}')
    return _published(row)


def _published(row: Weights) -> Sequence[_File | _Repository]:
    places: list[_File | _Repository] = []
    if row.urls:
        path = home() / 'files' / _file_name(row.urls[0])
        places.append(_File(row.name, row.urls, path, row.sha256))
    if row.hub_id:
        places.append(_repository(row.hub_id, row.hub_id))
    return places


def _repository(name: str, text: str) -> _Repository:
    match = _REPOSITORY.fullmatch(text)
    if match is None:
        raise FlaxnetsError(
            f'{name!r}: a repository of the hub is written hf-hub:organisation/name[@revision]'
        )
    return _Repository(match['id'], match['revision'] or 'main')


def _any_file(url: str) -> _File:
    try:
        check_url(url)
    except Unavailable as error:
        raise FlaxnetsError(f'{url}: {error}') from error
    name = _file_name(url)
    row = zoo.find_file(name)
    if row and url in row.urls:
        return _File(url, (url,), home() / 'files' / name, row.sha256)
    # A folder of its own: under its bare name, a stranger's file could pass for a published one.
    folder = home() / 'files' / 'url' / hashlib.sha256(url.encode()).hexdigest()[:16]
    found = _HASH_IN_NAME.search(name)
    return _File(url, (url,), folder / name, found[1] if found else None)


def _file_name(url: str) -> str:
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition('/')[2]
    if name in ('', '.', '..') or len(name.encode()) > 200 or not name.isprintable() or '\\' in name:
        raise FlaxnetsError(f'{url}: does not end in the name of a file')
    return name


def _failure(places: Sequence[_File | _Repository], failures: Sequence[str]) -> str:
    label = places[0].label
    reasons = '\n  '.join(failures)
    by_hand = '\n  or '.join(place.by_hand() for place in places)
    return f'{label} cannot be fetched:\n  {reasons}\nBy other means, bring\n  {by_hand}'


def hub_address() -> str:
    """The address of the hub, or of the mirror in `HF_ENDPOINT`, without a slash at its end."""
    return (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').strip().rstrip('/')


def _hub_origin() -> str:
    return origin_of(hub_address())


def hub_token() -> str | None:
    """The token in `HF_TOKEN`; None if it is not set.

    Raises:
      FlaxnetsError: it has characters that no token has.
    """
    token = os.environ.get('HF_TOKEN', '').strip()
    if not re.fullmatch(r'[!-~]*', token):
        raise FlaxnetsError('HF_TOKEN holds blanks or other characters that no token has')
    return token or None


def offline_variable() -> str | None:
    """The environment variable that forbids the network, if one does."""
    return next((name for name in ('FLAXNETS_OFFLINE', 'HF_HUB_OFFLINE') if _is_set(name)), None)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, '').strip().lower() not in ('', '0', 'false', 'no', 'off')

"""Uploads a folder to the Hugging Face hub with the package `huggingface_hub`, and explains its errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flaxnets.errors import FlaxnetsError
from flaxnets.version import VERSION
from flaxnets.words import some

from ..download.published_files import hub_address, hub_token, offline_variable
from .model_card import CARD_FILE

_NAME = re.compile(r'\w[\w.-]*/\w[\w.-]*', re.ASCII)
# Files that the hub itself puts into a new repository.
_EMPTY = frozenset(['.gitattributes', '.gitignore'])


@dataclass(frozen=True)
class Repository:
    """A repository to upload to, checked as far as that is possible without writing.

    Attributes:
      id: 'org/name'.
      api: the `HfApi` of the hub.
      exists: whether it is there already.
      files: names of the files in it.
    """

    id: str
    api: Any
    exists: bool
    files: tuple[str, ...]

    @property
    def url(self) -> str:
        return f'{hub_address()}/{self.id}'


def find_repository(name: str, *, private: bool = False, overwrite: bool = False) -> Repository:
    """Looks up a repository on the hub; nothing is written.

    Args:
      name: 'org/name'.
      private: it is to be private.
      overwrite: it may hold files; those of the same names get a new version.

    Raises:
      FlaxnetsError: the name has another form; the network is forbidden or the hub cannot be reached; the
        package is not installed; there is no token, or the hub refuses it; the repository holds files, and
        `overwrite` is False; or it is public, and `private` is True.
    """
    api = _api(name)
    with _plainly(name):
        found = _info(api, name)
    if found is None:
        return Repository(name, api, False, ())
    files = tuple(sorted(file.rfilename for file in found.siblings or ()))
    if private and not found.private:
        raise FlaxnetsError(f'{name} is there already and public; make it private on its page first')
    held = sorted(set(files) - _EMPTY)
    if held and not overwrite:
        raise FlaxnetsError(
            f'{name} is there already and holds {some(held, 4)}; choose another name, or commit a new '
            'version of its files (overwrite=True)'
        )
    return Repository(name, api, True, files)


def upload(repository: Repository, folder: Path, message: str, *, private: bool = False) -> Sequence[str]:
    """Uploads a folder to a repository in one commit; makes the repository if there is none.

    A model card that is in the repository already stays, since people edit it.

    Returns:
      The names of the files that were committed.

    Raises:
      FlaxnetsError: as `find_repository`, or the token may not write there.
    """
    kept = [CARD_FILE] if CARD_FILE in repository.files else []
    names = sorted(file.name for file in folder.iterdir() if file.name not in kept)
    with _plainly(repository.id):
        if not repository.exists:
            repository.api.create_repo(repository.id, private=private, exist_ok=True)
        repository.api.upload_folder(
            repo_id=repository.id, folder_path=folder, commit_message=message, ignore_patterns=kept or None
        )
    return names


def _api(name: str) -> Any:
    if not _NAME.fullmatch(name):
        raise FlaxnetsError(f'{name!r}: a repository of the hub is written organisation/name')
    if variable := offline_variable():
        raise FlaxnetsError(f'{variable} is set: nothing is uploaded; write_folder needs no network')
    try:
        import huggingface_hub
    except ImportError as error:
        raise FlaxnetsError(
            f'the upload needs the package huggingface_hub: pip install huggingface_hub ({error})'
        ) from error
    token = hub_token() or huggingface_hub.get_token()
    if not token:
        raise FlaxnetsError(
            'no token for the hub: make one that may write, in your settings there, and set HF_TOKEN to it '
            'or run `hf auth login`'
        )
    return huggingface_hub.HfApi(hub_address(), token, library_name='flaxnets', library_version=VERSION)


def _info(api: Any, name: str) -> Any:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(name)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None


@contextlib.contextmanager
def _plainly(name: str) -> Iterator[None]:
    """Turns whatever the package raises into an error of one line that says what to do."""
    try:
        yield
    except FlaxnetsError:
        raise
    except Exception as error:  # the package's own, those of its HTTP client, and the system's
        raise FlaxnetsError(f'{name}: {_reason(error)}') from error


def _reason(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:  # uploads in threads wrap the error
        causes.append(causes[-1].__cause__)
    for cause in causes:
        response = getattr(cause, 'response', None)
        code = getattr(response, 'status_code', None)
        said = str(getattr(cause, 'server_message', None) or '').strip().partition('\n')[0]
        said = f' ({said})' if said else ''
        if code == 401:
            return f'the hub does not accept the token{said}: set HF_TOKEN to a valid one'
        if code == 403:
            return f'the token may not write there{said}: it needs the right to write to this organisation'
        if code == 404:
            return f'no such place on the hub{said}'
        if code is not None:
            return f'the hub answers {code}{said}'
    last = causes[-1]
    kind = type(last).__name__
    text = str(last).strip().partition('\n')[0] or kind
    if 'Connect' in kind or 'Timeout' in kind or isinstance(last, ConnectionError | TimeoutError):
        return f'the hub cannot be reached at {hub_address()} ({text})'
    return text

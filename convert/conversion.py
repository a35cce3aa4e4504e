"""Opens weights of any kind as a `Checkpoint`: finds them, reads the file, identifies the net."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flaxnets import zoo
from flaxnets.api import is_published_name
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.store import runs, weights
from flaxnets.store.files import map_file, sha256_of
from flaxnets.store.home import home
from flaxnets.store.remote import names_store
from flaxnets.store.safetensors_file import read_safetensors
from flaxnets.zoo.records import Config, Weights

from .arithmetic import without_head
from .checkpoint import Checkpoint, net_of
from .download.published_files import HUB_PREFIX, fetch
from .formats.pth import read_pth
from .names.counters import add_counters, take_counters
from .names.found import Found
from .names.hub_folder import HubConfig, is_hub_folder, read_hub_folder
from .names.identification import contradiction, identify
from .names.image_settings import for_channels
from .names.layouts import to_canonical
from .names.tree import State, to_state
from .writing import SUFFIXES, certified, write


def open_checkpoint(
    source: str | os.PathLike[str],
    model: str | None = None,
    *,
    ema: bool = True,
    approximate: bool = False,
    quiet: bool = False,
    key: str | None = None,
    prefix: str | None = None,
    drop_head: bool = False,
) -> Checkpoint:
    """Opens weights of any kind.

    Args:
      source: a file that `torch.save` or safetensors wrote, by whichever publisher; a directory of
        weights of ours, a workdir of a training run or one of its checkpoints; a folder of the Hugging
        Face hub; a published name, `hf-hub:` repository or URL, which is downloaded once. All but names may
        lie in a bucket (`gs://BUCKET/run`).
      model: the net's name. Without it the net is the published file's, or is identified from the tensors.
      ema: take the averaged weights of a training file that holds both averaged and trained ones.
      approximate: accept weights whose tensors fit although their own net computes something else.
      quiet: show no progress of a download.
      key: which of several state dicts in a file to take, by the keys that lead to it: 'state.model'.
      prefix: which of several nets in a state dict to take, by what its names start with: 'encoder_q.'.
      drop_head: leave out the classifier, even one that none of the nets here can have.

    Raises:
      FlaxnetsError: there is no such source; the file is damaged or hostile; its net is none of the zoo's,
        cannot be told from another without `model`, or is not `model`.

    Examples:
      >>> checkpoint = open_checkpoint('weights/resnest50d')
      >>> checkpoint.config.name, checkpoint.state['fc.weight'].shape
      ('resnest50d', (1000, 2048))
      >>> checkpoint.variables['params']['fc']['kernel'].shape
      (2048, 1000)
    """
    asked: dict[str, Any] = dict(
        ema=ema, approximate=approximate, key=key, prefix=prefix, drop_head=drop_head
    )
    if names_store(source):
        with runs.fetched(source) as here:
            return replace(open_checkpoint(here, model, quiet=quiet, **asked), where=os.fspath(source))
    path, published = _located(source, quiet)
    if path.is_dir() and not is_hub_folder(path):
        checkpoint = _open_run(path, ema) if runs.is_checkpoint(path) else _open_directory(path)
        zoo.check_name(path, model, checkpoint.config.name)
        return without_head(checkpoint) if drop_head else checkpoint
    file = _read(path, published, asked)
    checkpoint = _understood(file, _which(file, model), model)
    return without_head(checkpoint) if drop_head and not file.found.headless else checkpoint


def converted(source: str) -> Path:
    """Downloads a source that is no path, and converts it if it is a published name; both are kept.

    Returns:
      A directory of weights for a published name, below `FLAXNETS_HOME`; for a repository of the hub or
      a URL, what was downloaded.

    Raises:
      FlaxnetsError: no such name, or it cannot be downloaded.
    """
    row = named(source)
    if row is None:
        return fetch(source)
    directory = kept(row)
    if not weights.is_directory(directory):
        try:
            write(open_checkpoint(source), directory)
        except CheckpointError:
            if not weights.is_directory(directory):  # else another process has written it meanwhile
                raise
    return directory


def kept(row: Weights) -> Path:
    """Where published weights are kept once they are converted."""
    return home() / 'converted' / row.name


def named(source: str) -> Weights | None:
    """The published weights that a source names.

    Returns:
      None for a repository of the hub, a URL, or a net without published weights.

    Raises:
      FlaxnetsError: the source is none of these.
    """
    try:
        return zoo.resolve(source)[1]
    except FlaxnetsError as error:
        if '://' in source or HUB_PREFIX.match(source):
            return None
        if '/' in source or Path(source).suffix in SUFFIXES:
            raise CheckpointError(f'{source}: no such file or directory') from None
        raise FlaxnetsError(f'{source}: no such file or directory, and {error}') from None


# Where the weights are, and what is in them.


def _located(source: str | os.PathLike[str], quiet: bool) -> tuple[Path, Weights | None]:
    """The path of a source, downloaded if need be; and the published weights, if it names any."""
    path = Path(source)
    if path.exists() and not is_published_name(source):
        return path, None
    published = named(os.fspath(source))
    return fetch(os.fspath(source), quiet=quiet), published


def _open_directory(path: Path) -> Checkpoint:
    if not (path / 'config.json').is_file():
        raise CheckpointError(f'{path}: a folder without config.json is no directory of weights')
    config, source = weights.read_config(path), weights.read_source(path)
    state = to_state(weights.read_variables(path), net_of(config))
    if source.num_batches_tracked:
        state = add_counters(state, source.num_batches_tracked)
    return Checkpoint(config, state, replace(source, file=source.file or path.name), str(path))


def _open_run(path: Path, ema: bool) -> Checkpoint:
    """The newest checkpoint of a training run, or the one that the path names."""
    found = runs.read(path, ema=ema)
    kind = 'moving averages' if found.averaged else 'weights'
    note = f'{kind} of a training run of flaxnets after {found.step} steps'
    source = weights.Source(file=path.name, layout='flaxnets', notes=(note,))
    return Checkpoint(found.config, to_state(found.variables, net_of(found.config)), source, str(path))


@dataclass(frozen=True)
class _File:
    """What is known of a file of weights before its net is identified.

    Attributes:
      path, digest: the file and its SHA-256.
      found: its tensors, and what it says of them.
      published: the published weights that it holds, by its name or SHA-256; None if it holds others.
      hub: what the configuration beside it says, in a folder of the Hugging Face hub; else None.
      certified: what the certificate beside it says; None if there is none.
    """

    path: Path
    digest: str
    found: Found
    published: Weights | None
    hub: HubConfig | None
    certified: Config | None


def _read(path: Path, published: Weights | None, asked: dict[str, Any]) -> _File:
    """Reads a file, or a folder of the Hugging Face hub; `asked` are keywords of `to_canonical`."""
    hub = None
    if path.is_dir():
        path, hub = read_hub_folder(path)
    if hub and hub.differences and not asked['approximate']:
        raise CheckpointError(
            f'{path.parent}: {"; ".join(hub.differences)}; approximate=True takes the weights'
        )
    read = _reader(path)
    with ThreadPoolExecutor(1) as beside:  # hashing takes a third of the time, and releases the GIL
        hashed = beside.submit(sha256_of, path)
        try:
            found = to_canonical(read(path), **asked)
        except CheckpointError as error:
            if str(path) not in str(error):
                error.args = (f'{path}: {error}',)
            raise
    digest = hashed.result()
    _check_download(path, digest)
    return _File(path, digest, found, published or _published(digest), hub, certified(path, digest))


def _reader(path: Path) -> Callable[[Path], object]:
    """The function that reads a file, by the format that its first bytes show."""
    with map_file(path) as data:
        # Safetensors has 8 bytes for its header's length, then JSON. Here a zip has 0, a legacy file 0xf9.
        is_safetensors = data[8:9] == b'{'
    return (lambda file: read_safetensors(file)[0]) if is_safetensors else read_pth


def _published(digest: str) -> Weights | None:
    """The published weights whose file has this SHA-256."""
    for row in zoo.WEIGHTS:
        if row.sha256 and digest.startswith(row.sha256):
            return row
    return None


def _check_download(path: Path, digest: str) -> None:
    """Raises if a file has the name of published weights, but not their SHA-256."""
    published = zoo.find_file(path.name)
    if published and published.sha256 and not digest.startswith(published.sha256):
        raise CheckpointError(
            f'{path}: bears the name of published weights, but its SHA-256 starts with '
            f'{digest[: len(published.sha256)]}, not {published.sha256}: a damaged or altered download; '
            'fetch it again, or rename it if it is your own'
        )


# Which net it is, and what it expects.


def _which(file: _File, model: str | None) -> str:
    """The name in the zoo of the net that a file holds; `model` is what the user says it is."""
    path, state = file.path, file.found.state
    if file.published:
        if model is not None and zoo.resolve(model)[0] != file.published.arch:
            raise FlaxnetsError(f'{path} is {file.published.name}, not {model}')
        return file.published.arch
    if model is None and file.hub:
        model = file.hub.architecture
    if model is None:
        hint = (file.certified.name if file.certified else file.found.named) or path.name
        try:
            return identify(state, hint=hint, layout=file.found.layout)
        except FlaxnetsError as error:
            raise FlaxnetsError(f'{path}: {error}') from None
    name, _ = zoo.resolve(model)
    difference = contradiction(state, name)
    if difference:
        raise CheckpointError(f'{path}: not {model}: {difference}')
    return name


def _understood(file: _File, name: str, model: str | None) -> Checkpoint:
    """The checkpoint in a file that holds the net `name`; `model` is what the user calls it."""
    found, hub = file.found, file.hub
    num_classes, in_chans = _sizes(found.state, name)
    if hub and (num_classes not in (0, hub.num_classes) or in_chans != hub.in_chans):
        raise CheckpointError(
            f'{file.path.parent}: config.json says {hub.num_classes} classes and {hub.in_chans} input '
            f'channels, {file.path.name} has {num_classes} and {in_chans}'
        )
    images: tuple[str, ...]
    config = file.certified
    if config and (config.name, config.num_classes, config.in_chans) == (name, num_classes, in_chans):
        images = (f'images: {config.preprocess} (by {file.path.name}.json)',)
    else:
        classes = found.classes or (hub.classes if hub else None)
        preprocess, images = _preprocess(file, name, model, in_chans)
        config = Config(
            name,
            zoo.NETS[name],
            preprocess,
            num_classes=num_classes,
            in_chans=in_chans,
            weights=file.published,
            classes=classes if classes and len(classes) == num_classes else None,
            class_order=None if classes or file.published else found.class_order,
        )
    state, counters, note = take_counters(found.state)
    of_hub = (*hub.differences, *hub.notes) if hub else ()
    notes = (*found.notes, *note, *of_hub, *images)
    source = weights.Source(file.path.name, file.digest, found.layout, notes, counters)
    return Checkpoint(config, state, source, str(file.path))


def _sizes(state: State, name: str) -> tuple[int, int]:
    """How many classes and input channels tensors of the net `name` are for."""
    stem = 'conv1.0.weight' if zoo.NETS[name].deep_stem else 'conv1.weight'
    num_classes = _length(state, 'fc.weight', axis=0, default=1000 if 'fc.bias' in state else 0)
    return num_classes, _length(state, stem, axis=1, default=3)


def _length(state: State, name: str, axis: int, default: int) -> int:
    """A size that the tensor `name` decides; `default` where it is missing or has no such axis."""
    tensor: Any = state.get(name)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]


def _preprocess(
    file: _File, name: str, model: str | None, in_chans: int
) -> tuple[Preprocess, tuple[str, ...]]:
    """How the weights expect their images, and notes on that where it is not published with them."""
    if file.published:
        return file.published.preprocess, ()
    notes: tuple[str, ...] = ()
    if file.hub:
        found = file.hub.preprocess
    else:
        said = file.found.images
        usual = _usual(name, model, said.weights)
        origin = f'assumed, as of {usual.weights.name if usual.weights else name}'
        if said.fields:
            origin = f"as the file's training, else {origin.removeprefix('assumed, ')}"
        found = said.applied_to(usual.preprocess)
        notes = (f'images: {found} ({origin})', *(f'images: {note}' for note in said.notes))
    found = for_channels(found, in_chans)
    if found.unsupported:
        reasons = '; '.join(found.unsupported)
        notes = (*notes, f'images: cannot be prepared as these weights expect them: {reasons}')
    return found, notes


def _usual(name: str, model: str | None, tagged: str | None) -> Config:
    """The published weights whose image settings stand in where a file says nothing."""
    own_tag = model if model and '.' in model else None
    for choice in (own_tag, tagged, model):
        if choice is None:
            continue
        try:
            usual = zoo.config(choice)
        except FlaxnetsError:  # a tag that the zoo does not have
            continue
        if usual.name == name:
            return usual
    return zoo.config(name)

"""From weights of any kind to any other: opened, worked on, written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flaxnets import zoo
from flaxnets.api import is_published_name
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import ResNet, build
from flaxnets.store import runs, weights
from flaxnets.store.files import map_file, written_whole
from flaxnets.store.home import home
from flaxnets.store.remote import StorePath, is_remote, names_store, place, staged
from flaxnets.store.safetensors_file import read_safetensors, write_safetensors
from flaxnets.zoo.records import Config, Weights, config_from_json, to_json

from . import arithmetic
from .download.published_files import fetch
from .formats.pth import read_pth
from .formats.pth_write import write_pth
from .names.hub_folder import HubConfig, is_hub_folder, read_hub_folder
from .names.identification import contradiction, identify
from .names.image_settings import for_channels
from .names.layouts import Canonical, caveat, from_canonical, to_canonical
from .names.roles import AmbiguousError
from .names.tree import COUNTER, State, is_number, to_state, to_variables
from .verification import Verification, verify
from .words import count

FORMATS = ('pth', 'safetensors')
MAX_CERTIFICATE_BYTES = 16_000_000
METADATA = {'format': 'pt'}  # of a safetensors file with PyTorch's names and layouts
SUFFIXES = {'.pth': 'pth', '.pt': 'pth', '.ckpt': 'pth', '.bin': 'pth', '.safetensors': 'safetensors'}
_TORCH_TAR = '.pth.tar'  # what PyTorch's own examples call a file of torch.save, which is no tar archive


@dataclass(frozen=True)
class Checkpoint:
    """Weights from anywhere, in the one form in which they are worked on.

    Attributes:
      config: the net, and the published file if this is one.
      state: canonical names and PyTorch's layouts, BatchNorm's counters included; views of the file.
      source: where they came from, for the certificate.
      where: the same for an error: the path.
    """

    config: Config
    state: dict[str, np.ndarray]
    source: weights.Source
    where: str

    def noted(self, note: str) -> weights.Source:
        return replace(self.source, notes=(*self.source.notes, note))

    def net(self) -> ResNet:
        return build(
            self.config.arch, self.config.num_classes, self.config.in_chans, folded=self.config.folded
        )

    @cached_property
    def variables(self) -> weights.Variables:
        """The Flax variables: views, dtypes kept.

        Raises:
          CheckpointError: every missing, unexpected, wrong-shaped, non-floating and non-finite tensor.
        """
        try:
            return to_variables(self.state, self.net())
        except CheckpointError as error:
            raise CheckpointError(f'{self.where} as {self.config.name}: {error}') from None


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
        Face hub; a published name, `hf-hub:` repository or URL,
        which is downloaded once. All but names may lie in a bucket (`gs://BUCKET/run`).
      model: the net's name. Without it the net is the published file's, or is identified from the tensors.
      ema: of a training file that holds both, take the averaged weights.
      approximate: accept weights whose tensors fit, but whose own net computes something a little else.
      quiet: show no progress of a download.
      key: of a file with several state dicts, where that is which is meant: 'state.model'.
      prefix: of a state dict with several nets, what stands before the names of the one that is meant.
      drop_head: leave out the classifier, also one that none of the nets here can have.

    Raises:
      FlaxnetsError: no such source, a damaged or hostile file, a net that is none of the zoo's, that
        cannot be told from another without `model`, or that contradicts it.
    """
    asked = _Asked(ema, approximate, key, prefix, drop_head)
    opened = _open(source, model, asked, quiet)
    dropped = any(note.startswith('dropped the head') for note in opened.source.notes)
    return without_head(opened) if drop_head and not dropped else opened


@dataclass(frozen=True)
class _Asked:
    """What of a file is asked for: arguments of `open_checkpoint`."""

    ema: bool
    approximate: bool
    key: str | None
    prefix: str | None
    drop_head: bool


def _open(source: str | os.PathLike[str], model: str | None, asked: _Asked, quiet: bool) -> Checkpoint:
    if names_store(source):
        with runs.fetched(source) as here:
            return replace(_open(here, model, asked, quiet), where=os.fspath(source))
    path, published, hub = Path(source), None, None
    if not path.exists() or is_published_name(source):
        published = named(os.fspath(source))
        path = fetch(os.fspath(source), quiet=quiet)
    if path.is_dir():
        if runs.is_checkpoint(path):
            return _open_run(path, model, asked.ema)
        if not is_hub_folder(path):
            return _open_directory(path, model)
        path, hub = read_hub_folder(path)
    if hub and hub.differences and not asked.approximate:
        raise CheckpointError(
            f'{path.parent}: {"; ".join(hub.differences)}; approximate=True takes the weights'
        )
    read = _reader(path)
    with ThreadPoolExecutor(1) as beside:  # a third of the time, and it leaves the interpreter free
        digest = beside.submit(_sha256, path)
        try:
            found = to_canonical(read(path), **vars(asked))
        except AmbiguousError as error:
            raise AmbiguousError(f'{path}: {error}', error.choices) from None
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(path) in str(error) else f'{path}: {error}') from None
    return _understood(path, digest.result(), found, model, published=published, hub=hub)


def converted(source: str) -> Path:
    """What is there of a source that is no path: a published name's weights, converted once and kept.

    Returns:
      A directory of weights for a published name, below `FLAXNETS_HOME`; for a repository of the hub or
      a URL, what was downloaded.

    Raises:
      FlaxnetsError: no such name, or it cannot be had.
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


def _open_directory(path: Path, model: str | None) -> Checkpoint:
    if not (path / 'config.json').is_file():
        raise CheckpointError(f'{path}: a folder without config.json is no directory of weights')
    config, source = weights.read_config(path), weights.read_source(path)
    _check_name(path, model, config)
    checkpoint = Checkpoint(config, {}, replace(source, file=source.file or path.name), str(path))
    state = to_state(weights.read_variables(path), checkpoint.net())
    return replace(checkpoint, state=_with_counters(state, source.num_batches_tracked))


def _open_run(path: Path, model: str | None, ema: bool) -> Checkpoint:
    """The newest checkpoint of a training run, or the one that the path names."""
    found = runs.read(path, ema=ema)
    _check_name(path, model, found.config)
    kind = 'moving averages' if found.averaged else 'weights'
    note = f'{kind} of a training run of flaxnets after {found.step} steps'
    source = weights.Source(file=path.name, layout='flaxnets', notes=(note,))
    checkpoint = Checkpoint(found.config, {}, source, str(path))
    return replace(checkpoint, state=to_state(found.variables, checkpoint.net()))


def _check_name(path: Path, model: str | None, config: Config) -> None:
    if model is not None and zoo.resolve(model)[0] != config.name:
        raise FlaxnetsError(f'{path} holds weights of {config.name}, not of {model}')


def named(source: str) -> Weights | None:
    """The published file that a source means which is no path; None for a hub's repository or a URL."""
    try:
        return zoo.resolve(source)[1]
    except FlaxnetsError as error:
        if '://' in source or source.lower().startswith(('hf-hub:', 'hf_hub:')):
            return None
        if '/' in source or Path(source).suffix in SUFFIXES:
            raise CheckpointError(f'{source}: no such file or directory') from None
        raise FlaxnetsError(f'{source}: no such file or directory, and {error}') from None


def _understood(
    path: Path,
    digest: str,
    found: Canonical,
    model: str | None,
    *,
    published: Weights | None,
    hub: HubConfig | None,
) -> Checkpoint:
    """The checkpoint in a file: which net it is, and what is known of it."""
    _check_download(path, digest)
    published = published or _published(digest)
    certified = _certified(path, digest)
    named = certified.name if certified else found.named
    name = _which(path, found.state, model, published, hub, named, found.layout)
    classes = found.classes or (hub.classes if hub else None)
    in_chans = _length(found.state, _first_weight(name), axis=1, default=3)
    preprocess, notes = _preprocess(name, model, found, published, hub, in_chans)
    num_classes = _length(found.state, 'fc.weight', axis=0, default=1000 if 'fc.bias' in found.state else 0)
    config = Config(
        name,
        zoo.NETS[name],
        preprocess,
        num_classes=num_classes,
        in_chans=in_chans,
        weights=published,
        classes=classes if classes and len(classes) == num_classes else None,
        class_order=None if classes or published else found.class_order,
    )
    if hub and (num_classes not in (0, hub.num_classes) or config.in_chans != hub.in_chans):
        raise CheckpointError(
            f'{path.parent}: config.json says {hub.num_classes} classes and {hub.in_chans} input channels, '
            f'{path.name} has {num_classes} and {config.in_chans}'
        )
    if certified and (certified.name, certified.num_classes, certified.in_chans) == (
        name,
        num_classes,
        in_chans,
    ):
        config = certified
        notes = (f'images: {config.preprocess} (by {path.name}.json)',)
    state, counters, note = _counters(found.state)
    notes = (*found.notes, *note, *((*hub.differences, *hub.notes) if hub else ()), *notes)
    source = weights.Source(path.name, digest, found.layout, notes, counters)
    return Checkpoint(config, state, source, str(path))


def _preprocess(
    name: str,
    model: str | None,
    canonical: Canonical,
    published: Weights | None,
    hub: HubConfig | None,
    in_chans: int,
) -> tuple[Preprocess, tuple[str, ...]]:
    """How the weights expect their images, and what to say of it where it is not published with them."""
    if published:
        return published.preprocess, ()
    notes: tuple[str, ...] = ()
    if hub:
        found = hub.preprocess
    else:
        said = canonical.images
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
    """The published weights whose images are meant where a file says nothing: those that it began with."""
    own_tag = model if model and '.' in model else None
    for choice in (own_tag, tagged, model):
        if choice is None:
            continue
        try:
            usual = zoo.config(choice)
        except FlaxnetsError:  # another tag than those here
            continue
        if usual.name == name:
            return usual
    return zoo.config(name)


def _reader(path: Path) -> Callable[[Path], object]:
    """What reads the format that a file's first bytes show."""
    with map_file(path) as data:
        # After the length of its header; a zip archive and a legacy file have a 0 and a 0xf9 there.
        is_safetensors = data[8:9] == b'{'
    return (lambda file: read_safetensors(file)[0]) if is_safetensors else read_pth


def _which(
    path: Path,
    state: State,
    model: str | None,
    published: Weights | None,
    hub: HubConfig | None,
    named: str | None,
    layout: str,
) -> str:
    """The name in the zoo of the net that these tensors are."""
    if published:
        if model is not None and zoo.resolve(model)[0] != published.arch:
            raise FlaxnetsError(f'{path} is {published.name}, not {model}')
        return published.arch
    if model is None and hub:
        model = hub.architecture
    if model is None:
        try:
            return identify(state, hint=named or path.name, layout=layout)
        except FlaxnetsError as error:
            raise FlaxnetsError(f'{path}: {error}') from None
    name, _ = zoo.resolve(model)
    difference = contradiction(state, name)
    if difference:
        raise CheckpointError(f'{path}: not {model}: {difference}')
    return name


# Work on checkpoints.


def averaged(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """The mean of several checkpoints of one net (`convert.arithmetic.average`)."""
    files = [checkpoint.source.file or '?' for checkpoint in checkpoints]
    nets = {checkpoint.config.name for checkpoint in checkpoints}
    if len(nets) > 1:
        raise CheckpointError(f'cannot average different nets: {", ".join(sorted(nets))}')
    configs = [checkpoint.config for checkpoint in checkpoints]
    named = {config.classes for config in configs} - {None}
    orders = {config.class_order for config in configs} - {None}
    if len(named) > 1 or (len(orders) > 1 and not named):
        raise CheckpointError('cannot average nets of different classes, or of the same in different orders')
    state = arithmetic.average([checkpoint.state for checkpoint in checkpoints], files)
    first = checkpoints[0]
    images = [str(config.preprocess) for config in configs]
    notes = [
        f'images: {file} expects {said}'
        for file, said in zip(files, images, strict=True)
        if said != images[0]
    ]
    if notes:
        notes.insert(0, f'images: {images[0]} (as of {files[0]})')
    source = weights.Source(
        layout=first.source.layout,
        notes=(f'the mean of {", ".join(files)}', *notes),
        num_batches_tracked=first.source.num_batches_tracked,
    )
    classes = next(iter(named), None)
    order = None if classes else next(iter(orders), None)
    config = replace(first.config, weights=None, classes=classes, class_order=order)
    return Checkpoint(config, state, source, 'the average')


def without_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its classifier."""
    config = replace(checkpoint.config, num_classes=0, classes=None, class_order=None)
    state = arithmetic.drop_head(checkpoint.state)
    return replace(checkpoint, config=config, state=state, source=checkpoint.noted('dropped the head'))


def with_classes(checkpoint: Checkpoint, classes: Sequence[str]) -> Checkpoint:
    """The checkpoint with names for its outputs, in their order, in place of what it calls them.

    Raises:
      FlaxnetsError: there are more or fewer names than outputs.
    """
    outputs = checkpoint.config.num_classes
    if len(classes) != outputs:
        raise FlaxnetsError(f'{checkpoint.where}: {len(classes)} names are given for its {outputs} outputs')
    config = replace(checkpoint.config, classes=tuple(classes), class_order=None)
    return replace(checkpoint, config=config, source=checkpoint.noted('named the classes as given'))


def with_images(checkpoint: Checkpoint, changes: Sequence[str]) -> Checkpoint:
    """The checkpoint of a net whose images are prepared otherwise: `Preprocess.changed`."""
    before = checkpoint.config.preprocess
    preprocess = before.changed(changes)
    notes = [note for note in checkpoint.source.notes if not note.startswith('images: ')]
    notes += [f'images: {note}' for note in before.overruled]
    source = replace(checkpoint.source, notes=(*notes, f'images: {preprocess} (as asked for)'))
    return replace(checkpoint, config=replace(checkpoint.config, preprocess=preprocess), source=source)


def as_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint's parameters in another dtype."""
    state = arithmetic.cast(checkpoint.state, dtype)
    return replace(checkpoint, state=state, source=checkpoint.noted(f'cast to {dtype}'))


def folded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every BatchNorm folded into its convolution, for inference."""
    if checkpoint.config.folded:
        raise FlaxnetsError(f'{checkpoint.where}: BatchNorm is folded already')
    state = arithmetic.fold_batch_norm(checkpoint.state)
    source = replace(checkpoint.noted('folded BatchNorm'), num_batches_tracked=None)
    config = replace(checkpoint.config, folded=True)
    return replace(checkpoint, config=config, state=state, source=source)


# Written.


def write(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    layout: str = 'timm',
    file_format: str | None = None,
    verification: Verification | None = None,
    approximate: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint to a directory of weights or to a file, by the name of `out`.

    A name that ends in .pth, .pth.tar, .pt, .ckpt, .bin or .safetensors is a file for PyTorch, with its
    certificate beside it (`net.pth.json`); any other a directory that `flaxnets.load` opens. Either is
    written whole or not at all.

    Args:
      checkpoint: what to write.
      out: where.
      layout: names in a file: 'timm', 'torchvision' or 'mmpretrain'.
      file_format: 'pth' or 'safetensors', in place of what the name of `out` says.
      verification: for the certificate.
      approximate: write a file even if the other library's net of these names computes something else.
      overwrite: replace what is there.

    Raises:
      FlaxnetsError: tensors that do not fit the net (all named), or `out` cannot or must not be written.
    """
    check_out(out, file_format, overwrite)
    if is_remote(out):
        there = StorePath(out)
        with staged(there.parent) as here:
            write(
                checkpoint,
                here / there.name,
                layout=layout,
                file_format=file_format,
                verification=verification,
                approximate=approximate,
            )
        return
    proof = verification.to_json() if verification else None
    kind = file_kind(out, file_format)
    variables = checkpoint.variables
    if kind is None:
        weights.save(
            out, variables, checkpoint.config, checkpoint.source, verification=proof, overwrite=overwrite
        )
        return
    if checkpoint.config.folded:
        raise FlaxnetsError(f'{out}: folded weights have no BatchNorm, so no PyTorch net takes them')
    difference = check_layout(checkpoint, layout, approximate)
    source = checkpoint.noted(difference) if difference else checkpoint.source
    tensors = from_canonical(checkpoint.state, layout, checkpoint.config.arch)
    with written_whole(_certificate_of(out)) as beside:  # named after its file has its name
        described = write_pth(out, tensors) if kind == 'pth' else write_safetensors(out, tensors, METADATA)
        said = weights.certificate(source, described, proof)
        said |= {'sha256': _sha256(Path(out)), 'config': to_json(checkpoint.config)}
        beside.write(weights.as_json(said))


def _certified(path: Path, digest: str) -> Config | None:
    """What the certificate beside a file says of it, if it is this file's and `write` wrote both."""
    beside = Path(_certificate_of(path))
    try:
        if not beside.is_file() or beside.stat().st_size > MAX_CERTIFICATE_BYTES:
            return None
        said = json.loads(beside.read_bytes())
        return config_from_json(said['config']) if said['sha256'] == digest else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # of others, or before it said this
        return None


def _certificate_of(out: str | os.PathLike[str]) -> str:
    return f'{os.fspath(out)}.json'


def file_kind(out: str | os.PathLike[str], file_format: str | None = None) -> str | None:
    """'pth' or 'safetensors' if `out` names a file, None if a directory."""
    if file_format is not None and file_format not in FORMATS:
        raise FlaxnetsError(f'format {file_format!r} is not one of {", ".join(FORMATS)}')
    name = Path(out).name.lower()
    if name.endswith('.tar') and not name.endswith(_TORCH_TAR) and file_format is None:
        raise FlaxnetsError(f'{out}: tar archives are not written; end the name in .pth or {_TORCH_TAR}')
    return file_format or ('pth' if name.endswith(_TORCH_TAR) else SUFFIXES.get(Path(name).suffix))


def check_out(out: str | os.PathLike[str], file_format: str | None, overwrite: bool) -> None:
    """Refuses what `write` would not write to; for asking before long work."""
    if file_kind(out, file_format) is None:
        weights.check_target(out, overwrite)
        return
    for path in (place(out), place(_certificate_of(out))):
        if path.is_dir():
            raise CheckpointError(f'{path} is a directory; choose another file')
        if path.exists() and not overwrite:
            raise CheckpointError(f'{path} exists; choose another file or overwrite it (overwrite=True)')


def check_layout(checkpoint: Checkpoint, layout: str, approximate: bool) -> str | None:
    """What another library's net of these names computes otherwise; None if nothing.

    Raises:
      FlaxnetsError: it does, and `approximate` is False; for asking before long work.
    """
    difference = caveat(layout, checkpoint.config.arch)
    if difference and not approximate:
        raise FlaxnetsError(f'{difference}; approximate=True writes them all the same')
    return difference


def verified(checkpoint: Checkpoint, original: State, image: str | None = None) -> Verification:
    """PyTorch's net with the `original` tensors beside ours with the checkpoint's."""
    return verify(original, checkpoint.variables, checkpoint.config, image)


def _with_counters(state: State, counters: Mapping[str, int] | None) -> dict[str, np.ndarray]:
    return add_counters(state, counters) if counters else dict(state)


def add_counters(state: State, counters: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The step counter of each BatchNorm put behind its running variance, where PyTorch lists it."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        out[name] = tensor
        layer, _, leaf = name.rpartition('.')
        if leaf == 'running_var' and layer in counters:
            out[layer + COUNTER] = np.array(counters[layer], np.int64)
    return out


def _counters(state: State) -> tuple[dict[str, np.ndarray], dict[str, int] | None, tuple[str, ...]]:
    """The state with BatchNorm's step counters as torch keeps them (int64), the counters, and what to say.

    Averaging and `.half()` make floating-point numbers of them, which torch takes back. Where those are not
    whole, or beyond float16, they have lost their meaning, and no net computes with them: left out.
    """
    found = {name: tensor for name, tensor in state.items() if name.endswith(COUNTER)}
    counters: dict[str, int] = {}
    for name, tensor in found.items():
        value = tensor.reshape(-1)[0] if tensor.size == 1 and is_number(tensor) else np.float64('nan')
        if not np.isfinite(value) or value != int(value):
            rest = {key: t for key, t in state.items() if key not in found}
            problem = f'{name} is {value}' if tensor.size == 1 else f'{name} has shape {tensor.shape}'
            return rest, None, (f'left out {count(len(found), "step counter")}: {problem}',)
        counters[name.removesuffix(COUNTER)] = int(value)
    dtypes = sorted({tensor.dtype.name for tensor in found.values()} - {'int64'})
    note = (f'took step counters of {", ".join(dtypes)} as int64',) if dtypes else ()
    kept = (
        {name: np.array(counters[name.removesuffix(COUNTER)], np.int64) for name in found} if dtypes else {}
    )
    return {**state, **kept}, counters or None, note


def _published(digest: str) -> Weights | None:
    """The published file with this hash."""
    for row in zoo.WEIGHTS:
        if row.sha256 and digest.startswith(row.sha256):
            return row
    return None


def _check_download(path: Path, digest: str) -> None:
    published = zoo.find_file(path.name)
    if published and published.sha256 and not digest.startswith(published.sha256):
        raise CheckpointError(
            f'{path}: bears the name of published weights, but its SHA-256 starts with '
            f'{digest[: len(published.sha256)]}, not {published.sha256}: a damaged or altered download; '
            'fetch it again, or rename it if it is your own'
        )


def _sha256(path: Path) -> str:
    try:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read: {error.strerror or error}') from error


def _first_weight(arch_name: str) -> str:
    return 'conv1.0.weight' if zoo.NETS[arch_name].deep_stem else 'conv1.weight'


def _length(state: State, name: str, axis: int, default: int) -> int:
    """A size that the tensor `name` decides; `default` where it is missing or has no such axis."""
    tensor: Any = state.get(name)
    return default if tensor is None or tensor.ndim <= axis else tensor.shape[axis]

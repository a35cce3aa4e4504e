"""A folder of named arrays that proves itself: an Orbax checkpoint with the digests of what is in it.

    DIR/arrays/            the arrays, nested by the parts of their names: 'params/conv1/kernel'
    DIR/manifest/metadata  JSON {'sha256': of the manifest, 'manifest': {'format', 'format_version',
                           'facts': the caller's, 'arrays': name -> {'shape', 'dtype', 'sha256'}}}

Orbax commits a folder as a whole, by a rename. In a store such as `gs://`, which has none, the folder is
written on this machine, copied, and a marker written last: a folder without it is no folder of arrays.
Orbax does not notice a flipped bit; the digests, taken from memory before anything is written, do.

This is the second form of arrays on disk beside that of `flaxnets.store.weights`, and stays for two reasons.
Runs that were begun with it must go on, so that its reader could not go away if checkpoints were written as
one safetensors file. And the two are for different readers: weights are handed on, as one file that other
programs read and that is mapped without a copy; a checkpoint is read by its own run alone, holds arrays of
any tree (the optimizer's too) and is written in parallel by a thread while the run goes on.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from ..errors import CheckpointError
from ..words import some
from .digest import describe_all
from .remote import StoreError, StorePath, place

if TYPE_CHECKING:  # Orbax takes half a second to import: functions do, once they need it
    import orbax.checkpoint as ocp

FORMAT = 'flaxnets-arrays'
FORMAT_VERSION = 1
UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of what Orbax has not committed
MARKER = 'commit_success.txt'  # in a store; Orbax's own name, from when it wrote there itself


class DamagedError(CheckpointError):
    """A folder is incomplete, or holds other bytes than were written."""


class Manifest(NamedTuple):
    """What a folder says of itself.

    Attributes:
      facts: the caller's JSON object.
      arrays: shape, dtype and SHA-256 of every array, by name.
    """

    facts: dict[str, Any]
    arrays: dict[str, dict[str, Any]]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of dicts, lists and tuples, by names like 'opt_state/0/trace/conv1/kernel'.

    Raises:
      CheckpointError: two leaves have one name, because a key has a slash in it.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name in leaves:
            raise CheckpointError(f'two arrays have the name {name!r}; keys must have no slash in them')
        leaves[name] = leaf
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes back to dicts in dicts."""
    tree: dict[str, Any] = traverse_util.unflatten_dict(dict(leaves), sep='/')
    return tree


def write(directory: str | os.PathLike[str], arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes a folder that does not exist yet, whole or not at all. Works in any thread.

    In a job of several processes only the one that calls this writes; the others are not waited for.

    Args:
      directory: the folder; `gs://` too.
      arrays: at least one NumPy array, by name.
      facts: a JSON object to keep with them.

    Raises:
      CheckpointError: it cannot be written, and why.
    """
    import orbax.checkpoint as ocp

    path = place(directory)
    manifest = {
        'format': FORMAT,
        'format_version': FORMAT_VERSION,
        'facts': dict(facts),
        'arrays': describe_all(arrays),
    }
    # Orbax has no empty arrays; the manifest alone brings them back.
    stored = nested({name: np.asarray(array) for name, array in arrays.items() if array.size})
    document = {'sha256': _sha256(manifest), 'manifest': manifest}
    parts = ocp.args.Composite(arrays=ocp.args.PyTreeSave(stored), manifest=ocp.args.JsonSave(document))
    size = sum(array.nbytes for array in arrays.values())
    try:
        if isinstance(path, StorePath):
            with tempfile.TemporaryDirectory() as temporary:
                here = Path(temporary) / 'arrays'
                _write_here(here, parts, size)
                names = {file.relative_to(here).as_posix() for file in here.rglob('*') if file.is_file()}
                # Orbax puts a marker of its own there: among the others it would be in the store before them.
                path.upload(here, sorted(names - {MARKER}))
            (path / MARKER).write_text('all of it is here\n')
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_here(path, parts, size)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be written: {error.strerror or error}') from error


def _write_here(path: Path, parts: ocp.args.Composite, size: int) -> None:
    """Writes a folder of this machine. Raises: OSError: in one line; nothing is left."""
    try:
        _check_space(path.parent, size)
        _by_orbax(lambda checkpointer: checkpointer.save(path, args=parts))
    except OSError:
        remove(path.with_name(path.name + UNFINISHED))
        raise


def is_committed(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder was written to its end, as far as its outside shows."""
    path = place(directory)
    if isinstance(path, StorePath):
        return (path / MARKER).is_file()
    if not path.is_dir():
        return False
    import orbax.checkpoint as ocp

    return ocp.utils.is_checkpoint_finalized(path)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """What a folder says that it holds, the manifest's own digest checked; no array is read.

    Raises:
      DamagedError: the folder is incomplete, or the manifest is not the one that was written.
      CheckpointError: it cannot be read, or a later flaxnets wrote it.
    """
    path = place(directory) / 'manifest' / 'metadata'
    try:
        document = json.loads(path.read_bytes())
        manifest = document['manifest']
        sound = document['sha256'] == _sha256(manifest)
    except FileNotFoundError:
        raise DamagedError(f'{path}: missing') from None
    except (StoreError, PermissionError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error.strerror}') from error
    except OSError as error:
        raise DamagedError(f'{path}: cannot be read: {error.strerror}') from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f'{path}: not a manifest: {error!r}') from error
    if not sound:
        raise DamagedError(f'{path}: not the manifest that was written')
    if (manifest['format'], manifest['format_version']) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f'{path}: format {manifest["format"]} {manifest["format_version"]}, this flaxnets reads '
            f'{FORMAT} {FORMAT_VERSION}; update flaxnets'
        )
    return Manifest(manifest['facts'], manifest['arrays'])


def read(
    directory: str | os.PathLike[str], names: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts of a folder and its arrays, nested, every digest checked.

    Args:
      directory: what `write` wrote.
      names: first parts of the names of those to read, as 'params', 'batch_stats'; None reads all. Lists
        and tuples come back as dicts with keys '0', '1', ...

    Raises:
      DamagedError: an array is missing, or is not the one that was written.
      CheckpointError: the folder has no such names, or cannot be read.
    """
    manifest = read_manifest(directory)
    tops = dict.fromkeys(name.partition('/')[0] for name in manifest.arrays)
    missing = sorted(set(names or ()) - set(tops))
    if missing:
        raise CheckpointError(f'{directory}: has no {", ".join(missing)}; it has {", ".join(tops)}')
    wanted = {
        name: entry
        for name, entry in manifest.arrays.items()
        if names is None or name.partition('/')[0] in names
    }
    return manifest.facts, nested(read_arrays(directory, wanted))


def read_arrays(
    directory: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]], inner: str = 'arrays'
) -> dict[str, np.ndarray]:
    """Some or all of the arrays of a manifest, by name, digests checked.

    Args:
      directory: what `write` wrote, or another folder of Orbax's.
      entries: shape, dtype and SHA-256 of each array that is wanted, by name.
      inner: name of the folder in it that holds the arrays.

    Raises:
      DamagedError: an array is missing, or is not the one that was written.
    """
    path = place(directory)
    arrays = {name: np.empty(entry['shape'], np.dtype(entry['dtype'])) for name, entry in entries.items()}
    stored = nested({name: array for name, array in arrays.items() if array.size})
    if stored:
        import orbax.checkpoint as ocp

        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        wanted = ocp.args.PyTreeRestore(stored, restore_args=kinds, partial_restore=True)
        parts = ocp.args.Composite(**{inner: wanted})
        try:
            with _here(path) as here:
                found = _by_orbax(lambda checkpointer: checkpointer.restore(here, args=parts), inner)
            arrays |= named(found[inner])
        except StoreError as error:  # it may be whole all the same
            raise CheckpointError(f'{path}: cannot be read: {error.strerror}') from error
        except OSError as error:
            raise DamagedError(f'{path}: cannot be read: {error}') from error
    wrong = [name for name, found in describe_all(arrays).items() if found != entries[name]]
    if wrong:
        raise DamagedError(f'{path}: not the arrays that were written: {some(wrong, 3)}')
    return arrays


@contextlib.contextmanager
def _here(path: Path | StorePath) -> Iterator[Path]:
    """The folder, or for as long as the block takes a copy of it on this machine."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        names = path.files()
        _check_space(Path(temporary), sum(names.values()))
        path.download(Path(temporary), names)
        yield Path(temporary)


def remove(path: Path | StorePath) -> None:
    """Removes a folder if it is there; what cannot be removed stays, and is then no folder of arrays."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        (path / MARKER).unlink(missing_ok=True)
        path.remove_files(path.files())


def move(path: Path | StorePath, target: Path | StorePath) -> None:
    """Renames a folder. In a store it is copied first: one of the two is always there, whole.

    Raises:
      OSError: it cannot be.
    """
    if isinstance(path, Path):
        path.rename(target)
        return
    assert isinstance(target, StorePath)
    names = path.files()
    path.copy_files([name for name in names if name != MARKER], target)
    path.copy_files([name for name in names if name == MARKER], target)
    (path / MARKER).unlink(missing_ok=True)  # an error here is told: with it the old one would still count
    remove(path)


class quiet:
    """Silences what Orbax says of failures beside raising them: pages of tracebacks, in logs and threads."""

    def __enter__(self) -> quiet:
        # One filter each: two threads that set a level and put the old one back would undo each other.
        self.silence = lambda record: False
        for name in ('absl', 'asyncio'):
            logging.getLogger(name).addFilter(self.silence)
        self.hook = sys.unraisablehook
        sys.unraisablehook = self.unraisable = self._unraisable
        return self

    def _unraisable(self, event: Any) -> None:
        if str(event.exc_value) != 'Event loop is closed':  # TensorStore's threads after a failure
            self.hook(event)

    def __exit__(self, *_: object) -> None:
        for name in ('absl', 'asyncio'):
            logging.getLogger(name).removeFilter(self.silence)
        if sys.unraisablehook is self.unraisable:
            sys.unraisablehook = self.hook


def this_process() -> ocp.options.MultiprocessingOptions:
    """This process by itself, whatever the others of the job do."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process_{me}'
    )


def _by_orbax(action: Callable[[ocp.Checkpointer], Any], inner: str = 'arrays') -> Any:
    """What `action` returns. Raises: OSError: in one line, whatever Orbax and TensorStore raised."""
    import orbax.checkpoint as ocp

    with quiet():
        try:
            with ocp.Checkpointer(_handler(inner), multiprocessing_options=this_process()) as checkpointer:
                return action(checkpointer)
        except Exception as error:  # of many kinds; ValueError for a full disk
            # TensorStore's other tasks fail too, unasked, and asyncio logs that whenever they are collected.
            logging.getLogger('asyncio').addFilter(_is_not_tensorstores)
            reason = _reason(error)
        gc.collect()  # now that `error` is gone
    raise OSError(reason)


def _is_not_tensorstores(record: logging.LogRecord) -> bool:
    """TensorStore's errors begin with a status code ('DATA_LOSS: ...'); not all of them name TensorStore."""
    if not record.exc_info:
        return True
    text = str(record.exc_info[1])
    return not ('tensorstore' in text or re.match(r'[A-Z]+(_[A-Z]+)*: ', text))


def _handler(inner: str) -> ocp.CompositeCheckpointHandler:
    import orbax.checkpoint as ocp

    alone = this_process()
    # Uncompressed: weights are noise to a compressor, which takes a third of the time for 8 percent.
    of_arrays = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        manifest=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        **{inner: of_arrays},
    )


def _check_space(path: Path, needed: int) -> None:
    """Asked beforehand: a disk that fills up later fails later, with a part of the folder written."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(f'{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free')


def _sha256(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """The last and most telling part of TensorStore's chains: '...: Failed writing: "/path": No space'."""
    text = str(error).partition('\n')[0].partition(' [')[0].rpartition('": ')[2]
    return text or type(error).__name__

"""A folder of named arrays with digests that show damage: an Orbax checkpoint and a manifest.

    DIR/arrays/            the arrays, nested by the parts of their names: 'params/conv1/kernel'
    DIR/manifest/metadata  JSON {'sha256': of the manifest, 'manifest': {'format', 'format_version',
                           'facts': the caller's, 'arrays': name -> {'shape', 'dtype', 'sha256'}}}

Orbax finishes a folder by a rename. A store such as `gs://` has no rename: the folder is written on this
machine and copied, and a marker file is written last. Without the marker the folder counts as unfinished.
Orbax does not notice a flipped bit. The digests do, since they are taken from memory before writing.

Arrays are stored in two forms, this one and that of `flaxnets.store.weights`, for two reasons. Runs that
began with this form must be able to go on, so that its reader is needed in any case. And the uses differ:
weights are handed on, as one file that other programs read and that is mapped without a copy. A checkpoint
is read only by its own run, holds any tree of arrays (the optimizer's too), and a thread writes it in
parallel while the run goes on.
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
from .files import check_space
from .remote import StoreError, StorePath, place

if TYPE_CHECKING:  # Orbax takes half a second to import: functions do, once they need it
    import orbax.checkpoint as ocp

FORMAT = 'flaxnets-arrays'
FORMAT_VERSION = 1
UNFINISHED = '.orbax-checkpoint-tmp'  # in the names of folders that Orbax has not finished
MARKER = 'commit_success.txt'  # Orbax's own name, since earlier versions let Orbax write to stores


class DamagedError(CheckpointError):
    """A folder is incomplete, or its bytes are not those that were written."""


class Manifest(NamedTuple):
    """A folder's description of its content.

    Attributes:
      facts: the JSON object that `write` was given.
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
    """Arrays by name, such as 'params/conv1/kernel', as dicts in dicts."""
    tree: dict[str, Any] = traverse_util.unflatten_dict(dict(leaves), sep='/')
    return tree


def write(directory: str | os.PathLike[str], arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes a new folder, whole or not at all. Works in any thread.

    In a job of several processes only the one that calls this writes, without waiting for the others.

    Args:
      directory: the folder, which does not exist yet; may be in a bucket (`gs://`).
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
    # Orbax cannot store empty arrays; reading makes them from the manifest.
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
                # Orbax wrote a marker too. Uploaded with the others, it might be in the store before them.
                path.upload(here, sorted(names - {MARKER}))
            (path / MARKER).write_text('all of it is here\n')
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_here(path, parts, size)
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be written: {error.strerror or error}') from error


def _write_here(path: Path, parts: ocp.args.Composite, size: int) -> None:
    """Writes a folder on this machine. If it raises an OSError (of one line), nothing of it is left."""
    try:
        check_space(path.parent, size)
        _by_orbax(lambda checkpointer: checkpointer.save(path, args=parts))
    except OSError:
        remove(path.with_name(path.name + UNFINISHED))
        raise


def is_committed(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder was finished. Its content is not read."""
    path = place(directory)
    if isinstance(path, StorePath):
        return (path / MARKER).is_file()
    if not path.is_dir():
        return False
    import orbax.checkpoint as ocp

    return ocp.utils.is_checkpoint_finalized(path)


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest of a folder and checks its digest. No array is read.

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


def read(directory: str | os.PathLike[str], names: Collection[str]) -> dict[str, Any]:
    """Reads arrays of a folder and checks their digests.

    Args:
      directory: a folder that `write` wrote.
      names: which arrays to read, by the first part of their names ('params', 'batch_stats').

    Returns:
      The arrays as dicts in dicts. Lists and tuples have become dicts with keys '0', '1', ...

    Raises:
      DamagedError: an array is missing, or is not the one that was written.
      CheckpointError: the folder has no such names, or cannot be read.
    """
    entries = read_manifest(directory).arrays
    tops = dict.fromkeys(name.partition('/')[0] for name in entries)
    missing = sorted(set(names) - set(tops))
    if missing:
        raise CheckpointError(f'{directory}: has no {", ".join(missing)}; it has {", ".join(tops)}')
    wanted = {name: entry for name, entry in entries.items() if name.partition('/')[0] in names}
    return nested(read_arrays(directory, wanted))


def read_arrays(
    directory: str | os.PathLike[str], entries: Mapping[str, Mapping[str, Any]], inner: str = 'arrays'
) -> dict[str, np.ndarray]:
    """Reads arrays of a folder, by name, and checks their digests.

    Args:
      directory: a folder that `write` wrote, or another Orbax checkpoint.
      entries: shape, dtype and SHA-256 of each array to read, by name.
      inner: name of the folder inside that holds the arrays.

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
    """The folder, or a copy of it on this machine that exists until the block ends."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        names = path.files()
        check_space(Path(temporary), sum(names.values()))
        path.download(Path(temporary), names)
        yield Path(temporary)


def remove(path: Path | StorePath) -> None:
    """Removes a folder if it exists. In a store its marker goes first: what remains counts as unfinished."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        (path / MARKER).unlink(missing_ok=True)
        path.remove_files(path.files())


def move(path: Path | StorePath, target: Path | StorePath) -> None:
    """Renames a folder. In a store it is copied first, so that one of the two is always there and whole.

    Raises:
      OSError: it cannot be renamed.
    """
    if isinstance(path, Path):
        path.rename(target)
        return
    assert isinstance(target, StorePath)
    names = path.files()
    path.copy_files([name for name in names if name != MARKER], target)
    path.copy_files([name for name in names if name == MARKER], target)
    (path / MARKER).unlink(missing_ok=True)  # raises errors: with its marker the old one would still count
    remove(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the pages of tracebacks that Orbax logs and prints from threads, besides raising errors."""
    hook = sys.unraisablehook

    def silence(record: logging.LogRecord) -> bool:
        return False

    def unraisable(event: Any) -> None:
        if str(event.exc_value) != 'Event loop is closed':  # raised in TensorStore's threads after a failure
            hook(event)

    # A filter of its own for each use: threads that set and restore a level would undo each other's.
    loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
    for logger in loggers:
        logger.addFilter(silence)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)
        if sys.unraisablehook is unraisable:
            sys.unraisablehook = hook


def this_process() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax works in this process alone, without the others of the job."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process_{me}'
    )


def _by_orbax(action: Callable[[ocp.Checkpointer], Any], inner: str = 'arrays') -> Any:
    """Runs `action` with a checkpointer. Raises errors of Orbax or TensorStore as an OSError of one line."""
    import orbax.checkpoint as ocp

    with quiet():
        try:
            with ocp.Checkpointer(_handler(inner), multiprocessing_options=this_process()) as checkpointer:
                return action(checkpointer)
        except Exception as error:  # of many kinds; ValueError for a full disk
            # TensorStore's other tasks fail too, and asyncio logs that when they are garbage-collected.
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
    # Uncompressed: compression takes a third of the time and saves only 8 percent.
    of_arrays = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        manifest=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        **{inner: of_arrays},
    )


def _sha256(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """The useful part of TensorStore's messages, such as 'No space' of '...: Failed: "/path": No space'."""
    text = str(error).partition('\n')[0].partition(' [')[0].rpartition('": ')[2]
    return text or type(error).__name__

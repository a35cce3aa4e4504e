"""Names for what is being written beside its final place, so that a rename completes it."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import socket
from pathlib import Path


def work_path(target: Path) -> Path:
    """A hidden name beside `target`, in the same file system, that nothing has.

    What killed runs of this machine left for the same target is removed first; a run that lives, here or
    on another host of a shared file system, keeps its own.
    """
    host = socket.gethostname()
    prefix = f'.{target.name}.{host}.'
    for left in target.parent.glob(f'{glob.escape(prefix)}*.part'):
        pid = left.name.removeprefix(prefix).partition('.')[0]
        if pid.isdigit() and not _is_running(int(pid)):
            remove(left)
    return target.with_name(f'{prefix}{os.getpid()}.{secrets.token_hex(4)}.part')


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True

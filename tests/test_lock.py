"""One run per workdir."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flaxnets.errors import FlaxnetsError
from train.run.lock import Lock

ROOT = Path(__file__).parent.parent


def hold(workdir: Path) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    program = (
        'import sys, time; from train.run.lock import Lock; lock = Lock(sys.argv[1]); print(); time.sleep(99)'
    )
    command = [sys.executable, '-uc', program, str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == '\n'
    return process


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process = hold(tmp_path / 'new' / 'run')
    expected = f'{tmp_path}/new/run is in use by process {process.pid} on {socket.gethostname()}; wait for it'
    for _ in range(2):
        with pytest.raises(FlaxnetsError, match=expected):
            Lock(str(tmp_path / 'new' / 'run'))
    Lock(str(tmp_path / 'new')).close()  # another workdir
    process.kill()
    process.communicate()
    with Lock(str(tmp_path / 'new' / 'run')), pytest.raises(FlaxnetsError, match=f'process {os.getpid()} on'):
        Lock(str(tmp_path / 'new' / 'run'))


def test_it_is_released_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Lock(str(tmp_path)):
        raise KeyError
    lock = Lock(str(tmp_path))
    lock.close()
    lock.close()
    process = hold(tmp_path)
    process.terminate()
    process.communicate()
    Lock(str(tmp_path)).close()


def test_a_child_that_outlives_the_run_does_not_hold_it(tmp_path: Path) -> None:
    with Lock(str(tmp_path)):
        child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    Lock(str(tmp_path)).close()
    child.communicate(b'\n')


def test_a_holder_that_has_not_written_its_name(tmp_path: Path) -> None:
    with Lock(str(tmp_path)):
        (tmp_path / '.lock').write_text('')
        with pytest.raises(FlaxnetsError, match='in use by another run;'):
            Lock(str(tmp_path))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, 'flock', flock)

    fails(errno.ENOTSUP)
    with Lock(str(tmp_path)), Lock(str(tmp_path)):
        pass
    fails(errno.EIO)
    with pytest.raises(FlaxnetsError, match='cannot be locked: '):
        Lock(str(tmp_path))


def test_a_workdir_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(FlaxnetsError, match='cannot be used as a workdir: (Not a directory|File exists)'):
        Lock(str(tmp_path / 'file'))

"""What is imported when: no command waits for JAX that does not need it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flaxnets

ROOT = Path(__file__).parents[1]
HEAVY = ('jax', 'jaxlib', 'flax', 'orbax', 'grain', 'scipy', 'matplotlib')


def run(code: str, **variables: str) -> str:
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **variables}
    result = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    return result.stdout


def test_jax_is_imported_where_it_is_used() -> None:
    code = f"""
import contextlib, io, sys
import flaxnets, flaxnets.__main__, train, train.__main__
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert flaxnets.__main__.main(['list', 'resnest*']) == 0
    assert train.__main__.main(['recipes']) == 0
assert 'resnest50d' in said.getvalue() and 'finetune' in said.getvalue()
import train.data.augment, train.data.planes, train.data.sources
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(code).strip() == '[]'


def test_ctrl_c_counts_while_garbage_is_collected() -> None:
    code = """
import gc, os, signal, time
from flaxnets import command_line

def _xla_gc_callback(*_):  # as jaxlib calls it; Python drops what is raised within
    if sent:
        return
    sent.append(True)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

sent = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
command_line.heed_interrupts()
gc.callbacks.append(_xla_gc_callback)
try:
    gc.collect()
    time.sleep(20)
except KeyboardInterrupt:
    print('interrupted')
"""
    assert run(code).strip() == 'interrupted'


def test_an_interrupted_command_waits_for_no_thread() -> None:
    code = """
import threading, time
from flaxnets.command_line import ended
threading.Thread(target=time.sleep, args=(60,)).start()
assert ended(0) == 0
print('said')
ended(130)
"""
    start = time.monotonic()
    found = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT)
    assert (found.returncode, found.stdout) == (130, b'said\n') and time.monotonic() - start < 30


def test_every_public_name_is_there() -> None:
    for name in flaxnets.__all__:
        assert getattr(flaxnets, name) is not None
        assert name in dir(flaxnets)
    assert flaxnets.ResNet.__module__ == 'flaxnets.nets.resnet'
    assert flaxnets.zoo.list_models is flaxnets.list_models
    assert not hasattr(flaxnets, 'no_such_name')


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of Linux')
@pytest.mark.parametrize(
    ('system', 'set_by_user', 'expected'),
    [
        ('always [madvise] never', None, 'glibc.malloc.hugetlb=1'),
        ('[always] madvise never', None, None),
        ('always [madvise] never', '', ''),
        (None, None, None),
    ],
)
def test_training_starts_with_huge_pages(
    system: str | None,
    set_by_user: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    if system is not None:
        (tmp_path / 'enabled').write_text(system)
    code = f"""
import os, pathlib
from flaxnets import command_line
command_line.HUGE_PAGES = pathlib.Path({str(tmp_path / 'enabled')!r})
command_line.start_with_huge_pages()
print(repr(os.environ.get('GLIBC_TUNABLES')))
"""
    variables = {} if set_by_user is None else {'GLIBC_TUNABLES': set_by_user}
    assert run(code, **variables).strip() == repr(expected)

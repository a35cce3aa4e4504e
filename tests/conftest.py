"""Set-up shared by the tests: torch and torchvision beside each other, servers of files."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # JAX_PLATFORMS=cuda make test: the same on a GPU
# GPUs and TPUs would multiply float32 at less than its precision.
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', '')  # no command keeps anything in the user's home
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')  # so that pmap has something to map over
# Compiling is what takes the time here: without LLVM's optimisation it takes a fifth. What XLA does by
# default is tried in `test_modes.py`, and by `JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= make test`
# everywhere.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# Where a test turns that off, because it trains: steps are as fast with LLVM's first level as with all.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=1'
    # An unknown flag ends the process.
    + (' --xla_cpu_use_fusion_emitters=false' if metadata.version('jaxlib').startswith('0.10.') else ''),
)

import file_server
import jax
import jaxtyping
import pytest
import torch
import torchvision_ops
from checked import CHECKED
from jax.experimental.compilation_cache import compilation_cache
from memory import forget

jaxtyping.install_import_hook(CHECKED, 'checked.check')  # before any of them is imported

torchvision_ops.define_missing()
# Each worker of the tests has a core or so: two threads of torch's would mostly wait, busily.
torch.set_num_threads(1)


def pytest_collectstart(collector: pytest.Collector) -> None:
    torch.manual_seed(zlib.crc32(collector.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """torch's nets begin with the same numbers in every run, whatever ran before on the same worker."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True, scope='module')
def forget_programs() -> Iterator[None]:
    """Compiled programs of a module's tests are of no use to the next one, and take gigabytes in the end."""
    yield
    forget()


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the user's settings and cache out of a test of downloads."""
    file_server.isolate(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[file_server.Server]:
    yield from file_server.running(file_server.Server())


@pytest.fixture
def other() -> Iterator[file_server.Server]:
    yield from file_server.running(file_server.Server())


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> file_server.Publish:
    return file_server.publisher(monkeypatch)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that pass what the annotations forbid, to see what users are told."""
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For modules whose runs take the same step: compiling it is what takes their time."""
    folder, shortest = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'

    def configure(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    before = {name: getattr(jax.config, name) for name in (folder, shortest)}
    configure({folder: str(tmp_path_factory.mktemp('compiled')), shortest: 0.0})
    yield
    configure(before)

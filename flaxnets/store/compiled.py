"""The commands' compilation cache, in which JAX keeps compiled programs for the next start."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from ..onednn import asked_for_onednn
from .home import home


def keep_compiled(*, on_cpus: bool) -> None:
    """Lets JAX keep compiled programs below `home()`, unless the user has set or disabled JAX's cache.

    Args:
      on_cpus: keep programs for CPUs too. Inference does: its programs are small and take long to compile.
        Training does not: writing large ones has crashed XLA (jaxlib 0.10.2), and a run compiles only once.
    """
    settings: Any = jax.config
    chosen = 'JAX_COMPILATION_CACHE_DIR' in os.environ or settings.jax_compilation_cache_dir
    if chosen or not settings.jax_enable_compilation_cache:
        return
    folder = home() / 'compiled'
    if jax.default_backend() == 'cpu':
        # What has oneDNN's convolutions XLA cannot write (jaxlib 0.12.0: std::bad_alloc). It compiles soon.
        if not on_cpus or asked_for_onednn():
            return
        # A program compiled for another processor can crash on an illegal instruction, and hosts may share
        # a home.
        folder /= f'cpu-{_processor()}'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _processor() -> str:
    """A short name that is the same for processors with the same instruction set."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        said = next(line for line in lines if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        said = f'{platform.machine()} {platform.processor()} {platform.node()}'
    return hashlib.sha256(f'{platform.machine()} {said}'.encode()).hexdigest()[:12]

"""Where JAX keeps compiled programs, so that the next start has them: the commands' compilation cache."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from .home import home


def keep_compiled(*, on_cpus: bool) -> None:
    """Lets JAX keep what it compiles below `home()`, unless the user has said where, or that it shall not.

    Args:
      on_cpus: also programs for CPUs. Those of inference are small and take long to compile. Those of
        training are not kept: to write large ones has crashed XLA (jaxlib 0.10.2), and a run compiles once.
    """
    settings: Any = jax.config
    chosen = 'JAX_COMPILATION_CACHE_DIR' in os.environ or settings.jax_compilation_cache_dir
    if chosen or not settings.jax_enable_compilation_cache:
        return
    folder = home() / 'compiled'
    if jax.default_backend() == 'cpu':
        if not on_cpus:
            return
        # A program for another processor ends with an illegal instruction, and homes are shared by hosts.
        folder /= f'cpu-{_processor()}'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _processor() -> str:
    """The same for processors with the same instructions."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        said = next(line for line in lines if line.startswith(('flags', 'Features')))
    except (OSError, StopIteration):
        said = f'{platform.machine()} {platform.processor()} {platform.node()}'
    return hashlib.sha256(f'{platform.machine()} {said}'.encode()).hexdigest()[:12]

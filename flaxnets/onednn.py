"""Asks XLA to leave convolutions on CPUs to oneDNN, which is faster at them than what XLA has by default.

This module imports no JAX, since XLA reads its flags when JAX is first used. The nets notice by themselves
what became of it (`nets.platforms.by_onednn`).
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util

# XLA heeds the first only for what YNNPACK, its first choice, was told not to take.
ASKED, YNNPACK = '--xla_cpu_experimental_onednn_custom_call', '--xla_cpu_experimental_ynn_fusion_type'
FLAGS = f'{ASKED}=true {YNNPACK}=-individual_convolution'
# jaxlib 0.10 knows the flags but has no oneDNN, so that they only take YNNPACK away. Later versions may not
# have them, and an unknown flag ends a process.
VERSIONS = ((0, 11), (0, 12))


def ask_for_onednn() -> None:
    """Adds the flags to this process's environment, where they are known to work, before JAX is used.

    On two cores a forward of ResNeXt-50 takes a fifth less time for it, a training step a seventh. Nothing is
    done if `XLA_FLAGS` has either flag already, or names a file of flags; if the user has JAX keep what it
    compiles, which XLA cannot do of these programs (jaxlib 0.12.0: std::bad_alloc); or if a GPU or TPU might
    be used: JAX's plug-ins for these have an XLA of their own, which reads the same flags and may be of
    another version.
    """
    flags = os.environ.get('XLA_FLAGS', '').strip()
    decided = any(name in flags for name in (ASKED, YNNPACK))
    decided = decided or (flags != '' and not flags.startswith('-'))  # XLA takes it for the name of a file
    decided = decided or bool(os.environ.get('JAX_COMPILATION_CACHE_DIR'))
    if not decided and _known_to_work() and not _other_xla():
        os.environ['XLA_FLAGS'] = f'{flags} {FLAGS}'.strip()


def asked_for_onednn() -> bool:
    """Whether `XLA_FLAGS` has the flag for oneDNN, and the last one, which counts, does not refuse it."""
    flags = (flag.partition('=') for flag in os.environ.get('XLA_FLAGS', '').split())
    values = [value.lower() for name, _, value in flags if name == ASKED]
    return bool(values) and values[-1] not in ('false', 'f', '0')


def _known_to_work() -> bool:
    version = tuple(map(int, metadata.version('jaxlib').split('.')[:2]))
    return version in VERSIONS and sys.platform == 'linux' and platform.machine() == 'x86_64'


def _other_xla() -> bool:
    """Whether this process might load a plug-in for an accelerator.

    That of TPUs also serves to plan for slices that are not there (`python -m train --plan`).
    """
    if util.find_spec('libtpu'):
        return True
    if os.environ.get('JAX_PLATFORMS') == 'cpu':
        return False
    return util.find_spec('jax_plugins') is not None or bool(metadata.entry_points(group='jax_plugins'))

"""What compiled programs hold, given back."""

from __future__ import annotations

import ctypes
import gc
import sys

import jax


def forget() -> None:
    """Drops all compiled programs, and gives the memory that they took back to the system."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == 'linux':
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed: half a gigabyte for each module

"""How many of the machine's cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """The number of cores: fewer than the machine's where a scheduler or `taskset` allots them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

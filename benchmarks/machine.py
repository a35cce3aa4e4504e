"""Describes the machine of a run, without names of hosts or paths, and reads processor times and memory."""

from __future__ import annotations

import os
import platform
import re
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

from flaxnets.cores import cores

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'timm', 'numpy', 'onnxruntime', 'openvino')


def description() -> dict[str, Any]:
    """Processor, cores, memory, versions."""
    return {
        'cpu': _first(r'model name\s*:\s*(.+)', '/proc/cpuinfo') or platform.machine(),
        'vector': _vector_unit(),
        'cores': cores(),
        'memory_gib': round(int(_first(r'MemTotal:\s*(\d+)', '/proc/meminfo') or 0) / 2**20, 1),
        'python': platform.python_version(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'versions': {name: version for name in PACKAGES if (version := installed(name))},
    }


def installed(package: str) -> str:
    """The version of a package, '' where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ''


def busy_seconds() -> float:
    """Processor seconds of all cores and all processes since the machine's start."""
    try:
        numbers = Path('/proc/stat').read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, numbers)
    return (user + nice + system + irq + softirq + steal) / os.sysconf('SC_CLK_TCK')


def childrens_seconds() -> float:
    """Processor seconds of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_mb(field: str) -> float:
    """This process's 'VmHWM' (peak) or 'VmRSS' (now), in MB; 0 where the system does not say."""
    found = _first(rf'{field}:\s*(\d+)', '/proc/self/status')
    return round(int(found or 0) / 1024, 1)


def reset_peak() -> bool:
    """Resets the peak to the memory held now; False where the system does not allow it."""
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def _vector_unit() -> str:
    flags = (_first(r'flags\s*:\s*(.+)', '/proc/cpuinfo') or '').split()
    known = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')
    return ', '.join(flag for flag in known if flag in flags)


def _first(pattern: str, path: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return found[1].strip() if found else None

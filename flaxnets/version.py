"""The version of flaxnets, for the package's metadata and for what it writes."""

from __future__ import annotations

VERSION = '0.1.0'


def versions(*packages: str) -> dict[str, str]:
    """Versions of flaxnets and of these packages, by name."""
    from importlib import metadata

    return {'flaxnets': VERSION, **{name: metadata.version(name) for name in packages}}

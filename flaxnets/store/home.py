"""Where flaxnets keeps what it fetched or made and can make again: one folder for all of it."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder below which flaxnets keeps downloads, converted weights and compiled programs.

    `FLAXNETS_HOME`, in which `~` stands for the user's own folder; without it `flaxnets` in `XDG_CACHE_HOME`,
    if that is an absolute path (the XDG specification wants others ignored), or in `~/.cache`.
    """
    if named := os.environ.get('FLAXNETS_HOME'):
        return Path(named).expanduser().absolute()
    cache = os.environ.get('XDG_CACHE_HOME', '')
    return (Path(cache) if os.path.isabs(cache) else Path.home() / '.cache') / 'flaxnets'

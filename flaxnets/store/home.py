"""The one folder in which flaxnets keeps what it can download or make again."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder in which flaxnets keeps downloads, converted weights and compiled programs.

    It is `FLAXNETS_HOME` if that is set; `~` in it means the user's home. Otherwise it is `flaxnets` in
    `XDG_CACHE_HOME`, or in `~/.cache` if that is not set or, as the XDG specification wants it, if it is not
    an absolute path.
    """
    if named := os.environ.get('FLAXNETS_HOME'):
        return Path(named).expanduser().absolute()
    cache = os.environ.get('XDG_CACHE_HOME', '')
    return (Path(cache) if os.path.isabs(cache) else Path.home() / '.cache') / 'flaxnets'

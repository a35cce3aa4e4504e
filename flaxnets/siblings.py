"""Imports the packages `convert` and `train` that are installed beside `flaxnets`, and no others.

Many people have a `convert.py` or `train.py` of their own, and Python prefers those in the working folder.
This module finds the packages by their path, and neither runs nor imports a file of the user's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import FlaxnetsError


def sibling(name: str) -> ModuleType:
    """Imports a module of `convert` or `train`: `sibling('convert.conversion')`.

    Args:
      name: package and module, with a dot between them.

    Returns:
      The module. If another module already has the package's name, the package is imported as
      `_flaxnets_convert` or `_flaxnets_train`.

    Raises:
      FlaxnetsError: the package is not beside `flaxnets`: the installation is incomplete.
    """
    package, _, inner = name.partition('.')
    home = Path(__file__).parents[1] / package / '__init__.py'
    if not home.is_file():
        raise FlaxnetsError(f'{home.parent} is missing: install flaxnets again')
    if not _is_ours(package, home):
        package = _imported_as(f'_flaxnets_{package}', home)
    return importlib.import_module(f'{package}.{inner}')


def _is_ours(package: str, home: Path) -> bool:
    """Whether Python finds the package at `home` by its own name; nothing is imported to find out."""
    loaded = sys.modules.get(package)
    try:
        found = loaded.__file__ if loaded else getattr(importlib.util.find_spec(package), 'origin', None)
    except (AttributeError, ImportError, ValueError):
        return False
    return found is not None and Path(found).resolve() == home.resolve()


def _imported_as(alias: str, home: Path) -> str:
    """Imports the package at `home` as `alias`, once. This works because its own imports are relative."""
    if alias not in sys.modules:
        inside = [str(home.parent)]
        spec = importlib.util.spec_from_file_location(alias, home, submodule_search_locations=inside)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return alias

"""How annotations are checked while tests run: `conftest.py` applies it to modules as they are imported."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is a float, as for mypy.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

"""python -m train: what the command does around a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import pytest

from train import __main__ as command


@pytest.mark.parametrize(
    'variable, value, folder', [('XDG_CACHE_HOME', '{}', 'flaxnets'), ('FLAXNETS_HOME', '~/nets', 'nets')]
)
def test_compiled_programs_lie_with_all_else_that_is_kept(
    variable: str, value: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ('FLAXNETS_HOME', 'XDG_CACHE_HOME', 'JAX_COMPILATION_CACHE_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv(variable, value.format(tmp_path))
    changed: dict[str, Any] = {}
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    monkeypatch.setattr(jax.config, 'update', lambda name, new: changed.update({name: new}))
    options = argparse.Namespace(coordinator=None, processes=None, process=None, distributed=False)
    compiled = tmp_path / folder / 'compiled'
    command._connect(options, training=True)
    assert changed.pop('jax_compilation_cache_dir') == str(compiled)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
    command._connect(options, training=True)
    assert not changed
    command._connect(options, training=False)  # for this kind of processor alone
    own = Path(changed.pop('jax_compilation_cache_dir'))
    assert own.parent == compiled and own.name.startswith('cpu-')
    monkeypatch.setattr('flaxnets.store.compiled._processor', lambda: 'other')
    command._connect(options, training=False)
    assert Path(changed.pop('jax_compilation_cache_dir')) == compiled / 'cpu-other'
    for value in ('', '/elsewhere'):  # the user has said where, or not at all
        monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', value)
        command._connect(options, training=False)
    assert not changed

"""python -m train: what the command does around a run."""

from __future__ import annotations

import argparse
import re
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


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--workdir', 'x', 'lr=fast', 'epoch=3'], "lr='fast' must be a number\n.*did you mean epochs"),
        (['lr=0.1'], '--workdir is missing'),
        (['--recipe', 'resnest51', '--workdir', 'x'], 'resnest50'),
        (['--workdir', 'x', '--processes', '2'], '--coordinator, --processes and --process go together'),
        (['--workdir', 'x', '--profile', '5'], r"--profile '5' must be two steps"),
        (['--workdir', 'x', 'batch_size=5000'], 'batch_size=5000 is more than the 1437 images'),
        (['--workdir', 'x', 'data=nowhere'], "data='nowhere' is not understood"),
        (['eval', '--model', 'absent.pth', '--data', 'digits'], 'absent.pth: no such file'),
        (['export', 'absent', '--out', 'x'], 'no checkpoint of a training run'),
        (['--workdir', 'x', '--distributed'], 'cannot join the other processes: .*--coordinator'),
        (
            ['eval', '--model', 'absent', '--data', 'digits', '--out', 'file'],
            'file: no such folder can',
        ),
    ],
)
def test_errors_are_one_clear_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('')
    assert command.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: ') and re.search(message, err, re.DOTALL)
    assert not list(tmp_path.glob('x/checkpoints/*'))


@pytest.mark.parametrize(
    'arguments',
    [
        ['--workdir', 'x'],
        ['eval', '--model', 'x', '--data', 'digits'],
        ['probe', '--model', 'x', '--data', 'y'],
    ],
)
def test_a_package_that_is_missing_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nets alone do not bring those of training."""
    monkeypatch.setattr(command, 'NEEDED', (*command.NEEDED, 'no_such_package'))
    assert command.main(arguments) == 1
    assert capsys.readouterr().err == 'error: this needs no_such_package: pip install no_such_package\n'


def test_print_shows_what_would_happen(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(['--print', 'lr=0.2']) == 0
    out = capsys.readouterr().out
    assert '* lr                   0.2' in out and '22 steps' in out and '599,914' in out  # with 10 classes


def test_print_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(['--recipe', 'resnest50d', '--print']) == 0
    out = capsys.readouterr().out
    assert "ImageNet's 1,281,167 images" in out and '156 steps' in out  # 1281167 / 8192

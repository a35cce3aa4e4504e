"""Where the user's own `convert.py` and `train.py` lie in the working folder, ours are found all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = "raise SystemExit('the file of the user was run')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of somebody who trains and converts with programs of their own."""
    for name in ('convert', 'train'):
        (tmp_path / f'{name}.py').write_text(OWN)
    (tmp_path / 'resnet.py').write_text(OWN)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # The working folder comes first on the path, as with `python -m` and in a notebook.
    code = f'import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; {command[0]}'
    return subprocess.run(
        [sys.executable, '-P', '-c', code, *command[1:]], cwd=folder, capture_output=True, text=True
    )


MAIN = 'from flaxnets.__main__ import main; sys.exit(main())'


@pytest.mark.parametrize(
    ('command', 'code', 'found'),
    [
        (('convert', '--help'), 0, 'usage: flaxnets convert'),
        (('convert', 'gone.pth', '--out', 'there'), 1, 'gone.pth'),
        (('train', '--help'), 0, 'usage: flaxnets train'),
        (('evaluate', '--help'), 0, 'usage: flaxnets evaluate'),
        (('recipes',), 0, 'resnest50d'),
        (('--help',), 0, 'evaluate'),
    ],
)
def test_commands_are_ours(folder: Path, command: tuple[str, ...], code: int, found: str) -> None:
    done = run(folder, MAIN, *command)
    assert (done.returncode, found in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def test_load_runs_nothing_of_the_users(folder: Path) -> None:
    done = run(folder, "import flaxnets; flaxnets.load('gone.pth')")
    assert done.returncode == 1
    assert 'CheckpointError' in done.stderr and 'gone.pth' in done.stderr


def test_a_module_of_the_user_that_is_already_there_stays(folder: Path) -> None:
    for name in ('convert', 'train'):
        (folder / f'{name}.py').write_text('OWN = True\n')
    code = """
import convert
from flaxnets.siblings import sibling
ours = sibling('convert.conversion')
assert convert.OWN and sys.modules['convert'] is convert
assert sibling('convert.conversion') is ours, 'imported once'
"""
    done = run(folder, code)
    assert done.returncode == 0, done.stderr


def test_ours_is_used_where_nothing_hides_it() -> None:
    code = """
import convert.conversion
from flaxnets.siblings import sibling
assert sibling('convert.conversion') is convert.conversion
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

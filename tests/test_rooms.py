"""Who may import whom: rooms import rooms of earlier rows, and no modules import one another in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The rooms of each package, in the rows of docs/house.md. A room may import rooms of earlier rows only.
ROWS: dict[str, tuple[tuple[str, ...], ...]] = {
    'flaxnets': (
        ('errors', 'version', 'checks'),
        ('siblings', 'words', 'command_line', 'onednn', 'cores'),
        ('nets', 'images'),
        ('zoo',),
        ('store',),
        ('api',),
        ('inference', 'exporting'),
        ('__init__', '__main__'),
    ),
    'convert': (
        ('__init__',),
        ('formats',),
        ('names',),
        ('checkpoint',),
        ('download', 'arithmetic', 'comparison', 'verification'),
        ('writing',),
        ('conversion',),
        ('publishing',),
        ('__main__',),
    ),
    'train': (
        ('fields',),
        ('settings', 'parallel'),
        ('recipes',),
        ('data', 'step'),
        ('notes',),
        ('job',),
        ('evaluation', 'run'),
        ('loop', 'tools'),
        ('__init__', '__main__'),
    ),
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package goes by its `__init__`."""
    files = (file for top in ROWS for file in sorted((ROOT / top).rglob('*.py')))
    return {'.'.join(file.relative_to(ROOT).with_suffix('').parts): file for file in files}


MODULES = modules()


def known(name: str) -> str | None:
    """The module of ours that a dotted name stands for, if it stands for one."""
    return next((module for module in (name, f'{name}.__init__') if module in MODULES), None)


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports anywhere, at its head or within a function."""
    package = name.split('.')[:-1]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text('utf-8'))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            candidates = [known(f'{module}.{alias.name}') or module for alias in node.names]
        else:
            continue
        found |= {module for candidate in candidates if (module := known(candidate))}
    return found - {name}


GRAPH = {name: imports(name) for name in MODULES}


def room(name: str) -> tuple[str, str]:
    top, inner, *_ = name.split('.')
    return top, inner


def row_of(name: str) -> int:
    top, inner = room(name)
    found = [i for i, rooms in enumerate(ROWS[top]) if inner in rooms]
    assert found, f'{name} is in no room: give it a row in {Path(__file__).name}'
    return found[0]


@pytest.mark.parametrize('name', MODULES)
def test_rooms_import_earlier_rows(name: str) -> None:
    top = room(name)[0]
    for other in GRAPH[name]:
        if room(other)[0] != top:
            assert top != 'flaxnets', f'{name} imports {other}: flaxnets imports neither'
            assert room(other)[0] == 'flaxnets', f'{name} imports {other}'
        elif room(other) != room(name) and not other.endswith('.__init__'):
            assert row_of(other) < row_of(name), f'{name} imports {other}, which is in no earlier row'


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, ' -> '.join((*path[path.index(name) :], name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_packages_import_themselves_relatively() -> None:
    """So that they work under whatever name they are imported."""
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text('utf-8'))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                assert node.module.split('.')[0] != room(name)[0], f'{name}: from {node.module} import ...'

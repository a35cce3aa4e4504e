"""Notebooks without Jupyter: runs the cells of one, keeps what they show, and makes a page of them.

`python docs/site/cells.py docs/finetune.ipynb` runs the notebook and writes its outputs into it. Jupyter and
its kernel are some sixty packages. All that is needed of them here is to run Python, to take what is printed,
and to show the value of a cell's last line. A line `!flaxnets ...` runs that command, as it would in Jupyter,
but within this process, where JAX has been imported already.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMAND = '!flaxnets '


def run(notebook: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Runs all code cells in one namespace.

    Args:
      notebook: the JSON of an `.ipynb` file (nbformat 4).
      folder: the working folder of the cells.

    Returns:
      The outputs of each code cell, in nbformat's form.
    """
    namespace: dict[str, Any] = {'__name__': '__main__'}
    found = []
    with contextlib.chdir(folder):
        for cell in notebook['cells']:
            if cell['cell_type'] == 'code':
                found.append(_run_cell(''.join(cell['source']), namespace))
    return found


def _run_cell(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as errors:
        if source.startswith('!'):
            code = _command(source)
            assert code == 0, f'{source}\n{printed.getvalue()}{errors.getvalue()}'
        else:
            value = _execute(source, namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({'output_type': 'stream', 'name': 'stdout', 'text': _lines(printed.getvalue())})
    if value is not None:
        outputs.append({'output_type': 'display_data', 'metadata': {}, 'data': _shown(value)})
    return outputs


def _command(source: str) -> int:
    from flaxnets.__main__ import main

    line = source.replace('\\\n', ' ')
    assert line.startswith(COMMAND) and '\n' not in line.strip(), f'one line {COMMAND}... a cell: {source}'
    return main(shlex.split(line.removeprefix(COMMAND)))


def _execute(source: str, namespace: dict[str, Any]) -> Any:
    """Runs statements; the value of the last one if it is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, '<cell>', 'exec'), namespace)
    return eval(compile(ast.Expression(last.value), '<cell>', 'eval'), namespace) if last else None


def _shown(value: Any) -> dict[str, Any]:
    png = getattr(value, '_repr_png_', None)
    shown = {'text/plain': _lines(type(value).__name__ if png else repr(value))}
    return shown | ({'image/png': base64.b64encode(png()).decode()} if png else {})


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def page(path: Path) -> dict[str, str | bytes]:
    """The notebook as a Markdown page, with its pictures beside it: name -> content."""
    files: dict[str, str | bytes] = {}
    parts = []
    for cell in json.loads(path.read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
            continue
        parts.append(f'```{"sh" if source.startswith("!") else "python"}\n{source.removeprefix("!")}\n```')
        for output in cell['outputs']:
            data = output.get('data', {})
            if 'image/png' in data:
                name = f'{path.stem}-{len(files) + 1}.png'
                files[name] = base64.b64decode(data['image/png'])
                parts.append(f'![What the cell above shows]({name})')
            else:
                text = ''.join(output.get('text') or data['text/plain'])
                parts.append(f'<div class="output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>')
    files[f'{path.stem}.md'] = '\n\n'.join(parts) + '\n'
    return files


def main() -> None:
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(run(notebook, Path(folder)))
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            cell['outputs'] = next(outputs)
    temporary = path.with_suffix('.new')
    temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
    os.replace(temporary, path)


if __name__ == '__main__':
    main()

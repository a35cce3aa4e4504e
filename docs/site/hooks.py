"""What MkDocs does not find as it is in docs/: pages from README.md, the notebook, the zoo's table and plot.

The README is the one source of its pages, and keeps links that work in a checkout. Source files that pages
link to are copied into the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cells
import zoo_table
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
CHECKED = 'How it is checked'  # a section of the README that has a page of its own
NOTEBOOK = 'finetune.ipynb'


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures that are made."""
    index, checked = readme_pages((ROOT / 'README.md').read_text())
    texts: dict[str, str | bytes] = {'index.md': index, 'checked.md': checked}
    texts |= cells.page(ROOT / 'docs' / NOTEBOOK)
    texts |= zoo_table.files()
    for path in linked_sources(ROOT / 'docs'):
        texts[f'source/{path}'] = (ROOT / path).read_text()
    for name, content in texts.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links within the checkout become links within the site."""
    if page.file.src_uri == 'zoo.md':
        page.meta['hide'] = ['toc']
        markdown = markdown.replace(
            zoo_table.PLACE, f'{zoo_table.table()}\n\n![Top-1 over cost]({zoo_table.PLOT})'
        )
    markdown = markdown.replace(f']({NOTEBOOK})', f']({Path(NOTEBOOK).stem}.md)')
    markdown = re.sub(
        r'\[[\w./]+\.(?:md|ipynb)\]\((\w+\.md)', lambda found: f'[*{title(found[1])}*]({found[1]}', markdown
    )
    return re.sub(r'\]\(\.\./(?=[a-z]+/)', '](source/', markdown)


def title(page: str) -> str:
    """The first heading of a page in docs/: links that show a file's name show it on the site."""
    path = ROOT / 'docs' / page
    text = path.read_text() if path.exists() else str(cells.page(ROOT / 'docs' / NOTEBOOK)[page])
    return text.partition('\n')[0].removeprefix('# ')


def readme_pages(readme: str) -> tuple[str, str]:
    """The README as the first page of the site, and its section about checks as a page."""
    readme = readme.replace('](docs/', '](')
    before, heading, rest = readme.partition(f'## {CHECKED}\n')
    section, following, after = rest.partition('\n## ')
    assert heading and following, f'README.md has no section {CHECKED!r}'
    return f'{before}## {after}', f'# {CHECKED}\n{section}'


def linked_sources(docs: Path) -> list[str]:
    """Files outside of docs/ to which pages link."""
    text = ''.join(page.read_text() for page in docs.glob('*.md'))
    return sorted(set(re.findall(r'\]\(\.\./([^)#]+)\)', text)))

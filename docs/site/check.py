"""Checks a built site: links lead to a page and a place on it, and nothing is loaded from another host.

`python docs/site/check.py build/site`
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {'script': 'src', 'img': 'src', 'link': 'href', 'iframe': 'src', 'source': 'src', 'object': 'data'}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places on it that links can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or '' for name, value in attrs}
        self.places |= {values[name] for name in ('id', 'name') if values.get(name)}
        if tag == 'a' and 'href' in values:
            self.links.append(values['href'])
        if values.get(LOADED.get(tag, '')):
            self.loaded.append(values[LOADED[tag]])


def problems(site: Path) -> list[str]:
    """What is wrong with a site, a line each."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob('*.html'))}
    found = [] if pages else [f'{site}: no pages']
    for path, page in pages.items():
        if path.name == '404.html':  # its links begin at the root of a host
            continue
        where = path.relative_to(site)
        found += [f'{where} loads {url}' for url in page.loaded if _is_outside(url)]
        targets = [url for url in (*page.links, *page.loaded) if not _is_outside(url)]
        found += [f'{where}: no {url}' for url in targets if not _leads_somewhere(url, path, pages)]
    for sheet in site.rglob('*.css'):
        urls = re.findall(r'url\(["\']?([^"\')]+)|@import\s+["\']([^"\']+)', sheet.read_text())
        found += [
            f'{sheet.relative_to(site)} loads {url}' for pair in urls for url in pair if _is_outside(url)
        ]
    return found


def _is_outside(url: str) -> bool:
    return url.startswith('//') or urlsplit(url).scheme not in ('', 'data')


def _leads_somewhere(url: str, origin: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(url)
    if parts.scheme == 'data':
        return True
    path = (origin.parent / unquote(parts.path)).resolve() if parts.path else origin.resolve()
    path = path / 'index.html' if path.is_dir() else path
    if not path.is_file():
        return False
    page = next((page for known, page in pages.items() if known.resolve() == path), None)
    return not parts.fragment or page is None or unquote(parts.fragment) in page.places


def main() -> int:
    found = problems(Path(sys.argv[1]))
    print('\n'.join(found), end='\n' if found else '')
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())

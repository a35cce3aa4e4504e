"""What the commands of all packages share."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help ends with examples; both texts are shown as they are written."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def as_typed(message: str, options: Mapping[str, str], valued: Sequence[str] = ()) -> str:
    """A message of the library, with its arguments written as options of the command line.

    Args:
      message: the message.
      options: argument as messages write it -> what a user types: {'overwrite=True': '--force'}.
      valued: arguments of text; `key='state.model'` becomes `--key state.model`.
    """
    for argument, option in options.items():
        message = message.replace(argument, option)
    if not valued:
        return message

    def as_option(match: re.Match[str]) -> str:
        return f'--{match[1].removeprefix("file_")} {shlex.quote(match[2][1:-1])}'

    return re.sub(rf"\b({'|'.join(valued)})=('[^']*'|\"[^\"]*\")", as_option, message)


def start_with_huge_pages() -> None:
    """Starts this process anew with its memory in huge pages, where Linux gives them only on request.

    On a CPU, XLA takes the memory of each step from the system and gives it back after it. In pages of 4 KB
    that is 290,000 pages for a step of ResNeXt-50 with 8 images, and a tenth of its time or more. glibc asks
    for huge ones only if `GLIBC_TUNABLES` says so when a process starts. If that variable is set at all, the
    user has decided, and nothing happens here.
    """
    try:
        on_request = '[madvise]' in HUGE_PAGES.read_text()
    except OSError:
        return
    if on_request and sys.executable and 'GLIBC_TUNABLES' not in os.environ:
        environment = {**os.environ, 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)

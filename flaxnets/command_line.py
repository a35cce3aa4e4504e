"""What the commands of all packages share."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

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


INTERRUPTED = 130  # 128 + SIGINT, as shells count it


def heed_interrupts() -> None:
    """Makes ctrl-C interrupt this process also while it collects garbage.

    jaxlib has Python call a function of its own at each collection, and Python drops an exception that is
    raised within it. While a net is traced that is often: one ctrl-C in three had no effect.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == '_xla_gc_callback':
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, interrupt)


def ended(code: int) -> int:
    """The exit code of a command, unless it was interrupted: then the process ends here.

    XLA may be compiling in other threads. At an ordinary exit Python would wait for them, and crash.
    """
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


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

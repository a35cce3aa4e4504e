"""What the commands of all packages share."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence


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

"""Reads from a program that XLA compiled for a GPU how many operations it starts and what they move."""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'f64': 8}
NAMES_ALONE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast'}  # they start nothing
_COMPUTATION = re.compile(r'(ENTRY )?%(\S+) \(.*\{$')
_OPERATION = re.compile(r'\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)(.*)')
_NAME = re.compile(r'%([\w.-]+)')
_SHAPE = re.compile(rf'\b({"|".join(BYTES)})\[([\d,]*)\]')


class Operation(NamedTuple):
    """A line of a program: `%name = shapes kind(operands), settings`."""

    name: str
    shapes: str
    kind: str
    operands: str
    settings: str


class Program(NamedTuple):
    """What a run of a program does on the card.

    Attributes:
      started: kernels, copies and calls of libraries, each of which takes a microsecond or more.
      moved: bytes that these read and write. Of a map that is cut, what is used of it counts. Libraries count
        as if they read and wrote each of their maps once; XLA's own account leaves them out.
    """

    started: int
    moved: int


def read(text: str) -> Program:
    """Reads `as_text()` of a compiled function."""
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations.setdefault('' if start[1] else start[2], [])
        elif match := _OPERATION.match(line):
            current.append(Operation(*match.groups()))
    sizes = {operation.name: size(operation.shapes) for operation in computations['']}
    started = [
        operation
        for operation in computations['']
        if operation.kind not in NAMES_ALONE and not operation.kind.endswith('-done')
    ]
    moved = 0
    for operation in started:
        called = re.search(r'calls=%([\w.-]+)', operation.settings)
        cuts = cut(computations[called[1]]) if called else {}
        moved += sizes[operation.name]
        moved += sum(
            cuts.get(i, sizes.get(name, 0)) for i, name in enumerate(_NAME.findall(operation.operands))
        )
    return Program(len(started), moved)


def cut(body: list[Operation]) -> dict[int, int]:
    """Of the parameters of a fusion that only slices of it use, by number: the bytes of the slices."""
    found = {}
    for parameter in (operation for operation in body if operation.kind == 'parameter'):
        users = [operation for operation in body if parameter.name in _NAME.findall(operation.operands)]
        if users and all(user.kind in ('slice', 'dynamic-slice') for user in users):
            found[int(parameter.operands)] = sum(size(user.shapes) for user in users)
    return found


def size(shapes: str) -> int:
    """Bytes of the shapes in a text, as in '(bf16[8,64]{1,0}, u8[0]{0})'."""
    return sum(
        BYTES[dtype] * prod(int(side) for side in sides.split(',') if side)
        for dtype, sides in _SHAPE.findall(shapes)
    )

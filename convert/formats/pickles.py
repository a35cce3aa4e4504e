"""Reads pickles without importing or calling anything that they name.

A pickle is a program: Python's own `Unpickler` imports whatever the file names and calls it. Here
the same opcodes run on a machine that knows only the names in a given table. A file can build
dictionaries, lists and numbers, and what the table's own small functions make of them; nothing else.
A name that is not in the table becomes a `Placeholder`: it is never looked up, and "calling" it makes
another placeholder, which keeps what it was given and does nothing with it.

The opcodes are documented in the standard library's `pickletools`, which also decodes them here.
What PyTorch's checkpoints may name is in `convert.formats.torch_names`.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from flaxnets.errors import CheckpointError, shown

# A tensor takes about 40 steps. A list of ImageNet's images, saved beside weights, takes 7 million.
MAX_STEPS = 20_000_000
# torch's magic number has 77 bits, the state of NumPy's generators 128; huge ones cannot be printed.
MAX_INTEGER_BITS = 256
_MAX_KEY = 1000  # values in a tuple or set that is a key: more take long to hash and compare
_MAX_ALIKE = 100  # keys of one hash: each is compared with all before it
_OWN_HASH = 2**61 - 1  # integers below are their own hash
MAX_NAME = 200


class Unfit(Exception):
    """Raised by a function of the table that cannot use its arguments: the result is a placeholder."""


@dataclass(frozen=True)
class Function:
    """A name in the table that a pickle may call; `build` makes the value from machine and arguments."""

    name: str
    build: Callable[[Machine, tuple[Any, ...]], object]


@dataclass(frozen=True)
class Class:
    """A name in the table that is a class; `make` gives an empty object, if it may be instantiated."""

    name: str
    make: Callable[[], object] | None = None


class Placeholder:
    """Stands for a class, function or object that is not in the table: its name, and what it was given.

    Attributes:
      name: what the file called it, or the class or function of which it was made.
      arguments: those of the call that made it; None if it was only named.
      state: what the opcode BUILD gave it.
      items: what was set in it as in a dictionary.
      members: what was appended or added to it.
    """

    __slots__ = ('arguments', 'items', 'members', 'name', 'state')

    def __init__(self, name: str, arguments: object = None) -> None:
        self.name = name if len(name) <= MAX_NAME else name[:MAX_NAME] + '...'
        self.arguments = arguments
        self.state: object = None
        self.items: dict[Any, Any] = {}
        self.members: list[Any] = []

    def parts(self) -> tuple[object, ...]:
        """Everything that it was given."""
        return (self.arguments, self.state, self.items, self.members)


class Stateful:
    """A value that a pickle makes first and completes afterwards (the opcode BUILD)."""

    def set_state(self, machine: Machine, state: object) -> None:
        """Completes the value from what BUILD gives; raises `CheckpointError` if it cannot be that."""
        raise NotImplementedError


class Machine:
    """Runs one pickle.

    Args:
      where: the file and the part of it, for messages.
      names: the names that mean something here, and their values; None refuses every name and object.
      persistent: makes the value of a persistent id; None refuses them all.
      outer: the machine of the pickle that contains this one; the steps count there too.
    """

    def __init__(
        self,
        where: str,
        names: Mapping[str, object] | None = None,
        persistent: Callable[[Machine, object], object] | None = None,
        outer: Machine | None = None,
    ) -> None:
        self.where = where
        self._names = names
        self._persistent = persistent
        self._outer = outer
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        # Keys whose hashes a file can choose, by type and hash.
        self._alike: dict[tuple[type, int], list[Any]] = {}

    def run(self, stream: IO[bytes] | mmap.mmap) -> Any:
        """The object pickled at the stream's position, which moves to the end of the pickle.

        Raises:
          CheckpointError: a damaged pickle, an opcode that no checkpoint uses, more than `MAX_STEPS`
            steps, keys that take too long to compare, or any name where `names` is None.
        """
        for opcode, argument in _opcodes(stream, self.where):
            self.spend(1)
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise self.refusal(f'the pickle uses the opcode {opcode}, which weights have no need of')
            operation(self, argument)
        result = self.pop()
        if self._stack or self._below_marks:
            raise self.damage('values are left behind on its stack')
        return result

    def refusal(self, problem: str) -> CheckpointError:
        """The error to raise for something that is not read."""
        return CheckpointError(f'{self.where}: {problem}')

    def damage(self, problem: str) -> CheckpointError:
        """The error to raise for a damaged pickle."""
        return self.refusal(f'the pickle is damaged: {problem}')

    def spend(self, steps: int) -> None:
        """Counts work, and raises beyond `MAX_STEPS`: a few bytes can ask for endless copying."""
        if self._outer is not None:
            self._outer.spend(steps)
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise self.refusal(f'the pickle takes more than {MAX_STEPS:,} steps, far beyond any net')

    def checked_keys(self, items: list[Any]) -> list[Any]:
        """Returns `items`; raises if they cannot be hashed and compared at little cost.

        To hash a tuple of shared tuples could take for ever, and so could the comparison of many keys of the
        same hash. A file can choose such numbers and tuples. It cannot choose such text, whose hashes Python
        makes at random.
        """
        for item in items:
            if isinstance(item, str | bytes) or (type(item) is int and abs(item) < _OWN_HASH):
                continue
            if isinstance(item, tuple):
                self._check_tuple(item)
            elif item.__hash__ is None:
                raise self.refusal(f'{type(item).__name__} is used as the key of a dictionary or set')
            elif isinstance(item, frozenset) and len(item) > _MAX_KEY:
                raise self.refusal('a set that is used as the key of a dictionary or set is too large')
            alike = self._alike.setdefault((type(item), hash(item)), [])
            if item not in alike:
                alike.append(item)
                if len(alike) > _MAX_ALIKE:
                    raise self.refusal('too many keys of its dictionaries and sets have the same hash')
        return items

    def _check_tuple(self, key: tuple[Any, ...]) -> None:
        left, seen = [key], 0
        while left:
            seen += len(left[-1])
            if seen > _MAX_KEY:
                raise self.refusal('a tuple that is used as the key of a dictionary or set is too large')
            items = left.pop()
            left += [item for item in items if isinstance(item, tuple)]
            self.checked_keys([item for item in items if not isinstance(item, tuple)])
        self.spend(seen // 16)

    def pop(self) -> Any:
        """Takes the top of the stack; raises `CheckpointError` if there is none."""
        top = self._top()
        del self._stack[-1]
        return top

    def _top(self) -> Any:
        if not self._stack:
            raise self.damage('a value is missing on its stack')
        return self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_integer(self, value: int) -> None:
        if value.bit_length() > MAX_INTEGER_BITS:
            self._push(Placeholder(f'an integer of {value.bit_length():,} bits'))
        else:
            self._push(value)

    def _push_bytestring(self, value: str) -> None:
        # Python 2's str: text if it is ASCII, else bytes. pickletools decodes it as Latin-1.
        self._push(value if value.isascii() else value.encode('latin-1'))

    def _push_tuple(self, length: int) -> None:
        items = [self.pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    def _mark(self) -> None:
        self._below_marks.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        if not self._below_marks:
            raise self.damage('a mark is missing on its stack')
        items, self._stack = self._stack, self._below_marks.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self.damage(f'value {shown(index)} is used before it is made')
        self._push(self._memo[index])

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Placeholder):
            target.members.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise self.damage(f'items are appended to {type(target).__name__}')

    def _add(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Placeholder):
            target.members.extend(items)
        elif isinstance(target, set):
            target.update(self.checked_keys(items))
        else:
            raise self.damage(f'members are added to {type(target).__name__}')

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Placeholder):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise self.damage(f'{len(items)} keys and values are put into {type(target).__name__}')
        target.update(zip(self.checked_keys(items[::2]), items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def _push_dict(self, items: list[Any]) -> None:
        self._push({})
        self._set_items(items)

    def _push_name(self, name: str) -> None:
        if self._names is None:
            raise self.refusal(f'the file asks for {shown(name)} where it has to hold numbers and text alone')
        self._push(self._names.get(name) or Placeholder(name))

    def _push_stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.damage('a name is not text')
        self._push_name(f'{module}.{name}')

    def _reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    def _call(self, function: object, arguments: object) -> None:
        """What calling would give, if the function is one of the table's own; else a placeholder."""
        if not isinstance(arguments, tuple):
            raise self.damage(f'arguments are {type(arguments).__name__}')
        if isinstance(function, Function):
            try:
                self._push(function.build(self, arguments))
            except Unfit:
                self._push(Placeholder(function.name, arguments))
        elif isinstance(function, Class) and function.make is not None and not arguments:
            self._push(function.make())
        else:
            self._push(Placeholder(self._called(function), arguments))

    def _called(self, function: object) -> str:
        name = getattr(function, 'name', None)
        if not isinstance(name, str):
            raise self.damage(f'{type(function).__name__} is called')
        return name

    def _new_object_with_names(self) -> None:
        named, arguments, kind = self.pop(), self.pop(), self.pop()
        self._push(Placeholder(self._called(kind), (arguments, named)))

    def _new_old_object(self, items: list[Any]) -> None:
        if not items:
            raise self.damage('an object is made of nothing')
        self._call(items[0], tuple(items[1:]))

    def _new_named_object(self, name: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self._push_name(name.replace(' ', '.', 1))
        self._call(self.pop(), arguments)

    def _build(self) -> None:
        state, target = self.pop(), self._top()
        if isinstance(target, Placeholder):
            target.state = state
        elif isinstance(target, Stateful):
            target.set_state(self, state)
        else:
            raise self.damage(f'{type(target).__name__} is given a state')

    def _drop(self) -> None:
        # An item above a mark, or the mark itself.
        if self._stack:
            self._stack.pop()
        else:
            self._pop_to_mark()

    def _push_persistent(self, identity: object) -> None:
        if self._persistent is None:
            raise self.damage('data outside it are referred to where there can be none')
        self._push(self._persistent(self, identity))


def _opcodes(stream: IO[bytes] | mmap.mmap, where: str) -> Iterator[tuple[str, Any]]:
    """Name and argument of each opcode up to STOP, which is left out."""
    try:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            if opcode.name != 'STOP':
                yield opcode.name, argument
    except Exception as error:  # its readers fail with whatever error the bytes lead them to
        raise CheckpointError(f'{where}: the pickle is damaged: {str(error)[:200]}') from error


# Out-of-band buffers are left out on purpose: a file has nowhere to keep them.
_OPERATIONS: dict[str, Callable[[Machine, Any], object]] = {
    'PROTO': lambda machine, _: None,
    'FRAME': lambda machine, _: None,
    'MARK': lambda machine, _: machine._mark(),
    'NONE': lambda machine, _: machine._push(None),
    'NEWTRUE': lambda machine, _: machine._push(True),
    'NEWFALSE': lambda machine, _: machine._push(False),
    'EMPTY_TUPLE': lambda machine, _: machine._push(()),
    'EMPTY_LIST': lambda machine, _: machine._push([]),
    'EMPTY_DICT': lambda machine, _: machine._push({}),
    'EMPTY_SET': lambda machine, _: machine._push(set()),
    'TUPLE': lambda machine, _: machine._push(tuple(machine._pop_to_mark())),
    'TUPLE1': lambda machine, _: machine._push_tuple(1),
    'TUPLE2': lambda machine, _: machine._push_tuple(2),
    'TUPLE3': lambda machine, _: machine._push_tuple(3),
    'LIST': lambda machine, _: machine._push(machine._pop_to_mark()),
    'DICT': lambda machine, _: machine._push_dict(machine._pop_to_mark()),
    'FROZENSET': lambda machine, _: machine._push(frozenset(machine.checked_keys(machine._pop_to_mark()))),
    'APPEND': lambda machine, _: machine._append([machine.pop()]),
    'APPENDS': lambda machine, _: machine._append(machine._pop_to_mark()),
    'ADDITEMS': lambda machine, _: machine._add(machine._pop_to_mark()),
    'SETITEM': lambda machine, _: machine._set_item(),
    'SETITEMS': lambda machine, _: machine._set_items(machine._pop_to_mark()),
    'MEMOIZE': lambda machine, _: machine._put(len(machine._memo)),
    'GLOBAL': lambda machine, name: machine._push_name(name.replace(' ', '.', 1)),
    'STACK_GLOBAL': lambda machine, _: machine._push_stack_name(),
    'REDUCE': lambda machine, _: machine._reduce(),
    'NEWOBJ': lambda machine, _: machine._reduce(),
    'NEWOBJ_EX': lambda machine, _: machine._new_object_with_names(),
    'OBJ': lambda machine, _: machine._new_old_object(machine._pop_to_mark()),
    'INST': lambda machine, name: machine._new_named_object(name),
    'POP': lambda machine, _: machine._drop(),
    'POP_MARK': lambda machine, _: machine._pop_to_mark(),
    'DUP': lambda machine, _: machine._push(machine._top()),
    'PERSID': Machine._push_persistent,
    **dict.fromkeys(('EXT1', 'EXT2', 'EXT4'), lambda machine, code: machine._push_name(f'extension {code}')),
    'BUILD': lambda machine, _: machine._build(),
    'BINPERSID': lambda machine, _: machine._push_persistent(machine.pop()),
    'BYTEARRAY8': lambda machine, value: machine._push(bytes(value)),
    **dict.fromkeys(('INT', 'LONG', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4'), Machine._push_integer),
    **dict.fromkeys(('FLOAT', 'BINFLOAT'), Machine._push),
    **dict.fromkeys(('UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'), Machine._push),
    **dict.fromkeys(('SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'), Machine._push),
    **dict.fromkeys(('STRING', 'SHORT_BINSTRING', 'BINSTRING'), Machine._push_bytestring),
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT'), Machine._put),
    **dict.fromkeys(('GET', 'BINGET', 'LONG_BINGET'), Machine._get),
}

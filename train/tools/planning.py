"""Plans a run on a TPU slice: asks the compiler for memory and time, on a machine that has no TPU.

libtpu's compiler works without the chips: the very step that would run is compiled for the slice's
topology. Its memory is exact; its time is XLA's own cost model (`estimated_cycles` of every operation), which
knows nothing of the input, of the host, or of how collectives overlap.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import abstract_variables

from .. import parallel
from ..fields import sides
from ..job import expected_images, make_model
from ..settings import PLAIN, Settings, complete, validate
from ..step.optimizer import make_optimizer
from ..step.schedule import count_steps
from ..step.state import create_state
from ..step.step import make_train_step

IMAGENET = 1_281_167  # training images of ImageNet-1k


@dataclass(frozen=True)
class Chip:
    """One generation of TPU, by chip (cloud.google.com/tpu/docs, "TPU versions").

    Attributes:
      memory: bytes of HBM.
      flops: peak bfloat16 operations a second.
      bandwidth: bytes of HBM a second.
      clock: cycles a second: `flops` over the operations of its matrix units in a cycle.
    """

    memory: float
    flops: float
    bandwidth: float
    clock: float


CHIPS = {
    'v3': Chip(32 * 2**30, 123e12, 900e9, 0.94e9),
    'v4': Chip(32 * 2**30, 275e12, 1228e9, 1.05e9),
    'v5e': Chip(16 * 2**30, 197e12, 819e9, 1.5e9),
    'v5p': Chip(95 * 2**30, 459e12, 2765e9, 1.75e9),
    'v6e': Chip(32 * 2**30, 918e12, 1640e9, 1.75e9),
}
# The cloud counts cores of v3, v4 and v5p, and chips of the others.
_FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8', 512: '4x8x8'}
_KINDS = {'v5litepod': 'v5e'}
# JAX runs a v4 chip's two cores as one device; left to itself, the compiler would make two of them.
_CONFIGURATIONS = {'v4': {'chip_config_name': 'megacore'}}


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of one program; bytes and operations are those of a device.

    Attributes:
      memory: bytes that it takes; None if the compiler gave up for want of memory.
      refusal: what it said then.
      flops, moved, reduced: operations, bytes to and from memory, bytes summed over the devices.
      cycles: XLA's estimate of the program's clock cycles.
      copies: bytes and shape of each copy of an array that only changes its layout or place, largest first.
    """

    memory: float | None = None
    refusal: str = ''
    flops: float = 0
    moved: float = 0
    reduced: float = 0
    cycles: float = 0
    copies: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan(Program):
    """What the compiler says of a training step on a slice.

    Attributes:
      topology: of the slice, as `v5e:4x4`.
      chip: its generation.
      devices, hosts: of the slice; a chip may be more than one device.
      batch_size: images of a step, over all devices.
      steps: of the run.
      available: bytes of memory of a device.
      cores: devices of a chip.
    """

    topology: str
    chip: Chip
    devices: int
    hosts: int
    batch_size: int
    steps: int
    available: float
    cores: int

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.memory is not None and self.memory <= self.available

    @property
    def seconds(self) -> float:
        """Seconds of a step: the estimate, or what operations or bytes take at the peak if that is longer."""
        return max(
            self.cycles / self.chip.clock,
            self.flops * self.cores / self.chip.flops,
            self.moved * self.cores / self.chip.bandwidth,
        )

    @property
    def images_per_second(self) -> float:
        """Images of all devices in a second, by the estimated time of a step."""
        return self.batch_size / self.seconds

    def text(self) -> str:
        """The plan as text for a terminal."""
        local = self.batch_size // self.devices
        lines = [
            f'{self.topology}: {self.devices} devices, {self.hosts} hosts; {self.batch_size} images a step, '
            f'{local} on a device'
        ]
        if self.memory is None:
            return '\n'.join([*lines, f'does NOT fit: {self.refusal}', *_ADVICE])
        used = f'{_gib(self.memory)} of {_gib(self.available)} GiB'
        lines.append(f'memory        {used}: {"fits" if self.fits else "does NOT fit"}')
        if not self.fits:
            lines += _ADVICE
        rate, hours = self.images_per_second, self.steps * self.seconds / 3600
        chip = self.chip
        return '\n'.join(
            [
                *lines,
                f'operations    {self.flops / 1e12:.2f} TFLOP: '
                f'{1e3 * self.flops * self.cores / chip.flops:.1f} ms at the peak',
                f'bytes moved   {self.moved / 1e9:.1f} GB: '
                f'{1e3 * self.moved * self.cores / chip.bandwidth:.1f} ms at the peak',
                f'all-reduced   {self.reduced / 1e6:.0f} MB',
                f'cycles        {self.cycles / 1e6:.0f} M: {1e3 * self.cycles / chip.clock:.1f} ms',
                f'a step        {1e3 * self.seconds:.1f} ms: {rate:,.0f} images/s, {hours:.1f} h for '
                f'the {self.steps} steps of the run',
                f'each host     must decode {rate / self.hosts:,.0f} images/s',
                "times are the compiler's estimates: input, hosts and waiting for other devices come on top",
            ]
        )


_ADVICE = ['a smaller batch_size=, accumulation=2 or remat=true need less memory']


def topology_name(text: str) -> str:
    """The compiler's name of a slice: `v4-32` and `v4:2x2x4` are both `v4:2x2x4`.

    Raises:
      FlaxnetsError: no such slice.
    """
    kind, separator, rest = text.partition(':' if ':' in text else '-')
    kind = _KINDS.get(kind, kind)
    sizes = _CUBES if kind in ('v3', 'v4', 'v5p') else _FLAT
    shape: str | None = rest
    if separator == '-':
        shape = sizes.get(int(rest)) if rest.isdigit() else None
    if kind not in CHIPS or not shape or not re.fullmatch(r'\d+x\d+(x\d+)?', shape):
        raise FlaxnetsError(
            f'{text!r} is no TPU slice known here: {", ".join(CHIPS)} with a shape or a number, as in '
            'v4:2x2x4 or v4-32, v5e:4x4 or v5e-16, v6e-256'
        )
    return f'{kind}:{shape}'


def plan(settings: Settings, slice_name: str, examples: int = IMAGENET) -> Plan:
    """Compiles the step of a recipe for a TPU slice.

    Args:
      settings: of the run; its data is not opened.
      slice_name: as `topology_name` takes it.
      examples: images of an epoch.

    Raises:
      FlaxnetsError: no such slice, libtpu is not installed, or the batch does not fit the slice's devices.
    """
    validate(settings)
    name = topology_name(slice_name)
    devices = slice_devices(name)
    s = complete(settings, expected_images(settings) or PLAIN)
    s = replace(s, num_classes=s.num_classes or 1000)
    epoch_steps, total = count_steps(s, examples)
    lowered = lower(s, devices, epoch_steps)
    cores = 1 + max(device.core_on_chip for device in devices)
    chip = CHIPS[name.partition(':')[0]]
    print(f'compiling {s.model} for {name}: usually two to ten minutes', file=sys.stderr, flush=True)
    start = time.monotonic()
    program = compiled(lowered)
    print(f'compiled in {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)
    return Plan(
        topology=name,
        chip=chip,
        devices=len(devices),
        hosts=len({device.process_index for device in devices}),
        batch_size=s.batch_size,
        steps=total,
        available=chip.memory / cores,
        cores=cores,
        **vars(program),
    )


def compiled(lowered: Any) -> Program:
    """Compiles what was lowered for `slice_devices`, and reads what the compiler says of it.

    Raises:
      FlaxnetsError: the program does not hold what is read here.
    """
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        said = re.search(r'Used [\d.]+\w of [\d.]+\w \w+', str(error))
        return Program(refusal=said[0] if said else str(error).partition('\n')[0])
    memory, costs, text = done.memory_analysis(), done.cost_analysis(), done.as_text()
    cycles = estimated_cycles(text)
    if not cycles:
        raise FlaxnetsError('this libtpu writes no estimated cycles into its programs; libtpu 0.0.42 does')
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    inner = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Program(
        memory=arguments + results - memory.alias_size_in_bytes + inner,
        flops=costs['flops'],
        moved=costs['bytes accessed'],
        reduced=reduced_bytes(text),
        cycles=cycles,
        copies=copies(text),
    )


def lower(settings: Settings, devices: Any, epoch_steps: int) -> Any:
    """The mapped step on these devices, lowered from shapes alone."""
    s, count = complete(settings), len(devices)
    model = make_model(s, count)
    variables = abstract_variables(model)
    optimizer = make_optimizer(s, epoch_steps, variables['params'])
    state = jax.eval_shape(lambda v: create_state(v, optimizer, ema=s.ema_decay > 0), variables)
    step = make_train_step(
        model,
        optimizer,
        s,
        Preprocess(mean=(0.5,), std=(0.5,)),  # whatever they are, the step takes as long
        epoch_steps=epoch_steps,
        axis_name=parallel.AXIS,
    )
    local = s.batch_size // count
    batch = {
        'image': jax.ShapeDtypeStruct((count, local, *sides(s.image_size), s.in_chans), jnp.uint8),
        'label': jax.ShapeDtypeStruct((count, local), jnp.int32),
    }
    return parallel.map_train_step(step, devices=devices).lower(state, batch)


def slice_devices(topology: str) -> list[Any]:
    """The devices of a topology (`topology_name`), as libtpu describes them.

    Raises:
      FlaxnetsError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise FlaxnetsError("a TPU slice needs libtpu, the TPU's compiler: pip install libtpu")
    # Otherwise libtpu looks for a TPU, for a cloud's metadata server, and for other processes that use it.
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',
        TPU_SKIP_MDS_QUERY='1',
        TPU_ACCELERATOR_TYPE='v5litepod-4',
        TPU_WORKER_HOSTNAMES='localhost',
        TPU_WORKER_ID='0',
        TPU_STDERR_LOG_LEVEL='3',
        TPU_MIN_LOG_LEVEL='3',
    )
    jax.config.update('jax_platforms', 'cpu')
    from jax.experimental import topologies

    try:
        options = _CONFIGURATIONS.get(topology.partition(':')[0], {})
        return list(topologies.get_topology_desc(topology, 'tpu', **options).devices)
    except Exception as error:  # the compiler's own kinds
        reason = str(error).partition('\n')[0]
        raise FlaxnetsError(f'{topology}: the compiler knows no such slice: {reason}') from error


# What the compiled program says of itself.

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_LOOP = re.compile(r' while\(.*body=%?([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r' (?:call|conditional|async-start)\(.*')
_CALLED = re.compile(r'(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_REDUCE = re.compile(r'= (.*?) all-reduce(?:-start)?\(')
_COPY = re.compile(r'= (\(.*?\)|\S+) copy(?:-start)?\(')
_SHAPE = re.compile(r'\b(pred|[suf]\d+|bf16)\[([\d,]*)\]')


def estimated_cycles(text: str) -> int:
    """XLA's estimates of all operations of a program, those of a loop as often as it runs."""
    own: dict[str, int] = {}
    inner: dict[str, list[tuple[str, int]]] = {}
    current = entry = ''
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            entry = current if header[1] else entry
            own[current], inner[current] = 0, []
            continue
        if not current:
            continue
        own[current] += sum(map(int, _CYCLES.findall(line)))
        if loop := _LOOP.search(line):
            trips = _TRIPS.search(line)
            inner[current].append((loop[1], int(trips[1]) if trips else 1))
        elif call := _CALL.search(line):
            inner[current] += [(name, 1) for name in _CALLED.findall(call[0])]

    def total(name: str) -> int:
        return own.get(name, 0) + sum(times * total(body) for body, times in inner.get(name, []))

    return total(entry)


def reduced_bytes(text: str) -> int:
    """Bytes that a device gives into all-reduces."""
    return sum(_bytes(_SHAPE.findall(found)) for found in _REDUCE.findall(text))


def copies(text: str) -> tuple[tuple[int, str], ...]:
    """Bytes and shape of the arrays that a program copies to another layout or place, largest first.

    Copies that are part of a fusion count too; those of a loop count once.
    """
    found = [_SHAPE.findall(shape)[:1] for shape in _COPY.findall(text)]
    sizes = [(_bytes(shape), f'{kind}[{sizes}]') for shape in found for kind, sizes in shape]
    return tuple(sorted(sizes, reverse=True))


def _bytes(shapes: Iterable[tuple[str, str]]) -> int:
    total = 0
    for kind, sizes in shapes:
        bits = 8 if kind == 'pred' else int(re.sub(r'\D', '', kind))
        total += bits // 8 * math.prod(int(n) for n in sizes.split(',') if n)
    return total


def _gib(count: float) -> str:
    return f'{count / 2**30:.1f}'

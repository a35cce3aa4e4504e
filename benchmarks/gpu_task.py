"""One process of `benchmarks/gpu.py`: parity of the blocks, the card's limits, layers, kernels, or a net.

    python -m benchmarks.gpu_task SPEC FOLDER NUMBER

The process first compiles, beside other processes, and then writes the file NUMBER.ready. It starts to
measure when the file NUMBER.go appears, and then has the card to itself. Findings go to NUMBER.jsonl as they
come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import flaxnets
from benchmarks import gpu_layers, gpu_program, kernels
from benchmarks.contestants import (
    import_timm,
    random_variables,
    timm_net,
    torch_call,
    training,
)
from benchmarks.forms import form
from benchmarks.measure import Findings, as_numbers
from convert.names.tree import to_variables
from convert.verification import torch_net
from flaxnets import zoo
from flaxnets.nets.resnet import build, count_macs

Spec = dict[str, Any]
COMPILE_SECONDS = 75  # for all layers; those that are not compiled by then are left out


@dataclass
class Contestant:
    """`call` starts the job once, `wait` returns when all that was started has ended."""

    call: Callable[[], Any]
    wait: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


def main(spec: Spec, folder: Path, number: str) -> None:
    findings = Findings(str(folder / f'{number}.jsonl'))
    card_free = Gate(folder / f'{number}.ready', folder / f'{number}.go')
    kinds = {'parity': parity, 'limits': limits, 'net': net, 'layers': layers, 'kernels': time_kernels}
    kinds[spec['kind']](spec, findings, card_free)


@dataclass
class Gate:
    ready: Path
    go: Path

    def __call__(self) -> None:
        """Reports that all is compiled, and waits for the card."""
        self.ready.touch()
        while not self.go.exists():
            time.sleep(0.01)


# Parity.


def parity(spec: Spec, findings: Findings, _: Gate) -> None:
    """Blocks of the nets' own widths against timm's: logits and gradients in float32 and bfloat16."""
    for name in spec['nets']:
        for dtype in ('float32', 'bfloat16'):
            try:
                findings.add(net=name, dtype=dtype, **compare(name, dtype, spec['batch'], spec['size']))
            except Exception as error:
                findings.add(net=name, dtype=dtype, equal=False, failed=_short(error))


def compare(name: str, dtype: str, batch: int, size: int) -> dict[str, Any]:
    """Differences from torch on the processor in float32, as shares of the norm.

    In float32 they may be 1e-4, gradients 1e-3. In bfloat16 the measure is timm itself under autocast on the
    same device, whose differences ours may exceed by half.
    """
    import_timm()
    arch = dataclasses.replace(zoo.NETS[name], layers=(1, 2, 1, 1))
    with mock.patch.dict(zoo.NETS, {'shortened': arch}):
        reference = torch_net('shortened')[0]
    randomise(reference)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    weights = rng.normal(size=(batch, 1000)).astype(np.float32)
    model = build(arch, num_classes=1000, dtype=dtype)
    state = {k: v.numpy() for k, v in reference.state_dict().items()}
    variables = to_variables(state, model)

    def loss(params: Any, stats: Any) -> Any:
        logits: Any = model.apply({'params': params, 'batch_stats': stats}, images)
        return (logits.astype(jnp.float32) * weights).sum(), logits

    precise = 'highest' if dtype == 'float32' else None  # without TF32
    with jax.default_matmul_precision(precise) if precise else contextlib.nullcontext():
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        grads, logits = gradient(variables['params'], variables['batch_stats'])
    expected_logits, expected = torch_gradient(reference, images, weights, 'cpu', False)
    tree = to_variables({**state, **expected}, model)['params']
    ours = {'logits': distance(logits, expected_logits), 'gradients': tree_distance(grads, tree)}
    if dtype == 'float32':
        return {**ours, 'equal': ours['logits'] <= 1e-4 and ours['gradients'] <= 1e-3}
    their_logits, theirs = torch_gradient(reference, images, weights, torch_device(), True)
    their = {
        'timm_logits': distance(their_logits, expected_logits),
        'timm_gradients': tree_distance(theirs, expected),
    }
    equal = all(ours[k] <= 1.5 * their[f'timm_{k}'] + 0.005 for k in ours)
    return {**ours, **their, 'equal': equal}


def randomise(reference: Any) -> None:
    """Statistics, scales and biases that are not 0 or 1, so that no path is hidden."""
    torch = importlib.import_module('torch')
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in reference.eval().modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)


def torch_gradient(
    reference: Any, images: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], device: str, narrow: bool
) -> tuple[Any, dict[str, Any]]:
    torch = importlib.import_module('torch')
    reference = reference.to(device)
    reference.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=narrow):
        logits = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device))
    (logits.float() * torch.from_numpy(weights).to(device)).sum().backward()
    grads = {name: p.grad.cpu().numpy().copy() for name, p in reference.named_parameters()}
    return logits.detach().cpu(), grads


def distance(found: Any, expected: Any) -> float:
    found, expected = as_numbers(found), as_numbers(expected)
    return float(f'{np.linalg.norm(found - expected) / np.linalg.norm(expected):.2e}')


def tree_distance(found: Any, expected: Any) -> float:
    """The difference over all parameters at once, so that one with a gradient near 0 counts little."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    both = [(as_numbers(f).ravel(), as_numbers(e).ravel()) for f, e in pairs]
    return distance(*(np.concatenate(side) for side in zip(*both, strict=True)))


# The card's limits.


def limits(spec: Spec, findings: Findings, card_free: Gate) -> None:
    """Products a second in bfloat16 and bytes a second of a copy, as this card reaches them."""
    side, length = spec['side'], spec['length']
    a = jnp.ones((side, side), jnp.bfloat16) * 0.01
    x = jnp.zeros(length, jnp.float32)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    contestants = {'product': repeated(product, a), 'copy': repeated(copy, x)}
    card_free()
    seconds = {name: min(turn(c, 0.3) for _ in range(3)) for name, c in contestants.items()}
    findings.add(flops=2 * side**3 / seconds['product'], bytes=2 * x.nbytes / seconds['copy'])


# Convolutions by themselves.


def layers(spec: Spec, findings: Findings, card_free: Gate) -> None:
    """Convolutions of the nets in every form, and as torch computes them: forward, and both gradients."""
    ready: dict[str, dict[str, Contestant]] = {}
    shapes = {layer.name: layer for layer in (gpu_layers.TOY if spec['toy'] else gpu_layers.LAYERS)}
    dtype = spec['dtype']
    images = {what: spec['batch'] if spec['toy'] else layer.images for what, layer in shapes.items()}
    with ThreadPoolExecutor(8) as pool:
        making = {
            (what, job, form): pool.submit(compiled_layer, layer, form, job, images[what], dtype)
            for what, layer in shapes.items()
            for job in ('forward', 'gradients')
            for form in layer.forms
        }
        end = time.monotonic() + COMPILE_SECONDS
        for (what, job, form), future in making.items():
            try:
                contestant = future.result(max(0, end - time.monotonic()))
                ready.setdefault(f'{what}, {job}', {})[form] = contestant
            except Exception as error:
                findings.add(what=f'{what}, {job}', contestant=form, left_out=_short(error))
        pool.shutdown(wait=False, cancel_futures=True)  # those that have begun are waited for
    for what, layer in shapes.items():
        for job in ('forward', 'gradients'):
            for layout in ('channels_last', 'contiguous'):
                call = gpu_layers.torch_call(layer, layout, job, images[what], dtype, torch_device())
                ready.setdefault(f'{what}, {job}', {})[f'torch {layout}'] = Contestant(call, torch_wait())
    card_free()
    for what, contestants in ready.items():
        take_turns(contestants, what, spec, findings)


def compiled_layer(layer: gpu_layers.Layer, form: str, job: str, batch: int, dtype: str) -> Contestant:
    call, arguments = gpu_layers.jax_call(layer, form, job, batch, dtype)
    jax.block_until_ready(call(*arguments))
    return repeated(call, *arguments)


# A kernel of the project's own.


def time_kernels(spec: Spec, findings: Findings, card_free: Gate) -> None:
    """`kernels.fused` beside XLA's programs for the same, at the sizes of ResNeXt-50 or at one toy size."""
    interpret = jax.default_backend() != 'gpu'
    shapes = {'8x8, 32 -> 128': (8, 32, 128)} if spec['toy'] else kernels.SHAPES
    ready: dict[str, dict[str, Contestant]] = {}
    for what, (side, inputs, outputs) in shapes.items():
        rows = spec['batch'] * side**2
        layer = kernels.random_layer(rows, inputs, outputs, spec['dtype'])
        forms: dict[str, Callable[..., Any]] = {
            'XLA, convolution': partial(kernels.plain, product=partial(kernels.convolved, side=side)),
            'XLA, product': kernels.plain,
            **{f'Pallas, {n} warps': partial(kernels.fused, warps=n, interpret=interpret) for n in (4, 8)},
        }
        # What no program can do without: the products, and each map once.
        facts = {'gflop': 2 * rows * inputs * outputs / 1e9}
        facts['gbyte'] = (layer.x.nbytes + rows * outputs * layer.x.dtype.itemsize) / 1e9
        expected, ready[what] = kernels.plain(layer), {}
        for name, function in forms.items():
            try:
                call = jax.jit(function).lower(layer).compile()
                differs = max(map(distance, call(layer), expected))
            except Exception as error:
                findings.add(what=what, contestant=name, left_out=_short(error))
                continue
            ready[what][name] = repeated(call, layer)
            findings.add(what=what, contestant=name, differs=differs, **facts)
    card_free()
    for what, contestants in ready.items():
        take_turns(contestants, what, spec, findings)


def repeated(call: Callable[..., Any], *arguments: Any) -> Contestant:
    last: list[Any] = [None]

    def once() -> None:
        last[0] = call(*arguments)

    return Contestant(once, lambda: jax.block_until_ready(last[0]))


# A net.


def net(spec: Spec, findings: Findings, card_free: Gate) -> None:
    ready: dict[tuple[str, str], Contestant] = {}
    with ThreadPoolExecutor(2) as pool, form(spec['form']):
        # XLA compiles beside torch.compile, which holds the interpreter.
        making: list[tuple[str, str, Future[Contestant]]] = [
            (what, 'flaxnets', pool.submit(flax_contestant, spec, what)) for what in spec['jobs']
        ]
        for what in spec['jobs']:
            for mode in spec['timm']:
                making.append((what, f'timm {mode}', _now(timm_contestant, spec, what, mode)))
        for what, name, future in making:
            try:
                ready[what, name] = future.result()
                findings.add(what=what, contestant=name, **ready[what, name].facts)
            except Exception as error:
                findings.add(what=what, contestant=name, left_out=_short(error))
    card_free()
    for what in spec['jobs']:
        take_turns({name: c for (w, name), c in ready.items() if w == what}, what, spec, findings)
    findings.add(memory=memory())
    for what in spec['jobs']:
        if (what, 'flaxnets') in ready:
            spent = profile(ready[what, 'flaxnets'], kept(spec, what, 'trace'))
            findings.add(what=what, contestant='flaxnets', operations=spent)


def kept(spec: Spec, what: str, kind: str) -> Path | None:
    """Where a net's program or trace is kept, if it is."""
    name = '_'.join(filter(None, (spec['net'], spec['form'], *os.environ['XLA_FLAGS'].split(), what, kind)))
    return Path(spec['keep'], name.replace('--xla_gpu_', '')) if spec['keep'] else None


def profile(contestant: Contestant, keep: Path | None, calls: int = 3) -> dict[str, float]:
    """Milliseconds a call that the card computes each kind of operation, by XLA's names, longest first."""
    faulthandler.dump_traceback_later(60, exit=True)  # a profiler that hangs must not take the others' time
    with tempfile.TemporaryDirectory() as folder:
        contestant.wait()
        with jax.profiler.trace(folder):
            for _ in range(calls):
                contestant.call()
            contestant.wait()
        found = operations(folder, calls)
        if keep:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
    faulthandler.cancel_dump_traceback_later()
    return found


def operations(folder: str, calls: int) -> dict[str, float]:
    total: dict[str, float] = {}
    for path in Path(folder).rglob('*.xplane.pb'):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith('/device:GPU'):
                continue
            for line in plane.lines:
                for event in line.events if line.name.startswith('Stream') else ():
                    name = str(dict(event.stats).get('hlo_op', ''))
                    if not name or name.startswith('command_buffer'):
                        name = event.name  # of a graph, only its kernels have names of their own
                    name = re.sub(r'[._]\d+$', '', name)
                    total[name] = total.get(name, 0) + event.duration_ns / 1e6 / calls
    longest = sorted(total.items(), key=lambda pair: -pair[1])
    return {name: round(ms, 3) for name, ms in longest[:40]}


def _now(function: Callable[..., Contestant], *args: Any) -> Future[Contestant]:
    future: Future[Contestant] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


def take_turns(contestants: dict[str, Contestant], what: str, spec: Spec, findings: Findings) -> None:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, contestant in list(contestants.items()):
        try:
            turn(contestant, 0.05)  # warm-up
        except Exception as error:  # out of memory
            findings.add(what=what, contestant=name, left_out=_short(error))
            del contestants[name]
    for i in range(spec['rounds']):
        order = list(contestants)
        order = order[i % len(order) :] + order[: i % len(order)] if order else []
        for name in order:
            times[name].append(turn(contestants[name], spec['seconds']))
    for name in contestants:
        rounds = [round(1e3 * t, 3) for t in times[name]]
        findings.add(what=what, contestant=name, ms=statistics.median(rounds), rounds_ms=rounds)


def turn(contestant: Contestant, seconds: float) -> float:
    """Seconds a call takes where many are under way, as in training: the card never waits for the host."""
    contestant.wait()
    calls, start = 0, time.perf_counter()
    while True:
        for _ in range(4 if calls else 1):
            contestant.call()
            calls += 1
        if time.perf_counter() - start >= seconds or calls >= 200:
            break
        if calls % 16 == 1:
            contestant.wait()  # the queue stays short
    contestant.wait()
    return (time.perf_counter() - start) / calls


def flax_contestant(spec: Spec, what: str) -> Contestant:
    model = flaxnets.create(spec['net'], dtype=spec['dtype'])
    macs, variables = count_macs(model, spec['size']), jax.device_put(random_variables(model))
    shape = (spec['batch'], spec['size'], spec['size'], 3)
    images = jax.random.normal(jax.random.key(0), shape)
    last: list[Any] = [None]
    keep = kept(spec, what, 'program.txt')
    if what == 'forward':
        forward, facts = compiled(lambda v, x: model.apply(v, x), variables, images, keep=keep)

        def call() -> None:
            last[0] = forward(variables, images)
    else:
        train, start = training(spec['net'], model, variables)
        state = [start]
        batch = {'image': images, 'label': jnp.zeros(spec['batch'], jnp.int32)}
        step, facts = compiled(train, start, batch, keep=keep, donate_argnums=0)

        def call() -> None:
            state[0], last[0] = step(state[0], batch)

    # A gradient of the map and one of the kernel cost as much as the forward each.
    facts['gflop'] = (1 if what == 'forward' else 3) * 2 * spec['batch'] * macs / 1e9
    return Contestant(call, lambda: jax.block_until_ready(last[0]), facts)


def compiled(
    function: Callable[..., Any], *args: Any, keep: Path | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    lowered = jax.jit(function, **options).lower(*args)
    traced = time.perf_counter()
    call = lowered.compile()
    facts: dict[str, Any] = {'trace_s': traced - start, 'compile_s': time.perf_counter() - traced}
    program = call.as_text()
    assert program is not None
    if keep:
        keep.write_text(program)
    read = gpu_program.read(program)
    facts |= {'gbyte': read.moved / 1e9, 'started': read.started}
    if (memory := call.memory_analysis()) is not None:
        facts['temporary_mb'] = memory.temp_size_in_bytes / 2**20
    return call, {key: round(value, 2) for key, value in facts.items()}


def timm_contestant(spec: Spec, what: str, mode: str) -> Contestant:
    torch = importlib.import_module('torch')
    device = torch_device()
    torch.backends.cudnn.benchmark = True
    layout = torch.contiguous_format if mode.endswith('contiguous') else torch.channels_last
    model = timm_net(spec['net']).to(device, memory_format=layout).train(what == 'step')
    images = torch.randn(spec['batch'], 3, spec['size'], spec['size'], device=device).to(memory_format=layout)
    net = torch.compile(model, backend=spec['backend']) if mode.startswith('compiled') else model
    call = torch_call(net, what, images, narrow=spec['dtype'] == 'bfloat16')
    wait = torch_wait()
    start = time.perf_counter()
    call()  # compiles, and tries cuDNN's algorithms
    wait()
    if device == 'cuda':
        torch.cuda.empty_cache()  # other processes need the card's memory to compile
    if net is model:
        return Contestant(call, wait)
    return Contestant(call, wait, {'first_s': round(time.perf_counter() - start, 2)})


def torch_device() -> str:
    torch = importlib.import_module('torch')
    on_card = jax.default_backend() == 'gpu'
    if on_card and not torch.cuda.is_available():
        raise RuntimeError('JAX sees a GPU, torch does not')
    return 'cuda' if on_card else 'cpu'


def torch_wait() -> Callable[[], Any]:
    torch = importlib.import_module('torch')
    return torch.cuda.synchronize if torch_device() == 'cuda' else lambda: None


def memory() -> dict[str, float]:
    """Peak megabytes on the card, as each framework counts them."""
    found = {}
    stats = jax.devices()[0].memory_stats()
    if stats:
        found['jax_mb'] = round(stats['peak_bytes_in_use'] / 2**20)
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_available():
        found['torch_mb'] = round(torch.cuda.max_memory_allocated() / 2**20)
    return found


def _short(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), '')
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    return f'{type(error).__name__}: {line[:80]}'


if __name__ == '__main__':
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

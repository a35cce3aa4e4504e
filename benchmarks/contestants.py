"""The contestants of `benchmarks/nets.py`: a net as flaxnets, plain Flax, timm and serving engines run it.

All have the same weights and images, so that their results can be compared before they are timed. Each
framework is imported only when it is needed, so that its memory can be measured without the others.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RATE, MOMENTUM = 1e-4, 0.9  # small: the numbers stay finite however many steps are taken
ENGINES = ('onnxruntime', 'openvino')


class NotHere(Exception):
    """A contestant cannot run on this machine; the message says why."""


@dataclass
class Job:
    """What is measured: a net's forward pass or training step, on a number of images of a size in pixels."""

    net: str
    what: str  # 'forward' or 'step'
    batch: int
    size: int
    threads: int

    def images(self) -> np.ndarray[Any, Any]:
        shape = (self.batch, self.size, self.size, 3)
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@dataclass
class Contestant:
    """`run` does the job once, to its end, and returns logits or the loss; `facts` go into the report."""

    run: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


class Weights:
    """The weights that all contestants of a process share: timm's net, or random numbers without torch."""

    def __init__(self, job: Job, with_torch: bool) -> None:
        self.job = job
        self.state = {k: v.numpy() for k, v in timm_net(job.net).state_dict().items()} if with_torch else {}

    def torch_net(self) -> Any:
        torch = importlib.import_module('torch')
        net = timm_net(self.job.net)
        if self.state:
            net.load_state_dict({name: torch.from_numpy(array) for name, array in self.state.items()})
        return net

    def variables(self, model: Any) -> Any:
        if not self.state:
            return random_variables(model)
        from convert.arithmetic import fold_batch_norm
        from convert.names.tree import to_variables

        return to_variables(fold_batch_norm(self.state) if model.folded else self.state, model)


def random_variables(model: Any) -> Any:
    """Random kernels, and all other arrays as initialised. NumPy makes them, so that nothing is compiled."""
    import jax

    from flaxnets.nets.resnet import abstract_variables

    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        if name == 'kernel':
            spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            return (spread * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
        if name in ('scale', 'var'):
            return np.ones(leaf.shape, leaf.dtype)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def import_timm() -> Any:
    """Imports torch and timm, and returns torch."""
    try:
        torch = importlib.import_module('torch')
        folder = str(Path(__file__).parent.parent / 'tests')
        if folder not in sys.path:
            sys.path.append(folder)
        importlib.import_module('torchvision_ops').define_missing()
        importlib.import_module('timm')
    except ImportError as error:
        raise NotHere(f'not installed: {error.name}') from None
    return torch


def timm_net(name: str) -> Any:
    """timm's net, random; its branches count, but a hundred of them do not grow without bound."""
    torch = import_timm()
    torch.manual_seed(0)
    from convert.verification import torch_net

    net = torch_net(name)[0]
    for key, module in net.named_modules():
        if key.endswith('bn3'):
            torch.nn.init.constant_(module.weight, 0.25)
    return net


def make(name: str, job: Job, weights: Weights) -> Contestant:
    """The contestant of that name."""
    if name in ENGINES:
        return _engine(name, job, weights)
    framework, _, mode = name.partition(' ')
    if framework == 'timm':
        return _timm(mode, job, weights)
    return _flax('plain' if name == 'plain Flax' else mode, job, weights)


def _flax(mode: str, job: Job, weights: Weights) -> Contestant:
    """'' is float32; 'bfloat16', 'folded' (BatchNorm in the kernels, forward only), 'plain' (see forms)."""
    import jax

    import flaxnets
    from benchmarks.forms import form

    model = flaxnets.create(job.net, dtype='bfloat16' if mode == 'bfloat16' else 'float32')
    if mode == 'folded':
        model = model.clone(folded=True)
    variables = jax.device_put(weights.variables(model))
    images = jax.device_put(job.images())
    with form('plain' if mode == 'plain' else ''):
        if job.what == 'forward':
            call, facts = _compiled(lambda v, x: model.apply(v, x), variables, images)
            return Contestant(lambda: jax.block_until_ready(call(variables, images)), facts)
        step, state = training(job.net, model, variables)
        holder = [state]
        batch = {'image': images, 'label': jax.numpy.zeros(job.batch, 'int32')}
        call, facts = _compiled(step, state, batch, donate_argnums=0)

    def run() -> Any:
        holder[0], metrics = call(holder[0], batch)
        jax.block_until_ready(holder[0])
        return metrics['loss'][0] / metrics['loss'][1]

    return Contestant(run, facts)


def training(net: str, model: Any, variables: Any) -> tuple[Callable[..., Any], Any]:
    """The training loop's own step for images that need no preparation, and the state before the first."""
    import jax
    import optax

    from flaxnets.images.preprocess import Preprocess
    from train.settings import Settings
    from train.step.state import create_state
    from train.step.step import make_train_step

    optimizer = optax.sgd(RATE, MOMENTUM, nesterov=True)
    step = make_train_step(model, optimizer, Settings(model=net), Preprocess(), epoch_steps=1)
    return step, jax.device_put(create_state(variables, optimizer))


def _compiled(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The compiled function, and what it took: seconds, and bytes by the compiler's own account.

    The function must be new for each contestant: JAX keeps the trace of one that it has seen.
    """
    import jax

    hits: list[str] = []

    def listener(event: str, **_: Any) -> None:
        if event == '/jax/compilation_cache/cache_hits':
            hits.append(event)

    jax.monitoring.register_event_listener(listener)
    start = time.perf_counter()
    lowered = jax.jit(function, **options).lower(*args)
    traced = time.perf_counter()
    call = lowered.compile()
    done = time.perf_counter()
    facts: dict[str, Any] = {'trace_s': round(traced - start, 2)}
    facts['from_cache_s' if hits else 'compile_s'] = round(done - traced, 2)
    memory = call.memory_analysis()
    if memory is not None:
        facts['temporary_mb'] = round(memory.temp_size_in_bytes / 2**20, 1)
    return call, facts


def _timm(mode: str, job: Job, weights: Weights) -> Contestant:
    """timm's net as `mode` says: 'contiguous', 'channels_last'; 'compiled' and 'bfloat16' are the latter."""
    net = weights.torch_net()
    import torch

    torch.set_num_threads(job.threads)
    layout = torch.contiguous_format if mode == 'contiguous' else torch.channels_last
    net = net.to(memory_format=layout).train(job.what == 'step')
    images = torch.from_numpy(job.images()).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    call: Any = net
    if mode == 'compiled':
        call = torch.compile(net)
    return Contestant(torch_call(call, job.what, images, narrow=mode == 'bfloat16'))


def torch_call(net: Any, what: str, images: Any, *, narrow: bool) -> Callable[[], Any]:
    """What is timed of a PyTorch net: its forward pass, or a step of SGD on images all of class 0.

    Args:
      net: the module, or what `torch.compile` made of it.
      what: 'forward' or 'step'.
      images: as the net takes them, on its device.
      narrow: compute in bfloat16 where autocast does.
    """
    torch = importlib.import_module('torch')
    cast = torch.autocast(images.device.type, torch.bfloat16, enabled=narrow)
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, nesterov=True)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def forward() -> Any:
        with torch.inference_mode(), cast:
            return net(images)

    def step() -> Any:
        optimizer.zero_grad()
        with cast:
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return forward if what == 'forward' else step


def _engine(name: str, job: Job, weights: Weights) -> Contestant:
    """An engine for serving on CPUs. It folds BatchNorm when it opens the net."""
    try:
        engine = importlib.import_module(name)
    except ImportError:
        raise NotHere(f'{name} is not installed') from None
    if job.what != 'forward':
        raise NotHere('inference alone')
    import torch

    net = weights.torch_net().eval()
    images = job.images().transpose(0, 3, 1, 2).copy()
    start = time.perf_counter()
    if name == 'openvino':
        options = {'INFERENCE_NUM_THREADS': job.threads, 'PERFORMANCE_HINT': 'LATENCY'}
        model = engine.convert_model(net, example_input=torch.from_numpy(images))
        model.reshape(images.shape)
        compiled = engine.compile_model(model, 'CPU', {**options, 'INFERENCE_PRECISION_HINT': 'f32'})
        seconds = time.perf_counter() - start
        return Contestant(lambda: compiled(images)[0], {'compile_s': round(seconds, 2)})
    options = engine.SessionOptions()
    options.intra_op_num_threads = job.threads
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'net.onnx')
        torch.onnx.export(net, (torch.from_numpy(images),), path, dynamo=False)
        session = engine.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    seconds = time.perf_counter() - start
    feed = {session.get_inputs()[0].name: images}
    return Contestant(lambda: session.run(None, feed)[0], {'compile_s': round(seconds, 2)})

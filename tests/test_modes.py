"""JAX as people set it: each kind of block, forward, gradient and training step, in modes that refuse much.

Modes that only refuse programs are tried by tracing every kind. The others run as well, and must give the
numbers of the default mode, each with the kind that holds most: what they change is JAX's and XLA's work, the
same for all. Nets are a stem and their second stage.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nets import random_variables, shallow

from flaxnets.images.preprocess import Preprocess
from flaxnets.nets import resnet
from flaxnets.nets.arch import Arch
from flaxnets.nets.layers import Span
from flaxnets.nets.pooling import max_pool_3x3
from flaxnets.nets.resnet import ResNet, build
from train.settings import Settings
from train.step.optimizer import make_optimizer
from train.step.state import create_state
from train.step.step import make_train_step

DEEP: dict[str, Any] = dict(deep_stem=True, stem_width=8, avg_down=True)
KINDS = {
    'resnext': Arch('resnext', (1, 2, 1, 1), 4, 16, se=True, planes=16, **DEEP),
    # The gradients of its kernels are taken tap by tap (`convolution.CPU_TAP`).
    'res2net': Arch('res2net', (1, 2, 1, 1), 2, 64, scale=4, planes=16),
    'resnest': Arch('resnest', (1, 2, 1, 1), 2, 32, radix=2, avg_down=True, planes=16),
    'resnest_fast': Arch('resnest', (1, 2, 1, 1), 1, 32, avd_first=True, avg_down=True, planes=16),
}
N, SIZE = 4, 32
DROPS: dict[str, Any] = dict(drop_path_rate=0.2, drop_block_rate=0.1)
TOLERANCE = 1e-4
each_kind = pytest.mark.parametrize('kind', KINDS)


def images(n: int = N, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, height, width, 3)).astype(np.float32)


def near(found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
        assert error <= TOLERANCE * np.abs(theirs).max() + 1e-7


# --- modes that refuse programs


class Middle(ResNet):
    """A net's stem, second stage and classifier: all paths of a block, its pools and both shortcuts."""

    def forward_maps(self, x: Any, train: bool = False, upto: int = 2) -> Any:
        (stem,) = super().forward_maps(x, train, 0)
        return [stem, self.layer2(max_pool_3x3(stem), train)][: upto + 1]


def short(kind: str, **options: Any) -> ResNet:
    return shallow(build(KINDS[kind], 5, zero_init_last=False, **options), Middle)


@pytest.fixture
def drop_block_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second stage too."""
    monkeypatch.setattr(resnet, 'DROP_BLOCK_STAGES', (1,))


def strictly(run: Callable[..., Any], whole: Any, shared: Any, *others: Any) -> Any:
    """The shapes of a program's results, traced with the batch on two devices and no promotion allowed."""
    mesh = jax.make_mesh((2,), ('batch',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = [
            jax.tree.map(lambda x, s=spec: jax.device_put(x, NamedSharding(mesh, s)), tree)
            for tree, spec in ((whole, P()), (shared, P('batch')))
        ]
        with jax.numpy_rank_promotion('raise'), jax.numpy_dtype_promotion('strict'):
            return jax.eval_shape(jax.jit(run), *put, *others)


def same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@each_kind
def test_modes_that_refuse_programs_refuse_no_net(kind: str, drop_block_acts: None) -> None:
    """Forward and gradient, with all that acts in training."""
    model = short(kind, drop_rate=0.1, **DROPS)
    variables = random_variables(model)

    def both(variables: Any, images: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            both, rngs = {**variables, 'params': params}, {'dropout': key}
            y, changed = model.apply(both, images, True, mutable=['batch_stats'], rngs=rngs)
            return jnp.square(y).mean(), changed

        return model.apply(variables, images), *jax.grad(loss, has_aux=True)(variables['params'])

    with jax.enable_x64(True):
        logits, grads, changed = strictly(both, variables, images(), jax.random.key(0))
    same(logits, np.zeros((N, 5), np.float32))
    same((grads, changed['batch_stats']), (variables['params'], variables['batch_stats']))


def test_modes_that_refuse_programs_refuse_no_training_step(drop_block_acts: None) -> None:
    settings = Settings(
        model='',
        num_classes=5,
        batch_size=N,
        image_size=SIZE,
        flip=0.5,
        lighting=0.1,
        erasing=0.5,
        mixup=0.2,
        cutmix=1.0,
        label_smoothing=0.1,
        ema_decay=0.9,
        clip_norm=1.0,
        weight_decay=1e-4,
        layer_decay=0.9,
        drop_rate=0.1,
        **DROPS,
    )
    model = short('resnext', drop_rate=0.1, **DROPS)
    variables = random_variables(model)
    optimizer = make_optimizer(settings, 4, variables['params'])
    state = create_state(variables, optimizer, ema=True)
    step = make_train_step(model, optimizer, settings, Preprocess(size=SIZE), epoch_steps=4)
    batch = {'image': np.zeros((N, SIZE, SIZE, 3), np.uint8), 'label': np.arange(N, dtype=np.int32)}
    plain = jax.eval_shape(step, state, batch)
    same(strictly(step, state, batch), plain)
    with jax.enable_x64(True):  # where whole numbers of two sizes meet
        same(jax.eval_shape(step, state, batch), plain)


# --- modes that run another way


def forward(model: ResNet, variables: Any, images: Any, *train: bool, **options: Any) -> Any:
    """The last map."""
    return model.apply(variables, images, *train, method='forward_features', **options)


def everything(model: ResNet, variables: Any, images: Any) -> Any:
    """The map of inference; gradients of the image-wise loss of training, and new statistics."""
    inferred = forward(model, variables, images)

    def loss(params: Any) -> Any:
        both = {**variables, 'params': params}
        y, changed = forward(model, both, images, True, mutable=['batch_stats'])
        return jnp.square(y).mean(), changed['batch_stats']

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables['params'])
    return inferred, value, grads, stats


@functools.cache
def expected(kind: str) -> Any:
    """`everything`, computed where nothing may be NaN or move between host and device unasked."""
    model = short(kind)
    arguments = jax.device_put((random_variables(model), images()))
    with jax.debug_nans(True), jax.transfer_guard('disallow'):
        found = jax.block_until_ready(jax.jit(functools.partial(everything, model))(*arguments))
    return jax.device_get(found)


@each_kind
def test_nothing_is_nan_or_moved_between_host_and_device(kind: str) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected(kind)))


@pytest.mark.parametrize(
    'kind, types',
    [('resnext', AxisType.Auto), ('res2net', AxisType.Explicit), ('resnest', AxisType.Explicit)],
)
def test_a_sharded_batch(kind: str, types: AxisType) -> None:
    model = short(kind)
    mesh = jax.make_mesh((2,), ('batch',), axis_types=(types,))
    with jax.set_mesh(mesh):
        variables = jax.device_put(random_variables(model), NamedSharding(mesh, P()))
        batch = jax.device_put(images(), NamedSharding(mesh, P('batch')))
        found = jax.jit(functools.partial(everything, model))(variables, batch)
    assert found[0].sharding.spec[0] == 'batch'
    near(found, expected(kind))


def test_shard_map() -> None:
    model = short('resnest').clone(bn_span=Span('batch'))
    mesh = jax.make_mesh((2,), ('batch',), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('batch')), out_specs=(P('batch'), P(), P()))
    def run(variables: Any, images: Any) -> Any:
        def loss(params: Any) -> Any:
            both = {**variables, 'params': params}
            y, changed = forward(model, both, images, True, mutable=['batch_stats'])
            return jax.lax.pmean(jnp.square(y).mean(), 'batch'), changed['batch_stats']

        # What every device holds is differentiated once: shard_map itself sums over the devices.
        grads, stats = jax.grad(loss, has_aux=True)(variables['params'])
        return forward(model, variables, images), grads, stats

    inferred, _, grads, stats = expected('resnest')
    near(jax.jit(run)(random_variables(model), images()), (inferred, grads, stats))


@each_kind
def test_an_export_with_free_batch_height_and_width(kind: str) -> None:
    model = short(kind)
    variables = random_variables(model)
    run = jax.jit(functools.partial(forward, model))
    shape = export.symbolic_shape('b, h, w, 3', constraints=['h >= 8', 'w >= 8'])
    free = jax.ShapeDtypeStruct(shape, jnp.float32)
    # One platform alone has the same forms, without the choice between them: once is enough.
    for platform in ('cuda', 'tpu') if kind == 'resnext' else ():
        export.export(run, platforms=[platform])(variables, free)
    exported = export.export(run, platforms=['cpu', 'cuda', 'tpu'])(variables, free)
    x = images(3, 33, 46)
    near(exported.call(variables, x), run(variables, x))


def test_an_export_of_a_whole_net() -> None:
    arch = dataclasses.replace(KINDS['resnest'], layers=(1, 1, 1, 1))
    model = build(arch, 5, global_pool='catavgmax')
    variables = random_variables(model)
    free = jax.ShapeDtypeStruct(export.symbolic_shape('b, h, w, 3'), jnp.float32)
    exported = export.export(jax.jit(model.apply), platforms=['cpu', 'cuda', 'tpu'])(variables, free)
    x = images(1, 193, 225)
    near(exported.call(variables, x), jax.jit(model.apply)(variables, x))


@each_kind
def test_vmap_jvp_and_gradients_by_example(kind: str) -> None:
    model = short(kind)
    variables, x = random_variables(model), images(2)

    def loss(params: Any, image: Any) -> Any:
        return jnp.square(forward(model, {**variables, 'params': params}, image[None])).mean()

    def run(params: Any, x: Any) -> Any:
        # Of two nets at once, too: XLA's fusions for CPUs (jaxlib 0.10.2) hang at seven dimensions.
        nets = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        by_example = jax.vmap(jax.grad(loss), (None, 0))
        grads = jax.tree.map(lambda g: g[0], jax.vmap(by_example, (0, None))(nets, x))
        _, slopes = jax.jvp(lambda p: jax.vmap(loss, (None, 0))(p, x), (params,), (params,))
        return grads, slopes, jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, x).mean())(params)

    traced = jax.jit(run).trace(variables['params'], x)
    if kind != 'resnest':  # the kind with most dimensions
        return
    grads, slopes, together = traced.lower().compile()(variables['params'], x)
    near(jax.tree.map(lambda g: g.mean(0), grads), together)
    products = jax.tree.map(lambda g, p: (g * p).reshape(2, -1).sum(1), grads, variables['params'])
    np.testing.assert_allclose(slopes, sum(jax.tree.leaves(products)), rtol=1e-3)


@pytest.mark.parametrize(
    'environment, kinds',
    [
        ({}, ['resnext', 'res2net', 'resnest']),  # XLA's defaults, which the other tests do without
        ({'XLA_FLAGS': '--xla_cpu_experimental_ynn_fusion_type=', 'JAX_REMAT3': '1'}, ['resnest']),
    ],
    ids=['optimised', 'without YNNPACK, another remat'],
)
def test_modes_of_the_environment(tmp_path: Path, environment: dict[str, str], kinds: list[str]) -> None:
    default = {'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0', 'JAX_NUM_CPU_DEVICES': '1'}
    variables = {**os.environ, **default, **environment}
    subprocess.run([sys.executable, __file__, str(tmp_path / 'found'), *kinds], env=variables, check=True)
    results = pickle.loads((tmp_path / 'found').read_bytes())
    assert set(results) == set(kinds)
    for kind, found in results.items():
        near(found, expected(kind))


if __name__ == '__main__':
    Path(sys.argv[1]).write_bytes(pickle.dumps({kind: expected(kind) for kind in sys.argv[2:]}))

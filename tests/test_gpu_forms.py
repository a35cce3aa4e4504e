"""The forms of GPUs: run on this platform they compute the same, and programs for GPUs have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export
from nets import random_variables

from flaxnets.nets import convolution, layers, pooling
from flaxnets.nets.arch import Arch
from flaxnets.nets.convolution import Geometry, conv2d
from flaxnets.nets.layers import BatchNorm, Conv
from flaxnets.nets.resnet import ResNet, abstract_variables, build

ARCHS = {
    'resnext': Arch('resnext', (1, 1, 1, 1), cardinality=8, base_width=4),
    'res2net': Arch('res2net', (1, 2, 1, 1), base_width=14, scale=4),
    'resnest': Arch('resnest', (1, 1, 1, 1), radix=2, deep_stem=True, stem_width=8, avg_down=True),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is traced within takes the form of GPUs, after a call of `choose`."""
    yield monkeypatch
    jax.clear_caches()


def choose(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.clear_caches()  # of what was traced in another form
    for module in (convolution, layers, pooling):
        monkeypatch.setattr(module, 'by_platform', lambda default, **forms: forms.get('gpu', default))


def results(model: ResNet, variables: Any, images: Array, train: bool) -> Any:
    """Logits in inference; loss, logits and new statistics; the gradients of parameters and images."""

    def loss(params: Any, images: Array) -> tuple[Array, Any]:
        logits, new = model.apply({**variables, 'params': params}, images, train, mutable=['batch_stats'])
        return (logits.astype(jnp.float32) * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).sum(), (
            logits,
            new,
        )

    differentiated = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables['params'], images)
    # A program without a gradient has another form.
    alone = jax.jit(model.apply)(variables, images)
    return alone, *differentiated


@pytest.mark.parametrize(
    'name, train',
    [('resnext', False), ('res2net', False), ('resnest', False), ('resnest', True)],
)
def test_nets_compute_the_same(name: str, train: bool, on_gpu: pytest.MonkeyPatch) -> None:
    model = build(ARCHS[name], num_classes=7)
    variables = random_variables(model)
    images = jax.random.normal(jax.random.key(0), (8, 48, 48, 3))
    expected = results(model, variables, images, train)
    choose(on_gpu)
    found = results(model, variables, images, train)
    # Where rounding moves a value over the edge of a ReLU, its gradient is another one.
    for ours, theirs, near in zip(found, expected, (1e-4, 1e-4, 1e-2), strict=True):
        # Some gradients are 0 but for rounding, as that of a bias before a BatchNorm.
        rounding = 1e-6 * max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(theirs))
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert jnp.linalg.norm(one - other) <= near * jnp.linalg.norm(other) + rounding


@pytest.mark.parametrize('name, farther', [('resnext', 1.5), ('resnest', 2.5)])
def test_in_bfloat16_the_folded_batch_norm_is_near(
    name: str, farther: float, on_gpu: pytest.MonkeyPatch
) -> None:
    """Logits beside those in float32, and how far off those of a BatchNorm by itself are.

    This platform rounds twice, the convolution's result and the sum with the bias. cuDNN does so once.
    """
    precise, narrow = (build(ARCHS[name], num_classes=7, dtype=dtype) for dtype in ('float32', 'bfloat16'))
    variables = random_variables(precise)
    images = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
    expected = precise.apply(variables, images)

    def error() -> float:
        return float(jnp.linalg.norm(narrow.apply(variables, images) - expected) / jnp.linalg.norm(expected))

    apart = error()
    choose(on_gpu)
    assert 0 < error() < farther * apart + 1e-3


@pytest.mark.parametrize(
    'height, width, size, padding', [(32, 32, 7, 3), (31, 34, 7, 3), (16, 9, 5, 2), (17, 17, 7, 0)]
)
def test_blocks_of_pixels_are_the_same_convolution(height: int, width: int, size: int, padding: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), 'float32')
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)), 'float32')
    geometry = Geometry(2, padding, 1)
    expected, found = (
        jax.value_and_grad(lambda x, k, f=form: (f(x, k, geometry) ** 2).sum(), (0, 1))(x, kernel)
        for form in (convolution._native, convolution._in_blocks)
    )
    assert convolution._in_blocks(x, kernel, geometry).shape == convolution._native(x, kernel, geometry).shape
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def program(function: Any, *shapes: Any, platform: str = 'cuda') -> str:
    return str(export.export(jax.jit(function), platforms=[platform])(*shapes).mlir_module())


@pytest.mark.parametrize('platform', ['cuda', 'rocm'])
def test_the_stem_is_convolved_in_blocks(platform: str) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, 'bfloat16') for shape in ((2, 32, 32, 3), (7, 7, 3, 64))]
    text = program(partial(conv2d, stride=2, padding=3), *shapes, platform=platform)
    assert re.search(r'stablehlo.convolution.*tensor<4x4x16x64xbf16>', text)


@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('groups, left', [(2, 0), (4, 1)])
def test_two_groups_are_convolutions_of_their_own(groups: int, left: int, size: int) -> None:
    shapes = [jax.ShapeDtypeStruct(s, 'bfloat16') for s in ((2, 8, 8, 32), (size, size, 32 // groups, 64))]
    text = program(partial(conv2d, padding=size // 2, groups=groups), *shapes)
    assert text.count(f'feature_group_count = {groups}') == left
    assert text.count('stablehlo.convolution') == (1 if left else groups)


@pytest.mark.parametrize('name, apart', [('resnext', 4), ('res2net', 0), ('resnest', 1)])
def test_in_inference_no_map_of_a_dense_convolution_is_normalised(name: str, apart: int) -> None:
    """Left are the maps of grouped convolutions, and of the deep stem's last one."""
    model = build(ARCHS[name])
    shapes = abstract_variables(model), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def normalised(platform: str) -> int:
        text = program(lambda variables, images: model.apply(variables, images), *shapes, platform=platform)
        return len(re.findall(r'stablehlo.subtract .*tensor<2x(?!1x)\d+x\d+x\d+xf32>', text))

    assert normalised('cuda') == apart
    assert normalised('cpu') > apart + 10


def test_a_gradient_in_inference_has_no_convolution_more() -> None:
    model = build(ARCHS['resnext'])  # 17 convolutions
    shapes = abstract_variables(model), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    gradient = jax.grad(
        lambda variables, images: model.apply(variables, images).sum(), (0, 1), allow_int=True
    )
    assert program(gradient, *shapes).count('stablehlo.convolution') == 3 * 17


@pytest.mark.parametrize('kind', [Conv, BatchNorm])
def test_layers_can_be_captured_by_their_type(kind: type) -> None:
    """With all of their methods: none of them runs within a transformation of its own."""
    model = build(ARCHS['resnext'])
    variables, images = random_variables(model), jnp.ones((2, 32, 32, 3))

    def run(variables: Any, images: Array) -> Any:
        wanted = lambda module, _: isinstance(module, kind)  # noqa: E731
        return model.apply(variables, images, capture_intermediates=wanted, mutable=['intermediates'])

    eager, compiled = run(variables, images), jax.jit(run)(variables, images)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)

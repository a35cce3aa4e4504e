"""Shapes in annotations are checked at every call while tests run, in the nets' modules too."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from checked import CHECKED
from jaxtyping import TypeCheckError

from flaxnets.nets.blocks import Downsample, SqueezeExcite
from flaxnets.nets.layers import BatchNorm, Conv, Dropout

MAP = jax.ShapeDtypeStruct((2, 6, 6, 8), jnp.float32)


class Wider(nn.Module):
    """Stands for a mistake in a layer: it doubles the channels of a map."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, origin: Any) -> jax.Array:
        return jnp.concatenate([x, x], -1)


def downsample(norm: Any, remat: bool = False) -> Callable[[jax.Array], Any]:
    """Creates a shortcut's variables and applies it; its result has 16 channels if `norm` keeps them."""
    made = nn.remat(Downsample, static_argnums=(2,)) if remat else Downsample
    layer = made(16, stride=2, pool=True, first_index=0, conv=Conv, norm=norm)
    return lambda x: layer.init_with_output(jax.random.key(0), x, False)[0]


@pytest.mark.parametrize('norm', [BatchNorm, Wider])
@pytest.mark.parametrize('remat', [False, True])
def test_a_wrong_result_of_a_module_is_noticed(norm: Any, remat: bool) -> None:
    run = downsample(norm, remat)
    four = jax.ShapeDtypeStruct((4, *MAP.shape), MAP.dtype)
    slope = jax.grad(lambda x: run(x).sum())
    for traced, x in ((run, MAP), (jax.jit(run), MAP), (jax.vmap(run), four), (slope, MAP)):
        if norm is BatchNorm:
            jax.eval_shape(traced, x)
        else:
            with pytest.raises(TypeCheckError, match='return value of flaxnets.nets.blocks.Downsample'):
                jax.eval_shape(traced, x)


@pytest.mark.parametrize(
    'layer, more, shape, dtype',
    [
        (Conv(4, 3), (), (6, 6, 8), 'float32'),
        (Conv(4, 3), (), (2, 6, 6, 8), 'int32'),
        (SqueezeExcite(Conv), (), (2, 3, 6, 6, 16), 'float32'),
        (BatchNorm(), (False,), (2, 8), 'float32'),
        (Dropout(0.5), (False,), (2, 8), 'uint8'),
    ],
)
def test_a_wrong_argument_is_noticed(layer: nn.Module, more: Any, shape: Any, dtype: str) -> None:
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, *more), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_every_floating_point_type_passes(dtype: Any) -> None:
    x = jax.ShapeDtypeStruct(MAP.shape, dtype)
    made = jax.eval_shape(lambda x: Conv(4, 3, dtype=dtype).init_with_output(jax.random.key(0), x)[0], x)
    assert made.dtype == dtype


@pytest.mark.parametrize('name', CHECKED)
def test_public_functions_say_the_shapes_of_arrays(name: str) -> None:
    module = importlib.import_module(name)
    assert type(module.__loader__).__module__.startswith('jaxtyping'), 'imported before the checks'
    bare = {'Array', 'jax.Array', 'np.ndarray', 'npt.NDArray[Any]'}
    tree = ast.parse(inspect.getsource(module)).body
    methods = [node for made in tree if isinstance(made, ast.ClassDef) for node in made.body]
    for node in [*tree, *methods]:
        if isinstance(node, ast.FunctionDef) and (node.name == '__call__' or not node.name.startswith('_')):
            hints = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
            assert not bare & {ast.unparse(hint) for hint in hints if hint}, node.name

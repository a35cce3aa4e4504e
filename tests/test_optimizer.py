"""SGD against torch's, step by step; what decays, by the names of timm's nets; layer-wise rates; freezing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from nets import timm_net

import flaxnets
from flaxnets.nets.resnet import abstract_variables
from train.settings import Settings
from train.step.optimizer import decays, make_optimizer, path_of, stage_of
from train.step.schedule import learning_rate

# A little net's parameters, by their paths; what torch calls `weight` is a kernel or a scale.
SHAPES = {
    'conv1/0/kernel': (3, 3, 2, 4),
    'conv1/1/scale': (4,),
    'bn1/scale': (4,),
    'bn1/bias': (4,),
    'layer1/0/conv2/kernel': (3, 3, 4, 4),
    'layer2/0/downsample/2/scale': (4,),
    'layer2/0/downsample/2/bias': (4,),
    'layer4/1/bn3/scale': (5,),
    'fc/kernel': (5, 3),
    'fc/bias': (3,),
}
STAGE = dict(conv1=0, bn1=0, layer1=1, layer2=2, layer3=3, layer4=4, fc=5)
STEPS, EPOCH_STEPS = 8, 2


def settings(**changes: Any) -> Settings:
    base = dict(lr=0.3, epochs=4, warmup_epochs=1, weight_decay=0.05, batch_size=8)
    return Settings('resnest50d', **{**base, **changes})


def tree(values: dict[str, Any]) -> Any:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split('/')
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def flat(nested: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nested)
    return {'/'.join(path_of(keys)): np.asarray(leaf) for keys, leaf in leaves}


def random(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def ours(s: Settings, dtype: str) -> list[dict[str, np.ndarray]]:
    """The parameters after each of the steps."""
    with jax.enable_x64(dtype == 'float64'):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(random(0)))
        optimizer = make_optimizer(s, EPOCH_STEPS, params)
        state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
        for step in range(STEPS):
            grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(random(1 + step)))
            updates, state = update(grads, state, params, step=jnp.asarray(step))
            params = optax.apply_updates(params, updates)
            history.append(flat(params))
    return history


def theirs(s: Settings, dtype: str, decaying: set[str]) -> list[dict[str, np.ndarray]]:
    """The same with `torch.optim.SGD`, a group for each parameter."""
    kind = getattr(torch, dtype)
    params = {name: torch.tensor(x, dtype=kind, requires_grad=True) for name, x in random(0).items()}
    groups = [
        dict(
            params=[parameter],
            weight_decay=s.weight_decay if name in decaying else 0.0,
            factor=s.layer_decay ** (5 - STAGE[name.split('/')[0]]),
        )
        for name, parameter in params.items()
        if STAGE[name.split('/')[0]] >= s.frozen_stages
    ]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=s.momentum, nesterov=s.nesterov)
    rate, history = learning_rate(s, EPOCH_STEPS), []
    for step in range(STEPS):
        for name, grad in random(1 + step).items():
            params[name].grad = torch.tensor(grad, dtype=kind)
        if s.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g['params']], s.clip_norm)
        for group in sgd.param_groups:
            group['lr'] = rate(step) * group['factor']
        sgd.step()
        history.append({name: p.detach().numpy().copy() for name, p in params.items()})
    return history


KERNELS = {name for name in SHAPES if name.endswith('kernel')}
ENCODING = KERNELS | {'conv1/1/scale', 'layer2/0/downsample/2/scale'}


@pytest.mark.parametrize(
    ('changes', 'decaying'),
    [
        (dict(decay='all'), set(SHAPES)),
        (dict(decay='kernels', nesterov=True), KERNELS),
        (dict(decay='encoding', nesterov=True), ENCODING),
        (dict(decay='all', momentum=0.0), set(SHAPES)),
        (dict(decay='kernels', weight_decay=0.0, schedule='constant', warmup_epochs=0), KERNELS),
        (dict(decay='kernels', nesterov=True, layer_decay=0.7), KERNELS),
        (dict(decay='kernels', nesterov=True, frozen_stages=2, layer_decay=0.5), KERNELS),
        (dict(decay='all', frozen_stages=5, schedule='step', step_epochs=2), set(SHAPES)),
    ],
    ids=['sgd', 'nag', 'encoding', 'plain', 'no-decay', 'layers', 'frozen', 'head-only'],
)
@pytest.mark.parametrize(('dtype', 'rtol'), [('float64', 1e-12), ('float32', 1e-5)])
def test_steps_equal_torch(changes: dict[str, Any], decaying: set[str], dtype: str, rtol: float) -> None:
    s = settings(**changes)
    expected, start = theirs(s, dtype, decaying), random(0)
    for step, (mine, reference) in enumerate(zip(ours(s, dtype), expected, strict=True)):
        for name, value in reference.items():
            assert mine[name].dtype == dtype
            message = f'{name} after step {step}'
            np.testing.assert_allclose(mine[name], value, rtol=rtol, atol=rtol, err_msg=message)
            if STAGE[name.split('/')[0]] < s.frozen_stages:
                np.testing.assert_array_equal(mine[name], start[name].astype(dtype), message)
    assert all((expected[-1][name] != start[name]).any() for name in ('fc/kernel', 'fc/bias'))


@pytest.mark.parametrize('frozen_stages', [0, 5])
@pytest.mark.parametrize('clip_norm', [0.5, 1e4])
def test_clipping_equals_torch(clip_norm: float, frozen_stages: int) -> None:
    # Of frozen parameters the gradient does not count. torch adds 1e-6 to the norm.
    s = settings(clip_norm=clip_norm, frozen_stages=frozen_stages, nesterov=True)
    for mine, reference in zip(ours(s, 'float64'), theirs(s, 'float64', KERNELS), strict=True):
        for name, value in reference.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_no_momentum_is_kept_for_what_is_frozen() -> None:
    params = tree(random(0))
    state = make_optimizer(settings(frozen_stages=4), EPOCH_STEPS, params).init(params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 5 + 15 + 3  # layer4/1/bn3/scale and fc
    state = make_optimizer(settings(momentum=0.0), EPOCH_STEPS, params).init(params)
    assert not [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]


def test_the_classifier_learns_fastest() -> None:
    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    s = settings(layer_decay=0.5, weight_decay=0.0, warmup_epochs=0, momentum=0.0, schedule='constant')
    optimizer = make_optimizer(s, EPOCH_STEPS, tree(params))
    start = optimizer.init(tree(params))
    updates = flat(optimizer.update(tree(params), start, tree(params), step=0)[0])
    factors = {name: float(update.flat[0]) / -0.3 for name, update in updates.items()}
    assert factors['fc/kernel'] == factors['fc/bias'] == pytest.approx(1)
    assert factors['layer4/1/bn3/scale'] == pytest.approx(1 / 2)
    assert factors['layer2/0/downsample/2/bias'] == pytest.approx(1 / 8)
    assert factors['layer1/0/conv2/kernel'] == pytest.approx(1 / 16)
    assert factors['conv1/1/scale'] == factors['bn1/bias'] == pytest.approx(1 / 32)


def torch_name(path: tuple[str, ...]) -> str:
    return '.'.join((*path[:-1], 'bias' if path[-1] == 'bias' else 'weight'))


@pytest.mark.parametrize(
    'name', ['resnest14d', 'resnest50d_4s2x40d', 'res2net50d', 'res2next50', 'seresnext50_32x4d']
)
def test_what_decays_by_the_names_of_timm(name: str) -> None:
    """PyTorch-Encoding's own filter on torch's names; Gluon's (beta, gamma, bias) leaves what has axes."""
    reference = dict(timm_net(name).named_parameters())
    params = abstract_variables(flaxnets.create(name))['params']
    paths = {torch_name(path_of(k)): path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert set(paths) == set(reference)

    expected = {
        'all': set(reference),
        'kernels': {n for n, p in reference.items() if p.ndim > 1},
        'encoding': {n for n in reference if not ('bn' in n or 'bias' in n)},
    }
    for kind, names in expected.items():
        assert {n for n, path in paths.items() if decays(kind, path)} == names, kind
    assert [n for n in expected['encoding'] if reference[n].ndim == 1]  # else both were the same rule


def test_the_scales_that_the_pytorch_port_decays() -> None:
    params = abstract_variables(flaxnets.create('resnest14d'))['params']
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sorted(torch_name(p) for p in paths if p[-1] == 'scale' and decays('encoding', p)) == [
        'conv1.1.weight',
        'conv1.4.weight',
        'layer1.0.downsample.2.weight',
        'layer2.0.downsample.2.weight',
        'layer3.0.downsample.2.weight',
        'layer4.0.downsample.2.weight',
    ]


def test_stages() -> None:
    params = abstract_variables(flaxnets.create('resnest_tiny'))['params']
    assert {name: stage_of((name, 'kernel')) for name in params} == STAGE

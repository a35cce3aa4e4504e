"""Classifiers of every make: torch's own layer is the oracle, and what is none of those known is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from states import prefixed, small
from torch import nn
from torch.nn.utils import parametrizations, prune

from convert.names.layouts import to_canonical
from flaxnets.errors import CheckpointError

FEATURES = 2048


def with_head(state: Mapping[str, torch.Tensor], root: str = 'fc', prefix: str = '') -> dict[str, Any]:
    body = {name: t for name, t in small('resnext').items() if not name.startswith('fc.')}
    return {**prefixed(body, prefix), **{f'{root}.{name}': t.numpy() for name, t in state.items()}}


def scaled(layer: Any) -> nn.Module:
    """A layer whose norm's factors are not those of the weights that it was made of."""
    for name, parameter in layer.named_parameters():
        if name.endswith(('weight_g', 'original0')):
            parameter.data *= torch.linspace(1, 2, parameter.numel()).reshape(parameter.shape)
    return layer  # type: ignore[no-any-return]


EXACT: dict[str, Callable[[], nn.Module]] = {
    'masked': lambda: prune.random_unstructured(nn.Linear(FEATURES, 5), 'weight', 0.5),
    'one norm for all': lambda: nn.utils.weight_norm(nn.Linear(FEATURES, 5), dim=None),
    'one norm for all, new': lambda: parametrizations.weight_norm(nn.Linear(FEATURES, 5), dim=None),
    'norms of columns': lambda: nn.utils.weight_norm(nn.Linear(FEATURES, 5), dim=1),
    'norms of columns, new': lambda: parametrizations.weight_norm(nn.Linear(FEATURES, 5), dim=1),
    'norms of columns, one output': lambda: nn.utils.weight_norm(nn.Linear(FEATURES, 1), dim=1),
    'norms of rows, one output': lambda: nn.utils.weight_norm(nn.Linear(FEATURES, 1)),
    'norms of rows': lambda: parametrizations.weight_norm(nn.Linear(FEATURES, 5)),
    'spectral': lambda: parametrizations.spectral_norm(nn.Linear(FEATURES, 5)),
    'spectral, old': lambda: nn.utils.spectral_norm(nn.Linear(FEATURES, 5)),
}


@pytest.mark.parametrize('name', EXACT)
def test_what_torch_makes_of_a_linear_layer(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        layer = scaled(EXACT[name]()).eval()
    found = to_canonical(with_head(layer.state_dict())).state
    x = torch.randn(4, FEATURES)
    with torch.no_grad():
        expected = layer(x).numpy()
    got = x.numpy() @ found['fc.weight'].T + found['fc.bias']
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


WEIGHT = torch.ones(5, FEATURES)
OTHER: dict[str, dict[str, torch.Tensor]] = {
    'sigma': {'weight': WEIGHT, 'sigma': torch.ones(1)},
    's': {'weight': WEIGHT, 'bias': torch.ones(5), 's': torch.ones(())},
    'lora_A': {'weight': WEIGHT, 'lora_A': torch.ones(4, FEATURES), 'lora_B': torch.ones(5, 4)},
    'parametrizations.weight.original': {'parametrizations.weight.original': WEIGHT, 'bias': torch.ones(5)},
    'parametrizations.weight.0.base': {
        'parametrizations.weight.original': WEIGHT,
        'parametrizations.weight.0.base': WEIGHT,
    },
    'parametrizations.bias.original': {'weight': WEIGHT, 'parametrizations.bias.original': torch.ones(5)},
    'weight_u': {'weight_orig': WEIGHT, 'weight_u': torch.ones(5)},
    'bias_mask': {'weight': WEIGHT, 'bias_orig': torch.ones(5), 'bias_mask': torch.ones(5)},
    'weight_mask': {'weight_orig': WEIGHT, 'weight_mask': torch.ones(5, 1)},
}


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('leaf', OTHER)
def test_a_layer_with_other_tensors_is_none_of_the_known_ones(leaf: str, prefix: str) -> None:
    saved = with_head(OTHER[leaf], prefix=prefix)
    with pytest.raises(CheckpointError, match=f'more than a linear layer: .*{leaf}.*drop_head=True'):
        to_canonical(saved)
    found = to_canonical(saved, drop_head=True)
    assert not any(name.startswith('fc') for name in found.state)


def test_a_norm_with_other_tensors_is_none_of_the_known_ones() -> None:
    state = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 5)).state_dict()
    assert 'fc.weight' in to_canonical(with_head(state)).state
    for change in ({'0.rmax': torch.ones(())}, {'0.bias': torch.ones(1)}):
        with pytest.raises(CheckpointError, match='more than a linear layer'):
            to_canonical(with_head({**state, **change}))


@pytest.mark.parametrize('root', ['fc', 'fc.layers', 'mlp'])
def test_between_two_linear_layers_may_be_a_function(root: str) -> None:
    state = nn.ModuleList([nn.Linear(FEATURES, 8), nn.Linear(8, 5)]).state_dict()
    with pytest.raises(CheckpointError, match=r'no telling whether a ReLU is between.*drop_head=True'):
        to_canonical(with_head(state, root))
    state = nn.ModuleList([nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)]).state_dict()
    with pytest.raises(CheckpointError, match=r'no telling whether a ReLU is between.*drop_head=True'):
        to_canonical(with_head(state, root))


@pytest.mark.parametrize('root', ['head', 'classifier.1'])
def test_a_transposed_classifier(root: str) -> None:
    """The net's own is told by the net's shapes, another by its own."""
    state = {'weight': torch.ones(FEATURES, 5), 'bias': torch.ones(5)}
    with pytest.raises(
        CheckpointError, match=rf'do not fit each other: {root} \(weight {FEATURES}x5, bias 5'
    ):
        to_canonical(with_head(state, root))
    assert to_canonical(with_head(state)).state['fc.weight'].shape == (FEATURES, 5)


def test_a_classifier_of_another_width_beside_the_net() -> None:
    for width in (512, 4096, 100):
        saved = with_head(nn.Linear(width, 5).state_dict(), 'classifier', 'backbone.')
        with pytest.raises(CheckpointError, match=f'takes {width} features, and the net gives 2048'):
            to_canonical(saved)
        found = to_canonical(saved, drop_head=True)
        assert 'fc.weight' not in found.state and 'dropped the head' in ' '.join(found.notes)

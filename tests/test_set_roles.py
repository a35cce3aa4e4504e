"""Which of several nets in a file is taken: what their names say, and what they do not."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from states import Saved, State, added, assert_is, prefixed, small

from convert.names.layouts import to_canonical
from convert.names.roles import AmbiguousError
from flaxnets.errors import CheckpointError

A: State = dict(small('resnext'))
B: State = added(A, 1)
BODY: State = {name: tensor for name, tensor in A.items() if not name.startswith('fc.')}
PARAMETERS: State = {name: t for name, t in B.items() if name.endswith(('weight', 'bias'))}
DINO: Saved = {'head.mlp.0.weight': np.ones((4, 2048)), 'head.last_layer.weight_v': np.ones((9, 4))}


@pytest.mark.parametrize('kept', ['exp_avg', 'momentum_buffer', 'square_avg', 'max_exp_avg_sq', 'grads'])
def test_what_an_optimizer_keeps_is_no_net(kept: str) -> None:
    """Nor is it the slower of two encoders, whose classifier would be left out."""
    for ema, moments in ((True, PARAMETERS), (False, PARAMETERS), (True, B), (False, B)):
        assert_is(to_canonical({'model': A, 'optimizer': {kept: moments}}, ema=ema), A)
        assert_is(to_canonical({'model': A, kept: moments}, ema=ema), A)
        assert_is(to_canonical({**A, **prefixed(moments, f'{kept}.')}, ema=ema), A)
    assert_is(to_canonical({'exp3': A}), A)  # an experiment
    assert_is(to_canonical({'model': A, 'optimizer': {kept: B}}, key=f'optimizer.{kept}'), B)


def test_a_file_of_an_optimizer_alone_is_refused() -> None:
    with pytest.raises(AmbiguousError, match='only what an optimizer keeps.*key='):
        to_canonical({'optimizer': {'exp_avg': A, 'exp_avg_sq': B}})


@pytest.mark.parametrize(
    ('first', 'second'),
    [
        ('source_net', 'target_net'),
        ('model', 'model_best_avg_acc'),
        ('model', 'model_best_average_loss'),
        ('student', 'teacher'),
        ('model', 'teacher'),
        ('model', 'momentum'),
        ('net', 'encoder_k'),
    ],
)
def test_names_that_do_not_tell_are_asked_for(first: str, second: str) -> None:
    for ema in (True, False):
        with pytest.raises(AmbiguousError) as error:
            to_canonical({first: A, second: B}, ema=ema)
        assert error.value.choices == ({'key': first}, {'key': second})
    assert_is(to_canonical({first: A, second: B}, key=second), B)


@pytest.mark.parametrize(
    'saved',
    [
        {'student': {**A, **DINO}, 'teacher': {**B, **DINO}},
        {'student': A, 'mean_teacher': B},
        {'student': A, 'ema_teacher': B},
        {'student': A, 'teacher': B, 'ema_decay': 0.99},
        {'student': A, 'teacher': B, 'args': {'momentum_teacher': 0.996}},
    ],
)
def test_a_teacher_that_is_an_average(saved: Saved) -> None:
    for ema, state in ((True, B), (False, A)):
        found = to_canonical(saved, ema=ema, drop_head=True)
        assert found.state['conv1.weight'] is state['conv1.weight']


@pytest.mark.parametrize(
    ('fast', 'slow'),
    [
        ('encoder_q', 'encoder_k'),
        ('query_encoder', 'key_encoder'),
        ('online_encoder', 'target_encoder'),
        ('online_net', 'target_net'),
        ('base_encoder', 'momentum_encoder'),
        ('backbone', 'momentum_backbone'),
    ],
)
def test_two_encoders(fast: str, slow: str) -> None:
    """The one that is trained is taken, and its projection is no classifier, however it is chosen."""
    nets = {fast: A, slow: B}
    joined = {'state_dict': {f'{key}.{name}': t for key, net in nets.items() for name, t in net.items()}}
    for found in (
        to_canonical(nets),
        to_canonical(nets, key=fast),
        to_canonical(joined),
        to_canonical(joined, prefix=f'{fast}.'),
    ):
        assert_is(found, BODY)
    assert_is(to_canonical(joined, prefix=slow), {name: B[name] for name in BODY})


def test_an_encoder_that_stands_twice() -> None:
    """`byol_pytorch` saves the net within its online encoder, and by itself."""
    listed = {f'0.{n}': t for n, t in as_children(BODY).items()}
    listed |= {'1.0.weight': np.ones(2048), '1.0.bias': np.ones(2048), '1.1.weight': A['fc.weight']}
    slow = added(listed, 1)
    saved = {
        f'{prefix}{name}': tensor
        for prefix, net in (('online_encoder.net.', listed), ('target_encoder.net.', slow), ('net.', listed))
        for name, tensor in net.items()
    }
    assert_is(to_canonical(saved), BODY)


def as_children(state: State) -> Saved:
    numbers = {'conv1': 0, 'bn1': 1, 'layer1': 4, 'layer2': 5, 'layer3': 6, 'layer4': 7}
    parts = ((name.partition('.'), tensor) for name, tensor in state.items())
    return {f'{numbers[first]}.{rest}': tensor for (first, _, rest), tensor in parts}


def test_two_encoders_of_different_nets_are_asked_for() -> None:
    with pytest.raises(AmbiguousError):
        to_canonical({'online': A, 'target': dict(small('resnest'))})


@pytest.mark.parametrize(
    'second',
    [
        {**A, 'fc.weight': A['fc.weight'] + 1},
        {**A, 'fc.weight': A['fc.weight'][:3], 'fc.bias': A['fc.bias'][:3]},
        {name.replace('fc.', 'classifier.'): t for name, t in A.items()},
    ],
)
def test_twins_have_one_head(second: State) -> None:
    for saved in ({'pretrained': A, 'finetuned': second}, {'finetuned': second, 'pretrained': A}):
        with pytest.raises(AmbiguousError):
            to_canonical(saved)


def test_twins_whose_head_stands_beside_or_is_missing() -> None:
    beside: Saved = {
        f'{root}.{name}': tensor
        for root in ('a', 'b')
        for name, tensor in {
            **prefixed(BODY, 'backbone.'),
            'head.weight': A['fc.weight'],
            'head.bias': A['fc.bias'],
        }.items()
    }
    assert_is(to_canonical(beside), A)
    with pytest.raises(AmbiguousError):
        to_canonical({**beside, 'b.head.bias': A['fc.bias'] + 1})
    assert_is(to_canonical({'body': BODY, 'model': A}), A)


def test_an_average_of_parameters_that_is_asked_for_takes_the_trained_statistics() -> None:
    found = to_canonical({'state_dict': A, 'state_dict_ema': PARAMETERS}, key='state_dict_ema')
    assert_is(found, {**A, **PARAMETERS})


@pytest.mark.parametrize('prefix', ['model.', 'net.model.', ''])
def test_the_average_of_latent_diffusion(prefix: str) -> None:
    flat = {'model_ema.' + name.replace('.', ''): t for name, t in PARAMETERS.items()}
    counters = {'model_ema.decay': np.ones(()), 'model_ema.num_updates': np.ones(())}
    saved = {'state_dict': {**prefixed(A, prefix), **flat, **counters}}
    found = to_canonical(saved)
    assert_is(found, {**A, **PARAMETERS})
    assert any('averaged of two values that LitEma' in note for note in found.notes)
    assert_is(to_canonical(saved, ema=False), A)


def test_an_average_beside_a_net_in_one_state_dict() -> None:
    saved = {**A, **prefixed(B, 'ema.')}
    assert_is(to_canonical(saved), B)
    assert_is(to_canonical(saved, ema=False), A)
    assert_is(to_canonical(saved, prefix='ema.'), B)
    assert_is(to_canonical(saved, prefix=''), A)
    with pytest.raises(AmbiguousError) as error:
        to_canonical({**A, **prefixed(B, 'copy.')})
    assert error.value.choices == ({'prefix': ''}, {'prefix': 'copy.'})
    parameters = {**A, **prefixed(PARAMETERS, 'ema.')}
    assert_is(to_canonical(parameters), {**A, **PARAMETERS})
    assert_is(to_canonical(parameters, ema=False), A)


def test_many_nets_are_listed_soon() -> None:
    saved: dict[str, Any] = {f'models.{i}.{n}': t for i in range(100) for n, t in A.items()}
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"100 nets.*prefix='models\.0\.'"):
        to_canonical(saved)
    assert_is(to_canonical(saved, prefix='models.7.'), A)
    assert time.process_time() - start < 5

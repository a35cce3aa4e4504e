"""Files by the hundred, as trainings write them: each becomes the one right net, or is refused and told why.

A file is a net under a prefix, with a head of some make, in a wrapper of some framework, with other things
beside it, written by torch or safetensors. What must come out is what was put in: the oracle is the tensors,
and for heads that are folded, torch's own module on random features.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import pathlib
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import flaxnets
from convert.checkpoint import Checkpoint
from convert.conversion import open_checkpoint
from convert.names.roles import AmbiguousError
from convert.names.tree import to_state
from flaxnets.errors import CheckpointError
from flaxnets.nets.resnet import abstract_variables

SEED = 0
FILES = 500 if os.environ.get('FLAXNETS_FAULTS') == 'full' else 250
FEATURES, CLASSES = 512, 10
NETS = ('resnext_tiny', 'resnext_tiny', 'resnext_tiny', 'res2net_tiny', 'resnest_tiny')
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)

State = dict[str, torch.Tensor]


@functools.cache
def body(name: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a net without its classifier, random ones."""
    model = flaxnets.create(name, num_classes=0)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: rng.uniform(0.5, 1, a.shape).astype('f4'), abstract_variables(model))
    return {key: torch.from_numpy(np.array(t)) for key, t in to_state(tree, model).items()}


def make_body(name: str, rng: random.Random) -> State:
    return {key: tensor + rng.uniform(-0.1, 0.1) for key, tensor in body(name).items()}


# Heads.


def with_statistics(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 1.5)
    return norm


HEADS: dict[str, Callable[[], nn.Module]] = {
    'linear': lambda: nn.Linear(FEATURES, CLASSES),
    'without bias': lambda: nn.Linear(FEATURES, CLASSES, bias=False),
    'after dropout': lambda: nn.Sequential(nn.Dropout(), nn.Linear(FEATURES, CLASSES)),
    '1x1 convolution': lambda: nn.Conv2d(FEATURES, CLASSES, 1),
    'weight norm': lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)),
    'old weight norm': lambda: nn.utils.weight_norm(nn.Linear(FEATURES, CLASSES)),
    'spectral norm': lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES)),
    'old spectral norm': lambda: nn.utils.spectral_norm(nn.Linear(FEATURES, CLASSES)),
    'norm before': lambda: nn.Sequential(
        with_statistics(nn.BatchNorm1d(FEATURES)), nn.Linear(FEATURES, CLASSES)
    ),
    'norm after': lambda: nn.Sequential(
        nn.Dropout(), nn.Linear(FEATURES, CLASSES), with_statistics(nn.BatchNorm1d(CLASSES))
    ),
}
EXACT = ('linear', 'without bias', 'after dropout', '1x1 convolution')
REFUSED_HEADS: dict[str, Callable[[], nn.Module]] = {
    'two layers': lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES, bias=False)),
    'mlp': lambda: nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    'layer norm': lambda: nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES)),
    'concatenated pools': lambda: nn.Linear(2 * FEATURES, CLASSES),
}


@dataclass
class Head:
    kind: str
    module: nn.Module | None
    state: State = field(default_factory=dict)

    def logits(self, x: torch.Tensor, state: State) -> np.ndarray:
        assert self.module is not None
        module = self.module.double().eval()
        module.load_state_dict({key: t.double() for key, t in state.items()})
        with torch.no_grad():
            if isinstance(module, nn.Conv2d):
                return np.asarray(module(x[:, :, None, None])[:, :, 0, 0])
            return np.asarray(module(x))


def make_head(rng: random.Random) -> Head:
    kind = rng.choice(['none', *['linear'] * 4, *HEADS, *REFUSED_HEADS])
    if kind == 'none':
        return Head(kind, None)
    module = {**HEADS, **REFUSED_HEADS}[kind]()
    return Head(kind, module, dict(module.eval().state_dict()))


# Names.

PREFIXES = ['', '', 'module.', 'model.', 'net.', '_orig_mod.', 'module._orig_mod.', 'model.module.']
PREFIXES += ['_forward_module.', 'classifier_net.0.', 'encoder.']
BACKBONES = ['backbone.', 'model.backbone.', 'module.encoder.', 'net.features.', 'student_net.']
CHILDREN = {'conv1': '0', 'bn1': '1', 'layer1': '4', 'layer2': '5', 'layer3': '6', 'layer4': '7'}


def named(state: State, head: State, rng: random.Random) -> tuple[State, str]:
    """The net under names of some code, and where its head lies."""
    form = rng.choice(['prefix', 'prefix', 'backbone', 'children', 'fastai', 'layer0', 'compiled blocks'])
    root = rng.choice(['fc', 'fc', 'classifier', 'head.fc', 'last_linear', 'head'])
    if form == 'prefix':
        prefix = rng.choice(PREFIXES)
        return {prefix + key: t for key, t in {**state, **under(head, root)}.items()}, form
    if form == 'backbone':
        prefix = rng.choice(BACKBONES)
        outside = prefix[: prefix.rstrip('.').rfind('.') + 1]
        return {
            **{prefix + key: t for key, t in state.items()},
            **under(head, outside + rng.choice(['head', 'classifier', 'fc', 'linear'])),
        }, form
    if form in ('children', 'fastai'):
        listed = {}
        for key, tensor in state.items():
            first, dot, rest = key.partition('.')
            listed[CHILDREN[first] + dot + rest] = tensor
        if form == 'children':
            return {**listed, **under(head, '9')}, form
        return {**{f'0.{key}': t for key, t in listed.items()}, **under(head, '1')}, form
    if form == 'layer0':
        swapped = {}
        for key, tensor in state.items():
            first, dot, rest = key.partition('.')
            swapped[{'conv1': 'layer0.0', 'bn1': 'layer0.1'}.get(first, first) + dot + rest] = tensor
        return {**swapped, **under(head, root)}, form
    blocks = {key.replace('layer3.', 'layer3._orig_mod.', 1): t for key, t in state.items()}
    return {**blocks, **under(head, root)}, form


def under(state: State, root: str) -> State:
    return {f'{root}.{key}': tensor for key, tensor in state.items()}


# Counters.


def with_counters(state: State, dtype: torch.dtype, rng: random.Random) -> tuple[State, int | None]:
    """BatchNorm's counters as files have them, and how many must come out; None if they mean nothing."""
    kind = rng.choice(['int64', 'int64', 'cast', 'missing', 'partial', 'fraction', 'int32', 'overflow'])
    value: torch.Tensor = {
        'cast': torch.tensor(7).to(dtype),
        'fraction': torch.tensor(7.5),
        'int32': torch.tensor(7, dtype=torch.int32),
        'overflow': torch.tensor(1e6).half(),
    }.get(kind, torch.tensor(7))
    out, count = {}, 0
    for key, tensor in state.items():
        out[key] = tensor
        if key.endswith('.running_var') and kind != 'missing' and (kind != 'partial' or rng.random() < 0.5):
            out[key.removesuffix('running_var') + 'num_batches_tracked'] = value
            count += 1
    return out, None if kind in ('fraction', 'overflow') else count


# Things beside.


class Callback:
    """A class of the user's own."""

    def __init__(self, value: object) -> None:
        self.value = value


def beside(rng: random.Random) -> dict[str, Any]:
    things: dict[str, Callable[[], Any]] = {
        'epoch': lambda: 3,
        'optimizer': lambda: torch.optim.SGD([torch.ones(2)], lr=0.1, momentum=0.9).state_dict(),
        'optimizer_object': lambda: torch.optim.Adam([torch.ones(2)]),
        'criterion': lambda: {'weight': torch.ones(CLASSES)},
        'loss': nn.CrossEntropyLoss,
        'metrics': lambda: {'acc': torch.tensor(0.5), 'history': np.arange(3.0), 'best': np.bool_(True)},
        'hyper_parameters': lambda: {
            'net': nn.Linear(2, 2),
            'optimizer': functools.partial(torch.optim.Adam, lr=1e-3),
            'path': pathlib.PosixPath('/data'),
        },
        'callbacks': lambda: {"ModelCheckpoint{'monitor': None}": {'best': torch.tensor(1.0)}},
        'args': lambda: argparse.Namespace(lr=0.1, started=datetime.datetime(2024, 1, 1), bn_eps=None),
        'split': lambda: list(range(1000)),
        'rng': lambda: [torch.get_rng_state(), np.random.default_rng(0), random.getstate()],
        'odd': lambda: {None: 1, (1, 2): torch.ones(2).to_sparse(), 1j: torch.ones(1).expand(9)},
        'callback': lambda: Callback(Callback(None)),
        'queue': lambda: torch.randn(4, 8),
    }
    return {key: things[key]() for key in rng.sample(list(things), rng.randint(0, 4))}


# Wrappers.


@dataclass
class Written:
    """What is saved, and which of the states must come out.

    Attributes:
      saved: the object.
      states: the nets in it by what takes them: keywords of `open_checkpoint`.
      averaged: True if there is an averaged and a trained one: 'averaged' and 'trained' in `states`.
    """

    saved: Any
    form: str
    averaged: bool = False
    ambiguous: bool = False
    momentum: bool = False


def wrapped(first: State, second: State, rng: random.Random) -> Written:
    """One or two nets (`first` averaged, `second` trained) in what frameworks write around them."""
    more = beside(rng)
    one = {
        'bare': lambda: first,
        'ordered': lambda: OrderedDict(first),
        'state_dict': lambda: {'state_dict': first, **more},
        'model': lambda: {**more, 'model': first},
        'odd key': lambda: {'checkpoint.best': first, **more},
        'deep': lambda: {'a': {'b': [more, {'c': first}]}},
        'list': lambda: [3, first, more],
        'tuple': lambda: (first, more),
        'mixed': lambda: {**first, 'epoch': 3, 'args': argparse.Namespace(lr=1), 'name': 'x'},
        'twins': lambda: {'model': first, 'best': {key: t.clone() for key, t in first.items()}, **more},
        'same': lambda: {'last': first, 'best': first},
    }
    both = {
        'timm': lambda: {'state_dict': second, 'state_dict_ema': first, **more},
        'deit': lambda: {'model': second, 'model_ema': first, **more},
        'net and ema': lambda: {'net': second, 'ema': first, **more},
        'monai': lambda: {'model_state_dict': second, 'ema_state_dict': first, **more},
        'inner ema': lambda: {'model': second, 'ema': {'module': first, 'updates': 3}, **more},
        'mean teacher': lambda: {'student': second, 'teacher': first, 'ema_decay': 0.99, **more},
        'lightning averaging': lambda: {
            'state_dict': first,
            'current_model_state': second,
            'averaging_state': {'n_averaged': torch.tensor(3)},
            **more,
        },
        'lightning callback': lambda: {
            'state_dict': second,
            'callbacks': {'EMACallback{}': {'decay': 0.9, 'state': first}},
        },
        'lightning swa': lambda: {
            'state_dict': second,
            'callbacks': {'StochasticWeightAveraging': {'n_averaged': 3, 'average_model_state': first}},
        },
        'mmengine': lambda: {
            'state_dict': first,
            'ema_state_dict': {'steps': torch.tensor(9), **{f'module.{k}': t for k, t in second.items()}},
            **more,
        },
        'composer': lambda: {
            'state': {
                'model': first,
                'algorithms': [
                    ('EMA', {'ema_model': dict(first), 'training_model': second, 'ema_weights_active': True})
                ],
            },
            'rng': more,
        },
        'ema_pytorch': lambda: {
            **{f'online_model.{key}': t for key, t in second.items()},
            **{f'ema_model.{key}': t for key, t in first.items()},
            'initted': torch.tensor(True),
            'step': torch.tensor(3),
        },
        'swa_utils': lambda: {
            'model': second,
            'swa_model': {'n_averaged': torch.tensor(3), **{f'module.{k}': t for k, t in first.items()}},
        },
    }
    momentum = {
        'moco': lambda: {
            'state_dict': {
                **{f'module.encoder_q.{k}': t for k, t in second.items()},
                **{f'module.encoder_k.{k}': t for k, t in first.items()},
                'module.queue': torch.randn(4, 8),
            }
        },
        'byol': lambda: {
            **{f'online_encoder.net.{k}': t for k, t in second.items()},
            **{f'target_encoder.net.{k}': t for k, t in first.items()},
            **{f'net.{k}': t for k, t in second.items()},
        },
    }
    unknown = {
        'student and teacher': lambda: {'teacher': first, 'student': second, **more},
        'two keys': lambda: {'a': first, 'b': second, **more},
        'two prefixes': lambda: {'state_dict': {**under(first, 'left'), **under(second, 'right')}, **more},
    }
    form = rng.choice([*one, *one, *both, *momentum, *unknown])
    saved = {**one, **both, **momentum, **unknown}[form]()
    return Written(saved, form, form in both, form in unknown, form in momentum)


def save(saved: Any, path: Path, rng: random.Random) -> Path:
    tensors = isinstance(saved, dict) and all(isinstance(t, torch.Tensor) for t in saved.values())
    if tensors and rng.random() < 0.3:
        path = path.with_suffix('.safetensors')
        safetensors.torch.save_file({k: t.clone().contiguous() for k, t in saved.items()}, path)
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    return path


@dataclass
class Net:
    """What was put into a file: one net's tensors by timm's names, its head apart, and its own names."""

    body: State
    head: State
    named: State
    form: str
    counters: int | None


def make_net(like: Net | None, name: str, head: Head, dtype: torch.dtype, rng: random.Random) -> Net:
    cast = {key: t.to(dtype) for key, t in make_body(name, rng).items()}
    heads = {key: t.to(dtype) if t.is_floating_point() else t for key, t in head.state.items()}
    if like is not None:  # the second of a pair has the first one's names
        order = dict(zip(like.named, like.named.values(), strict=True))
        body_of = {id(t): key for key, t in like.body.items()}
        named_ = {n: cast[body_of[id(t)]] if id(t) in body_of else t for n, t in order.items()}
        return Net(cast, heads, named_, like.form, like.counters)
    counted, counters = with_counters(cast, dtype, rng)
    named_, form = named(counted, heads, rng)
    return Net({key: counted[key] for key in cast}, heads, named_, form, counters)


def assert_is(checkpoint: Checkpoint, net: Net, head: Head, dtype: torch.dtype) -> None:
    """The tensors are those of `net`, bit by bit, and the classifier computes what torch's head does."""
    found = {n: t for n, t in checkpoint.state.items() if not n.endswith('num_batches_tracked')}
    classifier = {n: found.pop(n) for n in ('fc.weight', 'fc.bias') if n in found}
    assert set(found) == set(net.body)
    for key, tensor in net.body.items():
        assert found[key].dtype.name == str(dtype).removeprefix('torch.')
        assert np.array_equal(found[key].astype(np.float64), tensor.double().numpy()), key
    count = len(checkpoint.source.num_batches_tracked or {})
    assert count == (net.counters or 0)
    assert not count or set((checkpoint.source.num_batches_tracked or {}).values()) == {7}
    if not classifier:
        return
    x = torch.rand(4, FEATURES, dtype=torch.float64)
    expected = head.logits(x, net.head)
    weight, bias = (classifier[n].astype(np.float64) for n in ('fc.weight', 'fc.bias'))
    got = x.numpy() @ weight.T + bias
    # Exact up to the sum's order where nothing is folded, else up to the dtype that the fold is kept in.
    relative = 1e-12 if head.kind in EXACT else 8 * float(torch.finfo(dtype).eps)
    scale = float(np.abs(expected).max() + (np.abs(x.numpy()) @ np.abs(weight).T).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * scale)


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
def test_generated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    outcomes: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    for i in range(FILES):
        name, dtype, head = rng.choice(NETS), rng.choice(DTYPES), make_head(rng)
        first = make_net(None, name, head, dtype, rng)
        second = make_net(first, name, head, dtype, rng)
        written = wrapped(first.named, second.named, rng)
        path = save(written.saved, tmp_path / f'{i}.pth', rng)
        ema = not written.averaged or rng.random() < 0.5
        where = (SEED, i, name, dtype, head.kind, first.form, written.form, ema)
        forms.update([head.kind, first.form, written.form])
        try:
            outcomes[one(path, name, written, first, second, head, dtype, ema)] += 1
        except Exception as error:
            raise AssertionError(f'file {where}') from error
        path.unlink()
    with capsys.disabled():
        print(f'\n{FILES} files (seed {SEED}): {dict(outcomes)}')
    assert sum(outcomes.values()) == FILES and min(outcomes.values()) > FILES // 50
    assert all(forms[kind] > FILES // 250 for kind in (*HEADS, *REFUSED_HEADS, 'none'))


def one(
    path: Path,
    name: str,
    written: Written,
    first: Net,
    second: Net,
    head: Head,
    dtype: torch.dtype,
    ema: bool,
) -> str:
    """Opens one file and checks what comes out; what became of it."""
    keywords: dict[str, Any] = {'model': name, 'ema': ema}
    wanted = second if written.momentum or not ema else first
    outcome = 'converted'
    if written.ambiguous:
        with pytest.raises(AmbiguousError) as error:
            open_checkpoint(path, **keywords)
        assert len(error.value.choices) == 2
        assert all(value in str(error.value) for choice in error.value.choices for value in choice.values())
        keywords |= error.value.choices[1]
        wanted, outcome = second, 'converted once it was chosen'
    if head.kind in REFUSED_HEADS and not written.momentum:
        with pytest.raises(CheckpointError, match='drop_head=True'):
            open_checkpoint(path, **keywords)
        found = open_checkpoint(path, **keywords, drop_head=True)
        assert 'fc.weight' not in found.state
        outcome = 'converted without its head'
    else:
        found = open_checkpoint(path, **keywords)
        assert ('fc.weight' in found.state) == (head.kind != 'none' and not written.momentum)
    assert_is(found, wanted, head, dtype)
    assert all(note.isprintable() and len(note) < 2000 for note in found.source.notes)
    return outcome

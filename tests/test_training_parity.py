"""One SGD step in training mode against torch's: loss, every gradient, every parameter and statistic.

In float64: a ReLU whose input is within float32's rounding of 0 opens in one framework and not in the
other, after which gradients differ by percents, and torch's own float32 gradients from its float64 ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from nets import cut_off, numpy_state, randomise, shallow, timm_net, to_flax
from states import SMALL, small_net

from convert.names.tree import to_state
from flaxnets import zoo
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import ResNet, build
from train.settings import Settings
from train.step.state import create_state
from train.step.step import make_train_step

LR, MOMENTUM, DECAY, SMOOTHING = 0.1, 0.9, 1e-4, 0.1
RTOL = 1e-6
SIZE = 32  # of the images
OPTIONS: dict[str, Any] = dict(num_classes=5, dtype='float64', param_dtype='float64')


def pair(kind: str, **options: Any) -> tuple[torch.nn.Module, ResNet]:
    """timm's net and ours, cut off after a second stage of two blocks: all kinds of layers are in them."""
    layers = (1, 2, 1, 1)
    arch = dataclasses.replace(SMALL[kind], layers=layers)
    return cut_off(small_net(kind, layers=layers)).double(), shallow(build(arch, **OPTIONS, **options))


# A ResNeXt with a gate has all of a plain one; one kind's deep stem and average pools are those of all.
@pytest.mark.parametrize('kind', ['seresnext', 'resnextd', 'res2net', 'resnest'])
def test_sgd_step_equals_torch(kind: str) -> None:
    step_equals_torchs(*pair(kind))


def test_sgd_step_of_a_whole_net_equals_torch() -> None:
    reference = randomise(timm_net('resnext_tiny', num_classes=5)).double()
    step_equals_torchs(reference, build(zoo.NETS['resnext_tiny'], **OPTIONS))


def test_sgd_step_with_frozen_batch_norm_equals_torch() -> None:
    """Also of one image, which has no statistics of its own after split attention's pool."""
    step_equals_torchs(*pair('resnest', freeze_bn=True), images=1)


def step_equals_torchs(reference: torch.nn.Module, model: ResNet, images: int = 4) -> None:
    reference.train()
    for module in reference.modules():
        if model.freeze_bn and isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    before = {key: tensor.copy() for key, tensor in numpy_state(reference).items()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(model.num_classes, (images,), generator=generator)

    with jax.enable_x64(True):
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, MOMENTUM, nesterov=True))
        state = create_state(to_flax(reference, model), optimizer)
        settings = Settings(model='', label_smoothing=SMOOTHING)
        step = jax.jit(make_train_step(model, optimizer, settings, Preprocess(), epoch_steps=1))
        state, metrics = step(state, {'image': x.permute(0, 2, 3, 1).numpy(), 'label': labels.numpy()})
        # The first momentum is the gradient plus the weight decay.
        momentum = optax.tree.get(state.opt_state, 'trace')
        gradients = to_state({'params': momentum, 'batch_stats': state.batch_stats}, model)
        ours = to_state({'params': state.params, 'batch_stats': state.batch_stats}, model)

    sgd = torch.optim.SGD(reference.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)
    logits = reference(x)
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in reference.parameters() if p.grad is not None)
    sgd.step()

    total, count = metrics['loss']
    assert int(count) == images
    assert float(total) / images == pytest.approx(loss.item(), rel=RTOL)
    assert int(metrics['top1'][0]) == (logits.argmax(1) == labels).sum().item()
    assert float(metrics['grad_norm'][0]) == pytest.approx(norm.item(), rel=RTOL)
    for key, parameter in reference.named_parameters():
        near(f'gradient of {key}', gradients[key], sgd.state[parameter]['momentum_buffer'].numpy())
    theirs = {key: t for key, t in numpy_state(reference).items() if not key.endswith('num_batches_tracked')}
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        near(key, ours[key], tensor)
        kept = model.freeze_bn and 'running' in key
        assert (tensor != before[key]).any() != kept, (
            f'the step left {key} as it was: the test shows nothing of it'
        )


def near(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=RTOL * np.abs(theirs).max(), err_msg=what)

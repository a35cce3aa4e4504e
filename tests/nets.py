"""timm's nets with random weights, and the same weights in ours: what the parity tests compare."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.names.tree import to_variables
from convert.verification import torch_net
from flaxnets.nets.resnet import ResNet as FlaxResNet
from flaxnets.nets.resnet import abstract_variables


def timm_net(name: str, **kwargs: Any) -> torch.nn.Module:
    """timm's net of that name, randomly initialised; built from timm's blocks where timm has no such name."""
    return torch_net(name, **kwargs)[0]


def randomise(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random BatchNorm statistics, scales and biases, none of them 0, so that no path is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, module in net.named_modules():
            if name.endswith('bn3'):  # a smaller branch keeps a hundred blocks from growing without bound
                module.weight.mul_(0.25)
    return net.eval()


def numpy_state(net: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}


def to_flax(net: torch.nn.Module, model: FlaxResNet) -> dict[str, Any]:
    """The weights of timm's net as the variables of ours."""
    return to_variables(numpy_state(net), model)


class Shallow(FlaxResNet):
    """A net's stem, first two stages and classifier: enough of it where depth proves nothing."""

    def forward_maps(self, x: Any, train: bool = False, upto: int = 2) -> Any:
        return super().forward_maps(x, train, min(upto, 2))


def shallow(model: FlaxResNet, made: type[FlaxResNet] = Shallow) -> FlaxResNet:
    """The same net, cut off after its second stage: traced and compiled in a third of the time."""
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ('parent', 'name')]
    return made(**{name: getattr(model, name) for name in fields})


def cut_off(net: torch.nn.Module) -> torch.nn.Module:
    """timm's net as `shallow` makes ours: its first two stages and a classifier."""
    net.layer3 = net.layer4 = torch.nn.Identity()
    net.fc = torch.nn.Linear(net.layer2[-1].conv3.out_channels, net.num_classes)
    return net


def random_variables(model: FlaxResNet, seed: int = 0) -> dict[str, Any]:
    """Random variables of our net, made by NumPy: compiling an initialisation takes seconds."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in flatten_dict(abstract_variables(model)).items():
        if path[-1] == 'kernel':
            array = rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
        elif path[-1] in ('scale', 'var'):
            array = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            array = rng.normal(0, 0.1, leaf.shape)
        flat[path] = array.astype(leaf.dtype)
    return unflatten_dict(flat)

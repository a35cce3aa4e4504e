"""The convolutions of the nets by themselves, for `benchmarks/gpu.py`: their sizes, and who computes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.forms import LAYER_FORMS

LEAST_BYTES = 4e8  # of the maps of a convolution in bfloat16: a tenth of a millisecond of an H200
PACKS = ('plain', *(f'packs of {n}' for n in (8, 16, 32, 64)))
SPLIT, PADDED = ('plain', 'split', 'channels first'), ('plain', *(f'padded to {n}' for n in (8, 16, 32)))


class Layer(NamedTuple):
    """A square convolution of a square map, padded by half the kernel.

    Attributes:
      what: the net that has it.
      side, size: of the map and of the kernel, in pixels.
      inputs, outputs, groups, stride: of the convolution.
      forms: names in `forms.LAYER_FORMS`.
    """

    what: str
    side: int
    size: int
    inputs: int
    outputs: int
    groups: int
    stride: int
    forms: tuple[str, ...]

    @property
    def images(self) -> int:
        """So many that a call takes the card longer than the host needs to start it."""
        of_one = 2 * self.side**2 * (self.inputs + self.outputs / self.stride**2)
        return max(128, round(LEAST_BYTES / of_one))

    @property
    def name(self) -> str:
        return f'{self.what}, {self.side}x{self.side}, {self.inputs} to {self.outputs}'


TOY = [Layer('toy', 8, 3, 32, 32, 8, 1, PACKS)]
LAYERS = [
    Layer('ResNeXt 32x4d', 56, 3, 128, 128, 32, 1, (*PACKS, 'packs of 64 apart', 'channels first')),
    Layer('ResNeXt 32x8d', 28, 3, 256, 256, 32, 1, PACKS),
    Layer('ResNeXt 32x16d', 14, 3, 512, 512, 32, 1, ('plain', *PACKS[3:])),
    Layer('ResNeXt 32x32d', 7, 3, 1024, 1024, 32, 1, ('plain', 'packs of 64', 'packs of 128')),
    Layer('ResNeXt, stride 2', 56, 3, 256, 256, 32, 2, PACKS),
    Layer('stem', 224, 7, 3, 64, 1, 2, ('plain', 'flaxnets', 'padded to 8')),
    Layer('ResNeSt, radix 2', 56, 3, 64, 128, 2, 1, SPLIT),
    Layer('ResNeSt, radix 2', 28, 3, 128, 256, 2, 1, SPLIT),
    Layer('ResNeSt, radix 2', 14, 3, 256, 512, 2, 1, SPLIT),
    Layer('ResNeSt 4s2x40d', 28, 3, 160, 640, 8, 1, (*SPLIT, 'packs of 64')),
    Layer('Res2Net 14w', 56, 3, 14, 14, 1, 1, PADDED),
    Layer('Res2Net 28w', 28, 3, 28, 28, 1, 1, PADDED),
    Layer('Res2Net 56w', 14, 3, 56, 56, 1, 1, ('plain', 'padded to 16', 'padded to 64')),
    Layer('Res2Net 26w', 56, 3, 26, 26, 1, 1, PADDED),
    Layer('Res2NeXt 8x4d', 56, 3, 32, 32, 8, 1, PACKS[:4]),
    Layer('Res2NeXt 8x16d', 14, 3, 128, 128, 8, 1, ('plain', 'packs of 64', 'packs of 128')),
    Layer('ResNeXt 64x16d', 14, 3, 1024, 1024, 64, 1, ('plain', 'packs of 32', 'packs of 64')),
    Layer('1x1', 56, 1, 64, 256, 1, 1, ('plain', 'products')),
    Layer('1x1, stride 2', 56, 1, 256, 512, 1, 2, ('plain', 'products')),
    Layer('deep stem', 112, 3, 32, 32, 1, 1, ('plain', 'channels first')),
]


def jax_call(
    layer: Layer, form: str, job: str, batch: int, dtype: str
) -> tuple[Callable[..., Any], tuple[Array, ...]]:
    """The 'forward' or the 'gradients' (of map and kernel) as a jitted function, and its arguments.

    Its calls cost less of the host's time than those of a function compiled ahead of time.
    """
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((batch, layer.side, layer.side, layer.inputs), np.float32)
    weights = rng.standard_normal(
        (layer.size, layer.size, layer.inputs // layer.groups, layer.outputs), np.float32
    )
    x = jnp.asarray(pixels.transpose(0, 3, 1, 2) if form == 'channels first' else pixels, dtype)
    kernel = jnp.asarray(weights, dtype)
    geometry = {'stride': layer.stride, 'padding': layer.size // 2, 'groups': layer.groups}
    convolve = partial(LAYER_FORMS[form], **geometry)
    if job == 'forward':
        return jax.jit(convolve), (x, kernel)
    # These functions are linear in each argument, so that no result is computed on the way.
    gradients = jax.jit(lambda g, x, kernel: jax.vjp(convolve, x, kernel)[1](g))
    return gradients, (jnp.ones(jax.eval_shape(convolve, x, kernel).shape, dtype), x, kernel)


def torch_call(layer: Layer, layout: str, job: str, batch: int, dtype: str, device: str) -> Callable[[], Any]:
    """The same, by torch with maps and kernels in a layout: 'channels_last' or 'contiguous'."""
    torch = importlib.import_module('torch')
    torch.backends.cudnn.benchmark = True
    order = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
    half, groups = layer.size // 2, layer.groups

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=getattr(torch, dtype)).to(memory_format=order)

    x = random(batch, layer.inputs, layer.side, layer.side)
    kernel = random(layer.outputs, layer.inputs // groups, layer.size, layer.size)
    forward = partial(torch.nn.functional.conv2d, x, kernel, None, layer.stride, half, 1, groups)
    if job == 'forward':
        return forward
    wanted = (True, True, False)  # of map, kernel and bias
    settings = ([layer.stride] * 2, [half] * 2, [1, 1], False, [0, 0], groups, wanted)
    backward = torch.ops.aten.convolution_backward
    return partial(backward, torch.ones_like(forward()), x, kernel, None, *settings)

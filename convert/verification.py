"""Proves a conversion: compares PyTorch's net and ours on the same image, block by block.

PyTorch's net is timm's, or torchvision's where timm is not installed. Nothing else in the converter needs
either.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from PIL import Image

from flaxnets import zoo
from flaxnets.api import transform
from flaxnets.errors import FlaxnetsError
from flaxnets.nets.arch import Arch
from flaxnets.nets.blocks import Block
from flaxnets.zoo.records import Config

from .checkpoint import net_of
from .names.tree import State, is_floating

TOLERANCE = 1e-4  # of the largest magnitude of a block's output


@dataclass(frozen=True)
class Difference:
    """How far one layer's outputs in the two nets are apart.

    Attributes:
      layer: the layer's name: 'bn1', 'layer1.0', ..., 'fc'.
      largest: the largest difference of a value.
      relative: `largest` over the largest magnitude in PyTorch's output.
    """

    layer: str
    largest: float
    relative: float

    @property
    def within(self) -> bool:
        """Whether `relative` is within the tolerance."""
        return self.relative <= TOLERANCE


@dataclass(frozen=True)
class Verification:
    """What `verify` measured.

    Attributes:
      reference: the library and version of PyTorch's net.
      image: the image that both nets were given.
      layers: the stem's BatchNorm (`bn1`), every block, and the classifier (`fc`), in order.
    """

    reference: str
    image: str
    layers: tuple[Difference, ...]

    @property
    def first_outside(self) -> Difference | None:
        """The first layer that leaves the tolerance; None if the conversion is proven."""
        return next((layer for layer in self.layers if not layer.within), None)

    def to_json(self) -> dict[str, Any]:
        """The measurements as the certificate holds them."""
        return {**asdict(self), 'tolerance': TOLERANCE, 'within': self.first_outside is None}


def verify(state: State, variables: Any, config: Config, image: str | None = None) -> Verification:
    """Runs both nets on one image and compares them layer by layer.

    Args:
      state: PyTorch's tensors, under canonical names.
      variables: the Flax variables that they were converted to, of any dtype; both nets compute in float32.
      config: the net. Where it is `folded`, PyTorch's net still has BatchNorm.
      image: an image file, or None for a smooth random pattern.

    Raises:
      FlaxnetsError: neither timm nor torchvision is installed, they have no such net, or the image cannot be
        read.
    """
    picture = _pattern() if image is None else image
    preprocess = replace(config.preprocess, unsupported=())  # any image will do, prepared in any way
    if config.in_chans != 3:
        preprocess = replace(preprocess, mean=(0.5,), std=(0.5,))
    images = transform(preprocess)(picture)[None]
    if config.in_chans != 3:
        images = images[..., np.arange(config.in_chans) % 3]  # red, green, blue, red, ...
    theirs, reference = _torch_outputs(state, images, config)
    ours = _flax_outputs(variables, images, config)
    layers = []
    for layer, expected in theirs.items():
        largest, scale = np.abs(ours[layer] - expected).max(), np.abs(expected).max()
        # A value that is not finite makes this infinite or NaN, which no tolerance admits.
        relative = float(largest / scale) if scale else float(largest)
        layers.append(Difference(layer, float(largest), relative))
    return Verification(reference, image or 'a smooth random pattern', tuple(layers))


def _pattern() -> Image.Image:
    """An image with structure at every scale, always the same: the mean of noise of four grain sizes."""
    rng = np.random.default_rng(0)
    layers = []
    for size in (8, 32, 128, 512):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        layers.append(np.asarray(noise.resize((512, 512), Image.Resampling.BICUBIC), np.float32))
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def _flax_outputs(variables: Any, images: np.ndarray, config: Config) -> dict[str, np.ndarray]:
    model = net_of(config)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables)

    def wanted(module: Any, method: str) -> bool:
        return method == '__call__' and (isinstance(module, Block) or module.path in (('bn1',), ('fc',)))

    @jax.jit
    def run(variables: Any, images: Any) -> Any:
        _, changed = model.apply(variables, images, capture_intermediates=wanted, mutable=['intermediates'])
        return changed['intermediates']

    with jax.default_matmul_precision('highest'):  # accelerators compute in less than float32 by default
        outputs = run(exact, images)
    flat = traverse_util.flatten_dict(outputs, sep='.')
    return {name.removesuffix('.__call__'): np.asarray(output) for name, (output,) in flat.items()}


def _torch_outputs(state: State, images: np.ndarray, config: Config) -> tuple[dict[str, np.ndarray], str]:
    torch = _import('torch')
    net, reference = torch_net(config.name, num_classes=config.num_classes, in_chans=config.in_chans)
    tensors = {
        key: torch.from_numpy(np.array(t, np.float32 if is_floating(t) else None)) for key, t in state.items()
    }
    net.load_state_dict(tensors, strict=True)
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            array = output.numpy().copy()  # the next layer works in place
            outputs[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array

        return hook

    for name, module in net.named_modules():
        parts = name.split('.')
        if name in ('bn1', 'fc') or (parts[0].startswith('layer') and len(parts) == 2):
            module.register_forward_hook(keep(name))
    with torch.inference_mode():
        net.eval()(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    if config.num_classes == 0:
        outputs.pop('fc', None)  # timm's is an identity there
    return outputs, reference


def torch_net(name: str, **kwargs: Any) -> tuple[Any, str]:
    """PyTorch's net of that name in the zoo, randomly initialised, and what it comes from.

    Where timm does not list the net, it is built from timm's blocks.

    Args:
      name: key of `flaxnets.zoo.NETS`.
      **kwargs: `num_classes`, `in_chans` and further options of timm's `create_model`.

    Raises:
      FlaxnetsError: neither timm nor torchvision can be imported, or torchvision has no such net.
    """
    try:
        timm = _import('timm')
    except FlaxnetsError:
        return _torchvision_net(name, **kwargs)
    reference = f'timm {timm.__version__}'
    if timm.is_model(name):
        return timm.create_model(name, **kwargs), reference
    return of_timms_blocks(zoo.NETS[name], **kwargs), f'{reference}, its blocks'


def of_timms_blocks(arch: Arch, **kwargs: Any) -> Any:
    """The net of an architecture, built from timm's blocks and randomly initialised.

    Args:
      arch: any architecture, of the zoo or not.
      **kwargs: `num_classes`, `in_chans` and further options of timm's `ResNet`.
    """
    from timm.models.res2net import Bottle2neck
    from timm.models.resnest import ResNestBottleneck
    from timm.models.resnet import Bottleneck, ResNet

    blocks = {'resnext': Bottleneck, 'res2net': Bottle2neck, 'resnest': ResNestBottleneck}
    block_args: dict[str, Any] = {}
    if arch.block == 'resnest':
        block_args = dict(radix=arch.radix, avd=True, avd_first=arch.avd_first)
    if arch.block == 'res2net':
        block_args = dict(scale=arch.scale)
    if arch.se:
        block_args = dict(attn_layer='se')
    return ResNet(
        blocks[arch.block],  # type: ignore[arg-type]  # timm's own nets pass these
        arch.layers,
        cardinality=arch.cardinality,
        base_width=arch.base_width,
        stem_type='deep' if arch.deep_stem else '',
        stem_width=arch.stem_width,
        avg_down=arch.avg_down,
        channels=arch.stage_planes,
        block_args=block_args,
        **kwargs,
    )


def _torchvision_net(name: str, num_classes: int = 1000, in_chans: int = 3) -> tuple[Any, str]:
    models = _import('torchvision.models', needed='timm or torchvision')
    make = getattr(models, name, None) if name.startswith('resnext') else None
    if make is None or in_chans != 3 or num_classes == 0:
        raise FlaxnetsError(
            f'torchvision has no net equal to {name}: verifying needs timm (pip install torch timm)'
        )
    return make(num_classes=num_classes), f'torchvision {_import("torchvision").__version__}'


def _import(module: str, needed: str = 'PyTorch and timm') -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: builds of torch and torchvision that do not fit
        raise FlaxnetsError(
            f'verifying needs {needed} (pip install torch timm): {module} cannot be imported: {error}'
        ) from error

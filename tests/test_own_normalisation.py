"""Models that normalise images themselves, or say how: pickled whole, or as a state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from nets import timm_net
from torch import nn
from torchvision.transforms import Normalize

from convert.conversion import open_checkpoint
from flaxnets.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
BYTES = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # ImageNet's, blue first
NET = timm_net('resnext_tiny', num_classes=5)


class Buffers(nn.Module):
    """A layer that keeps its numbers as buffers, as attributes, or as buffers that no state dict has."""

    def __init__(self, mean: Any, std: Any, names: tuple[str, str] = ('mean', 'std'), kind: str = 'kept'):
        super().__init__()
        for name, values in zip(names, (mean, std), strict=True):
            tensor = torch.tensor(values).reshape(-1, 1, 1)
            if kind == 'attribute':
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=kind == 'kept')


class Detector(Buffers):
    def __init__(self, **options: Any) -> None:
        super().__init__(*BYTES, ('pixel_mean', 'pixel_std'), 'hidden')
        self.backbone = NET
        self.__dict__.update(options)


class Parts(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def images(saved: Any, tmp_path: Path) -> Preprocess:
    torch.save(saved, tmp_path / 'a.pth')
    return open_checkpoint(tmp_path / 'a.pth', 'resnext_tiny').config.preprocess


def test_layers_around_the_net_say_how_images_are_normalised(tmp_path: Path) -> None:
    buffers = Buffers(MEAN, STD)
    robust = Parts(normalizer=Buffers(MEAN, STD, ('new_mean', 'new_std')), model=NET)
    for saved in (
        nn.Sequential(buffers, NET),
        nn.Sequential(Buffers(MEAN, STD, kind='attribute'), NET),
        nn.Sequential(Normalize(MEAN, STD), NET),
        nn.Sequential(Buffers(MEAN, STD, kind='hidden'), NET),
        nn.Sequential(Buffers(*((255 * np.array(v)).tolist() for v in (MEAN, STD))), NET),
        nn.Sequential(buffers, NET).state_dict(),
        {'state_dict': robust.state_dict(), 'epoch': 3},
        robust,
        nn.DataParallel(robust),
    ):
        found = images(saved, tmp_path)
        assert (found.mean, found.std, found.channel_order, found.unsupported) == (MEAN, STD, 'rgb', ())
        # The oracle: what the layer makes of an image, pixel by pixel.
        pixel = torch.tensor([0.1, 0.6, 0.9]).reshape(3, 1, 1)
        ours = (pixel.numpy().ravel() - found.mean) / found.std
        np.testing.assert_allclose(ours, Normalize(MEAN, STD)(pixel).ravel(), rtol=1e-6)


def test_bytes_and_their_channel_order(tmp_path: Path) -> None:
    for saved, order in ((Detector(), 'bgr'), (Detector(input_format='RGB'), 'rgb')):
        found = images(saved, tmp_path)
        assert found.channel_order == order and found.unsupported == ()
        np.testing.assert_allclose(found.mean, np.array(BYTES[0]) / 255, rtol=1e-6)
        np.testing.assert_allclose(found.std, np.array(BYTES[1]) / 255, rtol=1e-6)
    for to_rgb, order in ((True, 'rgb'), (False, 'bgr')):
        layer: Any = Buffers((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), kind='hidden')
        layer.to_rgb = to_rgb
        found = images(Parts(data_preprocessor=layer, backbone=NET), tmp_path)
        assert found.channel_order == order
        np.testing.assert_allclose(found.mean, IMAGENET_MEAN, rtol=1e-6)
        np.testing.assert_allclose(found.std, IMAGENET_STD, rtol=1e-6)


def test_what_is_not_certain_is_refused_or_left(tmp_path: Path) -> None:
    twice = nn.Sequential(Buffers(MEAN, STD), nn.Sequential(Buffers(STD, MEAN), NET))
    assert 'several' in images(twice, tmp_path).unsupported[0]
    saved = {'state_dict': nn.Sequential(Buffers(MEAN, STD), NET).state_dict()}
    args = {'model': 'resnext_tiny', 'mean': [0.3] * 3, 'std': [0.3] * 3}
    assert 'once more' in images({**saved, 'args': args}, tmp_path).unsupported[0]
    same = {**args, 'mean': list(MEAN), 'std': list(STD)}
    plain = {**args, 'mean': [0.0] * 3, 'std': [1.0] * 3}
    for said in (same, plain):
        found = images({**saved, 'args': said}, tmp_path)
        assert (found.mean, found.std, found.unsupported) == (MEAN, STD, ())
    # Numbers of outputs, and those of something beside the net.
    for other in (
        Parts(model=NET, target=Buffers(MEAN, STD)),
        Parts(model=NET, scale=Buffers([0.3], [0.2])),
        Parts(model=NET, other=Parts(inner=Buffers(MEAN, STD))),
    ):
        assert images(other.state_dict(), tmp_path).mean == IMAGENET_MEAN


def test_a_pickled_model_of_timms_says_how_its_images_are(tmp_path: Path) -> None:
    net = timm.create_model(
        'resnext50_32x4d',
        num_classes=3,
        pretrained_cfg_overlay=dict(
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation='bicubic',
            crop_pct=1.0,
            input_size=(3, 160, 160),
        ),
    )
    expected = timm.data.resolve_data_config({}, model=net)
    torch.save(net, tmp_path / 'a.pth')
    found = open_checkpoint(tmp_path / 'a.pth').config
    assert found.name == 'resnext50_32x4d'
    got = found.preprocess
    assert (3, got.height, got.width) == expected['input_size']
    assert (got.mean, got.std) == (expected['mean'], expected['std'])
    assert (got.interpolation, got.crop_pct) == (expected['interpolation'], expected['crop_pct'])
    torch.save(nn.Sequential(Normalize(MEAN, STD), net), tmp_path / 'b.pth')
    got = open_checkpoint(tmp_path / 'b.pth').config.preprocess
    assert (got.mean, got.std, got.height, got.unsupported) == (MEAN, STD, 160, ())

"""Class activation maps: those of the package grad-cam on timm's net."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from nets import random_variables, to_flax
from PIL import Image
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection_with_sign_correction
from skimage import data as photographs
from states import SMALL, small_net

from flaxnets.__main__ import main
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.inference.activation_maps import METHODS, class_activation_map
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo.records import Config


class SignedEigenCAM(EigenCAM):
    """The peer's, whose sign is chance, with its own rule for the sign."""

    def get_cam_image(self, inputs, layer, targets, activations, grads, eigen_smooth):
        return get_2d_projection_with_sign_correction(activations)


PEERS = {
    'gradcam': GradCAM,
    'gradcam++': GradCAMPlusPlus,
    'hirescam': HiResCAM,
    'layercam': LayerCAM,
    'eigencam': SignedEigenCAM,
}
IMAGES = np.random.default_rng(0).normal(size=(3, 65, 97, 3)).astype(np.float32)
# Every method at the last stage, and the way back from the stem and from between two stages. The gradients
# of every kind of block are in `test_modes.py`.
CASES = [*((method, 4) for method in PEERS), ('gradcam++', 0), ('layercam', 3)]
# The pictures' net, which compiles in a second.
ARCH = Arch('resnext', (1, 1, 1, 1), 2, 32, planes=8)


@pytest.mark.parametrize('shape', [(2, 3, 4, 20), (2, 7, 5, 6)])
def test_the_first_component_by_the_smaller_of_two_products(shape: tuple[int, ...]) -> None:
    maps = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(METHODS['eigencam'](jnp.asarray(maps), jnp.asarray(maps)))
    rows = maps.reshape(shape[0], -1, shape[-1]).astype(np.float64)
    for image, map_ in zip(rows, found, strict=True):
        first = np.linalg.svd(image - image.mean(0))[0][:, 0]
        first = -first if -first.min() > first.max() else first
        np.testing.assert_allclose(map_.ravel(), first, atol=1e-5)


@pytest.fixture(scope='module')
def nets() -> Any:
    """timm's net, and the same weights for ours."""
    net = small_net('resnext')
    with torch.no_grad():  # grad-cam's map of a class whose weights are mostly negative is 0 everywhere
        net.fc.weight.add_(net.fc.weight.std())
    return net, to_flax(net, build(SMALL['resnext'], 5))


@pytest.mark.parametrize(('method', 'stage'), CASES)
def test_maps_are_grad_cams(method: str, stage: int, nets: Any) -> None:
    reference, variables = nets
    layer = [reference.act1, reference.layer1, reference.layer2, reference.layer3, reference.layer4][stage]
    wanted = [1, 4, 2]
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    with PEERS[method](reference, [layer]) as peer:
        expected = peer(images, [ClassifierOutputTarget(i) for i in wanted])
    model = build(SMALL['resnext'], 5)
    found, classes = class_activation_map(model, variables, IMAGES, wanted, method=method, stage=stage)
    assert classes.tolist() == wanted and found.shape == IMAGES.shape[:3] and found.dtype == np.float32
    assert expected.max() > 0.9
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert float(found.min()) == 0 and float(found.max()) == pytest.approx(1, abs=1e-5)


def test_the_most_probable_class_is_taken(nets: Any) -> None:
    model, (reference, variables) = build(SMALL['resnext'], 5), nets
    _, classes = class_activation_map(model, variables, IMAGES)
    with torch.no_grad():
        logits = reference(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_array_equal(classes, logits.argmax(-1))


def test_refused(nets: Any) -> None:
    model, (_, variables) = build(SMALL['resnext'], 5), nets
    assert set(METHODS) == set(PEERS)
    for options, word in (
        ({'method': 'cam'}, 'gradcam'),
        ({'stage': 5}, 'stage=5'),
        ({'classes': [1, 2, 5]}, 'class 5'),
        ({'classes': [1]}, '1 classes'),
    ):
        with pytest.raises(FlaxnetsError, match=word):
            class_activation_map(model, variables, IMAGES, **options)
    with pytest.raises(FlaxnetsError, match='no classifier'):
        class_activation_map(build(SMALL['resnext'], 0), variables, IMAGES)


def test_a_map_of_one_pixel_tells_nothing(nets: Any) -> None:
    model, (_, variables) = build(SMALL['resnext'], 5), nets
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    with pytest.raises(FlaxnetsError, match='one pixel'):
        jax.eval_shape(functools.partial(class_activation_map, model), variables, images)


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config('small', ARCH, Preprocess(65, 1.0), num_classes=3, classes=('cat', 'dog', 'hen'))
    weights.save(tmp_path / 'net', random_variables(build(config.arch, 3)), config)
    Image.fromarray(photographs.chelsea()).save(tmp_path / 'cat.jpg')
    out = tmp_path / 'cat.png'
    options = ['explain', str(tmp_path / 'cat.jpg'), '--model', str(tmp_path / 'net'), '--out', str(out)]
    assert main([*options, '--method', 'gradcam', 'eigencam', '--class', 'Dog', '--json']) == 0
    (fact,) = json.loads(capsys.readouterr().out)
    assert (fact['class'], fact['index']) == ('dog', 1) and 0 < fact['probability'] < 1
    with Image.open(out) as picture:
        assert picture.width == 660  # the image and two maps
    out.unlink()
    for wrong in (['--class', 'horse'], ['--class', '3'], ['--method', 'cam', '--stage', '7']):
        assert main([*options, *wrong]) == 1 and capsys.readouterr().err.startswith('error: ')
    assert main([*options[:-1], 'cat.pdf']) == 1 and not out.exists()

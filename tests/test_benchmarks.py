"""Published data sets by name: the classes are theirs, or nothing is said."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import timm
import torch
from nets import random_variables
from PIL import Image
from skimage import data as photographs
from timm.data import RealLabelsImagenet
from torchvision import transforms

import flaxnets
from flaxnets.errors import FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo import imagenet
from flaxnets.zoo.records import Config
from train.__main__ import main

ARCH = Arch('resnext', (1, 1, 1, 1), 2, 32, planes=8)
WNIDS = imagenet.wnids()


def save(path: Path, seed: int = 0, classes: tuple[str, ...] | None = None) -> Path:
    count = len(classes) if classes else 1000
    config = Config('small', ARCH, Preprocess(32, 0.875), num_classes=count, classes=classes)
    weights.save(path, random_variables(build(ARCH, count), seed), config)
    return path


@pytest.fixture(scope='module')
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two nets whose 1000 outputs are ImageNet's, in two orders."""
    root = tmp_path_factory.mktemp('nets')
    return save(root / 'a', classes=WNIDS), save(root / 'b', 1, WNIDS[::-1])


def folders(root: Path, names: list[str], files: list[str] | None = None) -> Path:
    whole = photographs.chelsea()
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        picture = Image.fromarray(whole[i % 250 : i % 250 + 40, i % 400 : i % 400 + 44])
        picture.save(root / name / (files[i] if files else f'{i}.png'), 'PNG')
    return root


def evaluate(capsys: pytest.CaptureFixture[str], *options: object) -> dict:
    code = main(['eval', *map(str, options), '--json', '--quiet', '--batch', '250', '--threads', '1'])
    output = capsys.readouterr()
    assert code == 0, output.err
    return {**json.loads(output.out), 'notes': output.err}


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    assert main(['eval', *map(str, options), '--quiet']) == 1
    return capsys.readouterr().err


def probabilities(net: Path, images: list[Path]) -> torch.Tensor:
    model, variables = flaxnets.load(net)
    transform = flaxnets.transform(net)
    found = jax.jit(model.apply)(variables, transform.batch(images))
    return torch.from_numpy(np.array(found)).softmax(1)


def test_real_labels_are_counted_as_timm_does(
    nets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f'ILSVRC2012_val_{i + 1:08}.JPEG' for i in range(1000)]
    root = folders(tmp_path / 'val', list(WNIDS), files)
    shares = probabilities(nets[0], [root / wnid / file for wnid, file in zip(WNIDS, files, strict=True)])
    rng = np.random.default_rng(0)
    # Labels that are sometimes among the first, sometimes none, sometimes wrong.
    best = shares.topk(5).indices.numpy()
    real = [[int(best[i, rng.integers(0, 5)]), 7] if i % 3 else [] if i % 2 else [3] for i in range(1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert 'real.json' in refused(capsys, '--model', nets[0], '--data', 'imagenet-real:val')
    (root / 'real.json').write_text(json.dumps(real + [[]] * 49_000))
    found = evaluate(capsys, '--model', nets[0], '--data', f'imagenet-real:{root}')
    every = [f'ILSVRC2012_val_{i + 1:08}.JPEG' for i in range(50_000)]
    timms = RealLabelsImagenet(every, real_json=str(root / 'real.json'))
    timms.add_result(shares)
    assert found['real_top1'] == pytest.approx(timms.get_accuracy(k=1))
    assert found['real_top5'] == pytest.approx(timms.get_accuracy(k=5))
    assert '50000' in found['notes'] and 'ReaL' in found['benchmark'] and found['published'] == {}


def test_imagenet_r_by_two_nets_whose_outputs_have_other_orders(
    nets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = Path(timm.__file__).parent / 'data' / '_info'
    valid = (info / 'imagenet_r_synsets.txt').read_text().split()
    root = folders(tmp_path / 'r', valid)
    images = [root / wnid / f'{i}.png' for i, wnid in enumerate(valid)]
    columns = [WNIDS.index(wnid) for wnid in valid]
    shares = [probabilities(nets[0], images), probabilities(nets[1], images).flip(1)]
    among = [(one[:, columns] / one[:, columns].sum(1, keepdim=True)) for one in shares]
    labels = torch.arange(200)
    found = evaluate(capsys, '--model', *nets, '--data', f'imagenet-r:{root}')
    both = (among[0] + among[1]) / 2
    assert found['top1'] == pytest.approx(100 * (both.argmax(1) == labels).float().mean().item())
    in_five = (both.topk(5).indices == labels[:, None]).any(1)
    assert found['top5'] == pytest.approx(100 * in_five.float().mean().item())
    loss = torch.nn.functional.nll_loss(both.log(), labels).item()
    assert found['loss'] == pytest.approx(loss, rel=1e-4)
    alone = 100 * (among[1].argmax(1) == labels).float().mean().item()
    assert found[f'top1 of {nets[1]} alone'] == pytest.approx(alone)
    assert (found['among'], found['among_classes']) == ('data', 200) and '30000' in found['notes']
    assert 'not the 200' in refused(capsys, '--model', nets[0], '--data', f'imagenet-a:{root}')
    assert '1000' in refused(capsys, '--model', nets[0], '--data', f'imagenet-sketch:{root}')


def test_other_nets_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = save(tmp_path / 'net', classes=('cat', 'dog'))
    root = folders(tmp_path / 'data', ['cat', 'dog'])
    assert '1000 classes' in refused(capsys, '--model', net, '--data', f'imagenet-v2:{root}')
    assert 'FOLDER' in refused(capsys, '--model', net, '--data', 'imagenet-v2')
    assert 'imagenet-v2, imagenet-a' in refused(capsys, '--model', net, '--data', f'imagenet-v3:{root}')


@pytest.mark.parametrize('size', [(41, 60), (33, 33), (200, 37)])
@pytest.mark.parametrize('mode', ['center', 'squash'])
def test_five_crops_are_torchvisions(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    found = flaxnets.transform(Preprocess(32, 0.8, mode)).five_crops(image)
    resize = transforms.Resize(40 if mode == 'center' else (40, 40))
    expected = transforms.FiveCrop(32)(resize(image))
    np.testing.assert_array_equal(found, np.stack([np.asarray(crop) for crop in expected]))


@pytest.mark.parametrize('preprocess', [Preprocess(32, 1.0), Preprocess(32, 0.8, 'border')])
def test_no_corners(preprocess: Preprocess) -> None:
    with pytest.raises(FlaxnetsError, match='crop'):
        flaxnets.transform(preprocess).five_crops(Image.new('RGB', (50, 50)))

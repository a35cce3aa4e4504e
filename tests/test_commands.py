"""python -m flaxnets: what its user sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import random_variables, randomise, timm_net
from PIL import Image
from skimage import data as photographs
from states import SMALL as SMALLS
from states import small_net
from timm.data import ImageNetInfo, create_transform

import flaxnets
from flaxnets import zoo
from flaxnets.__main__ import main
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build, costs
from flaxnets.store import weights
from flaxnets.zoo.records import Config

NET = 'resnest14d'
SMALL = Arch('resnext', (1, 1, 1, 1), 4, 4)


@pytest.fixture(scope='module')
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('photo') / 'cat.png'
    Image.fromarray(photographs.chelsea()).save(path)
    return path


@pytest.fixture(scope='module')
def reference() -> torch.nn.Module:
    return randomise(timm_net(NET))


@pytest.fixture(scope='module')
def file(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'net.pth'
    torch.save(reference.state_dict(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ''
    return output.out


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == '' and output.err.startswith('error: ') and 'Traceback' not in output.err
    return output.err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, 'list').splitlines()
    assert [line.split()[0] for line in lines] == flaxnets.list_models()
    assert json.loads(run(capsys, 'list', 'resnest*d', '--json')) == flaxnets.list_models('resnest*d')
    tagged = run(capsys, 'list', 'resnext50_32x4d', '--weights')
    assert 'resnext50_32x4d.gluon_in1k' in tagged and '79.35/94.42 % at 224 px' in tagged
    assert "no name matches 'vit*'" in refused(capsys, ['list', 'vit*'])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, 'info', 'resnest101')
    for words in (
        'resnest101e',
        '48,275,016 parameters',
        '13,321,472,000 MACs',
        '256 px',
        '82.9',
        'apache-2.0',
    ):
        assert words in text
    assert 'resnest101-22405ba7.pth' in text
    facts = json.loads(run(capsys, 'info', 'resnest101', '--json'))
    assert facts['parameters'] == 48_275_016
    assert facts['weights'][0]['sha256'] == '22405ba7'
    assert 'did you mean' in refused(capsys, ['info', 'resnest102'])


@pytest.mark.parametrize('name', ['resnest_tiny', 'res2net_tiny', 'resnext_tiny'])
def test_info_draws_the_net(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / 'net.png'
    assert run(capsys, 'info', name, '--plot', str(path)).startswith(name)
    with Image.open(path) as picture:
        assert picture.size == (1155, 792)
    assert '.png' in refused(capsys, ['info', name, '--plot', str(tmp_path / 'net.pdf')])


@pytest.mark.parametrize('kind', ['seresnext', 'res2netd', 'resnest'])
def test_costs_are_those_of_timms_parts(kind: str) -> None:
    reference = small_net(kind)
    macs: dict[str, int] = {}

    def count(name: str, module: torch.nn.Module, output: torch.Tensor) -> None:
        macs[name] = macs.get(name, 0) + output[0, 0].numel() * module.weight.numel()

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            part = name.split('.')[0]
            module.register_forward_hook(
                lambda m, _, y, part=part: count(part, m, y if y.ndim > 2 else y[..., None])
            )
    reference(torch.zeros(1, 3, 65, 97))
    found = costs(build(SMALLS[kind], 5), (65, 97))
    for part, module in reference.named_children():
        parameters = sum(p.numel() for p in module.parameters())
        if parameters:
            assert (found[part].parameters, found[part].macs) == (parameters, macs.get(part, 0))
    assert found['layer2'].output == (9, 13, 512) and found['fc'].output == (5,)


def test_info_of_a_file_has_nobody_elses_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(timm_net(NET).state_dict(), tmp_path / 'mine.pth')
    assert json.loads(run(capsys, 'info', NET, '--json'))['weights']
    assert json.loads(run(capsys, 'info', str(tmp_path / 'mine.pth'), '--json'))['weights'] == []


def test_info_of_a_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = build(zoo.ARCHS[NET], 7, 1)
    weights.save(
        tmp_path / 'mine', random_variables(model), Config(NET, zoo.ARCHS[NET], num_classes=7, in_chans=1)
    )
    said = run(capsys, 'info', str(tmp_path / 'mine'))
    assert '7 classes, 1 input channels' in said
    assert 'mean (0.449,), std (0.226,)' in said  # what is applied: the averages of the colours'
    own = Config('my own', SMALL, num_classes=7, folded=True)
    weights.save(tmp_path / 'own', random_variables(build(SMALL, 7, folded=True)), own)
    text = run(capsys, 'info', str(tmp_path / 'own'))
    assert text.startswith('my own: resnext, 1-1-1-1') and 'BatchNorm folded' in text


def test_predictions_are_timms(
    capsys: pytest.CaptureFixture[str], photo: Path, file: Path, reference: torch.nn.Module
) -> None:
    transform = create_transform((3, 224, 224), interpolation='bilinear', crop_pct=0.875)
    with torch.no_grad():
        expected = reference(transform(Image.open(photo).convert('RGB'))[None]).softmax(1)[0]
    probabilities, indices = (t.numpy() for t in expected.topk(4))
    results = json.loads(
        run(capsys, 'predict', str(photo), '--model', str(file), '--arch', NET, '--topk', '4', '--json')
    )
    assert [r['image'] for r in results] == [str(photo)]
    top = results[0]['top']
    assert [guess['index'] for guess in top] == indices.tolist()
    np.testing.assert_allclose([guess['probability'] for guess in top], probabilities, rtol=1e-4)
    info = ImageNetInfo()
    assert [guess['class'] for guess in top] == [info.index_to_description(i) for i in indices]


def test_predictions_for_people(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path) -> None:
    model = build(zoo.ARCHS[NET], 3)
    config = Config(NET, zoo.ARCHS[NET], num_classes=3, classes=('cat', 'dog', 'fish'))
    weights.save(tmp_path / 'net', random_variables(model), config)
    lines = run(capsys, 'predict', str(photo), str(photo), '--model', str(tmp_path / 'net')).splitlines()
    assert len(lines) == 2 * (1 + 3)
    assert lines[0] == str(photo)
    assert {line.split()[-1] for line in lines[1:4]} == {'cat', 'dog', 'fish'}
    (tmp_path / 'names.txt').write_text('ant\nbee\nwasp\n')
    options = ['--model', str(tmp_path / 'net'), '--classes', str(tmp_path / 'names.txt')]
    renamed = run(capsys, 'predict', str(photo), *options)
    assert {line.split()[-1] for line in renamed.splitlines()[1:]} == {'ant', 'bee', 'wasp'}
    assert sum(float(line.split('%')[0]) for line in lines[1:4]) == pytest.approx(100, abs=0.02)


def test_predict_refuses(
    capsys: pytest.CaptureFixture[str],
    photo: Path,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def words(*arguments: Any) -> str:
        return refused(capsys, ['predict', *map(str, arguments)])

    assert 'nowhere.jpg' in words('nowhere.jpg', '--model', file, '--arch', NET)
    assert 'net.pth' in words(file, '--model', file, '--arch', NET)
    assert 'nowhere: no such file' in words(photo, '--model', 'nowhere')
    assert '--topk 0' in words(photo, '--model', file, '--arch', NET, '--topk', 0)
    monkeypatch.setenv('FLAXNETS_OFFLINE', '1')
    monkeypatch.setenv('FLAXNETS_HOME', str(tmp_path))
    assert 'resnest50-528c19ca.pth' in words(photo, '--model', 'resnest50d')
    headless = build(zoo.ARCHS[NET], 0)
    weights.save(
        tmp_path / 'headless', random_variables(headless), Config(NET, zoo.ARCHS[NET], num_classes=0)
    )
    assert 'no classifier' in words(photo, '--model', tmp_path / 'headless')

"""Classes end to end: evaluations beside timm's, heads of fine-tuned nets, what runs publish."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from nets import numpy_state, randomise, timm_net
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.reader_factory import create_reader

import flaxnets
from convert.arithmetic import with_classes
from convert.conversion import open_checkpoint
from convert.writing import write
from flaxnets.errors import FlaxnetsError
from flaxnets.store import weights
from flaxnets.zoo import imagenet
from train import recipes
from train.__main__ import main
from train.evaluation.report import Report, run
from train.job import initial_state, make_job

NET = 'resnext_tiny'
TWELVE = [f'c{i}' for i in range(1, 13)]


def save(path: Path, net: torch.nn.Module, **around: Any) -> Path:
    torch.save({'state_dict': net.state_dict(), 'arch': NET, **around}, path)
    return path


def folders(root: Path, names: list[str]) -> Path:
    generator = np.random.default_rng(0)
    for name in names:
        (root / 'val' / name).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(root / 'val' / name / 'a.png')
    return root


def evaluate(model: Path, data: Path, **options: Any) -> Report:
    usual = dict(
        split='', out=None, batch=64, dtype='float32', workers=1, feed='threads', real_labels=None, quiet=True
    )
    asked = dict(images=None, classes=None, class_order=None, among=None, crops=1, flip=False)
    return run(argparse.Namespace(model=[str(model)], data=f'folder:{data}', **{**usual, **asked, **options}))


def pick(net: torch.nn.Module, output: int) -> torch.nn.Module:
    """A net that answers with one output, whatever it sees."""
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.zero_()
        net.fc.bias[output] = 9
    return net


@pytest.fixture(scope='module')
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders(tmp_path_factory.mktemp('twelve'), TWELVE)


def test_the_folder_that_timm_names_the_output_of(twelve: Path, tmp_path: Path) -> None:
    output = 9
    net = pick(timm_net(NET, num_classes=12), output)
    timms = create_reader('', str(twelve / 'val')).class_to_idx
    expected = next(name for name, number in timms.items() if number == output)
    file = save(tmp_path / 'timm.pth', net, args={'model': NET}, version=2)
    out = tmp_path / 'out'
    report = evaluate(file, twelve, out=str(out))
    rows = [line.split(',') for line in (out / 'per_class.csv').read_text().splitlines()[1:]]
    assert [row[1] for row in rows if float(row[3]) == 100] == [expected] == ['c10']
    assert report.result.top1 == pytest.approx(100 / 12)
    found = json.loads((out / 'result.json').read_text())
    assert 'natural' in found['matched'] and found['among'] == 'all' and found['among_classes'] == 12
    assert 'natural' in report.text() and 'all 12 outputs' in report.text()


def test_what_nothing_tells_is_asked(
    twelve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / 'own.pth'
    torch.save(pick(timm_net(NET, num_classes=12), 1).state_dict(), file)
    command = ['eval', '--model', str(file), '--data', f'folder:{twelve}', '--quiet', '--json']
    assert main(command) == 1
    error = capsys.readouterr().err
    for words in ("'c1', 'c10', 'c11'", "'c1', 'c2', 'c3'", '--classes', '--class-order'):
        assert words in error
    (tmp_path / 'names.txt').write_text('\n'.join(TWELVE))
    assert main([*command, '--classes', str(tmp_path / 'names.txt'), '--out', str(tmp_path / 'out')]) == 0
    assert json.loads(capsys.readouterr().out)['matched'].startswith('by name')
    assert '1,c2,1,100.00,c2' in (tmp_path / 'out' / 'per_class.csv').read_text().splitlines()
    assert main([*command, '--classes', str(tmp_path / 'absent.txt')]) == 1


def test_imagenet_a_is_judged_as_timm_does(tmp_path: Path) -> None:
    """`validate.py --valid-labels` takes the columns of the data's classes before it compares."""
    info = Path(timm.__file__).parent / 'data' / '_info'
    valid = list(map(int, (info / 'imagenet_a_indices.txt').read_text().split()))
    ids = (info / 'imagenet_a_synsets.txt').read_text().split()
    root = folders(tmp_path / 'data', ids)
    net = randomise(timm_net(NET))
    # As mmpretrain keeps them: the outputs have English names.
    file = save(tmp_path / 'mm.pth', net, meta={'CLASSES': ImageNetInfo().label_descriptions()})
    reader = create_reader('', str(root / 'val'))
    transform = flaxnets.transform(open_checkpoint(file, NET).config)
    images = np.stack([transform(reader.samples[i][0]) for i in range(len(reader))])
    with torch.no_grad():
        logits = net(torch.from_numpy(images).permute(0, 3, 1, 2))
    targets = torch.tensor([target for _, target in reader.samples])
    for among, judged, labels in (
        (None, logits[:, valid], targets),
        ('all', logits, torch.tensor(valid)[targets]),
    ):
        report = evaluate(file, root, among=among)
        own = judged.gather(1, labels[:, None])
        # An output within rounding of the right one may stand on either side of it.
        fewest, most = ((judged > own + margin).sum(1).numpy() for margin in (1e-4, -1e-4))
        assert (fewest <= report.result.ranks).all() and (report.result.ranks < most).all()
        best = judged.argmax(1).numpy()
        np.testing.assert_array_equal(report.result.predictions, best if among else np.array(valid)[best])
        loss = torch.nn.functional.cross_entropy(judged, labels).item()
        assert report.result.loss == pytest.approx(loss, rel=1e-4)
        found = report.as_json()
        assert (found['among'], found['among_classes']) == (('all', 1000) if among else ('data', 200))
        assert found['published'] == {} and ('ImageNet-A' in report.text()) is (among is None)
        assert report.matching.names[valid[0]] == imagenet.class_names()[valid[0]]


def test_reassessed_labels_are_for_imagenets_outputs(twelve: Path, tmp_path: Path) -> None:
    net = timm_net(NET, num_classes=12)
    file = save(tmp_path / 'net.pth', net, args={'model': NET})
    with pytest.raises(FlaxnetsError, match='reassessed'):
        evaluate(file, twelve, real_labels='real.json')


# Fine-tuning.


@pytest.fixture(scope='module')
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes whose names are those of ImageNet's ids in another vocabulary and order."""
    path = tmp_path_factory.mktemp('letters') / 'data.npz'
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    labels = np.arange(40) % 5
    names = np.array([imagenet.wnids()[i] for i in (4, 0, 3, 1, 2)])
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels, classes=names)
    return path


@pytest.fixture(scope='module')
def five() -> torch.nn.Module:
    return randomise(timm_net(NET, num_classes=5, in_chans=1))


HEADS: Mapping[str, tuple[tuple[str, ...] | None, list[int] | None]] = {
    'other vocabulary': (imagenet.class_names()[:5], [4, 0, 3, 1, 2]),
    'same names': (imagenet.wnids()[:5], [4, 0, 3, 1, 2]),
    'others': (tuple('abcde'), None),
    'part of others': ((*imagenet.wnids()[:4], 'a'), None),
}


@pytest.mark.parametrize(('names', 'columns'), HEADS.values(), ids=HEADS)
def test_a_classifier_of_the_same_classes_is_kept_in_the_datas_order(
    names: tuple[str, ...] | None,
    columns: list[int] | None,
    letters: Path,
    five: torch.nn.Module,
    tmp_path: Path,
) -> None:
    torch.save(five.state_dict(), tmp_path / 'net.pth')
    checkpoint = open_checkpoint(tmp_path / 'net.pth', NET)
    write(with_classes(checkpoint, names) if names else checkpoint, tmp_path / 'net')
    settings = dataclasses.replace(
        recipes.get('digits'),
        model=NET,
        data=f'arrays:{letters}',
        weights=str(tmp_path / 'net'),
        batch_size=8,
    )
    job = make_job(settings)
    said: list[str] = []
    head = initial_state(job, said.append).params['fc']
    old = numpy_state(five)
    if columns is None:
        assert not np.array_equal(head['kernel'], old['fc.weight'].T)
        assert np.isin(head['kernel'], old['fc.weight']).mean() < 0.1
        assert len(said) == 1 and 'new classifier' in said[0]
    else:
        np.testing.assert_array_equal(head['kernel'], old['fc.weight'].T[:, columns])
        np.testing.assert_array_equal(head['bias'], old['fc.bias'][columns])
        assert len(said) == 1 and 'kept' in said[0]
    assert job.config.classes == job.training.classes  # what it publishes


def test_names_of_a_file_reach_its_directory(tmp_path: Path, five: torch.nn.Module) -> None:
    file = save(tmp_path / 'net.pth', five, class_to_idx={name: i for i, name in enumerate('vwxyz')})
    write(open_checkpoint(file, NET), tmp_path / 'net')
    assert weights.read_config(tmp_path / 'net').classes == tuple('vwxyz')

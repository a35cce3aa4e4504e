"""flaxnets push: folders that timm opens as its own, and their way to a hub and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import timm
import torch
import yaml
from file_server import isolate, running
from hub_server import GOOD, READING, Hub
from nets import random_variables, randomise, timm_net, to_flax
from timm.data import resolve_data_config

import flaxnets
from convert.conversion import open_checkpoint
from convert.names.hub_folder import read_hub_config
from convert.publishing.facts import NOT_IN_TIMM
from flaxnets import zoo
from flaxnets.__main__ import main
from flaxnets.images.preprocess import Preprocess
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo.records import Config

CLASSES = ('ant', 'bee', 'sun|flower')
NET = 'resnest14d'
TINY = 'resnext_tiny'

# Of huggingface_hub's own calls of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)  # a protocol of its own
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_PROGRESS_BARS', True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for hub in running(Hub()):
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        monkeypatch.setenv('HF_TOKEN', GOOD)
        yield hub


@pytest.fixture(scope='module')
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('tiny') / 'flowers'
    arch = zoo.NETS[TINY]
    config = Config(TINY, arch, Preprocess(32, 1.0), num_classes=3, classes=CLASSES)
    source = weights.Source(notes=('trained by flaxnets: step 7',), num_batches_tracked={'bn1': 7})
    weights.save(path, random_variables(build(arch, 3)), config, source)
    return path


def push(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert main(['push', *map(str, arguments)]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(['push', *map(str, arguments)]) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith('error: ') and all(note.startswith('note: ') for note in notes)
    return error


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def head(card: str) -> dict[str, Any]:
    _, text, _ = card.split('---\n', 2)
    return dict(yaml.safe_load(text))


def test_timm_and_flaxnets_open_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = randomise(timm_net(NET, num_classes=3, in_chans=4))
    arch = zoo.NETS[NET]
    preprocess = Preprocess((64, 96), 0.9, 'squash', 'bicubic', mean=(0.4,), std=(0.2,))
    config = Config(NET, arch, preprocess, num_classes=3, in_chans=4, classes=CLASSES)
    weights.save(tmp_path / 'mine', to_flax(net, build(arch, 3, 4)), config)
    folder = tmp_path / 'folder'
    out, err = push(capsys, tmp_path / 'mine', '--folder', folder, '--licence', 'mit')
    assert str(folder) in out and err == ''
    assert {path.name for path in folder.iterdir()} == {
        'README.md',
        'config.json',
        'model.safetensors',
        'model.safetensors.json',
    }
    opened = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 4, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(opened(x), net(x), rtol=0, atol=0)
    theirs = resolve_data_config(model=opened, pretrained_cfg=opened.pretrained_cfg)
    assert tuple(theirs['input_size']) == (4, 64, 96) and tuple(theirs['mean']) == (0.4,) * 4
    assert (theirs['crop_pct'], theirs['crop_mode'], theirs['interpolation']) == (0.9, 'squash', 'bicubic')
    assert list(opened.pretrained_cfg['label_names']) == list(CLASSES)
    _, before = flaxnets.load(tmp_path / 'mine')
    _, after = flaxnets.load(folder)
    assert_same(after, before)
    assert flaxnets.config(folder) == config
    (folder / 'model.safetensors.json').unlink()  # as timm would write it
    bare = flaxnets.config(folder)
    assert bare == replace(config, preprocess=replace(preprocess, mean=(0.4,) * 4, std=(0.2,) * 4))
    said = head((folder / 'README.md').read_text())
    assert (said['license'], said['library_name'], said['pipeline_tag']) == (
        'mit',
        'timm',
        'image-classification',
    )


def test_which_nets_timm_has() -> None:
    assert {name for name in zoo.NETS if not timm.is_model(name)} == NOT_IN_TIMM


def test_the_card(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / 'result.json'
    facts = {
        'architecture': TINY,
        'data': 'folder:/home/me/flowers',
        'top1': 91.236,
        'top5': 100.0,
        'images': 550,
    }
    report.write_text(json.dumps(facts))
    folder = tmp_path / 'folder'
    _, err = push(capsys, tiny, 'me/flowers', '--folder', folder, '--report', report)
    assert 'timm has no net' in err and 'licence is unknown' in err
    text = (folder / 'README.md').read_text()
    for words in (
        '`resnext_tiny`',
        '32 x 32',
        '91.24 %',
        'step 7',
        "'hf-hub:me/flowers'",
        '`sun|flower`',
        '550',
    ):
        assert words in text, words
    assert '/home' not in text and 'create_model' not in text
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.library_name, data.tags[0]) == ('unknown', 'flaxnets', 'image-classification')
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name) == (91.236, 'flowers')
    for change, words in (
        ({'architecture': NET}, NET),
        ({'top1': 'high'}, 'high'),
        ({'among': 'all', 'among_classes': 10}, '10 classes'),
    ):
        report.write_text(json.dumps(facts | change))
        assert words in refused(capsys, tiny, '--folder', folder, '--force', '--report', report)
    report.write_text('[]')
    assert 'result.json' in refused(capsys, tiny, '--folder', folder, '--force', '--report', report)
    assert 'None.json' in refused(
        capsys, tiny, '--folder', folder, '--force', '--report', tmp_path / 'None.json'
    )
    assert "'My Own'" in refused(capsys, tiny, '--folder', folder, '--force', '--licence', 'My Own')


def test_published_weights_keep_licence_and_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(zoo.weights_of('resnest50d')[0], arch=TINY)
    arch = zoo.NETS[TINY]
    weights.save(
        tmp_path / 'w', random_variables(build(arch)), Config(TINY, arch, row.preprocess, weights=row)
    )
    push(capsys, tmp_path / 'w', '--folder', tmp_path / 'folder')
    said = head((tmp_path / 'folder/README.md').read_text())
    assert said['license'] == row.licence and said['datasets'] == ['imagenet-1k']
    (result,) = said['model-index'][0]['results']
    assert result['metrics'][0]['value'] == row.accuracy[0].top1
    assert row.licence in refused(capsys, tmp_path / 'w', '--folder', tmp_path / 'a', '--licence', 'mit')


def test_folders_that_are_refused(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'there').mkdir()
    assert '--force' in refused(capsys, tiny, '--folder', tmp_path / 'there')
    assert 'not overwritten' in refused(capsys, tiny, '--folder', tmp_path / 'there', '--force')
    folder = tmp_path / 'folder'
    push(capsys, tiny, '--folder', folder)
    push(capsys, tiny, '--folder', folder, '--force', '--licence', 'mit')
    assert head((folder / 'README.md').read_text())['license'] == 'mit'
    config, variables = weights.read_config(tiny), weights.read_variables(tiny)
    for changes, words in (
        ({'name': 'mine'}, "'mine'"),
        ({'preprocess': replace(config.preprocess, channel_order='bgr')}, 'bgr'),
    ):
        weights.save(tmp_path / 'own', variables, replace(config, **changes), overwrite=True)  # type: ignore[arg-type]
        assert words in refused(capsys, tmp_path / 'own', '--folder', tmp_path / 'x')
    folded = random_variables(build(config.arch, 3, folded=True))
    weights.save(tmp_path / 'own', folded, replace(config, folded=True), overwrite=True)
    assert 'folded' in refused(capsys, tmp_path / 'own', '--folder', tmp_path / 'x')
    first = replace(config, preprocess=replace(config.preprocess, crop_mode='center_first'))
    weights.save(tmp_path / 'own', variables, first, overwrite=True)
    _, err = push(capsys, tmp_path / 'own', '--folder', tmp_path / 'x')
    assert (
        'center_first' in err and read_hub_config(tmp_path / 'x/config.json').preprocess.crop_mode == 'center'
    )
    assert flaxnets.config(tmp_path / 'x') == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ['folder', 'own', 'there', 'x']


def test_to_the_hub_and_back(hub: Hub, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = push(capsys, tiny, 'me/flowers', '--licence', 'mit', '--private', '--message', 'first')
    assert f'{hub.url}/me/flowers' in out and hub.commits == ['first'] and hub.private == {'me/flowers'}
    files = hub.repositories['me/flowers']
    assert set(files) >= {'README.md', 'config.json', 'model.safetensors', 'model.safetensors.json'}
    assert any(path.endswith('/info/lfs/objects/batch') for path in hub.posted)
    _, there = flaxnets.load('hf-hub:me/flowers')
    assert_same(there, flaxnets.load(tiny)[1])
    assert flaxnets.config('hf-hub:me/flowers').classes == CLASSES
    assert open_checkpoint('hf-hub:me/flowers').source.num_batches_tracked == {'bn1': 7}


def test_a_repository_that_is_there(hub: Hub, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories['me/flowers'] = {'.gitattributes': b''}
    push(capsys, tiny, 'me/flowers')  # made by hand on the hub's page, and empty
    assert '/api/repos/create' not in hub.posted and len(hub.commits) == 1
    error = refused(capsys, tiny, 'me/flowers')
    assert 'README.md' in error and '--force' in error and len(hub.commits) == 1
    hub.repositories['me/flowers']['README.md'] = b'edited by hand'
    _, err = push(capsys, tiny, 'me/flowers', '--force')
    assert 'README.md stays' in err and hub.repositories['me/flowers']['README.md'] == b'edited by hand'
    assert len(hub.commits) == 2
    assert 'public' in refused(capsys, tiny, 'me/flowers', '--force', '--private')


def test_what_keeps_it_from_the_hub(
    hub: Hub, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 'organisation/name' in refused(capsys, tiny, 'flowers')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert 'does not accept the token' in refused(capsys, tiny, 'me/flowers')
    monkeypatch.setenv('HF_TOKEN', READING)
    assert 'may not write' in refused(capsys, tiny, 'me/flowers')
    monkeypatch.delenv('HF_TOKEN')
    assert 'no token' in refused(capsys, tiny, 'me/flowers')
    monkeypatch.setenv('HF_TOKEN', GOOD)
    assert 'no such file' in refused(capsys, 'weights/none', 'me/flowers')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert 'cannot be reached' in refused(capsys, tiny, 'me/flowers')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    error = refused(capsys, tiny, 'me/flowers')
    assert 'HF_HUB_OFFLINE' in error and '--folder' in error
    assert hub.commits == [] and 'me/flowers' not in hub.repositories
    with pytest.raises(SystemExit):
        main(['push', str(tiny)])

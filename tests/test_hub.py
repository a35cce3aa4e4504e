"""Repositories of the Hugging Face hub: fetched as it serves them, understood as timm does."""

from __future__ import annotations

import hashlib
import io
import json
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from file_server import (
    CONTENT,
    NAME,
    SHA256,
    Publish,
    Server,
    redirect,
    send,
)
from timm.data import resolve_data_config
from timm.models._hub import load_model_config_from_path, save_for_hf

from convert.download.published_files import fetch
from convert.names.hub_folder import HubConfig, is_hub_folder, read_hub_config, read_hub_folder
from flaxnets.api import transform
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.images.preprocess import Preprocess
from flaxnets.store.home import home
from flaxnets.store.safetensors_file import read_safetensors
from flaxnets.zoo import ARCHS
from flaxnets.zoo.records import Config, to_json

pytestmark = pytest.mark.usefixtures('isolated')


CONFIG = json.dumps({'architecture': 'resnest50d', 'num_classes': 5, 'pretrained_cfg': {}}).encode()
GIT_HASH = '"0123456789abcdef0123456789abcdef01234567"'


def serve_repository(server: Server, storage: Server, **linked: str) -> None:
    """As the hub does it: small files directly, large ones by redirection to where they lie."""
    linked = {'X_Linked_Etag': f'"{SHA256}"', 'X_Linked_Size': str(len(CONTENT)), **linked}
    at = '/me/net/resolve/main'
    server.routes[f'{at}/config.json'] = [send(CONFIG, headers={'ETag': GIT_HASH, 'X-Linked-Etag': GIT_HASH})]
    server.routes[f'{at}/model.safetensors'] = [redirect(f'{storage.url}/blob', 302, **linked)]
    storage.routes['/blob'] = [send(ranges=True)]


@pytest.fixture
def hub(server: Server, other: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv('HF_ENDPOINT', server.url + '/')
    serve_repository(server, other)
    return server


def test_a_repository_of_the_hub(hub: Server, other: Server) -> None:
    folder = fetch('hf-hub:me/net')
    assert folder == home() / 'files' / 'hub' / 'me' / 'net' / 'main'
    path, config = read_hub_folder(folder)
    assert path.read_bytes() == CONTENT and config.num_classes == 5
    assert (folder / 'model.safetensors.sha256').read_text() == f'{SHA256}  model.safetensors\n'
    assert fetch('hf-hub:me/net') == folder and len(hub.seen) == 2 and len(other.seen) == 1


@pytest.mark.parametrize('linked', [{'X_Linked_Etag': f'"{"0" * 64}"'}, {'X_Linked_Size': '2999999'}])
def test_the_hub_tells_what_the_file_must_be(hub: Server, other: Server, linked: dict[str, str]) -> None:
    serve_repository(hub, other, **linked)
    with pytest.raises(FlaxnetsError, match='not 00000000|the hub says that the file has 2999999'):
        fetch('hf-hub:me/net')
    assert not list(home().rglob('model.safetensors*'))


def test_only_the_hub_is_believed(hub: Server, other: Server) -> None:
    forged = CONTENT[::-1]
    other.routes['/blob'] = [send(forged, headers={'X-Linked-Etag': hashlib.sha256(forged).hexdigest()})]
    with pytest.raises(FlaxnetsError, match=f'not {SHA256[:8]}'):
        fetch('hf-hub:me/net')


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: Server, other: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    at = '/me/net/resolve/main'
    hub.routes['/renamed'] = hub.routes[f'{at}/model.safetensors']
    hub.routes[f'{at}/model.safetensors'] = [redirect('/renamed', 307)]
    fetch('hf-hub:me/net')
    assert [headers.get('authorization') for _, headers in hub.seen] == ['Bearer hf_secret'] * 3
    other.routes['/a.pth'] = [send(), redirect(f'{hub.url}/public')]
    hub.routes['/public'] = [send()]
    fetch(f'{other.url}/a.pth')
    fetch(f'{other.url}/a.pth?again')
    assert all(
        'authorization' not in headers and 'hf_secret' not in str(headers) for _, headers in other.seen
    )
    assert len(other.seen) == 3
    monkeypatch.setenv('HF_TOKEN', 'two words')
    with pytest.raises(FlaxnetsError, match='HF_TOKEN holds') as caught:
        fetch('hf-hub:me/other')
    assert 'two words' not in str(caught.value) and 'hf_secret' not in capsys.readouterr().err


def test_the_default_hub_is_the_only_place_for_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[urllib.request.Request] = []

    def answer(self: urllib.request.HTTPSHandler, req: urllib.request.Request) -> Any:
        asked.append(req)
        return self.parent.error('http', req, io.BytesIO(), 404, 'Not Found', Message())

    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setattr(urllib.request.HTTPSHandler, 'https_open', answer)
    urls = [
        'https://huggingface.co/a/b/resolve/main/x.pth',
        'https://huggingface.co.evil.org/x.pth',
        'https://huggingface.co:8443/x.pth',
        'https://cdn-lfs.huggingface.co/x.pth',
        'https://github.com/x.pth',
    ]
    for url in urls:
        with pytest.raises(FlaxnetsError, match='HTTP 404'):
            fetch(url)
    sent = [request.get_header('Authorization') for request in asked]
    assert sent == ['Bearer hf_secret', None, None, None, None]


def test_an_older_repository_has_a_bin_file(hub: Server) -> None:
    at = '/me/net/resolve/v1.0'
    hub.routes |= {f'{at}/config.json': [send(CONFIG)], f'{at}/pytorch_model.bin': [send()]}
    folder = fetch('hf-hub:me/net@v1.0')
    assert read_hub_folder(folder)[0] == folder / 'pytorch_model.bin'
    assert [path.rpartition('/')[2] for path, _ in hub.seen] == [
        'config.json',
        'model.safetensors',
        'pytorch_model.bin',
    ]


def test_a_repository_that_is_not_there_or_not_open(hub: Server) -> None:
    with pytest.raises(
        FlaxnetsError, match='/me/none/resolve/main/config.json: HTTP 404 Not Found'
    ) as caught:
        fetch('hf-hub:me/none')
    folder = home() / 'files' / 'hub' / 'me' / 'none' / 'main'
    assert f'config.json and model.safetensors from {hub.url}/me/none/tree/main into {folder}' in str(
        caught.value
    )
    hub.routes['/me/gated/resolve/main/config.json'] = [send(b'', 401)]
    with pytest.raises(FlaxnetsError, match='HTTP 401 Unauthorized .*set HF_TOKEN'):
        fetch('hf-hub:me/gated')
    hub.routes['/me/bare/resolve/main/config.json'] = [send(CONFIG)]
    with pytest.raises(FlaxnetsError, match=r'model\.pth: HTTP 404'):
        fetch('hf-hub:me/bare')


def test_a_configuration_without_end(hub: Server) -> None:
    hub.routes['/me/net/resolve/main/config.json'] = [send(b'{' + b' ' * 17_000_000, length=False)]
    with pytest.raises(FlaxnetsError, match='goes on after 16.0 MB'):
        fetch('hf-hub:me/net')
    hub.routes['/me/net/resolve/main/config.json'] = [send(b'{' + b' ' * 17_000_000)]
    with pytest.raises(FlaxnetsError, match='has 17.0 MB, more than the 16.0 MB expected'):
        fetch('hf-hub:me/net')


def test_the_hub_is_where_a_published_file_is_sought_last(
    hub: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(f'{hub.url}/{NAME}', hub_id='me/net')
    assert fetch('net') == home() / 'files' / 'hub' / 'me' / 'net' / 'main'
    assert hub.seen[0][0] == '/' + NAME
    monkeypatch.setenv('FLAXNETS_OFFLINE', 'true')
    assert fetch('net') == home() / 'files' / 'hub' / 'me' / 'net' / 'main' and len(hub.seen) == 3


def folder_of(tmp_path: Path, config: Any, *files: str) -> Path:
    (tmp_path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (tmp_path / name).write_bytes(b'x')
    return tmp_path


def test_the_folder_that_timm_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model('resnest14d', num_classes=3, in_chans=4)
    save_for_hf(model, str(tmp_path), {'label_names': ['ant', 'bee', 'cat']}, safe_serialization='both')
    assert is_hub_folder(tmp_path)
    path, config = read_hub_folder(tmp_path)
    assert path == tmp_path / 'model.safetensors'
    assert config.architecture == 'resnest14d'
    assert (config.num_classes, config.in_chans) == (3, 4)
    assert config.classes == ('ant', 'bee', 'cat') and config.differences == ()
    saved = json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    assert saved['mean'] == [config.preprocess.mean[0]] * 4 and len(set(config.preprocess.mean)) == 1
    got, _ = read_safetensors(path)
    state = model.state_dict()
    assert set(got) == set(state)
    assert all(np.array_equal(got[name], tensor.numpy()) for name, tensor in state.items())


NAMES = ['resnest50d', 'resnest200e', 'resnext50_32x4d.a3_in1k', 'resnext101_32x8d.tv2_in1k', 'resnest269e']


@pytest.mark.parametrize('name', NAMES)
def test_preprocessing_is_what_timm_takes_from_the_folder(tmp_path: Path, name: str) -> None:
    published = timm.get_pretrained_cfg(name).to_dict()
    architecture = published.pop('architecture')
    folder_of(
        tmp_path,
        {'architecture': architecture, 'num_classes': 1000, 'pretrained_cfg': published},
        'model.pth',
    )
    theirs, timm_name, _ = load_model_config_from_path(tmp_path)
    path, config = read_hub_folder(tmp_path)
    assert path.name == 'model.pth' and config.architecture == timm_name == architecture
    got, want = config.preprocess, resolve_data_config(pretrained_cfg=theirs)
    assert want['input_size'] == [3, got.size, got.size]
    assert (want['crop_pct'], want['crop_mode']) == (got.crop_pct, got.crop_mode)
    assert want['interpolation'] == got.interpolation
    assert (want['mean'], want['std']) == (list(got.mean), list(got.std))


def test_what_a_sparse_configuration_leaves_out_is_timms_default(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {'architecture': 'resnest50d', 'pretrained_cfg': {}})
    theirs, _, _ = load_model_config_from_path(folder)
    want = resolve_data_config(pretrained_cfg=theirs)
    config = read_hub_config(folder / 'config.json')
    assert config == HubConfig(
        'resnest50d',
        1000,
        3,
        Preprocess(want['input_size'][1], want['crop_pct'], interpolation='bicubic'),
    )
    assert want['interpolation'] == 'bicubic' and want['mean'] == config.preprocess.mean


def test_the_form_before_timm_0_9(tmp_path: Path) -> None:
    config = {'architecture': 'resnest50d', 'num_classes': 2, 'labels': ['a', 'b'], 'input_size': [3, 96, 96]}
    config |= {'interpolation': 'bilinear', 'crop_pct': 1.0, 'num_features': 2048}
    got = read_hub_config(folder_of(tmp_path, config) / 'config.json')
    assert got == HubConfig('resnest50d', 2, 3, Preprocess(96, 1.0), classes=('a', 'b'))


def test_details_of_the_configuration(tmp_path: Path) -> None:
    config = {
        'architecture': 'resnest50d.mine',
        'num_classes': 3,
        'global_pool': 'max',
        'label_names': {'0': 'ant', '2': 'cat'},
        'model_args': {'in_chans': 1, 'num_classes': 3, 'output_stride': 8, 'drop_rate': 0.2},
        'pretrained_cfg': {'num_classes': 1000, 'input_size': [3, 224, 224]},
    }
    got = read_hub_config(folder_of(tmp_path, config) / 'config.json')
    assert (got.architecture, got.num_classes, got.in_chans) == ('resnest50d', 3, 1)
    assert got.classes == ('ant', '1', 'cat')
    (said,) = got.differences
    assert "output_stride=8, global_pool='max': give" in said and 'drop_rate' not in said
    config['model_args'] = {'act_layer': 'silu'}
    other = read_hub_config(folder_of(tmp_path, config) / 'config.json')
    assert "act_layer='silu'" in other.differences[0] and 'none of the nets' in other.differences[0]


def test_the_preferred_weights_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {'architecture': 'resnest50d', 'pretrained_cfg': {}})
    with pytest.raises(CheckpointError, match=r'no weights: none of model\.safetensors'):
        read_hub_folder(folder)
    for name in ('model.pth', 'pytorch_model.pth', 'pytorch_model.bin', 'model.safetensors'):
        (folder / name).write_bytes(b'x')
        assert read_hub_folder(folder)[0] == folder / name


def cfg(**pretrained: Any) -> dict[str, Any]:
    return {'architecture': 'resnest50d', 'num_classes': 10, 'pretrained_cfg': pretrained}


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'crop_mode': 'five', 'interpolation': 'random'}, ('crop_mode', 'interpolation')),
        ({'input_size': [3, 224]}, ('input_size',)),
        ({'crop_pct': '0.9'}, ('crop_pct',)),
        ({'crop_pct': -1.5}, ('crop_pct',)),
        ({'mean': 'grey'}, ('mean',)),
        ({'std': [1, 0, 1]}, ('std',)),
    ],
)
def test_images_that_cannot_be_prepared_are_listed(
    tmp_path: Path, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    found = read_hub_folder(folder_of(tmp_path, cfg(**changes), 'model.safetensors'))[1].preprocess
    assert tuple(problem.partition('=')[0] for problem in found.unsupported) == named
    with pytest.raises(FlaxnetsError, match=named[0]):
        transform(found)


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        (cfg() | {'num_classes': -1}, 'num_classes=-1'),
        (cfg() | {'num_classes': '10'}, "num_classes='10'"),
        (cfg() | {'model_args': {'in_chans': 1.5}}, 'in_chans=1.5'),
        (cfg() | {'model_args': [1]}, 'model_args'),
        (cfg() | {'pretrained_cfg': 'resnest50d'}, 'pretrained_cfg'),
        (
            {'architectures': ['ResNetForImageClassification'], 'model_type': 'resnet'},
            'names no "architecture"',
        ),
        ([], 'not a table'),
        ('{"architecture": ', 'not JSON'),
        ('[' * 100_000, 'not JSON'),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: Any, match: str) -> None:
    folder = folder_of(tmp_path, config, 'model.safetensors')
    with pytest.raises(CheckpointError, match=match) as caught:
        read_hub_folder(folder)
    assert str(folder / 'config.json') in str(caught.value)


def test_told_apart_from_a_directory_of_flaxnets(tmp_path: Path) -> None:
    config = to_json(Config('resnest50d', ARCHS['resnest50d']))
    folder_of(tmp_path, {'format': 'flaxnets', 'format_version': 1, 'config': config}, 'model.safetensors')
    assert not is_hub_folder(tmp_path) and not is_hub_folder(tmp_path / 'none')
    folder_of(tmp_path, {'format': 'flaxnets', 'architecture': 'resnest50d'}, 'model.safetensors')
    assert not is_hub_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r'flaxnets\.load'):
        read_hub_folder(tmp_path)
    folder_of(tmp_path, {'model_type': 'resnet'})
    assert not is_hub_folder(tmp_path)

"""What files call their classes, wherever they say so; and in which order their training had them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import timm_net
from states import as_mmpretrain, small
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder
from torchvision.models import ResNeXt50_32X4D_Weights

from convert.__main__ import main
from convert.arithmetic import averaged, with_classes, with_images
from convert.conversion import open_checkpoint
from convert.names.class_names import class_names
from convert.names.hub_folder import read_hub_config
from convert.names.layouts import to_canonical
from flaxnets.errors import CheckpointError, FlaxnetsError
from flaxnets.store import weights

FIVE = ('Zebra', 'c1', 'c10', 'c2', 'd')  # as torchvision's ImageFolder has them
BY_NAME = {name: i for i, name in enumerate(FIVE)}
BY_NUMBER = dict(enumerate(FIVE))
STATE = small('resnext')

PLACES: dict[str, dict[str, Any]] = {
    'torchvision': {'class_to_idx': BY_NAME, 'epoch': 3},
    'shuffled': {'class_to_idx': dict(sorted(BY_NAME.items(), reverse=True))},
    'numpy': {'class_to_idx': {name: np.int64(i) for name, i in BY_NAME.items()}},
    'by number': {'idx_to_class': BY_NUMBER},
    'by text': {'id2label': {str(i): name for i, name in BY_NUMBER.items()}},
    'names by index': {'ind2name': BY_NUMBER},
    'list': {'classes': list(FIVE), 'num_classes': 5},
    'tuple': {'class_names': FIVE},
    'ultralytics': {'names': BY_NUMBER},
    'fastai': {'vocab': list(FIVE)},
    'mmengine': {'meta': {'dataset_meta': {'classes': FIVE, 'palette': [1, 2]}}},
    'mmcls': {'meta': {'CLASSES': FIVE}},
    'args': {'args': {'labels': list(FIVE), 'classes': 5, 'model': 'x'}},
    'Lightning': {'hyper_parameters': {'lr': 1, 'label2id': BY_NAME}, 'pytorch-lightning_version': '2.5'},
    'data module': {'datamodule_hyper_parameters': {'data': {'class_to_index': BY_NAME}}},
    'camel case': {'config': {'classNames': list(FIVE)}},
    'among the tensors': {'state_dict': {**STATE, 'class_to_idx': BY_NAME}},
    'two levels up': {'state_dict': {'net': {'model': STATE, 'epoch': 1}, 'classes': FIVE}},
    'and others': {'labels': [0, 1, 2, 3], 'target_names': 7, 'class_to_idx': BY_NAME, 'vocab': ['a', 'b']},
}


@pytest.mark.parametrize('around', PLACES.values(), ids=PLACES)
def test_places(around: dict[str, Any]) -> None:
    found = to_canonical({'state_dict': dict(STATE), **around})
    assert found.classes == FIVE and found.class_order is None
    assert not any('class names' in note for note in found.notes)


@pytest.mark.parametrize(
    'around',
    [
        {'class_to_idx': {'a': 0, 'b': 1}},
        {'class_to_idx': {**BY_NAME, 'd': 3}},
        {'class_to_idx': {name: i + 1 for name, i in BY_NAME.items()}},
        {'classes': ['a', 'b', 'c', 'd', None]},
        {'classes': set(FIVE)},
        {'id2label': {str(i): f'LABEL_{i}' for i in range(5)}},
        {'vocab': [*FIVE, 'six']},
    ],
)
def test_names_that_do_not_fit_are_said_and_left(around: dict[str, Any]) -> None:
    found = to_canonical({**around, 'state_dict': dict(STATE)})
    assert found.classes is None
    assert any(f'({next(iter(around))})' in note for note in found.notes)


def test_nothing_said_is_no_note() -> None:
    for around in ({}, {'classes': 5}, {'labels': [1, 2, 3]}, {'args': None}, {'names': ('x', 3)[1:]}):
        found = to_canonical({**around, 'state_dict': dict(STATE)})
        assert found.classes is None and not any('class names' in note for note in found.notes)


def test_two_ways_of_saying_it() -> None:
    around = {'classes': ['v', 'w', 'x', 'y', 'z'], 'class_to_idx': BY_NAME, 'state_dict': dict(STATE)}
    found = to_canonical(around)
    assert found.classes == FIVE
    assert any('classes says otherwise' in note for note in found.notes)
    info = ImageNetInfo()
    both = {'label_names': info.label_names(), 'id2label': dict(enumerate(info.label_descriptions()))}
    assert class_names(both).of(1000)[1] == ()
    wrong = {**both, 'id2label': dict(enumerate(info.label_descriptions()[::-1]))}
    assert class_names(wrong).of(1000)[1]
    categories = ResNeXt50_32X4D_Weights.DEFAULT.meta['categories']
    assert class_names({'meta': {'categories': categories}}).of(1000) == (tuple(categories), ())


def test_odd_content_is_passed_over() -> None:
    loop: dict[str, Any] = {'classes': None}
    loop['config'] = loop
    deep: dict[Any, Any] = {}
    for _ in range(2000):
        deep = {'config': deep, 3: deep, None: object()}
    for odd in (
        loop,
        deep,
        {'classes': object()},
        {'labels': {'train': np.arange(50), 'val': np.arange(5)}},
        {'args': {'data_path': 'x', 'data_set': np.arange(5)}},
        {'arch': 'x', 'args': {'model': 'x', 'class_map': np.arange(5)}},
        {'class_to_idx': {object(): 0, 'a': [1]}},
        {(): 1, b'classes': FIVE},
    ):
        assert class_names(odd).of(5)[0] is None


ORDERS: dict[str, tuple[dict[str, Any], str | None]] = {
    'timm': ({'arch': 'x', 'args': {'model': 'x', 'dataset': '', 'class_map': ''}, 'version': 2}, 'natural'),
    'timm, old': ({'arch': 'x', 'args': {'model': 'x'}}, 'natural'),
    'timm, class map': ({'arch': 'x', 'args': {'model': 'x', 'class_map': 'map.txt'}}, 'file'),
    'timm, ImageFolder': ({'arch': 'x', 'args': {'model': 'x', 'dataset': 'torch/image_folder'}}, 'text'),
    'timm, TFDS': ({'arch': 'x', 'args': {'model': 'x', 'dataset': 'tfds/flowers'}}, None),
    'torchvision': ({'epoch': 1, 'args': {'model': 'x', 'data_path': '/data'}}, 'text'),
    'DeiT, iNaturalist': ({'args': {'model': 'x', 'data_path': '/data', 'data_set': 'INAT'}}, None),
    'examples': ({'arch': 'x', 'best_acc1': 70.0, 'optimizer': {}}, 'text'),
    'the Res2Net authors': ({'arch': 'x', 'best_prec1': 70.0, 'optimizer': {}}, 'text'),
    'like the examples': ({'arch': 'x', 'best_acc1': 70.0}, None),
    'mm': ({'meta': {'mmcls_version': '0.25', 'epoch': 1}}, 'text'),
    'somebody': ({'epoch': 3, 'args': {'lr': 1}}, None),
}


@pytest.mark.parametrize(('around', 'order'), ORDERS.values(), ids=ORDERS)
def test_orders_of_trainings(around: dict[str, Any], order: str | None) -> None:
    found = to_canonical({**around, 'state_dict': dict(STATE)})
    assert found.class_order == order
    named = to_canonical({**around, 'class_to_idx': BY_NAME, 'state_dict': dict(STATE)})
    assert named.classes == FIVE and named.class_order is None


def tiny_state() -> dict[str, torch.Tensor]:
    """Of `resnext_tiny` with 5 outputs."""
    from nets import random_variables

    import flaxnets
    from convert.names.tree import to_state

    model = flaxnets.create('resnext_tiny', 5)
    return {
        name: torch.from_numpy(np.array(t)) for name, t in to_state(random_variables(model), model).items()
    }


def test_names_are_kept_and_can_be_given(tmp_path: Path) -> None:
    for name in FIVE:
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / 'a.jpg').touch()
    folder = ImageFolder(str(tmp_path / 'data'))
    state = tiny_state()
    torch.save({'state_dict': state, 'class_to_idx': folder.class_to_idx}, tmp_path / 'named.pth')
    args = argparse.Namespace(model='resnext_tiny', dataset='', class_map='')
    torch.save({'state_dict': state, 'arch': 'resnext_tiny', 'args': vars(args)}, tmp_path / 'timm.pth')
    named, timm = (open_checkpoint(tmp_path / f'{name}.pth', 'resnext_tiny') for name in ('named', 'timm'))
    assert named.config.classes == FIVE and named.config.class_order is None
    assert timm.config.classes is None and timm.config.class_order == 'natural'
    (tmp_path / 'names.json').write_text(json.dumps(dict(zip('vwxyz', range(5), strict=True))))
    out = tmp_path / 'out'
    arguments = [str(tmp_path / 'timm.pth'), '--model', 'resnext_tiny', '--out', str(out)]
    assert main([*arguments, '--classes', str(tmp_path / 'names.json')]) == 0
    config = weights.read_config(out)
    assert config.classes == tuple('vwxyz') and config.class_order is None
    assert weights.read_config(out) == open_checkpoint(out).config
    assert main([*arguments, '--force']) == 0
    assert weights.read_config(out).class_order == 'natural'
    with pytest.raises(FlaxnetsError, match='2 names'):
        with_classes(timm, ('a', 'b'))
    assert averaged([named, timm]).config.classes == FIVE
    with pytest.raises(CheckpointError, match='different classes'):
        averaged([named, with_classes(timm, tuple('vwxyz'))])
    assert main([*arguments, '--force', '--drop-head', '--classes', str(tmp_path / 'names.json')]) == 1
    assert main([*arguments, '--force', '--drop-head']) == 0
    assert weights.read_config(out).classes is None and weights.read_config(out).num_classes == 0


def test_averages_keep_what_their_sources_agree_on(tmp_path: Path) -> None:
    torch.save(tiny_state(), tmp_path / 'net.pth')
    first = open_checkpoint(tmp_path / 'net.pth', 'resnext_tiny')
    natural, text = (
        replace(first, config=replace(first.config, class_order=order)) for order in ('natural', 'text')
    )
    assert averaged([first, text]).config.class_order == 'text'
    with pytest.raises(CheckpointError, match='different orders'):
        averaged([natural, text])
    other = with_images(first, ['size=48', 'mean=0.5'])
    assert not any('images' in note for note in averaged([first, first]).source.notes)
    mean = averaged([first, other])
    assert mean.config.preprocess == first.config.preprocess
    said = [note for note in mean.source.notes if note.startswith('images: ')]
    assert len(said) == 2 and str(first.config.preprocess) in said[0]
    assert str(other.config.preprocess) in said[1]


def test_names_on_a_pickled_model(tmp_path: Path) -> None:
    net = timm_net('resnext_tiny', num_classes=5)
    net.class_to_idx = BY_NAME
    for saved in (net, {'model': net, 'epoch': 3}, torch.nn.DataParallel(net)):
        torch.save(saved, tmp_path / 'net.pth')
        assert open_checkpoint(tmp_path / 'net.pth', 'resnext_tiny').config.classes == FIVE


def test_mmpretrains_names() -> None:
    saved = {'meta': {'CLASSES': FIVE}, 'state_dict': as_mmpretrain('resnext', STATE)}
    assert to_canonical(saved).classes == FIVE


def test_names_in_a_hub_configuration(tmp_path: Path) -> None:
    path = tmp_path / 'config.json'
    for said, names in (
        ({'label_names': list(FIVE)}, FIVE),
        ({'pretrained_cfg': {'label_names': list(FIVE)}}, FIVE),
        ({'id2label': {str(i): name for i, name in BY_NUMBER.items()}}, FIVE),
        ({'label_names': {'0': 'ant', '3': 'cat'}}, ('ant', '1', '2', 'cat', '4')),
        ({'label_names': ['a', 'b']}, None),
        ({'label_names': {'5': 'a'}}, None),
        ({'label_names': list(range(5))}, None),
    ):
        path.write_text(json.dumps({'architecture': 'resnest50d', 'num_classes': 5, **said}))
        found = read_hub_config(path)
        assert found.classes == names
        assert bool(found.notes) == (names is None and 'label_names' in said and 0 not in said['label_names'])

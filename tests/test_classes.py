"""The one rule for classes, beside the readers and vocabularies of timm and torchvision."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.reader_factory import create_reader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNeXt50_32X4D_Weights

import flaxnets
from flaxnets import zoo
from flaxnets.errors import FlaxnetsError
from flaxnets.zoo import imagenet
from flaxnets.zoo.classes import ClassesError, in_order, match, output_names, read_classes
from flaxnets.zoo.records import Config, config_from_json, to_json

NET = 'resnest14d'
PUBLISHED = zoo.config('resnest50d')
IDS = imagenet.wnids()
TORCHVISION = tuple(ResNeXt50_32X4D_Weights.DEFAULT.meta['categories'])
TIMM = tuple(ImageNetInfo().label_descriptions())


def weights(classes: Sequence[str] | int, order: str | None = None) -> Config:
    """Weights that name their classes, or have so many."""
    count = classes if isinstance(classes, int) else len(classes)
    names = None if isinstance(classes, int) else tuple(classes)
    return Config(NET, zoo.NETS[NET], num_classes=count, classes=names, class_order=order)


def outputs(data: Sequence[str], config: Config, **said: object) -> list[int]:
    return list(match(data, config, **said).outputs)  # type: ignore[arg-type]


def refused(data: Sequence[str], config: Config, *words: str, **said: object) -> None:
    with pytest.raises(ClassesError) as error:
        match(data, config, **said)  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)


# Orders of folders.


def test_orders_are_those_of_timm_and_torchvision(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = ['c', 'C', 'Zebra', 'apple', 'a b', 'a_b', 'x-', 'é', '2x']
    for trial in range(20):
        names = {
            f'{generator.choice(words)}{generator.choice(["", generator.randrange(200)])}' for _ in range(15)
        }
        by_key = {re.sub(r'0*(\d+)', r'\1', name.lower()): name for name in names}  # to timm these are alike
        for name in by_key.values():
            (tmp_path / str(trial) / name).mkdir(parents=True)
            Image.new('RGB', (1, 1)).save(tmp_path / str(trial) / name / 'a.png')
        root = str(tmp_path / str(trial))
        timm = create_reader('', root).class_to_idx
        assert in_order(list(by_key.values()), 'natural') == tuple(sorted(timm, key=timm.get))
        assert in_order(list(by_key.values()), 'text') == tuple(ImageFolder(root).classes)


def test_weights_without_names_have_the_order_of_their_training() -> None:
    data = sorted(f'c{i}' for i in range(1, 13))  # as folders are listed: c1, c10, c11, c12, c2, ...
    natural = [int(name[1:]) - 1 for name in data]
    assert outputs(data, weights(12, 'natural')) == outputs(data, weights(12), order='natural') == natural
    assert outputs(data, weights(12, 'text')) == outputs(data, weights(12), order='text') == list(range(12))
    assert outputs(data, weights(12, 'natural'), order='text') == list(range(12))
    assert outputs(data, weights(12), classes=[f'c{i}' for i in range(1, 13)]) == natural
    refused(data, weights(12), "'c1', 'c10', 'c11'", "'c1', 'c2', 'c3'", 'order=', 'classes=')
    refused(data, weights(12, 'file'), 'classes=')
    shuffled = ['c3', 'c1', 'c2']  # a list of the data's own
    refused(shuffled, weights(3), "'data'", "'c3', 'c1', 'c2'")
    assert outputs(shuffled, weights(3), order='data') == [0, 1, 2]
    for same in (['ant', 'bee', 'cat'], ['c01', 'c02', 'c12'], list('0123456789'), list(map(str, range(12)))):
        assert outputs(same, weights(len(same))) == list(range(len(same)))
    refused(['A', 'a', 'b'], weights(3, 'natural'), "'A'")
    refused(['ant', 'bee'], weights(3), '2 classes', '3')
    refused(['ant', 'bee', 'cat', 'dog'], weights(3), '4 classes', '3')
    with pytest.raises(FlaxnetsError, match='order='):
        match(data, weights(data), order='natural')
    with pytest.raises(FlaxnetsError, match='order='):
        match(data, weights(12), order='numbers')


def test_numbers() -> None:
    numbers = sorted(map(str, range(1000)))  # 0, 1, 10, 100, ...
    by_number = list(map(int, numbers))
    for config in (PUBLISHED, weights(1000), weights(TORCHVISION), weights(1000, 'text')):
        assert outputs(numbers, config) == by_number
    assert outputs(numbers, weights(1000), order='text') == list(range(1000))
    assert outputs(['007', '400'], PUBLISHED) == [7, 400]
    assert outputs(['2', '0', '1'], weights(('ant', 'bee', 'cat'))) == [2, 0, 1]
    assert outputs(['00', '01', '10'], weights(('10', '1', '0'))) == [2, 1, 0]
    assert outputs(['00', '01'], weights(12)) == [0, 1]
    refused(['1', '2', '3'], weights(('ant', 'bee', 'cat')), "'1', '2', '3'")  # counted from 1
    refused(['1', '2'], weights(('ant', 'bee', 'cat')), "'1', '2'")
    some = ['0', '1', '10', '11', '2']
    refused(some, weights(12), '5 classes')
    assert (
        outputs(some, weights(12, 'natural'))
        == outputs(some, weights(12), order='natural')
        == [0, 1, 10, 11, 2]
    )
    assert outputs(some, weights(12, 'text')) == [0, 1, 2, 3, 4]
    refused(list('0123'), weights(12), '4 classes')  # of 0, 1, 10, 11, 2, ... or of 0, 1, 2, ...
    assert outputs(list('0123'), weights(10)) == [0, 1, 2, 3]
    assert outputs(list(map(str, range(11))), weights(12)) == list(range(11))  # labels without folders
    refused(['2', '3'], weights(10), '2 classes')
    refused(['1000'], PUBLISHED, "'1000'")
    refused(['0', '1'], weights(IDS[::-1]), "'0', '1'")  # ImageNet's numbers, or those of the outputs
    refused(['1', '2'], weights([f'own {i}' for i in range(1000)]), "'1', '2'")
    refused(sorted(map(str, range(12))), weights(12), "'0', '1', '10'", "'0', '1', '2'")


# Names.


def test_names() -> None:
    own = weights(('ant', 'Bee_fly', 'cat'))
    assert outputs(('ant', 'Bee_fly', 'cat'), own) == [0, 1, 2]
    assert outputs(('cat', 'ant'), own) == [2, 0]
    assert outputs(('Cat', 'bee-fly'), own) == [2, 1]
    birds = weights(('Sooty_Albatross', 'Crested Auklet'))
    assert outputs(('001.Crested_Auklet', '002.Sooty_Albatross'), birds) == [1, 0]
    assert outputs(('cafe\u0301',), weights(('tea', 'caf\u00e9'))) == [1]  # as macOS and as others write it
    assert outputs(('Cat', 'CAT'), weights(('CAT', 'Cat'))) == [1, 0]
    refused(('cat', 'Cat'), own, "'Cat'")  # one of them is another class
    refused(('a cat', 'ant', 'b'), own, '2 of the 3', "'a cat', 'b'", "'Bee_fly'")
    assert outputs(('x', 'y', 'z'), own, classes=('z', 'y', 'x')) == [2, 1, 0]
    refused(('x', 'y', 'z'), own, '2 names', '3', classes=('x', 'y'))
    assert match(('ant',), own).names == ('ant', 'Bee_fly', 'cat')
    assert not match(('ant',), own).whole and match(('cat', 'ant', 'Bee_fly'), own).whole


VOCABULARIES = {
    'ids': IDS,
    "timm's descriptions": TIMM,
    "torchvision's": TORCHVISION,
    'first synonyms': tuple(names.split(', ')[0] for names in TIMM),
    'small letters': tuple(names.split(', ')[0].lower().replace(' ', '_') for names in TIMM),
    "Stanford's folders": tuple(f'{i}-{n.split(", ")[0]}' for i, n in zip(IDS, TIMM, strict=True)),
}


def test_imagenets_vocabularies_mean_the_same() -> None:
    """Whatever list names the outputs and whatever list names the data, in their order."""
    for names in VOCABULARIES.values():
        assert imagenet.places(names) == tuple(range(1000))
        assert outputs(names, PUBLISHED) == outputs(names, weights(1000)) == list(range(1000))
        for others in VOCABULARIES.values():
            assert outputs(others, weights(names)) == list(range(1000))


def test_imagenets_classes_in_any_order_and_number() -> None:
    """By timm's own tables: each name is one of the synonyms of the id that it is matched with."""
    info = ImageNetInfo()
    generator = np.random.default_rng(0)
    for trial in range(40):
        name, names = list(VOCABULARIES.items())[trial % len(VOCABULARIES)]
        chosen = generator.permutation(1000)[: generator.integers(1, 1000)].tolist()
        data = [names[i] for i in chosen]
        doubtful = {n for n in data if sum(other.lower() == n.lower() for other in names) > 1}
        if doubtful or {'crane', 'maillot'} & set(data):
            data, chosen = zip(
                *[(n, i) for n, i in zip(data, chosen, strict=True) if unmistakable(n)], strict=True
            )
        found = outputs(data, PUBLISHED)
        assert found == list(chosen), name
        if name not in ('ids', "Stanford's folders"):
            for place, called in zip(found, data, strict=True):
                description = info.index_to_description(place).lower()
                assert called.lower().replace('_', ' ').split(', ')[0] in description.replace(
                    'maillot, t', 'maillot t'
                )
        # and as a net of these classes alone, judged by their ids
        ids = sorted(info.index_to_label_name(i) for i in chosen)
        assert [chosen[i] for i in outputs(ids, weights(data))] == [IDS.index(i) for i in ids]


def unmistakable(name: str) -> bool:
    return name.lower().split(',')[0] not in ('crane', 'crane bird', 'maillot', 'cardigan')


def test_names_that_leave_a_choice_are_not_guessed() -> None:
    assert imagenet.places(['crane', 'crane bird']) == (517, 134)
    assert imagenet.places(['maillot', 'maillot, tank suit']) == (638, 639)
    assert imagenet.places(['Cardigan', 'cardigan', 'tench']) == (264, 474, 0)
    for names in (
        ['crane'],
        ['maillot', 'tench'],
        ['tench', IDS[1]],
        ['tench', 'Tinca tinca'],
        ['tench', 'my cat'],
    ):
        assert imagenet.places(names) is None
    refused(['crane'], PUBLISHED, "'crane'", 'not certain')
    refused(['tench', 'my cat'], PUBLISHED, '1 of the 2', "'my cat'")
    refused([IDS[0], 'n00000001'], PUBLISHED, "'n00000001'")
    swapped = list(TIMM)
    swapped[3], swapped[7] = swapped[7], swapped[3]
    assert imagenet.places(swapped) == (0, 1, 2, 7, 4, 5, 6, 3, *range(8, 1000))
    swapped[3] = 'a fish'
    assert imagenet.places(swapped) is None  # 'a fish' may be 3, or 7, whose name stands elsewhere
    assert imagenet.places([*TIMM[:3], 'a fish', *TIMM[4:]]) == tuple(range(1000))
    backwards = TORCHVISION[::-1]
    assert imagenet.places(backwards) == tuple(range(999, -1, -1))


def test_unnamed_nets_of_1000_outputs_are_imagenets() -> None:
    unnamed = weights(1000)
    assert outputs(IDS[5:9], unnamed) == [5, 6, 7, 8]
    assert match(IDS[5:9], unnamed).names == TIMM
    own = [f'own {i:04}' for i in range(1000)]
    assert match(own, unnamed).names == tuple(own)
    assert output_names(unnamed)[0] == TIMM == output_names(PUBLISHED)[0] == output_names(weights(IDS))[0]
    assert output_names(weights(2))[0] == ('class 0', 'class 1')
    assert output_names(weights(('a', 'b')))[0] == ('a', 'b')
    assert output_names(weights(2), ('x', 'y'))[0] == ('x', 'y')
    with pytest.raises(ClassesError, match='1 names'):
        output_names(weights(2), ('x',))


def test_known_parts_of_imagenet() -> None:
    folder = Path(__import__('timm').__file__).parent / 'data' / '_info'
    for letter in 'ar':
        indices = list(map(int, (folder / f'imagenet_{letter}_indices.txt').read_text().split()))
        ids = (folder / f'imagenet_{letter}_synsets.txt').read_text().split()
        found = outputs(ids, PUBLISHED)
        assert found == indices
        assert imagenet.subset(found) == f'ImageNet-{letter.upper()}'
        assert imagenet.subset(found[1:]) is None


# Files of names, and what is kept.


def test_files_of_names(tmp_path: Path) -> None:
    forms = {
        'lines.txt': 'ant\nbee fly \r\ncat\n\n',
        'list.json': json.dumps(['ant', 'bee fly', 'cat']),
        'by_name.json': json.dumps({'bee fly': 1, 'ant': 0, 'cat': 2}),
        'by_number.json': json.dumps({'1': 'bee fly', '0': 'ant', '2': 'cat'}),
        'pairs.json': json.dumps({'1': ['bee fly', 'x'], '0': ['ant', 'y'], '2': ['cat', 'z']}),
        'marked.txt': '\ufeffant\nbee fly\ncat',
    }
    for name, text in forms.items():
        path = tmp_path / name
        path.write_text(text, encoding='utf-8')
        assert read_classes(path) == ('ant', 'bee fly', 'cat')
    for text in (
        '',
        'a\n\nb',
        '{"a": 1, "b": 2}',
        '{"a": 0, "b": 0}',
        '[1.5]',
        '[',
        '{}',
        '[[]]',
        '{"0": null}',
    ):
        path.write_text(text)
        with pytest.raises(FlaxnetsError, match=re.escape(str(path))):
            read_classes(path)
    with pytest.raises(FlaxnetsError, match=r'absent\.txt'):
        read_classes(tmp_path / 'absent.txt')
    path.write_bytes(b'\x80\x04\x95')
    with pytest.raises(FlaxnetsError, match=re.escape(str(path))):
        read_classes(path)


def test_the_order_is_kept_in_a_configuration() -> None:
    config = weights(12, 'natural')
    data = json.loads(json.dumps(to_json(config)))
    assert config_from_json(data) == config
    del data['class_order']  # as directories of weights were written before
    assert config_from_json(data) == dataclasses.replace(config, class_order=None)
    assert flaxnets.config('resnest50d').class_order is None
    with pytest.raises(FlaxnetsError, match="class_order='alphabetical'"):
        weights(12, 'alphabetical')

"""Many images: the same answers as one by one, whatever the batch and what is wrong with some of them."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from nets import random_variables
from PIL import Image
from skimage import data as photographs
from sklearn.neighbors import NearestNeighbors

import flaxnets
from flaxnets.__main__ import main
from flaxnets.errors import FlaxnetsError
from flaxnets.images.listing import ImageFile
from flaxnets.images.preprocess import Preprocess
from flaxnets.inference.batches import Result, mapped
from flaxnets.inference.features import nearest, save_features
from flaxnets.inference.prediction import Guess, Prediction
from flaxnets.inference.tables import check_table, open_table
from flaxnets.nets.arch import Arch
from flaxnets.nets.resnet import build
from flaxnets.store import weights
from flaxnets.zoo.records import Config

CLASSES, COUNT = ('cat', 'dog', 'fish', 'hen'), 11
ARCH = Arch('resnext', (1, 1, 1, 1), 2, 32, planes=8)  # compiles in a second
BATCH = ('--batch', 2)  # several batches on each device, whatever their number


@pytest.fixture(scope='module')
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, one of them broken, and weights beside it."""
    root = tmp_path_factory.mktemp('here')
    (root / 'photos').mkdir()
    whole = photographs.chelsea()
    for i in range(COUNT):
        Image.fromarray(whole[10 * i : 10 * i + 90, 20 * i : 20 * i + 120]).save(
            root / 'photos' / f'{i:02}.png'
        )
    (root / 'photos' / '04b.png').write_bytes(b'\x89PNG\r\n\x1a\n and no more')
    model = build(ARCH, len(CLASSES))
    config = Config('small', ARCH, Preprocess(32, 1.0), num_classes=len(CLASSES), classes=CLASSES)
    weights.save(root / 'net', random_variables(model), config)
    return root


@pytest.fixture(scope='module')
def expected(here: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, probabilities and features, one image at a time."""
    model, variables = flaxnets.load(here / 'net')
    transform = flaxnets.transform(here / 'net')

    @jax.jit
    def both(image: np.ndarray) -> tuple[jax.Array, jax.Array]:
        features = model.apply(variables, image[None], method='forward_features')
        return jax.nn.softmax(model.apply(variables, image[None]))[0], features.mean((1, 2))[0]

    names = [str(here / 'photos' / f'{i:02}.png') for i in range(COUNT)]
    found = [both(transform(name)) for name in names]
    return names, np.stack([p for p, _ in found]), np.stack([f for _, f in found])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_answers_of_one_by_one(
    here: Path,
    expected: tuple[list[str], np.ndarray, np.ndarray],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    table = tmp_path / 'table.csv'
    options = ('--model', here / 'net', '--topk', 3, *BATCH, '--out', table)
    code, out, err = run(capsys, 'predict', here / 'photos', *options)
    assert code == 1 and f'{COUNT} images' in out
    first, last = err.splitlines()
    assert first.startswith('error: ') and '04b.png' in first and last.startswith(f'1 of {COUNT + 1} images')
    names, probabilities, _ = expected
    rows = read(table)
    bad = rows.pop(5)
    assert (Path(bad['image']).name, bad['class_1']) == ('04b.png', None) and '04b.png' in bad['error']
    assert [row['image'] for row in rows] == names and not any(row['error'] for row in rows)
    order = np.argsort(-probabilities, axis=1, kind='stable')
    for k in range(3):
        assert [int(row[f'index_{k + 1}']) for row in rows] == order[:, k].tolist()
        assert [row[f'class_{k + 1}'] for row in rows] == [CLASSES[i] for i in order[:, k]]
        np.testing.assert_allclose(
            [float(row[f'probability_{k + 1}']) for row in rows],
            np.take_along_axis(probabilities, order, 1)[:, k],
            rtol=1e-5,
        )
    assert [path.name for path in tmp_path.iterdir()] == [table.name]


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_every_table_says_the_same(suffix: str, tmp_path: Path) -> None:
    top = (Guess('crane, "bird"', 134, 0.75), Guess('größer\n', 7, 0.125))
    said = [
        Prediction('a b.jpg', top),
        Prediction('c,d.jpg', problem='damaged'),
        Prediction('e.jpg', top[:1]),
    ]
    table = tmp_path / f'table.{suffix}'
    with open_table(str(table), 2) as out:
        for prediction in said:
            out.write(prediction)
        assert not table.exists()
    for row, prediction in zip(read(table), said, strict=True):
        assert (row['image'], row.get('error')) == (prediction.image, prediction.problem)
        for i, guess in enumerate(prediction.top, 1):
            cells = (row[f'class_{i}'], int(row[f'index_{i}']), float(row[f'probability_{i}']))
            assert cells == (guess.name, guess.index, guess.probability)
        assert not any(row.get(f'class_{i}') for i in (1, 2)[len(prediction.top) :])
    with pytest.raises(RuntimeError), open_table(str(tmp_path / f'half.{suffix}'), 2) as out:
        out.write(said[0])
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [table.name]


def read(table: Path) -> list[dict]:
    if table.suffix == '.parquet':
        return pyarrow.parquet.read_table(table).to_pylist()
    if table.suffix == '.csv':
        found = list(csv.DictReader(io.StringIO(table.read_text())))
        return [{name: cell or None for name, cell in row.items()} for row in found]
    flat = []
    for line in table.read_text().splitlines():
        row = json.loads(line)
        cells = {f'{key}_{i}': value for i, top in enumerate(row['top'], 1) for key, value in top.items()}
        flat.append({'image': row['image'], 'class_1': None, 'error': row.get('error')} | cells)
    return flat


@pytest.mark.parametrize('count', [3, 30])
def test_on_screen(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        named_by, preprocess = 'the weights', Preprocess()

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __call__(self, files: Sequence[ImageFile], *, topk: int, batch: int) -> Iterator[Prediction]:
            for i, file in enumerate(files):
                bad = 'damaged' if i == 1 else None
                yield Prediction(
                    file.name, () if bad else (Guess('cat, puss', 0, 0.75), Guess('dog', 1, 0.25)), bad
                )

    monkeypatch.setattr('flaxnets.inference.prediction.Classifier', Told)
    files = [tmp_path / f'{i}.png' for i in range(count)]
    for file in files:
        file.touch()
    code, out, err = run(capsys, 'predict', *files, '--model', 'net')
    assert code == 1 and err.splitlines() == ['error: damaged', f'1 of {count} images cannot be read']
    lines = out.splitlines()
    if count == 3:
        for file, said in ((files[0], lines[:3]), (files[2], lines[3:])):
            assert said == [str(file), '   75.00%  cat, puss', '   25.00%  dog']
    else:
        assert len(lines) == count - 1 and lines[-1].split() == ['75.00%', 'cat', str(files[-1])]


def test_features_and_neighbours(
    here: Path,
    expected: tuple[list[str], np.ndarray, np.ndarray],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out = tmp_path / 'features.npy'
    query = (here / 'photos' / '03.png', here / 'photos' / '07.png')
    options = ('--model', here / 'net', *BATCH, '--out', out, '--neighbours', 3, '--json')
    code, text, _ = run(capsys, 'embed', here / 'photos', *options, '--query', *query)
    files, _, features = expected
    assert code == 1
    found = np.load(out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-5)
    assert (tmp_path / 'features.txt').read_text().splitlines() == files
    distances, rows = NearestNeighbors(n_neighbors=4, metric='cosine').fit(features).kneighbors(features)
    for query in json.loads(text)['neighbours']:
        i = files.index(query['image'])
        assert [n['image'] for n in query['neighbours']] == [files[j] for j in rows[i, 1:]]
        similar = [n['similarity'] for n in query['neighbours']]
        np.testing.assert_allclose(similar, 1 - distances[i, 1:], atol=1e-5)
    with Image.open(tmp_path / 'features-neighbours.png') as picture:
        assert picture.width > 400


def test_names_with_line_breaks_need_json(tmp_path: Path) -> None:
    results = [Result(ImageFile(name, name), np.arange(3, dtype=np.float32)) for name in ('a', 'b\nc')]
    with pytest.raises(FlaxnetsError, match='line break'):
        save_features(iter(results), str(tmp_path / 'f.npy'), str(tmp_path / 'f.txt'), 3)
    assert not list(tmp_path.iterdir())
    save_features(iter(results), str(tmp_path / 'f.npy'), str(tmp_path / 'f.json'), 3)
    assert json.loads((tmp_path / 'f.json').read_text()) == ['a', 'b\nc']
    np.testing.assert_array_equal(np.load(tmp_path / 'f.npy'), [[0, 1, 2]] * 2)


def test_nearest_without_itself() -> None:
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    places = np.array([4, 0, 29])
    rows, values = nearest(features[places], features, 6, leave_out=places)
    distances, other = (
        NearestNeighbors(n_neighbors=7, metric='cosine').fit(features).kneighbors(features[places])
    )
    np.testing.assert_array_equal(rows, other[:, 1:])
    np.testing.assert_allclose(values, 1 - distances[:, 1:], atol=1e-6)
    assert nearest(features[:1], features[:3], 9, leave_out=np.array([0]))[0].shape == (1, 2)
    rows, _ = nearest(features[places], features, 2, leave_out=np.array([-1, 0, -1]))
    assert rows[:, 0].tolist() == [4, other[1, 1], 29]
    with pytest.raises(FlaxnetsError):
        nearest(features[:1], features[:1], 1, leave_out=np.array([0]))


@pytest.mark.parametrize(
    'options',
    [
        ('predict', '--out', 'table.xls'),
        ('predict', '--out', 'gone/table.csv'),
        ('predict', '--batch', '0'),
        ('embed', '--out', 'features.npz'),
        ('embed', '--out', 'features.npy', '--names', 'names.csv'),
        ('embed', '--out', 'features.npy', '--neighbours', '-1'),
        ('embed', '--out', 'features.npy', '--query', 'a.png'),
    ],
)
def test_refused(
    options: tuple[str, ...],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capsys, options[0], here / 'photos' / '00.png', '--model', here / 'net', *options[1:]
    )
    assert (code, out) == (1, '') and err.startswith('error: ') and not list(tmp_path.iterdir())


def test_parquet_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(FlaxnetsError, match='pyarrow'):
        check_table(str(tmp_path / 'table.parquet'))
    check_table(str(tmp_path / 'table.csv'))


def test_no_files_have_no_results(here: Path) -> None:
    transform = flaxnets.transform(here / 'net')
    assert list(mapped(lambda variables, images: images, {}, transform, [])) == []


def test_a_table_is_no_folder_and_a_full_disk_is_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'x.csv').mkdir()
    with pytest.raises(FlaxnetsError, match='is a folder'):
        check_table(str(tmp_path / 'x.csv'))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, 'No space left on device', 'table.csv')

    monkeypatch.setattr('flaxnets.store.files.os.replace', full)
    picture = str(here / 'photos' / '00.png')
    code, _, error = run(capsys, 'predict', picture, '--model', here / 'net', '--out', tmp_path / 'y.csv')
    said = f'error: {tmp_path / "y.csv"}: cannot be written: No space left on device'
    assert (code, error.splitlines()[-1]) == (1, said)
    assert [path.name for path in tmp_path.iterdir()] == ['x.csv']

"""Random folders and tars, read beside torchvision, timm and WebDataset.

Each generator makes trees with what real ones have: hidden entries, links, loops, odd endings, missing
classes, long names, members twice. The list of (image, class) must be the other reader's, but for the
differences that docs/training.md states; these are written out here, and nowhere taken from our own code.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from flaxnets.errors import FlaxnetsError
from train.data.sources import Source, open_source

SEED = int(os.environ.get('FLAXNETS_SEED', '20261127'))
FOLDERS, CLASS_TARS, SHARDS = 80, 70, 70
TIMMS = ('.png', '.jpg', '.jpeg')
HIDDEN = re.compile(r'(^|/)(\.[^/.][^/]*|__MACOSX|@eaDir|Thumbs\.db)(/|$)')  # what the docs leave out
CLASSES = ('cat', 'Dog', 'dog', 'n01440764', '10', '2', 'a b', 'über', 'x.jpg', 'class.1')


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (3, 2), (9, 99, 199)).save(file, form)
    return file.getvalue()


KINDS = {form: encoded(form) for form in ('jpeg', 'png', 'webp', 'gif', 'bmp', 'tiff', 'avif')}


class Maker:
    """Random choices, and images that differ from each other."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made = 0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def image(self, form: str = 'jpeg') -> bytes:
        self.made += 1
        return KINDS[form] + b'%06d' % self.made  # what follows an image is no part of it

    def name(self) -> str:
        """Of an image; endings that lie or that nobody knows are for content to decide."""
        self.made += 1
        endings = (
            '.jpg',
            '.JPEG',
            '.png',
            '.Jpg',
            '.bmp',
            '.webp',
            '.tif',
            '.jfif',
            '.gif',
            '',
            '.dat',
            '.avif',
        )
        return f'{self.random.choice(["", "img_", "a.b."])}{self.made}{self.random.choice(endings)}'

    def content(self) -> bytes:
        return self.image(self.random.choice(list(KINDS)))

    def classes(self) -> list[str]:
        return self.random.sample(CLASSES, self.random.randint(1, 4))


def is_picture(path: str) -> bool:
    """Pillow's own word on a file."""
    try:
        with Image.open(path) as image:
            return image.format is not None
    except OSError:
        return False


# Folders.


def fill(maker: Maker, folder: Path, outside: Path) -> None:
    """What may lie in the folder of a class."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(maker.random.randint(1, 3)):
        (folder / maker.name()).write_bytes(maker.content())
    if maker.chance(0.4):
        (folder / 'notes.txt').write_text('BM is how bitmaps begin, P1 how others do')
    if maker.chance(0.2):
        (folder / 'empty').write_bytes(b'')
    if maker.chance(0.4):
        (folder / maker.random.choice(['._a.jpg', '.hidden.png', 'Thumbs.db'])).write_bytes(maker.content())
    if maker.chance(0.3):
        inner = folder / maker.random.choice(['.ipynb_checkpoints', '@eaDir'])
        inner.mkdir()
        (inner / 'x.jpg').write_bytes(maker.image())
    if maker.chance(0.2):
        (folder / 'deeper').mkdir()
        (folder / 'deeper' / maker.name()).write_bytes(maker.content())
    if maker.chance(0.3):
        target = outside / str(maker.made)
        target.write_bytes(maker.content())
        (folder / f'link{maker.name()}').symlink_to(target)
    if maker.chance(0.15):
        target = outside / f'folder{maker.made}'
        target.mkdir()
        (target / maker.name()).write_bytes(maker.content())
        (folder / 'linked').symlink_to(target)
    if maker.chance(0.15):
        (folder / maker.random.choice(['broken.jpg', 'broken'])).symlink_to(outside / 'nowhere')


def make_folder(maker: Maker, root: Path) -> tuple[list[str], str]:
    """A data set; the classes of its training part, and the name of its other part."""
    outside = root / 'outside'
    outside.mkdir(parents=True)
    classes = maker.classes()
    train = root / 'data' / maker.random.choice(['train', 'Train', 'training'])
    val = root / 'data' / maker.random.choice(['val', 'validation', 'valid', 'test', 'Val'])
    for name in classes:
        fill(maker, train / name, outside)
        (train / name / 'one.jpg').write_bytes(maker.image())
    val.mkdir()
    for name in classes:
        if maker.chance(0.6):
            fill(maker, val / name, outside)
        elif maker.chance(0.5):
            (val / name).mkdir()  # a class without images
    (val / classes[0]).mkdir(exist_ok=True)
    (val / classes[0] / 'one.jpg').write_bytes(maker.image())
    for part in (train, val):
        if maker.chance(0.3):
            fill(maker, part / maker.random.choice(['__MACOSX', '.ipynb_checkpoints', '@eaDir']), outside)
        if maker.chance(0.3):
            (part / 'loose.jpg').write_bytes(maker.image())
        if maker.chance(0.2):  # one in a tree: readers that follow two multiply without end
            (part / classes[0] / 'loop').symlink_to(maker.random.choice([part, part / classes[0]]))
    if maker.chance(0.2):
        target = outside / 'class'
        fill(maker, target, outside)
        (target / 'one.jpg').write_bytes(maker.image())
        (train / 'zlinked').symlink_to(target)
    return [str(train), str(val)], str(root / 'data')


def in_a_loop(root: str, path: str) -> bool:
    """Whether a path comes through one and the same folder twice."""
    seen = {os.path.realpath(root)}
    folder = root
    for part in os.path.relpath(path, root).split(os.sep)[:-1]:
        folder = os.path.join(folder, part)
        if os.path.realpath(folder) in seen:
            return True
        seen.add(os.path.realpath(folder))
    return False


def listed(source: Source) -> list[tuple[str, str]]:
    return sorted(
        (source.record_name(i), source.classes[source_label(source, i)]) for i in range(len(source))
    )


def source_label(source: Source, index: int) -> int:
    return int(source.labels[index])  # type: ignore[attr-defined]


def of_torchvision(root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Classes and images of `ImageFolder`; any picture is taken, whatever its ending."""
    classes = [name for name in find_classes(root)[0] if not HIDDEN.search(name)]
    pairs = make_dataset(
        root,
        {name: i for i, name in enumerate(classes)},
        is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS) or is_picture(path),
        allow_empty=True,
    )
    kept = [(path, classes[label]) for path, label in pairs]
    return classes, [
        pair
        for pair in kept
        if not HIDDEN.search(os.path.relpath(pair[0], root)) and not in_a_loop(root, pair[0])
    ]


def of_timm(root: str) -> list[tuple[str, str]]:
    """Images and classes of timm's reader, without those that lie deeper: their class there is another."""
    pairs, places = find_images_and_targets(root)
    names = {place: name for name, place in places.items()}
    return [
        (path, names[label])
        for path, label in pairs
        if os.path.relpath(path, root).count(os.sep) == 1 and not HIDDEN.search(os.path.relpath(path, root))
    ]


def test_folders_are_read_as_torchvision_and_timm_read_them(tmp_path: Path) -> None:
    images = 0
    for number in range(FOLDERS):
        maker = Maker(SEED + number)
        (train, val), data = make_folder(maker, tmp_path / str(number))
        training = open_source(f'folder:{data}', '', True)
        evaluation = open_source(f'folder:{data}', '', False)
        for source, root in ((training, train), (evaluation, val)):
            classes, pairs = of_torchvision(root)
            assert list(source.classes) == classes, f'seed {SEED + number}'
            assert listed(source) == sorted(pairs), f'seed {SEED + number}'
            flat = [pair for pair in listed(source) if os.path.relpath(pair[0], root).count(os.sep) == 1]
            ours = [pair for pair in flat if os.path.splitext(pair[0])[1].lower() in TIMMS]
            assert ours == sorted(of_timm(root)), f'seed {SEED + number}'
            images += len(source)
        among = evaluation.among(training.classes)
        assert among.classes == training.classes and listed(among) == listed(evaluation)
    print(f'seed {SEED}: {FOLDERS} folders, {images} images')


# Tars whose classes are folders or tars.


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def make_tar(maker: Maker, path: Path, folders: list[str]) -> None:
    """A tar of some images in each folder; '' stands for none."""
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(path, 'w', format=maker.random.choice(forms)) as archive:
        before = maker.random.choice(['', './', 'data/', 'a/b/']) if '' not in folders else ''
        for folder in folders:
            place = f'{before}{folder}/' if folder else ''
            if place and maker.chance(0.5):
                info = tarfile.TarInfo(place)
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            add(archive, f'{place}one.jpg', maker.image())
            for _ in range(maker.random.randint(0, 2)):
                add(archive, f'{place}{maker.name()}', maker.content())
            if maker.chance(0.2) and archive.format != tarfile.USTAR_FORMAT:
                add(archive, f'{place}{"long" * 40}{maker.made}.png', maker.image('png'))
            if maker.chance(0.3):
                hidden = maker.random.choice(['._x.jpg', '.x.png', '@eaDir/x.jpg', '__MACOSX/x.jpg'])
                add(archive, place + hidden, maker.image())
            if maker.chance(0.3):
                add(archive, f'{place}notes.xml', b'<annotation/>')
            if maker.chance(0.2):
                info = tarfile.TarInfo(f'{place}link{maker.made}.jpg')
                info.type, info.linkname = maker.random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), 'one.jpg'
                archive.addfile(info)
            if maker.chance(0.15):
                add(archive, f'{place}one.jpg', maker.image())  # appended to: two of one name


def make_class_tars(maker: Maker, root: Path) -> tuple[str, str]:
    """Tars in one of the forms that timm's reader opens; our pattern for them, and its root."""
    root.mkdir()
    classes = [name for name in maker.classes() if name != 'x.jpg']
    form = maker.random.choice(['one', 'one a class', 'several', 'tar of tars'])
    if form == 'one':
        make_tar(maker, root / 'all.tar', classes or ['cat'])
        return f'tar:{root}/all.tar', f'{root}/all.tar'
    if form == 'tar of tars':
        with tarfile.open(root / 'outer.tar', 'w') as archive:
            for name in classes or ['cat']:
                make_tar(maker, root / 'inner', [''])
                add(
                    archive, f'{maker.random.choice(["", "inner/"])}{name}.tar', (root / 'inner').read_bytes()
                )
        (root / 'inner').unlink()
        return f'tar:{root}/outer.tar', f'{root}/outer.tar'
    (root / 'train').mkdir()
    for number, name in enumerate(classes or ['cat']):
        if form == 'one a class':
            make_tar(maker, root / 'train' / f'{name}.tar', [''])
        else:
            make_tar(maker, root / 'train' / f'{number}.tar', [name, 'more'])
    ways = [f'tar:{root}/{{split}}/*.tar', f'tar:{root}/{{split}}', f'tar:{root}', f'tar:{root}/train']
    return maker.random.choice(ways), f'{root}/train'


def pairs_of_timm(root: str) -> list[tuple[bytes, str]]:
    """Bytes and classes by timm's reader, without hidden members."""
    reader = ReaderImageInTar(root, cache_tarinfo=False)
    found = []
    for index, (info, _, _) in enumerate(reader.samples):
        if not HIDDEN.search(info.name):
            file, target = reader[index]
            found.append((file.read(), reader.class_idx_to_name[int(target)]))
    states = [reader.tar_state] if reader.root_is_tar else list(reader.tar_state.values())
    for state in states:
        for part in (*state.children.values(), state):
            if part.tf is not None:
                part.tf.close()
    return sorted(found)


def stored(source: Source, index: int) -> bytes:
    image = source[index].image
    assert isinstance(image, bytes)
    return image


def test_class_tars_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    images = 0
    for number in range(CLASS_TARS):
        maker = Maker(SEED + number)
        pattern, root = make_class_tars(maker, tmp_path / str(number))
        source = open_source(pattern, '', True)
        assert list(source.classes) == sorted(source.classes)
        pairs = []
        for index in range(len(source)):
            data, name = stored(source, index), source.record_name(index)
            assert is_picture(io.BytesIO(data))  # type: ignore[arg-type]
            # timm's reader knows three endings; any other picture is one more here.
            if os.path.splitext(name)[1].lower() in TIMMS:
                pairs.append((data, source.classes[source[index].label]))
        assert sorted(pairs) == pairs_of_timm(root), f'seed {SEED + number}'
        images += len(source)
    print(f'seed {SEED}: {CLASS_TARS} sets of class tars, {images} images')


# WebDataset's shards.


def make_shards(maker: Maker, root: Path) -> tuple[str, list[str], str, list[str]]:
    """Shards; our pattern, their paths in its order, the field of the label, the fields of the images."""
    root.mkdir()
    count = maker.random.randint(1, 3)
    field = maker.random.choice(['cls', 'json', 'txt', 'cls', 'class'])
    fields = maker.random.choice(
        [
            ['jpg'],
            ['png'],
            ['left.jpg', 'right.jpg'],
            ['seg.png', 'jpg'],
            ['png', 'jpg'],
            ['webp', 'png'],
            ['webp'],
            ['gif', 'depth.png'],
        ]
    )
    texts = field == 'txt' or maker.chance(0.3)
    names = [name for name in CLASSES if not name.isdecimal()]
    shards = [f'{root}/train-{number:04d}.tar' for number in range(count)]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, 'w') as archive:
            if maker.chance(0.2):
                add(archive, '__index__', b'{}')
            for sample in range(10):
                places = ['', './', 'in/side/'] if field != 'txt' else ['', './']
                key = f'{maker.random.choice(places)}s{number}{sample}'
                label = names[sample % 3] if texts else str(maker.random.randint(0, 12))
                text = (
                    json.dumps({'label': label if texts else int(label), 'width': 3})
                    if field == 'json'
                    else label
                )
                parts = [(f, maker.image('jpeg' if f.endswith('jpg') else f.split('.')[-1])) for f in fields]
                if field != 'json' and maker.chance(0.3):
                    parts.append(('json', b'{"width": 3}'))
                parts.append(
                    (
                        field if maker.chance(0.9) else field.upper(),
                        text.encode() + maker.random.choice([b'', b'\n']),
                    )
                )
                if maker.chance(0.2):
                    parts.append(('npy', b'\x93NUMPY'))
                maker.random.shuffle(parts)
                for ending, data in parts:
                    add(archive, f'{key}.{ending}', data)
                if maker.chance(0.1):
                    add(archive, f'._{key}.jpg', b'\0\5\x16\7')
    braces = f'{root}/train-{{0000..{count - 1:04d}}}.tar'
    patterns = [
        braces,
        '::'.join(shards),
        f'{root}/{{split}}-*.tar',
        str(root),
        f'{root}/{{split}}-{{0..0}}*.tar',
    ]
    return f'tar:{maker.random.choice(patterns[:4])}', shards, field, fields


def samples_of(shards: list[str]) -> Iterator[dict[str, bytes]]:
    """The samples by WebDataset's own reader, hidden members left out."""
    with contextlib.ExitStack() as stack:  # WebDataset itself leaves them open
        streams = [{'url': shard, 'stream': stack.enter_context(open(shard, 'rb'))} for shard in shards]
        for sample in group_by_keys(tar_file_expander(streams)):
            if not HIDDEN.search(sample['__key__']):
                yield sample


def first_image(sample: dict[str, bytes], fields: list[str]) -> bytes:
    """The image that the docs say is taken: one that is called by its kind alone, or else the first."""
    plain = [field for field in ('jpg', 'png', 'webp', 'gif') if field in fields]
    return sample[plain[0] if plain else next(field for field in sample if field in fields)]


def label_in(sample: dict[str, bytes], field: str) -> str:
    return str(json.loads(sample['json'])['label']) if field == 'json' else sample[field].decode().strip()


def test_shards_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    images = 0
    for number in range(SHARDS):
        maker = Maker(SEED + number)
        pattern, shards, field, fields = make_shards(maker, tmp_path / str(number))
        source = open_source(pattern, '', True)
        expected = [(first_image(s, fields), label_in(s, field)) for s in samples_of(shards)]
        found = [(stored(source, i), source.classes[source[i].label]) for i in range(len(source))]
        assert found == expected, f'seed {SEED + number}'
        images += len(source)
    print(f'seed {SEED}: {SHARDS} sets of shards, {images} images')


@pytest.mark.parametrize('form', ['flat', 'gzip', 'cut', 'garbage', 'unlabelled'])
def test_random_tars_that_are_refused_in_one_line(tmp_path: Path, form: str) -> None:
    for number in range(5):
        maker = Maker(SEED + number)
        path = tmp_path / f'{number}.tar'
        make_tar(maker, path, [''] if form == 'flat' else ['cat', 'dog'])
        data = path.read_bytes()
        if form == 'gzip':
            path.write_bytes(gzip.compress(data))
        elif form == 'cut':
            path.write_bytes(data[: maker.random.randrange(1, 1200)])
        elif form == 'garbage':
            path.write_bytes(data[:1024] + b'<html>' * 200 + data[2224:])
        elif form == 'unlabelled':
            with tarfile.open(path, 'w') as archive:
                add(archive, 'a.jpg', maker.image())
                add(archive, 'a.cls', b'-1')
        with pytest.raises(FlaxnetsError) as refused:
            open_source(f'tar:{path}', '', True)
        assert str(path) in str(refused.value) and '\n' not in str(refused.value)

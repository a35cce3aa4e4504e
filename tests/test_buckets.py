"""Workdirs and data in a bucket, by an emulator of Google's store on this machine."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import feeds
import numpy as np
import pytest
from bucket import Bucket
from PIL import Image
from test_checkpoint import assert_same, make_state, save, targets

import flaxnets
from flaxnets.errors import CheckpointError, FlaxnetsError, ImageError
from flaxnets.store import arrays, runs
from flaxnets.store import remote as store
from flaxnets.store.remote import StoreError, StorePath
from train.data.batches import train_batches
from train.data.sources import open_source
from train.data.sources import store as source_store
from train.run import lock, log
from train.run.checkpoints import Checkpoints
from train.run.lock import Lock
from train.run.log import Log, read

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'


@pytest.fixture(scope='module')
def opened() -> Iterator[Bucket]:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STORAGE_EMULATOR_HOST', bucket.host)
        yield bucket
    bucket.close()


@pytest.fixture
def bucket(opened: Bucket) -> Iterator[Bucket]:
    """An empty one, which does what it is asked."""
    yield opened
    opened.fault = lambda method, path: None
    opened.wipe()
    opened.requests.clear()


ROOT = StorePath('gs://bucket/some where')


# --- objects


def test_what_a_path_can_do(bucket: Bucket) -> None:
    path = ROOT / 'a' / 'b.txt'
    assert (str(path), path.name, path.stem, path.suffix) == (
        'gs://bucket/some where/a/b.txt',
        'b.txt',
        'b',
        '.txt',
    )
    assert path.parent.parent == ROOT
    assert not (path.exists() or path.is_file() or path.is_dir() or ROOT.exists())
    for missing in (path.read_bytes, path.unlink, path.size):
        with pytest.raises(FileNotFoundError):
            missing()
    path.unlink(missing_ok=True)
    path.write_bytes(b'0123456789')
    path.write_bytes(b'abcdefghij')
    assert (path.read_bytes(), path.read_bytes(2, 5), path.read_bytes(8), path.size()) == (
        b'abcdefghij',
        b'cde',
        b'ij',
        10,
    )
    assert path.is_file() and not path.is_dir() and path.exists()
    assert ROOT.is_dir() and not ROOT.is_file()
    (ROOT / 'empty').write_bytes(b'')
    assert (ROOT / 'empty').read_bytes() == b''
    assert ROOT.iterdir() == [ROOT / 'a', ROOT / 'empty'] and path.iterdir() == []
    assert ROOT.glob('e*') == [ROOT / 'empty'] and ROOT.files() == {'a/b.txt': 10, 'empty': 0}
    with pytest.raises(FileExistsError):
        path.create(b'again')
    (ROOT / 'new').create(b'once')
    path.unlink()
    assert bucket.names() == ['some where/empty', 'some where/new']


def test_many_objects(bucket: Bucket) -> None:
    """More than one answer of the store holds."""
    for number in range(2500):
        bucket.put(f'many/{number:04}.jpg', b'x' * (number % 3))
    (ROOT.parent / 'many' / 'inner' / 'one').write_bytes(b'1')
    names = [path.name for path in (ROOT.parent / 'many').iterdir()]
    assert names == [*(f'{number:04}.jpg' for number in range(2500)), 'inner']
    assert len((ROOT.parent / 'many').files()) == 2501
    assert len(StorePath('gs://bucket/many/00*.jpg').matching()) == 100
    pages = [request for request in bucket.requests if 'pageToken' in request]
    assert len(pages) >= 4, bucket.requests


def test_a_folder_goes_there_and_back(bucket: Bucket, tmp_path: Path) -> None:
    with store.staged('gs://bucket/run/weights') as here:
        (here / 'inner').mkdir()
        (here / 'inner' / 'a').write_bytes(b'1')
        (here / 'b').write_bytes(b'')
    assert bucket.names() == ['run/weights/b', 'run/weights/inner/a']
    there = StorePath('gs://bucket/run/weights')
    there.download(tmp_path, there.files())
    assert (tmp_path / 'inner' / 'a').read_bytes() == b'1' and (tmp_path / 'b').read_bytes() == b''
    with store.staged(tmp_path / 'b') as here:
        assert here == tmp_path / 'b'
    with pytest.raises(KeyError), store.staged('gs://bucket/not'):
        raise KeyError
    assert not StorePath('gs://bucket/not').exists()


@pytest.mark.parametrize(
    'text', ['gs:/bucket/run', 'gs:bucket', 'gs://', 'gs:///x', 's3:/x', 'GS://bucket/x']
)
def test_what_is_no_place_in_a_bucket(text: str) -> None:
    for use in (store.is_remote, Lock, read, Checkpoints_of, arrays.is_committed, flaxnets.load):
        with pytest.raises(
            FlaxnetsError, match=f'{text}.*: a place in a bucket is written (gs|s3)://BUCKET/NAME'
        ):
            use(text)
    with pytest.raises(FlaxnetsError, match='give it as a str'):
        store.is_remote(Path('gs://bucket/x'))


def Checkpoints_of(text: str) -> Checkpoints:
    return Checkpoints(text, 1, 0)


@pytest.mark.parametrize('text', ['http://x/run', 'file:///x', 'hdfs://x/y'])
def test_another_kind_of_store(text: str) -> None:
    for use in (store.is_remote, Lock, read):
        with pytest.raises(FlaxnetsError, match=f'{text}: neither a path of this machine nor one of gs://, '):
            use(text)
    assert not store.names_store(text)


@pytest.mark.parametrize(('kind', 'package'), [('s3', 's3fs'), ('az', 'adlfs'), ('gs', 'gcsfs')])
def test_a_package_is_missing(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f'{package}.core', None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(store, '_filesystem', store._filesystem.__wrapped__)
    with pytest.raises(StoreError, match=f'needs the package {package}: pip install {package}'):
        StorePath(f'{kind}://b/x').read_bytes()


# --- what goes wrong


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    path = StorePath('gs://nobucket/run')
    for use in (path.iterdir, path.is_dir, path.files, lambda: path.write_bytes(b'')):
        with pytest.raises(StoreError, match=r'^gs://nobucket/run: there is no bucket nobucket'):
            use()
    with pytest.raises(FlaxnetsError, match='gs://nobucket/run: cannot be used .*: there is no bucket'):
        Lock('gs://nobucket/run')


@pytest.mark.parametrize(('status', 'reason'), [(403, 'no permission'), (401, 'no permission'), (400, '400')])
def test_what_a_store_refuses(bucket: Bucket, status: int, reason: str) -> None:
    (ROOT / 'x').write_bytes(b'1')
    bucket.fault = lambda method, path: status
    for use in (
        (ROOT / 'x').read_bytes,
        ROOT.iterdir,
        lambda: (ROOT / 'x').write_bytes(b''),
        (ROOT / 'x').unlink,
    ):
        with pytest.raises(StoreError, match=reason) as caught:
            use()
        assert '\n' not in str(caught.value) and str(caught.value).startswith(str(ROOT))
    with pytest.raises(FlaxnetsError, match=f'cannot be used as a workdir: .*{reason}'):
        Lock(str(ROOT))
    with Checkpoints(str(ROOT), 1, 0) as checkpoints, pytest.raises(FlaxnetsError, match=reason):
        checkpoints.restore(targets(make_state(0)))


def test_every_byte_is_kept(bucket: Bucket) -> None:
    """The last ones too, which a reader of multipart uploads may take for the end of a line."""
    for end in (b'\r', b'\n', b'\r\n', b'\n\r', b'\r\r', b' ', b'\0', b'\n--'):
        content = bytes(range(256)) + end
        (ROOT / 'x').write_bytes(content)
        assert (ROOT / 'x').read_bytes() == content


def test_a_moment_without_a_network(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is made again; only after some time it has failed."""
    answers = iter([503, 0, 429])
    bucket.fault = lambda method, path: next(answers, None)
    (ROOT / 'x').write_bytes(b'1')
    assert next(answers, None) is None


# --- checkpoints


@pytest.fixture
def checkpoints(bucket: Bucket) -> Iterator[Checkpoints]:
    with Checkpoints('gs://bucket/run/checkpoints', keep_last=2, keep_best=1) as opened:
        yield opened


def test_checkpoints_come_back_and_go(bucket: Bucket, checkpoints: Checkpoints) -> None:
    assert checkpoints.restore(targets(make_state(0))) is None and checkpoints.steps() == []
    for step in (1, 2, 3, 4):
        assert save(checkpoints, step, make_state(step), score=1.0 if step == 1 else None) is None
    assert checkpoints.steps() == [4, 3, 1]
    assert {name.split('/')[2] for name in bucket.names()} == {'1', '3', '4'}
    restored = checkpoints.restore(targets(make_state(0)))
    assert restored is not None and (restored.step, restored.skipped) == (4, ())
    assert_same(restored.state, make_state(4))
    assert runs.find('gs://bucket/run') == 'gs://bucket/run/checkpoints/4'
    assert runs.find('gs://bucket/run', 'best') == 'gs://bucket/run/checkpoints/1'
    with pytest.raises(CheckpointError, match='no checkpoint 2; there are 1, 3, 4'):
        runs.find('gs://bucket/run', '2')
    found = arrays.read('gs://bucket/run/checkpoints/1', ['params'])
    assert_same(found['params'], make_state(1)['params'])


def test_part_of_a_checkpoint_is_none(bucket: Bucket, checkpoints: Checkpoints) -> None:
    """However far an upload came: the marker is the last of it."""
    for step in (1, 2):
        assert save(checkpoints, step, make_state(step)) is None
    assert bucket.names('run/checkpoints/2/commit') == ['run/checkpoints/2/commit_success.txt']
    count = len(bucket.names('run/checkpoints/2/')) - 1  # Orbax's own files vary by one or two
    for uploaded in range(0, count - 2, 1 if FULL else 4):
        done = itertools.count()
        bucket.fault = lambda method, path, n=uploaded, done=done: (
            400 if path.startswith('/upload') and next(done) >= n else None
        )
        error = save(checkpoints, 3, make_state(3))
        assert isinstance(error, CheckpointError) and 'checkpoints/3: cannot be written: ' in str(error)
        assert len(bucket.names('run/checkpoints/3/')) <= uploaded
        assert checkpoints.steps() == [2, 1] and runs.find('gs://bucket/run').endswith('/2')
    bucket.fault = lambda method, path: None
    restored = checkpoints.restore(targets(make_state(0)))
    assert restored is not None and restored.step == 2 and restored.skipped == ()
    assert bucket.names('run/checkpoints/3/') == [], 'what was left is removed'
    assert save(checkpoints, 3, make_state(3)) is None and checkpoints.steps() == [3, 2]


def test_a_damaged_object(bucket: Bucket, checkpoints: Checkpoints) -> None:
    for attempt in range(2):
        for step in (1, 2):
            assert save(checkpoints, step, make_state(step)) is None
        names = bucket.names('run/checkpoints/2/')
        name = 'run/checkpoints/2/manifest/metadata'
        if attempt:
            name = max(names, key=lambda name: len(bucket.read(name)))
        content = bytearray(bucket.read(name))
        content[len(content) // 2] ^= 1
        bucket.put(name, bytes(content))
        restored = checkpoints.restore(targets(make_state(0)))
        assert restored is not None and restored.step == 1 and restored.skipped[0][0] == 2
        assert_same(restored.state, make_state(1))
        assert checkpoints.steps() == [1]
        aside = f'run/checkpoints/2.damaged{".1" * attempt}/'
        assert len(bucket.names(aside)) == len(names) and bucket.names('run/checkpoints/2/') == []


def test_a_store_out_of_reach_is_no_damage(bucket: Bucket, checkpoints: Checkpoints) -> None:
    """Whichever request of a restore fails, no step is set aside for it."""
    for step in (1, 2):
        assert save(checkpoints, step, make_state(step)) is None
    before, number = bucket.names(), 0
    while True:
        asked = itertools.count()
        bucket.fault = lambda method, path, n=number, asked=asked: 403 if next(asked) == n else None
        try:
            restored = checkpoints.restore(targets(make_state(0)))
        except FlaxnetsError as error:
            assert 'no permission' in str(error)
        else:
            if next(asked) <= number:
                break
            assert restored is not None and (restored.step, restored.skipped) == (2, ())
        assert bucket.names() == before
        number += 1 if FULL else 4
    assert number > 10


def test_only_the_last_request_makes_a_step(
    bucket: Bucket, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise StoreError('gs://bucket', 'gone')

    monkeypatch.setattr(StorePath, 'write_text', fails)
    assert isinstance(save(checkpoints, 7, make_state(1)), CheckpointError)
    assert checkpoints.steps() == [] and any('manifest/metadata' in name for name in bucket.names())


def test_a_step_is_replaced(bucket: Bucket, checkpoints: Checkpoints) -> None:
    """Whichever request of it is the last one, the step is there afterwards, the old or the new one."""
    assert save(checkpoints, 7, make_state(1)) is None
    number, ends = 0, set()
    while True:
        asked = itertools.count()
        bucket.fault = lambda method, path, n=number, asked=asked: 400 if next(asked) >= n else None
        failed = save(checkpoints, 7, make_state(2), score=0.5)
        bucket.fault = lambda method, path: None
        restored = checkpoints.restore(targets(make_state(0)))
        assert restored is not None and (restored.step, restored.skipped) == (7, ())
        which = 1 if restored.score is None else 2
        assert_same(restored.state, make_state(which))
        assert {name.split('/')[2] for name in bucket.names()} == {'7'}
        ends.add((which, failed is None))
        if failed is None and next(asked) <= number:
            break
        if which == 2:
            assert save(checkpoints, 7, make_state(1)) is None
        number += 1 if FULL else 14
    assert {(1, False), (2, True)} <= ends


# --- the log, the lock


def open_log(workdir: str, first_step: int = 0) -> Log:
    return Log(
        workdir,
        primary=True,
        total_steps=9,
        first_step=first_step,
        images_per_step=1,
        quiet=True,
    )


def test_the_log(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = 'gs://bucket/run'
    values = {'epoch': 1.0, 'loss': 2.0}
    first = open_log(workdir)
    first.train(1, values)
    assert read(workdir) == []
    first.flush()  # as before a checkpoint
    assert [r['step'] for r in read(workdir)] == [1]
    first.train(2, values)
    first.flush()
    first.train(3, values)  # and it is killed
    with open_log(workdir, first_step=1) as second:
        assert [r['step'] for r in read(workdir)] == [1]
        second.event('resume', 'x', step=1)
        monkeypatch.setattr(log, 'REWRITE_SECONDS', 0.0)
        bucket.fault = lambda method, path: 403
        for step in (2, 3):
            second.train(step, values)
            second._records._thread.join()
        bucket.fault = lambda method, path: None
        second.train(4, values)
        second._records._thread.join()
        assert [r['step'] for r in read(workdir)] == [1, 1, 2, 3, 4]
    assert capsys.readouterr().err.count('log.jsonl cannot be written: no permission') == 1
    bucket.put('run/log.jsonl', b'nonsense\n' + bucket.read('run/log.jsonl'))
    with pytest.raises(FlaxnetsError, match=r'log\.jsonl, line 1: not a record'):
        read(workdir)


def test_the_lock(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.05)
    monkeypatch.setattr(lock, 'SILENT_SECONDS', 1.0)
    monkeypatch.setattr(lock, 'SETTLING_SECONDS', 0.1)
    workdir = 'gs://bucket/run'
    with Lock(workdir) as held:
        with pytest.raises(FlaxnetsError, match=f'run is in use by process {os.getpid()} on'):
            Lock(workdir)
        held.check()
    held.close()
    assert bucket.names() == []
    holder = {'host': 'elsewhere', 'pid': 12, 'run': 'x'}
    bucket.put('run/.lock', json.dumps(holder).encode())  # and it is dead
    started = time.monotonic()
    with Lock(workdir) as held:
        assert time.monotonic() - started > 1.0
        assert 'waiting up to 1 s for a sign of life of process 12 on elsewhere' in capsys.readouterr().err
        bucket.put('run/.lock', json.dumps(holder).encode())  # it was not
        time.sleep(0.3)
        with pytest.raises(FlaxnetsError, match='in use by process 12 on elsewhere'):
            held.check()
    assert bucket.names() == ['run/.lock'], "another run's"
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.communicate()
    bucket.put('run/.lock', json.dumps({**holder, 'host': socket.gethostname(), 'pid': child.pid}).encode())
    capsys.readouterr()
    Lock(workdir).close()  # the system says that it is dead
    assert 'waiting' not in capsys.readouterr().err


def test_of_two_runs_that_take_over_a_dead_lock_one_goes_on(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, 'SETTLING_SECONDS', 0.5)
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.communicate()
    dead = {'host': socket.gethostname(), 'pid': child.pid, 'run': 'dead'}
    bucket.put('run/.lock', json.dumps(dead).encode())
    other = json.dumps({'host': 'elsewhere', 'pid': 12, 'run': 'quicker'}).encode()
    timer = threading.Timer(0.2, bucket.put, ('run/.lock', other))  # it removed ours, and made its own
    timer.start()
    with pytest.raises(FlaxnetsError, match='in use by process 12 on elsewhere'):
        Lock('gs://bucket/run')
    timer.join()


def test_a_lock_that_says_nothing_sensible(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.05)
    monkeypatch.setattr(lock, 'SILENT_SECONDS', 0.2)
    monkeypatch.setattr(lock, 'SETTLING_SECONDS', 0.0)
    for content in (b'{"pid": "abc"}', b'{"pid": null, "host": 3}', b'no JSON', b'[1]'):
        bucket.put('run/.lock', content)
        Lock('gs://bucket/run').close()


# --- data


def put_tree(bucket: Bucket, folder: Path) -> None:
    for path in folder.rglob('*'):
        if path.is_file():
            bucket.put(f'data/{path.relative_to(folder).as_posix()}', path.read_bytes())


def picture(number: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(file, 'png')
    return file.getvalue()


@pytest.fixture
def data(bucket: Bucket, tmp_path: Path) -> Path:
    """The same images as a folder, as tar files and as arrays, here and in the bucket."""
    here = tmp_path / 'data'
    for part, count in (('train', 5), ('val', 2)):
        paths = [here.parent / f'{part}-{shard}.tar' for shard in range(2)]
        archives = [tarfile.open(path, 'w') for path in paths]  # noqa: SIM115
        for number in range(4 * count):
            name = here / 'folder' / part / 'abcd'[number % 4] / f'{number} ü.png'
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_bytes(picture(number))
            archives[number % 2].add(name, f'{"abcd"[number % 4]}/{number}.png')
        (here / 'folder' / part / 'a' / 'notes.txt').write_text('no image')
        for archive in archives:
            archive.close()
            path = Path(str(archive.name))
            path.rename(here / path.name)
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    labels = np.arange(9) % 3
    np.savez(here / 'some.npz', x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    put_tree(bucket, here)
    return here


@pytest.mark.parametrize(
    'spec',
    ['folder:{}/folder', 'tar:{}/{{split}}-*.tar', 'tar:{}/{{split}}-{{0..1}}.tar', 'arrays:{}/some.npz'],
)
def test_the_same_images_as_here(bucket: Bucket, data: Path, spec: str) -> None:
    for training in (True, False):
        here = open_source(spec.format(data), '', training)
        there = open_source(spec.format('gs://bucket/data'), '', training)
        assert (len(there), there.classes, there.fingerprint) == (len(here), here.classes, here.fingerprint)
        for index in range(len(here)):
            one, other = here[index], there[index]
            assert one.label == other.label and np.array_equal(one.image, other.image)
            assert one.name.replace(str(data), 'gs://bucket/data') == other.name


def downloads(bucket: Bucket) -> list[str]:
    """The requests for content. gcsfs asks two things at once for a size, and one may come in later."""
    return [request for request in bucket.requests if request.startswith('GET /download/')]


def test_an_image_takes_one_request(bucket: Bucket, data: Path) -> None:
    for spec in ('folder:gs://bucket/data/folder', 'tar:gs://bucket/data/{split}-*.tar'):
        source = open_source(spec, '', True)
        bucket.requests.clear()
        with ThreadPoolExecutor(8) as threads:
            records = list(threads.map(source.__getitem__, range(len(source))))
        asked = downloads(bucket)
        assert len(asked) == len(records) == 20 and len(bucket.requests) < 30
        ranges = [re.search(r'bytes=(\d+)-(\d+)$', request) for request in asked]
        if spec.startswith('tar'):
            lengths = sorted(int(found[2]) - int(found[1]) + 1 for found in ranges if found)
            assert lengths == sorted(len(record.image) for record in records)


def test_worker_processes_read_from_a_bucket(bucket: Bucket, data: Path) -> None:
    source = open_source('tar:gs://bucket/data/{split}-*.tar', '', True)
    found = {}
    for kind in ('threads', 'processes'):
        options: dict[str, Any] = {'batch_size': 5, 'seed': 0, 'start_step': 0, kind: 1}
        batches = train_batches(source, feeds.small, **options)
        found[kind] = [next(batches) for _ in range(4)]
        batches.close()
    for ours, theirs in zip(found['processes'], found['threads'], strict=True):
        assert np.array_equal(ours['image'], theirs['image']) and np.array_equal(
            ours['label'], theirs['label']
        )


def test_a_large_file_is_read_in_parts(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(100_000)
    bucket.put('large', content)
    monkeypatch.setattr(source_store, 'BLOCK', 10_000)
    monkeypatch.setattr(source_store, 'PART', 3_000)
    with source_store.opened('gs://bucket/large') as file:
        bucket.requests.clear()
        assert file.read(10) == content[:10] and len(downloads(bucket)) == 4
        assert file.seek(9_000) == 9_000 and file.read(1_000) == content[9_000:10_000]
        assert len(downloads(bucket)) == 4
        file.seek(-5, os.SEEK_END)
        assert file.read() == content[-5:] and len(downloads(bucket)) == 5
        file.seek(0)
        assert file.read() == content


def test_data_that_is_not_there(bucket: Bucket, data: Path) -> None:
    for spec, reason in (
        ('folder:gs://bucket/nothing', 'gs://bucket/nothing: no such folder'),
        ('folder:gs://nobucket/data', 'there is no bucket nobucket'),
        ('tar:gs://bucket/no-{split}-*.tar', 'no file matches gs://bucket/no-train-'),
        ('tar:gs://nobucket/{split}-*.tar', 'there is no bucket nobucket'),
        ('arrays:gs://bucket/data/no.npz', 'no such object'),
        ('folder:gs:/bucket/data/folder', 'a place in a bucket is written gs://'),
        ('tar:http://x/{split}.tar', 'neither a path of this machine nor'),
        ('tfds:mnist?data_dir=gs://bucket/tfds', 'copy'),
    ):
        with pytest.raises(FlaxnetsError) as caught:
            open_source(spec, '', True)
        assert reason in str(caught.value) and '\n' not in str(caught.value)
    source = open_source('folder:gs://bucket/data/folder', '', True)
    bucket.fault = lambda method, path: 403
    with pytest.raises(
        StoreError, match='no permission'
    ):  # and no ImageError, for which it would be replaced
        source[0]
    bucket.fault = lambda method, path: None
    bucket.wipe()
    with pytest.raises(ImageError, match='no such object'):
        source[0]

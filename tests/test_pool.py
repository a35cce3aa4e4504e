"""Worker processes: the batches of threads, whatever happens to the processes."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feeds
import numpy as np
import psutil
import pytest

from flaxnets.errors import FlaxnetsError
from train.data.batches import TooManyBadImagesError, TrainBatches, eval_batches, train_batches, workers_for
from train.data.pool import WorkerError
from train.data.sources import Source, open_source

ROOT = Path(__file__).parents[1]


def begin(source: Any = None, transform: Any = feeds.noisy, **options: Any) -> TrainBatches:
    options = {'batch_size': 4, 'seed': 0, 'start_step': 0, 'in_chans': 1, **options}
    return train_batches(source or feeds.numbers(), transform, **options)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.fixture
def workers() -> Iterator[set[int]]:
    """No process that a test begins may be left over, nor a file in shared memory."""
    files = set(os.listdir('/dev/shm'))
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield before
    gc.collect()
    assert_gone({p.pid for p in psutil.Process().children(recursive=True)} - before)
    assert set(os.listdir('/dev/shm')) <= files


def assert_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, pids))


def test_processes_make_the_batches_of_threads(workers: set[int]) -> None:
    threads = begin(threads=1)
    straight = [next(threads) for _ in range(40)]
    threads.close()
    for processes in (1, 3):
        batches = begin(processes=processes, start_step=13)
        kept = [next(batches) for _ in range(27)]  # more than there are slots: none is overwritten
        part = kept[0]['image'][1:3][::-1]
        alone = part.copy()
        for ours, theirs in zip(kept, straight[13:], strict=True):
            same(ours, theirs)
        del kept, ours
        for _ in range(9):
            next(batches)
        np.testing.assert_array_equal(part, alone)  # a view keeps its batch
        slots = len(batches._batches._slots)
        for _ in range(60):
            next(batches)
        assert len(batches._batches._slots) == slots  # all others are used again
        assert batches.images_per_second()
        batches.close()
        np.testing.assert_array_equal(part, alone)  # also after the end
        with pytest.raises(WorkerError):
            next(batches)


@pytest.mark.parametrize('hosts', [1, 2])
def test_an_evaluation_is_that_of_threads(hosts: int, workers: set[int]) -> None:
    options: dict[str, Any] = {'batch_size': 10, 'in_chans': 1, 'host': hosts - 1, 'hosts': hosts}
    ours = list(eval_batches(feeds.numbers(), feeds.whole, processes=2, **options))
    theirs = list(eval_batches(feeds.numbers(), feeds.whole, threads=1, **options))
    for one, other in zip(ours, theirs, strict=True):
        same(one, other)


def test_bad_images_are_counted_as_threads_count_them(workers: set[int]) -> None:
    found = []
    for start in (0, 2):
        for kind in ('threads', 'processes'):
            batches = begin(feeds.Broken({0, 3, 4}), feeds.plain, batch_size=6, start_step=start, **{kind: 2})
            counts = []
            for _ in range(5):
                batch = next(batches)
                counts.append((batch['label'].tolist(), batches.bad, sorted(batches.new_bad())))
            batches.close()
            found.append(counts)
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0][-1][1] > 3
    # What was found after a step that a run stopped at is found again.
    assert [news for *_, news in found[0][2:]] == [news for *_, news in found[2][:3]]
    with pytest.raises(TooManyBadImagesError, match='max_bad_images=0.0001'):
        next(begin(feeds.Broken(set(range(23))), feeds.plain, processes=2, max_bad=0.0001))
    with pytest.raises(TooManyBadImagesError, match='none of its images'):
        next(begin(feeds.Broken(set(range(23))), feeds.plain, processes=2, max_bad=1.0))


def until_the_end(batches: TrainBatches) -> None:
    for _ in range(30):
        next(batches)


def test_what_goes_wrong_is_said_once_and_ends_all(workers: set[int]) -> None:
    with pytest.raises(ZeroDivisionError, match='seven') as failed:
        until_the_end(begin(feeds.Failing(feeds.divide), processes=2))
    assert 'divide' in failed.value.__notes__[0]
    with pytest.raises(WorkerError, match='SIGKILL'):
        until_the_end(begin(feeds.Failing(feeds.die), processes=2))
    with pytest.raises(WorkerError, match='cannot be handed'):
        begin(transform=lambda image, rng: feeds.noisy(image, rng), processes=1)
    with pytest.raises(WorkerError, match='cannot open'):
        until_the_end(begin(transform=NotThere(), processes=1))
    batches = begin(processes=2)
    next(batches)
    (parent,) = (p for p in psutil.Process().children() if p.pid not in workers and p.children())
    parent.kill()
    with pytest.raises(WorkerError, match='process of the workers was killed'):
        until_the_end(batches)
    for wrong in ({'processes': -1}, {'threads': -1}, {'batch_size': 0}, {'batch_size': 5, 'hosts': 2}):
        with pytest.raises(FlaxnetsError):
            begin(**wrong)


class NotThere:
    """Travels, but cannot be opened where JAX is not to be had."""

    def __call__(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        return feeds.noisy(image, rng)

    def __reduce__(self) -> Any:
        return __import__, ('jax',)


MAIN = """
import signal, sys, time
import feeds, psutil
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
from train.data.images import Share, TrainImages
from train.data.pool import Pool
images = TrainImages(feeds.numbers(), feeds.light, 0, 1, Share(4, 0, 1))
nothing = lambda *told: None
pool = Pool(images, rows=4, steps=range(99), processes=2, bad=nothing, made=nothing)
assert not next(pool)['image'].any() and 'jax' not in sys.modules
print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
time.sleep(60)
"""


def test_no_process_outlives_the_main_one(workers: set[int]) -> None:
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
    begun = [
        subprocess.Popen([sys.executable, '-c', MAIN], stdout=subprocess.PIPE, env=env, text=True, **group)
        for group in ({}, {}, {'start_new_session': True})
    ]
    pids = {int(pid) for main in begun if main.stdout for pid in main.stdout.readline().split()}
    assert len(pids) == 9 and all(map(psutil.pid_exists, pids))
    begun[0].kill()
    begun[1].terminate()
    os.killpg(begun[2].pid, signal.SIGINT)  # ctrl-C: to all of a terminal
    for main in begun:
        assert main.wait() != 0
        assert main.stdout
        main.stdout.close()
    assert_gone(pids)


@pytest.mark.parametrize('form', ['digits', 'folder:{}', 'folder:{}[:50%]', 'tar:{}', 'arrays:{}'])
def test_sources_travel(form: str, image_sets: dict[str, Path]) -> None:
    kind = form.partition(':')[0]
    spec, _, part = form.format(image_sets.get(kind, '')).partition('[')
    source: Source = open_source(spec, f'train[{part}' if part else '', training=True)
    other: Source = pickle.loads(pickle.dumps(source))
    assert other.fingerprint == source.fingerprint and len(other) == len(source) > 0
    for index in range(min(3, len(source))):
        np.testing.assert_equal(vars(other[index]), vars(source[index]))


@pytest.fixture(scope='module')
def image_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same few images as a folder, a tar and arrays."""
    import tarfile

    from PIL import Image

    root = tmp_path_factory.mktemp('sets')
    for name in ('cat', 'dog'):
        (root / 'folder' / 'train' / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (5, 4), (i, 9, 9)).save(root / 'folder' / 'train' / name / f'{i}.png')
    with tarfile.open(root / 'all.tar', 'w') as tar:
        tar.add(root / 'folder' / 'train', 'train')
    np.savez(root / 'all.npz', x_train=np.zeros((4, 5, 4, 3), np.uint8), y_train=np.arange(4))
    return {'folder': root / 'folder', 'tar': root / 'all.tar', 'arrays': root / 'all.npz'}


def test_who_makes_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers_for('auto', 2, 1_000_000) == {'threads': 2}
    assert workers_for('auto', 16, 1_000_000) == {'processes': 16}
    assert workers_for('auto', 16, 1_000) == {'threads': 16}
    monkeypatch.setattr(
        os, 'sched_getaffinity', lambda process: {0, 1, 5}
    )  # of the machine's, those allotted
    assert workers_for('processes', 0, 10) == {'processes': 3}
    assert workers_for('threads', 64, 1_000_000) == {'threads': 64}

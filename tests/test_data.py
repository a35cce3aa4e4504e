"""Batches: every image, in an order that seed and position alone decide."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeds import Broken, N, noisy, numbers, plain
from PIL import Image

from flaxnets.errors import FlaxnetsError, ImageError
from train.data.batches import TooManyBadImagesError, eval_batches, train_batches
from train.data.sources import open_source


def take(steps: int, **options: Any) -> list[dict[str, np.ndarray]]:
    options = {'batch_size': 4, 'seed': 0, 'start_step': 0, 'in_chans': 1, 'threads': 3, **options}
    batches = train_batches(options.pop('source', numbers()), options.pop('transform', plain), **options)
    try:
        return [next(batches) for _ in range(steps)]
    finally:
        batches.close()


def labels(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([batch['label'] for batch in batches])


def test_each_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    seen = labels(take(3 * N, batch_size=4))  # 12 epochs, which begin anywhere in a batch
    epochs = seen.reshape(12, N)
    for epoch in epochs:
        assert sorted(epoch) == list(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert (labels(take(N, seed=1)) != seen[: 4 * N]).any()


def test_an_image_comes_with_its_label() -> None:
    for batch in take(5):
        assert batch['image'].dtype == np.uint8 and batch['image'].shape == (4, 4, 4, 1)
        assert batch['label'].dtype == np.int32
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
def test_hosts_share_the_same_batches(hosts: int) -> None:
    whole = take(8, batch_size=12, transform=noisy)
    parts = [take(8, batch_size=12, transform=noisy, host=h, hosts=hosts) for h in range(hosts)]
    for step, batch in enumerate(whole):
        for key in ('image', 'label'):
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), batch[key])


@pytest.mark.parametrize('threads', [1, 8])
def test_a_run_goes_on_with_the_batches_it_would_have_had(threads: int) -> None:
    straight = take(20, transform=noisy)
    resumed = take(7, transform=noisy, start_step=13, threads=threads)
    for ours, theirs in zip(resumed, straight[13:], strict=True):
        np.testing.assert_array_equal(ours['image'], theirs['image'])
        np.testing.assert_array_equal(ours['label'], theirs['label'])


def test_an_image_is_augmented_anew_in_every_epoch() -> None:
    first, second = take(2, batch_size=N, transform=noisy)
    order = [np.argsort(batch['label']) for batch in (first, second)]
    assert (first['image'][order[0]] != second['image'][order[1]]).any((1, 2, 3)).all()


def test_bad_images_are_replaced_counted_and_named() -> None:
    batches = train_batches(
        Broken({3, 4}), plain, batch_size=N, seed=0, start_step=0, in_chans=1, threads=2, max_bad=0.01
    )
    batch = next(batches)
    batches.close()
    counts = np.bincount(batch['label'], minlength=N)
    assert counts[3] == counts[4] == 0 and counts[5] == 3 and counts.sum() == N
    named = batches.new_bad()
    assert batches.bad == len(named) >= 3  # 3, then 4 in its place; 4 itself
    assert any('image 3:' in text for text in named) and any('image 4:' in text for text in named)
    assert batches.new_bad() == []


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        (tmp_path / split / 'cat').mkdir(parents=True)
        for name in 'abcd':
            Image.new('L', (8, 8)).save(tmp_path / split / 'cat' / f'{name}.png')
    source = open_source(f'folder:{tmp_path}', '', training=True)
    (tmp_path / 'train' / 'cat' / 'b.png').unlink()  # after it was listed
    batches = train_batches(
        source, plain, batch_size=4, seed=0, start_step=0, in_chans=1, threads=1, max_bad=0.01
    )
    assert len(next(batches)['label']) == 4
    assert 'b.png: cannot be read: No such file' in batches.new_bad()[0]
    batches.close()


def test_too_many_bad_images_end_the_run() -> None:
    with pytest.raises(TooManyBadImagesError, match=r'share above max_bad_images=0.0001.*image \d+: '):
        take(4, source=Broken({1, 2, 3}), batch_size=N, max_bad=0.0001)
    with pytest.raises(TooManyBadImagesError, match='none of its images'):
        take(1, source=Broken(set(range(N))), max_bad=1.0)


def assert_threads_end(before: int) -> None:
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_a_worker_that_fails_ends_the_run_with_its_error_and_no_threads() -> None:
    def failing(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        raise RuntimeError('a defect')

    before = threading.active_count()
    with pytest.raises(RuntimeError, match='a defect'):
        take(1, transform=failing)
    assert_threads_end(before)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    take(3, threads=8)
    assert_threads_end(before)


def test_a_batch_that_hosts_cannot_share() -> None:
    with pytest.raises(FlaxnetsError, match='batch_size=4 cannot be shared by 3 hosts'):
        take(1, hosts=3)


@pytest.mark.parametrize('hosts', [1, 2, 3])
def test_an_evaluation_sees_every_image_once(hosts: int) -> None:
    size = 6
    for count in range(1, 3 * size + 2):
        parts = [
            list(
                eval_batches(
                    numbers(count),
                    lambda image: np.array(image)[..., None],
                    batch_size=size,
                    in_chans=1,
                    host=host,
                    hosts=hosts,
                    threads=2,
                )
            )
            for host in range(hosts)
        ]
        assert {len(part) for part in parts} == {-(-count // size)}
        seen: list[int] = []
        for batches in zip(*parts, strict=True):
            for batch in batches:
                assert len(batch['label']) == size // hosts
                np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
                seen += list(batch['label'][batch['mask']])
        assert seen == list(range(count))


def test_an_evaluation_never_leaves_an_image_out() -> None:
    batches = eval_batches(Broken({5}), lambda image: np.array(image)[..., None], batch_size=4, in_chans=1)
    with pytest.raises(ImageError, match='image 5: '):
        list(batches)


def test_the_feed_measures_itself() -> None:
    batches = train_batches(numbers(), plain, batch_size=4, seed=0, start_step=0, in_chans=1, threads=2)
    next(batches)
    rate = batches.images_per_second()
    batches.close()
    assert rate is not None and rate > 0

"""Checkpoints of a run: what is kept, what is refused, and every fault that the disk may have."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxnets.errors import CheckpointError
from flaxnets.store import arrays, runs
from train.run.checkpoints import Checkpoints

FULL = os.environ.get('FLAXNETS_FAULTS') == 'full'
ROOT = Path(__file__).parent.parent
MEGABYTE = 1 << 20


def make_state(seed: int, width: int = 40) -> dict[str, Any]:
    """What a run has: parameters, an optax state of named tuples, counters, odd dtypes and shapes."""
    rng = np.random.default_rng(seed)
    params = {
        'conv1': {'0': {'kernel': rng.standard_normal((3, 3, 3, width)).astype(np.float32)}},
        'fc': {
            'kernel': rng.standard_normal((width, 10)).astype(np.float32),
            'bias': rng.standard_normal(10).astype(jnp.bfloat16),
        },
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-4), optax.adamw(1e-3), optax.trace(0.9)
    )
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    state = {
        'params': params,
        'opt_state': opt_state,
        'step': np.int32(seed),
        'skipped': [np.uint32(7), np.bool_(True), None],
        'half': rng.standard_normal((2, 3)).astype(np.float16).T,
        'none': np.zeros((0, 3), np.float32),
        'ema': {'params': params, 'batch_stats': {'mean': np.array([-0.0, 1e-45, 3e38], np.float32)}},
    }
    return jax.tree.map(np.array, state)


def assert_same(found: Any, expected: Any) -> None:
    """The same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(one) is np.ndarray
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def targets(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def save(checkpoints: Checkpoints, step: int, state: Any, score: float | None = None) -> Exception | None:
    checkpoints.save(step, state, {'seed': 1}, score)
    checkpoints.wait()
    (outcome,) = checkpoints.poll()
    assert outcome.step == step and outcome.seconds > 0
    return outcome.error


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(str(tmp_path / 'steps'), keep_last=2, keep_best=1) as opened:
        yield opened


# --- what is saved comes back


def test_a_state_comes_back_bit_by_bit(checkpoints: Checkpoints) -> None:
    state = make_state(5)
    meta = {'config': {'lr': 0.1, 'model': 'resnet50'}, 'position': 12345678901234}
    checkpoints.save(5, state, meta, 0.75)
    restored = checkpoints.restore(targets(state))
    assert restored is not None and (restored.step, restored.score, restored.skipped) == (5, 0.75, ())
    assert restored.meta == meta
    assert_same(restored.state, state)


def test_there_is_nothing_at_first(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.restore(targets(make_state(1))) is None
    assert checkpoints.steps() == [] and checkpoints.poll() == []
    assert not (tmp_path / 'steps').exists()


def test_save_returns_before_it_is_written(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    write = arrays.write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(arrays, 'write', slowly)
    checkpoints.save(1, make_state(1), {}, None)
    assert checkpoints.poll() == [] and checkpoints.steps() == []
    checkpoints.wait()
    assert [outcome.step for outcome in checkpoints.poll()] == [1] and checkpoints.steps() == [1]
    assert checkpoints.poll() == []


def test_a_part_is_read_without_the_rest(checkpoints: Checkpoints, tmp_path: Path) -> None:
    state = make_state(3)
    assert save(checkpoints, 3, state) is None
    facts = arrays.read_manifest(tmp_path / 'steps' / '3').facts
    found = arrays.read(tmp_path / 'steps' / '3', ['params', 'ema'])
    assert facts == {'step': 3, 'score': None, 'meta': {'seed': 1}}
    assert_same(found, {'params': state['params'], 'ema': state['ema']})
    with pytest.raises(CheckpointError, match='has no batch_stats; it has ema, half, none, opt_st'):
        arrays.read(tmp_path / 'steps' / '3', ['params', 'batch_stats'])
    assert arrays.read(tmp_path / 'steps' / '3', ['skipped'])['skipped']['0'] == 7


def test_another_tree_is_refused_with_the_differences(checkpoints: Checkpoints, tmp_path: Path) -> None:
    state = make_state(1)
    assert save(checkpoints, 1, state) is None
    other = make_state(1, width=41)
    other['momentum'] = other.pop('step')
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(targets(other))
    message = str(caught.value)
    assert 'has no momentum;' in message and 'has step, which is not wanted' in message
    assert 'conv1/0/kernel as float32[3, 3, 3, 40], wanted is float32[3, 3, 3, 41]' in message
    assert message.endswith('and 2 more differences')  # of 12: 2 names, 2 kernels in 5 copies
    state['step'] = np.int64(1)
    with pytest.raises(CheckpointError, match=r'it has step as int32\[\], wanted is int64\[\]$'):
        checkpoints.restore(state)
    assert os.listdir(tmp_path / 'steps') == ['1']  # a difference is no damage


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16', 'float64'])
def test_what_is_not_finite_is_not_saved(checkpoints: Checkpoints, value: float, dtype: str) -> None:
    assert save(checkpoints, 1, make_state(1)) is None
    state = make_state(2)
    state['ema']['params']['fc']['bias'] = np.array([1, value, 2], jnp.dtype(dtype))
    with pytest.raises(CheckpointError, match='step 2 is not saved: not finite: ema/params/fc/bias$'):
        checkpoints.save(2, state, {}, 0.9)
    with pytest.raises(CheckpointError, match='not finite: the score'):
        checkpoints.save(2, make_state(2), {}, value)
    assert checkpoints.steps() == [1] and checkpoints.poll() == []


def test_large_finite_numbers_are_saved(checkpoints: Checkpoints) -> None:
    state = {'overflows': np.full(1000, 3e38, np.float32), 'integers': np.full(3, 2**31 - 1, np.int32)}
    assert save(checkpoints, 1, state) is None


def test_two_arrays_of_one_name_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="'a/b'"):
        checkpoints.save(1, {'a/b': np.ones(1), 'a': {'b': np.ones(1)}}, {}, None)


# --- what stays


@pytest.mark.parametrize(
    ('last', 'best', 'scores', 'kept'),
    [
        (1, 0, [None, None, None], [3]),
        (2, 0, [0.9, 0.1, 0.2], [3, 2]),
        (1, 1, [0.9, 0.1, 0.2], [3, 1]),
        (1, 2, [0.9, 0.1, 0.2, None, 0.95, None], [6, 5, 1]),
        (2, 1, [0.1, 0.2, 0.3, 0.4], [4, 3]),
        (1, 1, [0.5, 0.5, None], [3, 2]),  # of equal scores the newest
        (3, 1, [None, 0.5], [2, 1]),
    ],
)
def test_the_last_and_the_best_stay(
    tmp_path: Path, last: int, best: int, scores: list[float | None], kept: list[int]
) -> None:
    state = {'x': np.ones(3)}
    for step, score in enumerate(scores, 1):
        with Checkpoints(str(tmp_path), last, best) as checkpoints:  # scores outlive the process
            assert save(checkpoints, step, state, score) is None
    assert checkpoints.steps() == kept and sorted(map(int, os.listdir(tmp_path))) == sorted(kept)
    known = [(score, step) for step, score in enumerate(scores, 1) if score is not None and step in kept]
    if known:
        assert runs.find(tmp_path, 'best') == str(tmp_path / str(max(known)[1]))


def test_nothing_goes_before_the_newer_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(str(tmp_path), 1, 0)
    assert save(checkpoints, 1, make_state(1)) is None
    with monkeypatch.context() as patch:
        patch.setattr(arrays, 'check_space', no_space)
        assert 'no room' in str(save(checkpoints, 2, make_state(2)))
        assert 'no room' in str(save(checkpoints, 1, make_state(2)))
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(make_state(0))
    assert restored is not None
    assert_same(restored.state, make_state(1))
    checkpoints.close()


def no_space(*_: object) -> None:
    raise OSError('no room')


def test_a_step_is_replaced_by_a_later_save_of_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert save(checkpoints, 7, make_state(1)) is None
    assert save(checkpoints, 7, make_state(2), score=0.5) is None
    restored = checkpoints.restore(make_state(0))
    assert restored is not None and restored.score == 0.5
    assert_same(restored.state, make_state(2))
    assert os.listdir(tmp_path / 'steps') == ['7']


def test_a_killed_replacement_brings_the_old_one_back(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / 'steps'
    assert save(checkpoints, 7, make_state(1)) is None
    (folder / '7').rename(folder / '7.replaced')
    (folder / f'7{arrays.UNFINISHED}').mkdir()
    (folder / '6.deleted').mkdir()
    restored = checkpoints.restore(make_state(0))
    assert restored is not None and restored.step == 7 and os.listdir(folder) == ['7']


def test_a_saved_step_stays_though_later_ones_exist(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path), 1, 0) as checkpoints:
        assert save(checkpoints, 9, make_state(1)) is None
        assert save(checkpoints, 4, make_state(1)) is None
        assert checkpoints.steps() == [9, 4]


def test_other_processes_do_not_write(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path), 1, 0, primary=False) as checkpoints:
        checkpoints.save(1, make_state(1), {}, None)
        checkpoints.wait()
        assert checkpoints.poll() == [] and os.listdir(tmp_path) == []


# --- damage


class Pair:
    """Steps 10 and 20 in a folder, of which 20 can be damaged and mended again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.newest, self.state = folder, folder / '20', make_state(20)
        with Checkpoints(str(folder), 2, 1) as checkpoints:
            assert save(checkpoints, 10, make_state(10)) is None
            assert save(checkpoints, 20, self.state) is None
        self.copy = folder.with_name('copy')
        shutil.copytree(self.newest, self.copy)

    def files(self) -> list[Path]:
        return sorted(path.relative_to(self.copy) for path in self.copy.rglob('*') if path.is_file())

    def detects(self) -> bool:
        """Whether the damage was noticed; if not, what was restored must be what was saved. Then mends."""
        with Checkpoints(str(self.folder), 2, 1) as checkpoints:
            restored = checkpoints.restore(targets(self.state))
        assert restored is not None
        if restored.step == 10:
            ((step, reason),) = restored.skipped
            assert step == 20 and str(self.newest) in reason and '\n' not in reason
            assert_same(restored.state, make_state(10))
            assert sorted(os.listdir(self.folder)) == ['10', '20.damaged']
            shutil.rmtree(self.folder / '20.damaged')
        else:
            assert restored.skipped == ()
            assert_same(restored.state, self.state)
            shutil.rmtree(self.newest)
        shutil.copytree(self.copy, self.newest)
        return restored.step == 10


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp('pair') / 'steps')


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is said to the terminal or to a log, also not when the garbage of failures is collected."""
    yield
    gc.collect()
    assert capfd.readouterr() == ('', '')
    assert caplog.get_records('call') + caplog.records == []


@pytest.mark.fault
@pytest.mark.usefixtures('silence')
def test_no_flipped_bit_is_used(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    files = [path for path in pair.files() if (pair.copy / path).stat().st_size]
    detected: dict[Path, list[bool]] = {path: [] for path in files}
    for trial in range(1000 if FULL else 64):
        path = files[trial % len(files)]
        content = bytearray((pair.copy / path).read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        (pair.newest / path).write_bytes(content)
        detected[path].append(pair.detects())
    counts = {str(path): f'{sum(found)}/{len(found)}' for path, found in detected.items()}
    # Files of the commit and of what Orbax has superseded are never read.
    largest = max(files, key=lambda path: (pair.copy / path).stat().st_size)
    assert all(any(detected[path]) for path in (largest, Path('arrays/manifest.ocdbt'))), counts
    assert all(detected[Path('manifest/metadata')]), counts
    if FULL:
        with capfd.disabled():
            print(json.dumps(counts, indent=1))


@pytest.mark.fault
@pytest.mark.usefixtures('silence')
def test_no_file_that_is_cut_or_gone_matters(pair: Pair) -> None:
    detected: dict[str, list[bool]] = {}
    for path in pair.files():
        size = (pair.copy / path).stat().st_size
        found = detected.setdefault(str(path), [])
        for kept in (size // 2, 0, size - 1):
            os.truncate(pair.newest / path, max(kept, 0))
            found.append(pair.detects())
        (pair.newest / path).unlink()
        found.append(pair.detects())
        (pair.newest / path).unlink()
        (pair.newest / path).mkdir()
        found.append(pair.detects())
    assert all(detected['manifest/metadata'] + detected['arrays/manifest.ocdbt']), detected


@pytest.mark.parametrize(
    'text, said',
    [
        ('FAILED_PRECONDITION: Error reading "opt_state.mu" in OCDBT database at local file "/a/"', False),
        ('NOT_FOUND: Error opening "zarr" driver: [tensorstore_spec=...]', False),
        ('Error opening "zarr" driver [source locations=tensorstore/kvstore.cc:1]', False),
        ('an error of the program', True),
        ('Note: an error of the program', True),
    ],
)
def test_only_tensorstores_failures_are_kept_from_the_log_of_tasks(text: str, said: bool) -> None:
    error = ValueError(text)
    record = logging.LogRecord(
        'asyncio', logging.ERROR, '', 0, 'never retrieved', None, (ValueError, error, None)
    )
    assert arrays._is_not_tensorstores(record) is said


@pytest.mark.fault
def test_an_emptied_step_is_passed_over(pair: Pair) -> None:
    shutil.rmtree(pair.newest)
    pair.newest.mkdir()
    assert pair.detects()
    for folder in [path for path in pair.copy.rglob('*') if path.is_dir()]:
        shutil.rmtree(pair.newest / folder.relative_to(pair.copy))
        pair.detects()
    shutil.rmtree(pair.newest)
    shutil.copytree(pair.folder / '10', pair.newest)  # sound in itself, but not what its name says
    assert pair.detects()


@pytest.mark.fault
def test_an_array_of_the_same_size_in_its_place_is_noticed(pair: Pair, tmp_path: Path) -> None:
    """What Orbax itself cannot see: another checkpoint's arrays under this one's manifest."""
    shutil.rmtree(pair.newest / 'arrays')
    shutil.copytree(pair.folder / '10' / 'arrays', pair.newest / 'arrays')
    assert pair.detects()


@pytest.mark.fault
@pytest.mark.usefixtures('silence')
def test_if_all_are_damaged_the_run_does_not_start_anew(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / 'steps'
    for attempt in range(2):
        for step in (1, 2):
            assert save(checkpoints, step, make_state(step)) is None
            (folder / str(step) / 'manifest' / 'metadata').write_text('{}')
        for _ in range(2):  # nor when it is started once more
            with pytest.raises(CheckpointError, match=r'no checkpoint is sound.* Remove them or choose'):
                checkpoints.restore(targets(make_state(0)))
        assert len(os.listdir(folder)) == 2 * attempt + 2
    assert sorted(os.listdir(folder)) == ['1.damaged', '1.damaged.1', '2.damaged', '2.damaged.1']


@pytest.mark.fault
def test_a_reader_sets_nothing_aside(pair: Pair) -> None:
    (pair.newest / 'manifest' / 'metadata').unlink()
    with Checkpoints(str(pair.folder), 2, 1, primary=False) as checkpoints:
        restored = checkpoints.restore(pair.state)
        assert restored is not None and restored.step == 10 and len(restored.skipped) == 1
    assert sorted(os.listdir(pair.folder)) == ['10', '20']
    assert pair.detects()


# --- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, where this process may mount one."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'none', str(disk)]
    if sys.platform != 'linux' or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no permission to mount a tmpfs')
    yield disk
    subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.fault
@pytest.mark.usefixtures('silence')
@pytest.mark.parametrize('checked', [True, False], ids=['asked before', 'while writing'])
def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    if not checked:  # the disk fills up after it was asked
        monkeypatch.setattr(arrays, 'check_space', lambda *_: None)
    state = {f'x{i}': np.full((MEGABYTE // 64,), i, np.float32) for i in range(20)}  # 1.25 MiB
    reason = 'MB are needed' if checked else 'No space left on device'
    with Checkpoints(str(small_disk / 'steps'), 3, 0) as checkpoints:
        assert save(checkpoints, 1, state) is None
        ballast = small_disk / 'ballast'
        ballast.write_bytes(bytes(MEGABYTE))
        for step in (2, 3, 1) if not FULL else (2, 3, 1) * 10:
            assert reason in str(save(checkpoints, step, state))
            assert checkpoints.steps() == [1]
        ballast.unlink()
        assert save(checkpoints, 4, state) is None
        assert checkpoints.steps() == [4, 1] and sorted(os.listdir(small_disk / 'steps')) == ['1', '4']
        restored = checkpoints.restore(targets(state))
        assert restored is not None and restored.step == 4


def run(program: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process of its own; its noise is what its stderr has."""
    start = 'import sys; from test_checkpoint import *\n'
    environment = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'} | environment
    command = [sys.executable, '-c', start + program, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.fault
def test_a_file_that_cannot_grow_is_one_quiet_error(tmp_path: Path) -> None:
    program = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Checkpoints(sys.argv[1], 3, 0) as checkpoints:
    assert save(checkpoints, 1, make_state(1)) is None
    for attempt in range(4):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        print(save(checkpoints, 2, make_state(2, 400)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert save(checkpoints, 2, make_state(2, 400)) is None
    assert checkpoints.restore(make_state(2, 400)).step == 2
"""
    process = run(program, tmp_path)
    out, err = process.communicate(timeout=600)
    assert err == '' and process.returncode == 0
    lines = out.splitlines()
    assert len(lines) == 4 and all('2: cannot be written: ' in line for line in lines), out
    assert sorted(os.listdir(tmp_path)) == ['1', '2']


@pytest.mark.fault
def test_a_removed_folder_is_made_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        assert save(checkpoints, step, make_state(step)) is None
        shutil.rmtree(tmp_path / 'steps')
    (tmp_path / 'steps').write_text('a file')
    assert isinstance(save(checkpoints, 3, make_state(3)), Exception)
    (tmp_path / 'steps').unlink()
    assert save(checkpoints, 4, make_state(4)) is None and checkpoints.steps() == [4]


# --- killed


@pytest.mark.fault
def test_killed_at_any_moment(tmp_path: Path) -> None:
    program = """
with Checkpoints(sys.argv[1], 2, 1) as checkpoints:
    state = make_state(0, 4000)
    restored = checkpoints.restore(state)
    step = restored.step if restored else 0
    assert not (restored and restored.skipped), restored.skipped
    assert restored is None or (restored.state['params']['fc']['bias'][:5] == 0.5 + step % 64).all()
    print('ready', step, flush=True)
    while True:
        step += 1
        state['params']['fc']['bias'][:5] = 0.5 + step % 64
        save_state = jax.tree.map(np.array, state)
        assert save(checkpoints, step, save_state, step % 7) is None
"""
    rng, last, grown, kills = np.random.default_rng(0), 0, 0, 0
    while kills < (30 if FULL else 3) or grown < 2:  # a slow machine may not get to the end of a save
        kills += 1
        assert kills < 100
        process = run(program, tmp_path)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith('ready'), process.communicate()[1]
        step = int(line.split()[1])
        assert step >= last
        grown, last = grown + (step > last), step
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.communicate()
    state = make_state(0, 4000)
    with Checkpoints(str(tmp_path), 2, 1) as checkpoints:
        assert checkpoints.restore(state) is not None
        assert all(name.isdecimal() for name in os.listdir(tmp_path))


# --- several processes


@pytest.mark.fault
def test_two_processes_write_once_and_read_the_same(tmp_path: Path) -> None:
    program = """
from train.parallel import JobError
number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f'localhost:{port}', 2, number)
assert jax.process_count() == 2 and jax.device_count() == 4
with Checkpoints(folder, 3, 0, primary=number == 0) as checkpoints:
    assert checkpoints.restore(make_state(0)) is None
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {}, None)
        checkpoints.wait()
        assert [outcome.error for outcome in checkpoints.poll()] == [None] * (number == 0)
        if number == 1:
            time.sleep(0.3)  # the other one is never waited for
    for step in (2, 1):
        restored = checkpoints.restore(make_state(0))
        assert_same(restored.state, make_state(step))
        assert (restored.step, len(restored.skipped)) == (step, 2 - step if number == 0 else 0)
        if number == 0:
            (Path(folder) / str(step) / 'manifest' / 'metadata').unlink(missing_ok=True)
    with pytest.raises(JobError, match='process 0 of the job failed' if number else 'no checkpoint is sound'):
        checkpoints.restore(make_state(0))
    checkpoints.save(3, make_state(3), {}, None)
    if number == 1:
        read_arrays, arrays.read_arrays = arrays.read_arrays, no_space
    with pytest.raises(JobError if number == 0 else OSError, match='process 1 of the job failed|no room'):
        checkpoints.restore(make_state(0))
    if number == 1:
        arrays.read_arrays = read_arrays
    assert checkpoints.restore(make_state(0)).step == 3
"""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = [run(program, n, port, tmp_path, JAX_NUM_CPU_DEVICES='2') for n in range(2)]
    try:
        for process in processes:
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(os.listdir(tmp_path)) == ['1.damaged', '2.damaged', '3']

"""Whole runs in this process: what they learn, what they leave, what they refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from memory import forget
from runs import digests
from short_nets import short_nets

import flaxnets
from convert.conversion import open_checkpoint
from convert.formats.pth import read_pth
from convert.writing import write
from flaxnets.errors import FlaxnetsError, ImageError
from flaxnets.store import runs as checkpoints_of
from flaxnets.store.arrays import read_manifest
from train import loop, parallel, recipes
from train.__main__ import main
from train.data.sources import open_source
from train.job import make_job
from train.loop import NonFiniteError, Outcome, train
from train.run import log
from train.run.checkpoints import Checkpoints
from train.run.log import read
from train.run.meter import of_all_hosts
from train.settings import Settings
from train.tools.exporting import export

DIGITS = recipes.get('digits')
SHORT = dataclasses.replace(
    DIGITS,
    model='resnext_tiny',
    image_size=16,  # of 8x8 digits
    eval_size=16,
    train_split='test',  # 360 images: 22 steps an epoch
    batch_size=16,
    epochs=2,
    log_steps=11,
    eval_epochs=1,
    ema_decay=0.5,
)


def quiet(settings: Settings, workdir: Path, **options: Any) -> Outcome:
    return train(settings, str(workdir), quiet=True, **options)


pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module', autouse=True)
def with_short_nets() -> Iterator[None]:
    with short_nets():
        yield


@pytest.fixture(autouse=True)
def forget_the_run() -> Iterator[None]:
    """Programs of a run are of no use to the next one, which traces its own: a quarter of a gigabyte each."""
    yield
    forget()


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    workdir = tmp_path_factory.mktemp('run') / 'finished'
    return workdir, quiet(SHORT, workdir)


def test_what_a_run_leaves(finished: tuple[Path, Outcome]) -> None:
    workdir, outcome = finished
    names = {'checkpoints', 'confusion.png', 'curves.png', 'log.jsonl', 'tensorboard', 'weights', '.lock'}
    assert {path.name for path in workdir.iterdir()} == names
    assert (outcome.step, outcome.stopped) == (44, None)
    config = flaxnets.config(workdir / 'weights')
    assert (config.name, config.num_classes, config.in_chans) == ('resnext_tiny', 10, 1)
    assert config.classes == tuple('0123456789') and config.preprocess.size == 16
    kinds = [record['kind'] for record in read(str(workdir))]
    assert kinds.count('eval') == 2 and kinds.count('train') == 4 and kinds.count('saved') == 2
    trained = [record for record in read(str(workdir)) if record['kind'] == 'train']
    assert {record['bad_images'] for record in trained} == {0}
    for record in trained:  # the rate that the step was taken with: half a cosine over 44 steps
        rate = SHORT.lr / 2 * (1 + np.cos(np.pi * (record['step'] - 1) / 44))
        assert record['learning_rate'] == pytest.approx(rate, rel=1e-4)


def test_the_weights_are_what_was_evaluated(finished: tuple[Path, Outcome]) -> None:
    workdir, outcome = finished
    model, variables = flaxnets.load(workdir / 'weights')
    source = open_source('digits', '', training=False)
    transform = flaxnets.transform(workdir / 'weights')
    images = transform.batch([np.asarray(source[i].image) for i in range(len(source))])
    predictions = np.asarray(jax.jit(model.apply)(variables, images)).argmax(1)
    assert outcome.evaluation is not None
    np.testing.assert_array_equal(predictions, outcome.evaluation.predictions)


def test_checkpoints_go_home_to_pytorch_averaged_or_not(
    finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    workdir, _ = finished
    averaged, trained = open_checkpoint(workdir), open_checkpoint(workdir, ema=False)
    assert 'moving averages' in averaged.source.notes[0] and 'after 44 steps' in averaged.source.notes[0]
    assert any((averaged.state[name] != trained.state[name]).any() for name in averaged.state)
    for checkpoint in (averaged, trained):
        path = tmp_path / 'net.pth'
        write(checkpoint, path, overwrite=True)
        jax.tree.map(np.testing.assert_array_equal, read_pth(path), dict(checkpoint.state))
    stored = checkpoints_of.read(workdir / 'checkpoints' / '44')
    assert open_checkpoint(workdir / 'checkpoints' / '44').config == stored.config
    _, variables = flaxnets.load(workdir)
    np.testing.assert_array_equal(
        variables['params']['fc']['kernel'], stored.variables['params']['fc']['kernel']
    )


def test_export_takes_the_checkpoint_that_is_asked_for(
    finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    workdir, _ = finished
    assert export(str(workdir), str(tmp_path / 'last')) == 44
    assert digests_of(tmp_path / 'last') == digests(workdir)
    assert export(str(workdir), str(tmp_path / 'best'), 'best') in (22, 44)
    assert export(str(workdir), str(tmp_path / 'plain'), '44', ema=False) == 44
    assert digests_of(tmp_path / 'plain') != digests(workdir)
    with pytest.raises(FlaxnetsError, match='no checkpoint 7; there are .*44, last and best'):
        export(str(workdir), str(tmp_path / 'x'), '7')
    with pytest.raises(FlaxnetsError, match='no checkpoint of a training run'):
        export(str(tmp_path), str(tmp_path / 'x'))
    with pytest.raises(FlaxnetsError, match='exists'):
        export(str(workdir), str(tmp_path / 'last'))


def digests_of(directory: Path) -> Any:
    return json.loads((directory / 'certificate.json').read_text())['arrays']


def test_a_run_that_is_resumed_is_the_run_that_was_not(
    finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    for last in (13, 0):
        quiet(dataclasses.replace(SHORT, max_steps=last, workers=1 + last % 3), tmp_path)
    assert digests(tmp_path) == digests(finished[0])
    steps = [record['step'] for record in read(str(tmp_path)) if record['kind'] == 'train']
    assert steps == sorted(set(steps))


@pytest.mark.parametrize('moment', [22, 23])  # the last step of an epoch, the evaluation after it
def test_stopped_where_it_would_evaluate_it_does_so_later(
    moment: int, finished: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopsAtTheEndOfTheEpoch(loop.Stop):
        def requested(self) -> bool:
            self._asked += 1
            self.reason = 'SIGTERM' if self._asked >= moment else None
            return self.reason is not None

    settings = dataclasses.replace(SHORT, keep_last=9)
    with monkeypatch.context() as patched:
        patched.setattr(loop, 'Stop', StopsAtTheEndOfTheEpoch)
        outcome = quiet(settings, tmp_path)
    assert (outcome.step, outcome.stopped, outcome.evaluation) == (22, 'SIGTERM', None)
    assert quiet(settings, tmp_path).stopped is None
    evaluations = {r['step']: r['top1'] for r in read(str(tmp_path)) if r['kind'] == 'eval'}
    for step, top1 in evaluations.items():
        assert read_manifest(tmp_path / 'checkpoints' / str(step)).facts['score'] == top1
    assert digests(tmp_path) == digests(finished[0])
    found, expected = ([r for r in read(str(d)) if r['kind'] == 'eval'] for d in (tmp_path, finished[0]))
    assert [(r['step'], r['loss']) for r in found] == [(r['step'], r['loss']) for r in expected]
    assert [r['step'] for r in found] == [22, 44]


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(lr=0.2, seed=1), r'lr: 0\.1 -> 0\.2\n.*seed: 0 -> 1'),
        (dict(model='res2net_tiny'), "model: 'resnext_tiny' -> 'res2net_tiny'"),
        (dict(train_split='train'), 'the training images are not the same ones'),
    ],
)
def test_another_run_is_not_gone_on_with(
    finished: tuple[Path, Outcome], change: dict[str, Any], message: str
) -> None:
    workdir, _ = finished
    before = digests(workdir)
    with pytest.raises(FlaxnetsError, match=f'(?s)a run with other settings.*{message}'):
        quiet(dataclasses.replace(SHORT, **change), workdir)
    assert digests(workdir) == before


def test_a_run_goes_on_with_other_images_of_the_evaluation(tmp_path: Path) -> None:
    """One that could not be read may have been repaired."""
    source = open_source('digits', 'test', training=True)
    images, labels = (np.stack(each) for each in zip(*((r.image, r.label) for r in source), strict=True))
    few = {'x_train': images, 'y_train': labels, 'classes': list('0123456789')}
    settings = dataclasses.replace(SHORT, data=f'arrays:{tmp_path}/digits.npz', train_split='')
    for step, last in ((11, 40), (12, 50)):
        np.savez(tmp_path / 'digits.npz', **few, x_test=images[:last], y_test=labels[:last])
        assert quiet(dataclasses.replace(settings, max_steps=step), tmp_path / 'run').step == step
    said = [record['message'] for record in read(str(tmp_path / 'run')) if record['kind'] == 'note']
    assert sum('the evaluation images are not those of before' in text for text in said) == 1


def test_a_finished_run_is_evaluated_again_and_not_trained(finished: tuple[Path, Outcome]) -> None:
    workdir, outcome = finished
    log_before = (workdir / 'log.jsonl').read_text()
    again = quiet(SHORT, workdir)
    assert (workdir / 'log.jsonl').read_text() == log_before
    assert again.step == 44
    assert again.evaluation is not None and outcome.evaluation is not None
    np.testing.assert_array_equal(again.evaluation.predictions, outcome.evaluation.predictions)


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A batch of this step has a pixel that is not finite."""
    plain = loop.train_batches

    def poisoned(*args: Any, start_step: int, **kwargs: Any) -> Any:
        batches = plain(*args, start_step=start_step, **kwargs)
        original, count = batches.__class__.__next__, [start_step]

        class Poisoned(batches.__class__):  # type: ignore[misc, name-defined]
            def __next__(self) -> Any:
                batch = original(self)
                count[0] += 1
                image = batch['image'].astype(np.float32) / 255
                if count[0] == step:
                    image[0, 0, 0, 0] = np.nan
                return {**batch, 'image': image}

        batches.__class__ = Poisoned
        return batches

    monkeypatch.setattr(loop, 'train_batches', poisoned)


def test_numbers_that_are_not_finite_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    poison(monkeypatch, 9)
    settings = dataclasses.replace(SHORT, save_steps=2, max_steps=20, eval_epochs=99)  # at the end alone
    with pytest.raises(NonFiniteError, match=r'step 9: .* not finite.*newest checkpoint is of step 8'):
        quiet(settings, tmp_path)
    assert checkpoints_of.read(tmp_path).step == 8
    assert not (tmp_path / 'weights').exists()


def test_or_are_skipped_counted_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 9)
    settings = dataclasses.replace(SHORT, max_steps=12, log_steps=4, on_non_finite='skip')
    outcome = quiet(settings, tmp_path, profile=(3, 4))
    assert outcome.step == 12 and outcome.weights
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
    assert 'step 9: ' in capsys.readouterr().err
    quiet(dataclasses.replace(settings, max_steps=16), tmp_path)  # a resumed run counts on
    records = [r for r in read(str(tmp_path)) if r['kind'] == 'train']
    assert [r['skipped'] for r in records] == [0, 0, 1, 1]
    assert all(np.isfinite(r['loss']) for r in records)


def test_bad_images_are_counted_once_however_often_a_run_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = loop.make_job

    class Some:
        """A source, of which every fiftieth image cannot be read."""

        def __init__(self, source: Any) -> None:
            self.source = source

        def __len__(self) -> int:
            return len(self.source)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.source, name)

        def __getitem__(self, index: int, /) -> Any:
            if index % 50 == 0:
                raise ImageError(f'image {index} is damaged')
            return self.source[index]

    def job(*arguments: Any) -> Any:
        made = plain(*arguments)
        return dataclasses.replace(made, training=Some(made.training))

    monkeypatch.setattr(loop, 'make_job', job)
    settings = dataclasses.replace(SHORT, log_steps=4, workers=3, max_bad_images=0.1)
    quiet(dataclasses.replace(settings, max_steps=16), tmp_path / 'whole')
    for last in (6, 16):
        quiet(dataclasses.replace(settings, max_steps=last), tmp_path / 'parts')
    whole, parts = (read(str(tmp_path / name)) for name in ('whole', 'parts'))
    counts = [{r['step']: r['bad_images'] for r in log if r['kind'] == 'train'} for log in (whole, parts)]
    assert counts[0][16] > 4
    both = counts[0].keys() & counts[1].keys()  # the first and last steps of a call have lines of their own
    assert {4, 8, 16} <= both and all(counts[0][step] == counts[1][step] for step in both)
    named = [sorted(r['message'] for r in log if r['kind'] == 'bad_image') for log in (whole, parts)]
    assert named[0] == named[1] and len(named[0]) == counts[0][16]
    assert digests(tmp_path / 'whole') == digests(tmp_path / 'parts')


def test_an_evaluation_that_is_not_finite_is_no_best_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Overflows(loop.Evaluator):
        def __call__(self, variables: Any, *rest: Any) -> Any:
            bias = variables['params']['fc']['bias']
            params = {**variables['params'], 'fc': {**variables['params']['fc'], 'bias': bias + np.inf}}
            return super().__call__({**variables, 'params': params}, *rest)

    monkeypatch.setattr(loop, 'Evaluator', Overflows)
    outcome = quiet(dataclasses.replace(SHORT, max_steps=22), tmp_path)
    assert outcome.evaluation is not None and outcome.evaluation.non_finite == 360
    assert read_manifest(tmp_path / 'checkpoints' / '22').facts['score'] is None
    assert '360 images had logits that are not finite' in capsys.readouterr().err
    log_before = (tmp_path / 'log.jsonl').read_text()
    quiet(dataclasses.replace(SHORT, max_steps=22), tmp_path)
    assert (tmp_path / 'log.jsonl').read_text() == log_before
    quiet(dataclasses.replace(SHORT, max_steps=24), tmp_path)
    assert [r['step'] for r in read(str(tmp_path)) if r['kind'] == 'eval'] == [22, 24]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(crop='typo'), "crop='typo' is not one of"),
        (dict(eval_epochs=0), 'eval_epochs=0'),
        (dict(keep_last=0), 'keep_last=0'),
    ],
)
def test_bad_settings_are_refused_from_python_too(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import train as package

    assert package.train is train and package.Settings is Settings
    for begin in (lambda s: package.train(s, str(tmp_path / 'run')), make_job):
        with pytest.raises(FlaxnetsError, match=message):
            begin(dataclasses.replace(SHORT, **change))
    assert not (tmp_path / 'run').exists()


def test_the_log_tells_of_all_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches:
        def images_per_second(self) -> float:
            return 100.0

    def gather(own: list[float]) -> Any:
        assert own == [0.125, 100.0]
        return np.array([own, [0.5, 80.0]], np.float32)

    monkeypatch.setattr(parallel, 'gather', gather)
    values = of_all_hosts({'loss': 1.0, 'wait_share': 0.125}, Batches())
    assert values == {'loss': 1.0, 'wait_share': 0.5, 'feed_images_per_second': 160.0}


def test_a_profile_survives_a_stop_within_it(tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, eval_epochs=99)  # at the end alone
    for last in (3, 6):  # the first run ends within the window, the second begins there
        quiet(dataclasses.replace(settings, max_steps=last), tmp_path, profile=(2, 5))
    assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 2


def test_a_full_disk_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a while nothing at all can be written, the log included."""

    class Full(log._File):
        def flush(self) -> None:
            if b'"step": 4' in self._waiting and b'"step": 12' not in self._waiting:
                raise OSError(28, 'No space left on device')
            super().flush()

    monkeypatch.setattr(log, '_File', Full)
    assert quiet(dataclasses.replace(SHORT, max_steps=16, log_steps=4), tmp_path).weights
    assert capsys.readouterr().err.count('log.jsonl cannot be written: No space left on device') == 1
    assert [r['step'] for r in read(str(tmp_path)) if r['kind'] == 'train'] == [4, 8, 12, 16]


@pytest.mark.parametrize('policy', ['continue', 'stop'])
def test_a_save_that_fails(
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = Checkpoints._commit

    def full(self: Checkpoints, step: int, *args: Any) -> None:
        if step == 8:
            raise OSError('No space left on device')
        commit(self, step, *args)

    monkeypatch.setattr(Checkpoints, '_commit', full)
    settings = dataclasses.replace(SHORT, save_steps=4, max_steps=16, keep_last=9, on_failed_save=policy)
    if policy == 'stop':
        with pytest.raises(FlaxnetsError, match='checkpoint 8 could not be saved: No space left on device'):
            quiet(settings, tmp_path)
        assert checkpoints_of.read(tmp_path).step in (4, 12)
        return
    assert quiet(settings, tmp_path).weights
    assert 'checkpoint 8 could not be saved: No space left' in capsys.readouterr().err
    steps = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    assert steps == [4, 12, 16]


def test_weights_of_another_net_are_refused(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    weights = str(finished[0] / 'weights')
    with pytest.raises(FlaxnetsError, match='those of resnext_tiny, but model=res2net_tiny'):
        quiet(dataclasses.replace(DIGITS, weights=weights), tmp_path)


def test_eval_on_the_command_line(
    finished: tuple[Path, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, outcome = finished
    arguments = ['eval', '--model', str(workdir / 'weights'), '--data', 'digits', '--out', str(tmp_path)]
    assert main([*arguments, '--json', '--quiet', '--batch', '7']) == 0
    found = json.loads(capsys.readouterr().out)
    assert outcome.evaluation is not None
    assert found['top1'] == outcome.evaluation.top1 and found['images'] == 360
    pictures = {f'{name}.png' for name in ('confusion', 'mistakes', 'reliability', 'by_confidence')}
    assert {path.name for path in tmp_path.iterdir()} == {
        'result.json', 'per_class.csv', 'mistakes.csv', *pictures
    }  # fmt: skip
    assert (tmp_path / 'per_class.csv').read_text().splitlines()[1].startswith('0,0,36,')
    assert main(arguments) == 0
    assert 'top-1' in capsys.readouterr().out

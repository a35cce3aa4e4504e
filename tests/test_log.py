"""The log of a run: records, lines, TensorBoard's files; what a killed run leaves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from flaxnets.errors import FlaxnetsError
from train.run.log import Log, read

VALUES = {
    'epoch': 1.5,
    'loss': 2.25,
    'top1': 40.0,
    'learning_rate': 0.05,
    'images_per_second': 100.0,
    'wait_share': 0.25,
    'feed_images_per_second': 400.0,
}


def open_log(workdir: Path, first_step: int = 0, **options: Any) -> Log:
    options = {'primary': True, 'total_steps': 400, 'images_per_step': 32, **options}
    return Log(str(workdir), first_step=first_step, **options)


def test_records_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path) as log:
        log.train(30, VALUES)
        log.eval(40, {'images': 10, 'top1': 50.0, 'top5': 90.0, 'loss': 1.5})
        log.event('saved', 'checkpoint 40 in 0.1 s', step=40)
        log.train(50, {**VALUES, 'loss': float('nan')})
    records = read(str(tmp_path))
    assert [(r['kind'], r['step']) for r in records] == [
        ('train', 30),
        ('eval', 40),
        ('saved', 40),
        ('train', 50),
    ]
    assert records[0]['loss'] == 2.25 and records[3]['loss'] is None
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        'step 30/400  epoch 1.5  loss 2.250  top-1 40.0 %  lr 0.05  100 images/s  (feed 400)  waiting 25 %  '
        '118 s left'  # 370 steps of 32 images at 100 a second
    )
    assert lines[1] == 'step 40: top-1 50.00 %, top-5 90.00 %, loss 1.5000 on 10 images'
    assert lines[2] == 'checkpoint 40 in 0.1 s'


def test_a_run_that_goes_on_drops_what_it_will_do_again(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (10, 20, 21):
            log.train(step, VALUES)
        log.event('saved', 'x', step=20)
    with open_log(tmp_path, first_step=20) as log:
        log.event('resume', 'y', step=20)
        log.train(30, {**VALUES, 'loss': 1.0})
    records = read(str(tmp_path))
    assert [(r['kind'], r['step']) for r in records] == [
        ('train', 10),
        ('train', 20),
        ('saved', 20),
        ('resume', 20),
        ('train', 30),
    ]
    assert records[-1]['loss'] == 1.0


def test_a_line_that_a_killed_run_did_not_finish_is_dropped(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train(10, VALUES)
    path = tmp_path / 'log.jsonl'
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert len(read(str(tmp_path))) == 1
    with open_log(tmp_path, first_step=10) as log:
        log.train(20, VALUES)
    assert [r['step'] for r in read(str(tmp_path))] == [10, 20]
    path.write_text('nonsense\n' + path.read_text())
    with pytest.raises(FlaxnetsError, match=r'log\.jsonl, line 1: not a record'):
        read(str(tmp_path))


def test_tensorboards_files(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train(30, VALUES)
        log.eval(40, {'images': 10, 'top1': 50.0, 'top5': 90.0, 'loss': 1.5})
    found = {}
    for path in (tmp_path / 'tensorboard').iterdir():
        data = path.read_bytes()
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack('<Q', data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    assert found[30, 'train/loss'] == 2.25
    assert found[40, 'eval/top1'] == 50.0


def test_quiet_and_secondary_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path / 'a', quiet=True) as log:
        log.train(1, VALUES)
        log.event('saved', 'a checkpoint')
        log.event('non_finite', 'something is wrong')
    with open_log(tmp_path / 'b', primary=False) as log:
        log.train(1, VALUES)
        log.advance(1)
        log.event('non_finite', 'said once is enough')
        with log.evaluating(10) as done:
            done(5)
    assert capsys.readouterr().err == 'something is wrong\n'
    assert not (tmp_path / 'b').exists()
    assert json.loads((tmp_path / 'a' / 'log.jsonl').read_text().splitlines()[0])['loss'] == 2.25

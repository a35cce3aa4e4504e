"""The benchmarks' files of findings: a run that was stopped goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import nets, report


def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    log = tmp_path / 'log.jsonl'
    report.append(log, {'a': 1})
    with log.open('a') as file:
        file.write('{"b": ')
    report.append(log, {'c': 3})
    assert list(report.lines(log)) == [{'a': 1}, {'c': 3}]


def test_what_had_no_time_left_is_measured_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(measurement: nets.Measurement, *_: Any) -> dict[str, Any]:
        measured.append(measurement.net)
        return {'key': measurement.key, 'findings': []}

    def run(*options: str) -> list[str]:
        measured.clear()
        command = ['nets', '--out', str(tmp_path), '--only', 'forward1', '--nets', 'resnest14d', *options]
        monkeypatch.setattr(sys, 'argv', command)
        nets.main()
        return list(measured)

    monkeypatch.setattr(nets, 'measure', measure)
    monkeypatch.setattr(nets, 'ask_for_onednn', lambda: None)
    for name in ('tables', 'picture'):
        monkeypatch.setattr(report, name, lambda log: (log.parent / 'cpu.md').write_text(''))
    assert run('--minutes', '0.1') == []
    assert run('--resume') == ['resnest14d']
    assert run('--resume') == []

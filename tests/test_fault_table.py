"""The table of `tests/faults.py`: that its faults can be put in."""

from __future__ import annotations

import faults
import pytest


@pytest.mark.parametrize('fault', faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_stands_for_one_line_and_its_tests_are_there(fault: faults.Fault) -> None:
    faults.check(fault)
    files = [word for word in fault.tests.split() if word.startswith('tests/')]
    assert files and all((faults.ROOT / file).is_file() for file in files)


def test_names_tell_faults_apart() -> None:
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS) >= 60

"""Values in messages are short, whatever they are."""

from __future__ import annotations

from flaxnets.errors import shown


def test_integers() -> None:
    assert shown(7) == '7' and shown(-(2**64)) == str(-(2**64))
    assert shown(10**9000) == 'an integer of 29,898 bits' and shown([10**9000]).startswith('[an integer')

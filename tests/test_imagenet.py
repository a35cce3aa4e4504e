"""The class names against timm's copy of them."""

from __future__ import annotations

from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from flaxnets.zoo.imagenet import class_names, wnids


def test_names_and_ids_are_timms_at_every_index() -> None:
    info: Any = ImageNetInfo('imagenet-1k')
    assert list(wnids()) == info.label_names()
    assert list(class_names()) == info.label_descriptions()


def test_order_is_that_of_the_sorted_ids() -> None:
    assert len(class_names()) == 1000
    assert len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())


def test_landmarks() -> None:
    expected = {0: 'tench', 207: 'golden retriever', 281: 'tabby', 999: 'toilet tissue'}
    assert {i: class_names()[i].split(', ')[0] for i in expected} == expected
    assert wnids()[0] == 'n01440764'

"""Parts of data sets, by name and by percents as TensorFlow Datasets writes them: `train[:80%]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from flaxnets.errors import FlaxnetsError

from .base import SPLITS, Labelled, View

_PATTERN = re.compile(r'(?P<name>[^\[\]+]*)(\[(?P<first>-?\d+%)?:(?P<last>-?\d+%)?\])?')


@dataclass(frozen=True)
class Part:
    """Which part of a data set is meant.

    Attributes:
      names: that the part may have, the first choice first.
      chosen: whether the user named the part; otherwise `names` are the usual ones.
      percent: first and last percent of each class, or None for all of it. The function that opens a source
        gives the whole part; `open_source` takes the percents.
      whole: where data has no parts, all of it may be taken for the part. If False that is an error, so that
        no net is evaluated on the images that it was trained on unless the user asked for it.
      training: the part is to be trained on, so each class must have images.
    """

    names: tuple[str, ...]
    chosen: bool = False
    percent: tuple[int, int] | None = None
    whole: bool = False
    training: bool = False

    @property
    def may_be_the_whole(self) -> bool:
        """Whether data without parts is taken as it is."""
        return self.whole and not self.chosen

    @property
    def shares_the_whole(self) -> bool:
        """Whether percents of no named part are meant, `[:80%]`: data that has parts must refuse them."""
        return self.percent is not None and not self.chosen


def parse(split: str, training: bool, whole: bool) -> Part:
    """Reads `''`, `val`, `train[:80%]`, or `[80%:]` of data without parts.

    Raises:
      FlaxnetsError: it is none of these.
    """
    found = _PATTERN.fullmatch(split)
    if found is None:
        raise FlaxnetsError(
            f'the part {split!r} is not understood: it can be a name, and percents of each class, as in '
            "'val', 'train[:80%]', 'train[80%:]', or '[:80%]' of data that has no parts"
        )
    sliced = '[' in split
    percent = (_bound(found['first'], 0), _bound(found['last'], 100)) if sliced else None
    if percent is not None and percent[0] >= percent[1]:
        raise FlaxnetsError(f'the part {split!r} is empty: it goes from {percent[0]} % to {percent[1]} %')
    name = found['name'].strip()
    names = (name,) if name else SPLITS[training]
    return Part(names, bool(name), percent, whole or (sliced and not name), training)


def _bound(text: str | None, usual: int) -> int:
    if text is None:
        return usual
    value = int(text.rstrip('%'))
    return min(100, max(0, value + 100 if text.startswith('-') else value))


def percents(source: Labelled, first: int, last: int) -> Labelled:
    """The images of each class from one percentage to another, in the source's own order.

    Which images they are depends on nothing but their number and order, so that [:80%] and [80%:] have no
    image in common and leave none out. They are drawn at random, since the order of names often follows what
    the images show.

    Raises:
      FlaxnetsError: no image lies between the two percentages.
    """
    drawn = np.random.RandomState(0)  # its stream is the same in every version of NumPy
    chosen = []
    for label in range(source.num_classes):
        places = drawn.permutation(np.flatnonzero(source.labels == label))
        begin, end = ((len(places) * percent + 50) // 100 for percent in (first, last))
        chosen.append(places[begin:end])
    places = np.sort(np.concatenate(chosen))
    if not len(places):
        raise FlaxnetsError(f'{source.name}: no image lies between {first} % and {last} % of its classes')
    return View(f'{source.name}[{first}%:{last}%]', source, places, source.labels[places], source.classes)

"""Where images come from: folders, tars, arrays, prepared data sets of TensorFlow.

`open.py` lists the kinds and opens them; `base.py` says what a source is.
"""

from .arrays import ArraySource
from .base import SPLITS, Labelled, Record, Source
from .entries import some
from .open import ANY_CHANNELS, open_source

__all__ = ['ANY_CHANNELS', 'SPLITS', 'ArraySource', 'Labelled', 'Record', 'Source', 'open_source', 'some']

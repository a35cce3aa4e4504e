"""Where images come from: folders, tars, arrays, prepared data sets of TensorFlow."""

from .arrays import ArraySource
from .base import SPLITS, Labelled, Record, Source
from .entries import some
from .open import open_source

__all__ = ['SPLITS', 'ArraySource', 'Labelled', 'Record', 'Source', 'open_source', 'some']

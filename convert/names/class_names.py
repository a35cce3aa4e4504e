"""Reads the class names in a file or, if it has none, the order in which its training had the classes.

    {'class_to_idx': {'ant': 0, 'bee': 1}}            torchvision's ImageFolder, kept by many trainings
    {'meta': {'dataset_meta': {'classes': [...]}}}    mmengine; {'meta': {'CLASSES': [...]}} mmcv
    {'label_names': [...]}, {'id2label': {...}}       timm's and transformers' `config.json`
    {'hyper_parameters': {'class_names': [...]}}      Lightning

References: timm's `train.py` and `create_dataset`, torchvision's references, pytorch/examples, mmpretrain's
`CustomDataset.find_folders`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxnets.errors import shown
from flaxnets.zoo.classes import in_their_order
from flaxnets.zoo.imagenet import places

_CLASS = '(?:class|classes|cls|label|labels|category|categories|cat|target)(?:_?names?)?'
_NUMBER = '(?:idx|ind|ix|index|indices|ids?|int|num|number)'
# Keys of tables name -> number, of tables number -> name, and of lists; the likeliest first.
_NAMES = (
    re.compile(f'(?:{_CLASS}|names?)_?(?:to|2)_?{_NUMBER}'),
    re.compile(f'{_NUMBER}_?(?:to|2)_?(?:{_CLASS}|names?)'),
    re.compile(f'{_CLASS}(?:_?list)?|vocab|names'),
)
_DEPTH = 4  # levels of nested dictionaries that are looked at
_MOST = 2_000  # dictionaries that are looked at


@dataclass(frozen=True)
class Said:
    """What a file says of its classes.

    Attributes:
      names: what may be the names, as (where in the file, value): ('meta.CLASSES', [...]). The values are
        unchecked; the likeliest comes first.
      order: as `flaxnets.Config.class_order`.
    """

    names: tuple[tuple[str, object], ...] = ()
    order: str | None = None

    def of(self, outputs: int) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
        """The class names of a net with so many outputs, None if the file does not give them; and notes."""
        usable = [(where, names) for where, value in self.names if (names := _complete(value, outputs))]
        if not usable:
            notes = [
                f"left out the file's class names ({where}): {_kind(value, outputs)}"
                for where, value in self.names
            ]
            if self.order == 'file':
                notes.append(
                    "does not name its classes: its training took them from a file of its own (timm's "
                    '--class-map), which evaluation will ask for'
                )
            return None, tuple(notes)
        chosen, names = usable[0]
        other = [where for where, those in usable if not _are_same(names, those)]
        note = f'took the names of the classes from {chosen}: {", ".join(other[:5])} says otherwise'
        return names, (note,) if other else ()


def class_names(around: Mapping[Any, Any]) -> Said:
    """What the dictionary that a state dict stands in says of its classes.

    Args:
      around: the dictionary as it was read; it may hold anything.
    """
    found: list[tuple[int, str, object]] = []
    for where, key, value in _entries(around):
        rank = next((i for i, pattern in enumerate(_NAMES) if pattern.fullmatch(_plain(key))), None)
        if rank is not None and _may_be_names(value):
            found.append((rank, where, value))
    found.sort(key=lambda item: item[0])  # among equals, outer dictionaries stay first
    return Said(tuple((where, value) for _, where, value in found), _order(around))


def _entries(around: Mapping[Any, Any]) -> Iterator[tuple[str, str, object]]:
    """(path, key, value) for each text key in nested dictionaries, the outer ones first."""
    level: list[tuple[str, Mapping[Any, Any]]] = [('', around)]
    seen = 0
    for _ in range(_DEPTH):
        inner: list[tuple[str, Mapping[Any, Any]]] = []
        for where, table in level:
            seen += 1
            if seen > _MOST:
                return
            if any(isinstance(value, np.ndarray) for value in table.values()) and where:
                continue  # a state dict
            for key, value in table.items():
                if not isinstance(key, str):
                    continue
                yield where + key, key, value
                if isinstance(value, Mapping):
                    inner.append((f'{where}{key}.', value))
        level = inner


def _plain(key: str) -> str:
    """A key in small letters, its words joined by _: 'className' and 'CLASS-NAME' -> 'class_name'."""
    return re.sub(r'(?<=[a-z])(?=[A-Z])|[\s-]+', '_', key).strip('_').lower()


def _may_be_names(value: object) -> bool:
    """Whether text is in it: counts of classes, labels of images and file names are called alike."""
    if isinstance(value, Mapping):
        return any(isinstance(part, str) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple | set | frozenset) and any(isinstance(v, str) for v in value)


def _complete(value: object, outputs: int) -> tuple[str, ...] | None:
    """The names of all outputs in order, if the value gives them; else None."""
    if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value.values()):
        # timm writes a table where some outputs have no name: those are called by their number.
        numbers = {str(key) for key in value if isinstance(key, int | str)}
        if len(numbers) == len(value) and numbers <= {str(i) for i in range(outputs)}:
            named = {str(key): name for key, name in value.items()}
            value = [named.get(str(i), str(i)) for i in range(outputs)]
    names = in_their_order(value)
    return names if names is not None and len(names) == outputs and not _are_blanks(names) else None


def _are_same(names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    if names == others:
        return True
    meant = places(names)  # WordNet ids and English names may stand beside each other
    return meant is not None and meant == places(others)


def _are_blanks(names: Sequence[str]) -> bool:
    """What transformers writes for classes that nobody has named."""
    return all(re.fullmatch(r'LABEL_\d+', name) for name in names)


def _kind(value: object, outputs: int) -> str:
    """Why a value does not name the outputs, in words."""
    names = in_their_order(value)
    if names is None or _are_blanks(names):
        return f'it is no list of names ({shown(value)})'
    return f'it names {len(names)} classes, there are {outputs} outputs'


def _order(around: Mapping[Any, Any]) -> str | None:
    """How the training that wrote a file sorted its folders (`Config.class_order`); None if unknown."""
    args = around.get('args')
    args = args if isinstance(args, Mapping) else {}
    if isinstance(around.get('arch'), str) and 'model' in args:  # timm
        return _timm_order(args)
    if 'data_path' in args:  # torchvision's references, and DeiT's, which names its data set
        kind = args.get('data_set')
        return 'text' if kind is None or (isinstance(kind, str) and kind == 'IMNET') else None
    meta = around.get('meta')
    if isinstance(meta, Mapping) and any('version' in key for key in meta if isinstance(key, str)):
        return 'text'  # mmengine, mmcv
    judged = 'best_acc1' in around or 'best_prec1' in around
    is_example = judged and isinstance(around.get('arch'), str) and 'optimizer' in around and not args
    return 'text' if is_example else None  # pytorch/examples, and the many trainings made from it


def _timm_order(args: Mapping[Any, Any]) -> str | None:
    class_map = args.get('class_map')
    if isinstance(class_map, str | Mapping) and class_map:
        return 'file'
    kind = args.get('dataset')
    if not isinstance(kind, str) or '/' not in kind:
        return 'natural'  # folders and tars
    return 'text' if kind.lower() in ('torch/image_folder', 'torch/folder') else None

"""Writes predictions as tables: CSV, JSON lines or Parquet files, each written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import FlaxnetsError
from ..store.files import check_place, written_whole
from .prediction import Prediction

SUFFIXES = ('.csv', '.jsonl', '.parquet')
ROWS = 4096  # rows in a row group of a Parquet file


class Table(Protocol):
    """A table of one of the formats, to which predictions are written one by one."""

    def write(self, prediction: Prediction) -> None: ...

    def close(self) -> None:
        """Writes rows that are still in memory; the file itself stays open."""


def check_table(path: str) -> None:
    """Checks, before long work, that a table can be written to `path`.

    Raises:
      FlaxnetsError: an unknown suffix; no such folder, or `path` is one; or pyarrow is not installed, which
        Parquet needs.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise FlaxnetsError(f'{path}: a table is written as {", ".join(SUFFIXES)}, not as {suffix!r}')
    check_place(path)
    if suffix == '.parquet':
        _arrow()


@contextmanager
def open_table(path: str, topk: int) -> Iterator[Table]:
    """A table to write predictions to. The file appears at `path` once the block has ended without an error.

    CSV and Parquet have a row for each image, with the columns `image`, `class_1`, `index_1`,
    `probability_1` and so on, and `error`, which says why an image cannot be read. Each of the JSON lines is
    `Prediction.as_json`.

    Args:
      path: file to write; its suffix decides the format.
      topk: number of classes in a row.

    Raises:
      FlaxnetsError: as in `check_table`; or the file cannot be written.
    """
    check_table(path)
    kinds: dict[str, Any] = {'.csv': _Csv, '.jsonl': _JsonLines, '.parquet': _Parquet}
    with written_whole(path) as file:
        table: Table = kinds[Path(path).suffix.lower()](file, topk)
        try:
            yield table
        finally:
            table.close()


def _columns(topk: int) -> list[str]:
    each = [f'{what}_{i}' for i in range(1, topk + 1) for what in ('class', 'index', 'probability')]
    return ['image', *each, 'error']


def _row(prediction: Prediction, topk: int) -> list[Any]:
    cells = [cell for g in prediction.top for cell in (g.name, g.index, g.probability)]
    return [prediction.image, *cells, *[None] * (3 * topk - len(cells)), prediction.problem]


class _Csv:
    def __init__(self, file: IO[bytes], topk: int) -> None:
        self._file = io.TextIOWrapper(file, newline='', encoding='utf-8')
        self._writer, self._topk = csv.writer(self._file), topk
        self._writer.writerow(_columns(topk))

    def write(self, prediction: Prediction) -> None:
        self._writer.writerow(_row(prediction, self._topk))

    def close(self) -> None:
        self._file.detach()


class _JsonLines:
    def __init__(self, file: IO[bytes], topk: int) -> None:
        self._file = io.TextIOWrapper(file, newline='', encoding='utf-8')

    def write(self, prediction: Prediction) -> None:
        print(json.dumps(prediction.as_json(), ensure_ascii=False), file=self._file)

    def close(self) -> None:
        self._file.detach()


class _Parquet:
    def __init__(self, file: IO[bytes], topk: int) -> None:
        arrow, parquet = _arrow()
        types = {'class': arrow.string(), 'index': arrow.int32(), 'probability': arrow.float32()}
        fields = [(c, types.get(c.rpartition('_')[0], arrow.string())) for c in _columns(topk)]
        self._arrow, self._schema, self._topk = arrow, arrow.schema(fields), topk
        self._writer = parquet.ParquetWriter(file, self._schema)
        self._rows: list[list[Any]] = []

    def write(self, prediction: Prediction) -> None:
        self._rows.append(_row(prediction, self._topk))
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        columns: Sequence[Any] = list(zip(*self._rows, strict=True))
        if columns:
            arrays = [self._arrow.array(c, f.type) for c, f in zip(columns, self._schema, strict=True)]
            self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FlaxnetsError(
            'parquet needs pyarrow, which is not installed: pip install pyarrow, or write .csv'
        ) from error
    return pyarrow, pyarrow.parquet

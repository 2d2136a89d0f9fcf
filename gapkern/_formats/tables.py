"""Columns of embeddings in tables: Parquet, Arrow as Hugging Face's `datasets` keeps it, and Lance; read by batches.

A column is a list of D floating-point numbers in each row, of a fixed size or not. Ragged lists and nulls are refused
by their row.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gapkern import _check
from gapkern._formats.reading import UNREADABLE, Matrix, Stream, matrix, opened, reason

ARROW = (".arrow", ".feather")
LANCE = ".lance"
SUFFIXES = (".parquet", *ARROW, LANCE)
USUAL = ("embedding", "embeddings", "emb", "vector")  # what a column is called where several could be meant
BATCH = 2**20  # numbers that are decoded at a time
NARROW = 8192  # rows of other columns that are decoded at a time


def is_table(file: str | os.PathLike[str]) -> bool:
    return os.path.splitext(os.fspath(file).rstrip("/"))[1] in SUFFIXES


def table(file: Path, key: str | None, name: str) -> Matrix:
    """A column of embeddings: that of `key`, the only one of lists of numbers, or the one of a `USUAL` name.

    Raises:
        ImportError: pyarrow is not installed, or lance for its folders.
        ValueError: there is no such file or column, several and no key; no, other or ragged lists, nulls.
    """
    with _Opened(file, name) as there:
        column = _column(there.schema, key, file, name)
        kind = _numbers_of(there.schema.field(column).type)
        rows = there.rows
        if kind is None:
            raise ValueError(
                f"{name}: expected lists of floating-point numbers in {file}[{column}], got "
                f"{there.schema.field(column).type}"
            )
        first = next(there.batches([column], 0, 1), None) if rows else None
        dims = 1 if first is None else _values(first[1].column(0), None, 0, file, column, name).shape[1]

    def pieces(start: int) -> Iterator[tuple[int, np.ndarray]]:
        with _Opened(file, name) as again:
            for row, batch in again.batches([column], start, max(1, BATCH // dims)):
                yield row, _values(batch.column(0), dims, row, file, column, name)

    stream = Stream(pieces, dims, kind)

    def part(low: int, high: int) -> np.ndarray:
        try:
            return stream.read(low, high)
        except EOFError as error:
            raise ValueError(f"{name}: cannot read {file}: {error}") from None

    return matrix(file, name, (rows, dims), kind, part, mapped=False)


def columns(file: Path, name: str) -> list[str]:
    """The names of a table's columns."""
    with _Opened(file, name) as there:
        return list(there.schema.names)


def values(file: Path, column: str, name: str) -> list[Any]:
    """A column's values, as Python's own objects.

    Raises:
        ValueError: there is no such column.
    """
    with _Opened(file, name) as there:
        if column not in there.schema.names:
            raise ValueError(f"{name}: expected one of {', '.join(there.schema.names)} in {file}, got [{column}]")
        found: list[Any] = []
        for _, batch in there.batches([column], 0, NARROW):
            found += batch.column(0).to_pylist()
        return found


def embeddings_column(file: Path, key: str | None, name: str) -> str:
    """The column that `table` reads."""
    with _Opened(file, name) as there:
        return _column(there.schema, key, file, name)


def batches(file: Path, name: str, rows: int) -> Iterator[Any]:
    """All columns, as Arrow's record batches of at most that many rows."""
    with _Opened(file, name) as there:
        for _, batch in there.batches(list(there.schema.names), 0, rows):
            yield batch


class _Opened:
    """A table that is open: its schema, rows, and batches from a row on."""

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name
        self._close: list[Any] = []

    def __enter__(self) -> "_Opened":
        self.arrow = _check.extra("pyarrow", "pyarrow", "tables")
        if self.file.suffix == LANCE:
            lance = _check.extra("lance", "pylance", "lance")
            if not self.file.is_dir():
                raise ValueError(f"{self.name}: expected a folder of Lance, got {self.file}, which is none")
            with self._one_line("a folder of Lance"):
                self._there = lance.dataset(str(self.file))
                self.schema, self.rows = self._there.schema, self._there.count_rows()
            return self
        opened(self.file, self.name)
        with self._one_line(f"a {self.file.suffix} file"):
            if self.file.suffix == ".parquet":
                parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
                # Mapped, a page at a time is decoded; read, a whole column chunk would be in memory.
                self._there = parquet.ParquetFile(self.file, memory_map=True, pre_buffer=False)
                self._close.append(self._there)
                self.schema, self.rows = self._there.schema_arrow, self._there.metadata.num_rows
            else:
                self.schema, self.rows = self._arrow()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._close:
            each.close()
        self._close.clear()

    def _arrow(self) -> tuple[Any, int]:
        """Of Arrow's file or stream."""
        mapped = self.arrow.memory_map(str(self.file))
        self._close.append(mapped)
        self._is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if self._is_file:
            self._there = self.arrow.ipc.open_file(mapped)
            counts = [self._there.get_batch(i).num_rows for i in range(self._there.num_record_batches)]
            return self._there.schema, sum(counts)
        self._there = self._stream()
        return self._there.schema, sum(batch.num_rows for batch in self._stream())

    def _stream(self) -> Any:
        mapped = self.arrow.memory_map(str(self.file))
        self._close.append(mapped)
        return self.arrow.ipc.open_stream(mapped)

    def batches(self, wanted: list[str], first: int, rows: int) -> Iterator[tuple[int, Any]]:
        """Record batches of at most `rows` rows, with the number of their first row; the first has row `first`."""
        with self._one_line(f"a {self.file.suffix} file"):
            start, parts = self._parts(wanted, first, rows)
            for batch in parts:
                batch.validate(full=True)
                for low in range(max(0, first - start), batch.num_rows, rows):
                    yield start + low, batch.slice(low, rows)
                start += batch.num_rows

    def _parts(self, wanted: list[str], first: int, rows: int) -> tuple[int, Iterator[Any]]:
        """The batches from that which holds a row on, and the row that they begin with."""
        if self.file.suffix == LANCE:
            found = self._there.scanner(columns=wanted, batch_size=rows, offset=first or None, scan_in_order=True)
            return first, iter(found.to_batches())
        if self.file.suffix == ".parquet":
            counts = [self._there.metadata.row_group(i).num_rows for i in range(self._there.num_row_groups)]
            group, start = _holding(counts, first)
            groups = list(range(group, len(counts)))
            return start, self._there.iter_batches(rows, row_groups=groups, columns=wanted)
        if self._is_file:
            counts = [self._there.get_batch(i).num_rows for i in range(self._there.num_record_batches)]
            group, start = _holding(counts, first)
            return start, (self._there.get_batch(i).select(wanted) for i in range(group, len(counts)))
        return 0, (batch.select(wanted) for batch in self._there)

    def _one_line(self, expected: str) -> "_OneLine":
        return _OneLine(self.arrow, f"{self.name}: expected {expected}, got {self.file}")


class _OneLine:
    """Turns what Arrow and Lance raise on damaged files into one line."""

    def __init__(self, arrow: Any, said: str):
        self.arrow, self.said = arrow, said

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        panic = type(error).__name__ == "PanicException"  # of Lance, in Rust: no Exception
        if error and (panic or isinstance(error, (self.arrow.ArrowException, RuntimeError, *UNREADABLE))):
            raise ValueError(f"{self.said}: {reason(error)[:200]}") from None


def _holding(counts: list[int], row: int) -> tuple[int, int]:
    """The group that holds a row, and its first row."""
    start = 0
    for group, count in enumerate(counts):
        if row < start + count:
            return group, start
        start += count
    return len(counts), start


def _column(schema: Any, key: str | None, file: Path, name: str) -> str:
    there = list(schema.names)
    if key is not None:
        if there.count(key) != 1:
            got = f"[{key}] twice" if key in there else f"[{key}]"
            raise ValueError(f"{name}: expected one of {', '.join(there)} in {file}, got {got}")
        return key
    fitting = [field.name for field in schema if (kind := _numbers_of(field.type)) is not None and kind.kind == "f"]
    if len(fitting) != 1:
        usual = [column for column in fitting if column in USUAL]
        if len(usual) == 1:
            return usual[0]
        got = f"{', '.join(fitting)}; choose one as file[column]" if fitting else f"none among {', '.join(there)}"
        raise ValueError(f"{name}: expected one column of lists of floating-point numbers in {file}, got {got}")
    return fitting[0]


def _numbers_of(kind: Any) -> np.dtype[Any] | None:
    """The dtype of a type of lists of floating-point numbers or bytes; None of any other."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    types = pyarrow.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return None
    value = kind.value_type
    if types.is_floating(value) or value in (pyarrow.uint8(), pyarrow.int8()):
        return np.dtype(value.to_pandas_dtype())
    return None


def _values(array: Any, dims: int | None, row: int, file: Path, column: str, name: str) -> np.ndarray:
    """Lists (n, D); `dims` is what is expected, `row` the first one's number."""
    import pyarrow

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if array.null_count:
        at = row + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{name}: expected a list in each row of {file}[{column}], got null in row {at}")
    if pyarrow.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size)
    else:
        lengths = array.value_lengths().to_numpy()
    dims = int(lengths[0]) if dims is None else dims
    if len(wrong := np.flatnonzero(lengths != dims)):
        raise ValueError(
            f"{name}: expected lists of one length in {file}[{column}], got {dims} numbers in row 0 and "
            f"{lengths[wrong[0]]} in row {row + int(wrong[0])}"
        )
    flat = array.flatten()
    if flat.null_count:
        at = row + int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // max(1, dims)
        raise ValueError(f"{name}: expected numbers in {file}[{column}], got null in row {at}")
    found: np.ndarray = flat.to_numpy(zero_copy_only=False)
    return found.reshape(len(array), dims)

"""Matrices written from front to back: `.npy`, `.safetensors`, and Parquet with the columns beside them.

A file is never written through a mapping: where the disk is full, that ends the process with SIGBUS.
"""

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._formats import tables

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
SUFFIXES = (".npy", ".safetensors", ".parquet")
COLUMN = "embedding"


class Writer:
    """Writes a matrix of known shape to a new file, rows after rows.

    All of its room on the disk is taken at once, so that a full disk is seen before the work; Parquet's is not known.

    Args:
        file: open for writing, at its start.
        suffix: one of `SUFFIXES`.
        dtype, rows, dims: of the matrix.
        beside: for Parquet: batches of a table whose `column` becomes the matrix and whose other columns are kept.

    Raises:
        ValueError: another suffix, or a dtype that the format has not.
        OSError: there is no room.
    """

    def __init__(
        self,
        file: BinaryIO,
        suffix: str,
        dtype: torch.dtype,
        rows: int,
        dims: int,
        beside: Iterator[Any] | None = None,
        column: str = COLUMN,
    ):
        self._file, self._dtype, self._shape = file, dtype, (rows, dims)
        self._parquet: _Parquet | None = None
        if dtype == torch.bfloat16 and suffix in (".npy", ".parquet"):
            raise ValueError(f"path: {suffix} has no bfloat16; expected a name ending in .safetensors")
        if suffix == ".parquet":
            self._parquet = _Parquet(file, dims, beside, column)
            return
        bytes_ = rows * dims * dtype.itemsize
        header = self._header(suffix, bytes_)
        reserve(file.fileno(), len(header) + bytes_)
        file.write(header)

    def _header(self, suffix: str, bytes_: int) -> bytes:
        if suffix == ".safetensors":
            facts = {"dtype": _NAMES[self._dtype], "shape": self._shape, "data_offsets": (0, bytes_)}
            text = json.dumps({"embeddings": facts}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            return len(text).to_bytes(8, "little") + text
        if suffix != ".npy":
            known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            raise ValueError(f"path: expected a name ending in {known}, got one in {suffix or 'nothing'}")
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=self._dtype).numpy().dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": self._shape})
        return header.getvalue()

    def write(self, rows: Tensor) -> None:
        """Appends rows (n, D)."""
        rows = rows.detach().cpu().contiguous()
        if self._parquet is not None:
            self._parquet.write(rows.numpy())
        else:
            self._file.write(rows.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Writes what stands at the end; the file stays open."""
        if self._parquet is not None:
            self._parquet.close()


class _Parquet:
    """Rows as a column of lists of a fixed size, in row groups of the parts that are written."""

    def __init__(self, file: BinaryIO, dims: int, beside: Iterator[Any] | None, column: str):
        self._arrow = _check.extra("pyarrow", "pyarrow", "tables")
        self._module = _check.extra("pyarrow.parquet", "pyarrow", "tables")
        self._file, self._dims, self._beside, self._column = file, dims, beside, column
        self._kept: list[Any] = []
        self._writer: Any = None

    def write(self, rows: np.ndarray) -> None:
        arrow = self._arrow
        lists = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.ravel()), self._dims)
        if self._beside is None:
            found = arrow.table({self._column: lists})
        else:
            found = self._others(len(rows))
            at = found.schema.get_field_index(self._column)
            before = found.schema.field(at).type
            sized = arrow.types.is_fixed_size_list(before) and before.list_size != self._dims
            if isinstance(before, arrow.BaseExtensionType) or sized or before.value_type != lists.type.value_type:
                found = found.replace_schema_metadata(None)  # what it says of the column is so no more
            else:
                lists = lists.cast(before)
            found = found.set_column(at, self._column, lists)
        if self._writer is None:
            # Mantissas do not compress; a dictionary of them only costs.
            plain = {"use_dictionary": [c for c in found.schema.names if c != self._column], "write_statistics": False}
            self._writer = self._module.ParquetWriter(self._file, found.schema, compression="zstd", **plain)
        self._writer.write_table(found, row_group_size=len(rows))

    def _others(self, count: int) -> Any:
        """The next rows of the table that the matrix came from."""
        while sum(batch.num_rows for batch in self._kept) < count:
            assert self._beside is not None
            self._kept.append(next(self._beside))
        whole = self._arrow.Table.from_batches(self._kept)
        rest = whole.slice(count)
        self._kept = rest.to_batches() if rest.num_rows else []
        return whole.slice(0, count)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def beside(file: Path, key: str | None, name: str, rows: int) -> tuple[Iterator[Any], str] | None:
    """What `Writer` takes of a table whose embeddings it writes anew; None of other files."""
    if not tables.is_table(file):
        return None
    return tables.batches(file, name, rows), tables.embeddings_column(file, key, name)


def reserve(descriptor: int, size: int) -> None:
    """Takes the room for a file of that many bytes on its disk, where the file system can.

    Raises:
        OSError: there is no room.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise

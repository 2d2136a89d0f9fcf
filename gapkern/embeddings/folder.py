"""Folders of embeddings as clip-retrieval writes them, and the manifest that says what they hold.

    OUT/img_emb/img_emb_0.npy ...     OUT/metadata/metadata_0.parquet ...
    OUT/text_emb/text_emb_0.npy ...   OUT/text_metadata/metadata_0.parquet ...
    OUT/<kind>/manifest.json          model, rows, D, dtype, the order of the rows' keys, what the embeddings were made
                                      from, and each shard's rows, bytes and SHA-256

The keys are the metadata's column `key`; the manifest has their order's hash. Shards are in natural order (2 before
10). Where clip-retrieval wrote the folder, `metadata` belongs to both kinds, there is no manifest, and the order of the
rows is called "as stored".
"""

import bisect
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files, layout
from gapkern.embeddings import keys
from gapkern.embeddings.manifests import differences, manifest
from gapkern.layout import KINDS, MANIFEST, place

TABLE_KEYS = ("key", "id", "image_path", "file_name", "filename", "filepath", "path", "url")
METADATA = {"img_emb": ("metadata",), "text_emb": ("text_metadata", "metadata")}


class Embeddings:
    """Embeddings (N, D) of a file or a folder of shards, mapped: rows are read when they are asked for.

    Args:
        path: a file or a folder as `gapkern.files.load_embeddings` reads them, or one with `img_emb` or `text_emb`.
        kind: "img_emb" or "text_emb", where the folder holds both.

    Attributes: shards (paths in natural order), counts (rows of each), dims, dtype, manifest (or None), model, order
    (the hash of the rows' keys, or None where rows are as stored).

    Raises:
        ValueError: what is there cannot be read, shards differ in D or dtype, or names, rows, bytes, D or dtype are not
            those of the manifest. Values are compared by `verify`.

    Example:
        >>> import tempfile
        >>> from gapkern.embeddings import write_folder
        >>> out = tempfile.mkdtemp()
        >>> _ = write_folder(out, "img_emb", [torch.zeros(3, 4), torch.ones(2, 4)], model="mine")
        >>> x = Embeddings(out)
        >>> len(x), x.dims, x.model, x[2:4].sum(1).tolist()
        (5, 4, 'mine', [0.0, 4.0])
    """

    def __init__(self, path: str | os.PathLike[str], kind: str | None = None, *, name: str = "path"):
        self.path = place(path, kind, name=name)
        self.kind = self.path.name if self.path.name in KINDS else None
        self.manifest = manifest(self.path, name=name)
        self.shards = files.shards(self.path, name=name)
        self._name = name
        self._parts = [files.open_matrix(shard, name=name) for shard in self.shards]
        self.counts = [part.rows for part in self._parts]
        self.dims, self.dtype = self._parts[0].dims, self._parts[0].dtype
        for shard, part in zip(self.shards, self._parts, strict=True):
            if (part.dims, part.dtype) != (self.dims, self.dtype):
                raise ValueError(
                    f"{name}: expected D = {self.dims} and {self.dtype} as in {self.shards[0]}, got "
                    f"{(part.rows, part.dims)} and {part.dtype} in {shard}"
                )
        self._starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        if self.manifest is not None and (found := differences(self.manifest, self.shards, self._parts)):
            raise ValueError(f"{name}: {self.path} differs from its manifest: {'; '.join(found)}")

    @property
    def model(self) -> str | None:
        return None if self.manifest is None else self.manifest.get("model")

    @property
    def order(self) -> str | None:
        return None if self.manifest is None else self.manifest.get("order")

    def keys(self, column: str = "key") -> list[str] | None:
        """The rows' keys, from the metadata or, of tables, a column; None where there is no such column.

        A table's keys are its `key`, or the first of `TABLE_KEYS` whose values are all there and each once.

        Raises:
            ValueError: the metadata is not the one whose keys' order the manifest has.
        """
        if not metadata_files(self.path):
            return self._table_keys((column,) if column != "key" else TABLE_KEYS)
        parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
        with self._parquet():
            if any(column not in parquet.read_schema(part).names for part in metadata_files(self.path)):
                return None
        found = [str(row[column]) for row in self.metadata([column])]
        if column == "key" and self.order is not None and keys.order(found) != self.order:
            raise ValueError(f"{self._name}: expected metadata of the order in {self.path / MANIFEST}, got another's")
        return found

    def _table_keys(self, wanted: Sequence[str]) -> list[str] | None:
        there = files.columns(self.shards[0], name=self._name)
        for column in (c for c in wanted if there.count(c) == 1):
            found = [value for shard in self.shards for value in files.column(shard, column, name=self._name)]
            plain = all(isinstance(value, str | int) and not isinstance(value, bool) for value in found)
            if plain and (column not in TABLE_KEYS or len(set(found)) == len(found)):
                return [str(value) for value in found]
        return None

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, rows: int | slice) -> Tensor:
        """A row (D,), or the rows (n, D) of a slice without a step, read into memory."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows: expected a slice without a step, got {rows}")
            parts = list(self.chunks(first=first, last=last))
            return torch.cat(parts) if parts else torch.empty(0, self.dims, dtype=self.dtype)
        row = rows + len(self) if rows < 0 else rows
        if not 0 <= row < len(self):
            raise IndexError(f"rows: expected a row of {len(self)}, got {rows}")
        return self[row : row + 1][0]

    def chunks(self, rows: int | None = None, *, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """The rows from `first` to `last`, some at a time, in memory; never across two shards."""
        last = len(self) if last is None else min(last, len(self))
        step = rows or max(1, files.CHUNK // self.dims)
        i = max(0, bisect.bisect_right(self._starts, first) - 1)
        while first < last:
            start, end = self._starts[i], self._starts[i] + self.counts[i]
            while first < min(last, end):
                until = min(first + step, last, end)
                part = self._parts[i].read(first - start, until - start)
                yield part.clone() if self._parts[i].mapped else part
                first = until
            i += 1

    def metadata(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """What the Parquet files say of each row, in the rows' order; read a group of rows at a time.

        Raises:
            ValueError: there is no metadata, or not one entry per row.
            ImportError: pyarrow is not installed.
        """
        parquet = _check.extra("pyarrow.parquet", "pyarrow", "tables")
        parts = metadata_files(self.path)
        with self._parquet():
            counts = [parquet.read_metadata(part).num_rows for part in parts]
        if sum(counts) != len(self):
            raise ValueError(f"{self._name}: expected metadata of {len(self)} rows for {self.path}, got {sum(counts)}")
        for part in parts:
            with self._parquet():
                for batch in parquet.ParquetFile(part).iter_batches(columns=columns):
                    yield from batch.to_pylist()

    @contextlib.contextmanager
    def _parquet(self) -> Iterator[None]:
        """Turns what pyarrow raises on damaged files into one line."""
        arrow = _check.extra("pyarrow", "pyarrow", "tables")
        try:
            yield
        except (arrow.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self._name}: expected Parquet beside {self.path}, got {reason}") from None


def metadata_files(shards: Path) -> list[Path]:
    """The Parquet files that belong to a folder of shards, in natural order; none where there are none."""
    for folder in (*(shards.parent / name for name in METADATA.get(shards.name, ())), shards / "metadata"):
        found = [p for p in folder.glob("*.parquet") if not p.name.startswith(".")]
        if found:
            return sorted(found, key=lambda p: layout.natural(p.name))
    return []

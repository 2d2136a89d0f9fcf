"""Reading embeddings and writing results: whole files or none, and errors that say what was expected."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _formats, _lock, _memory, layout
from gapkern._writing import replacing, sync, writable, write

__all__ = [
    "CHUNK",
    "chunks",
    "column",
    "columns",
    "convert",
    "digest",
    "fingerprint",
    "folder",
    "is_table",
    "load_array",
    "load_embeddings",
    "open_matrix",
    "plain",
    "read_json",
    "read_text",
    "replacing",
    "save",
    "save_embeddings",
    "shards",
    "size",
    "sync",
    "writable",
    "write",
    "write_json",
]

CHUNK = 2**22  # numbers at hand at once when a file is streamed


def plain(value: Any) -> Any:
    """`value` with tensors, arrays, paths and non-finite numbers as JSON has them (NaN and infinity become null).

    Example:
        >>> plain({"a": torch.tensor([1.0, float("nan")]), "b": (np.float32(2.0),)})
        {'a': [1.0, None], 'b': [2.0]}
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes JSON that any reader takes: `plain` values, two spaces, a final newline."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    return write(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_text(path: str | os.PathLike[str], *, name: str = "path") -> str:
    """What a file of text holds, in UTF-8 with or without a byte-order mark; line ends as they are.

    A pipe is read where something writes into it, as the shell's `<(...)` does.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        ValueError: it cannot be read, is no text in UTF-8, or is a device, which may have no end.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.txt"
        >>> _ = path.write_bytes(b"\\xef\\xbb\\xbfone\\r\\ntwo")
        >>> read_text(path)
        'one\\r\\ntwo'
    """
    return _formats.text(path, name)


def read_json(path: str | os.PathLike[str], *, name: str = "path") -> Any:
    """What a JSON file holds, in UTF-8 with or without a byte-order mark.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        ValueError: it cannot be read, or is no JSON.

    Example:
        >>> import tempfile
        >>> read_json(write_json(Path(tempfile.mkdtemp()) / "x.json", {"a": [1]}))
        {'a': [1]}
    """
    text = read_text(path, name=name)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name}: expected JSON in {path}, got lists within lists without end") from None
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON in {path}, got {_formats.reason(error)}") from None


def folder(path: str | os.PathLike[str], *, name: str = "out") -> Path:
    """`path` as a folder that exists and can be written.

    Raises:
        ValueError: it cannot be made or written, in one line that says why.
    """
    path = _lock.make(path, name=name)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot write to the folder {path}: {error.strerror}") from None
    return path


def shards(path: str | os.PathLike[str], *, name: str = "path") -> list[str]:
    """The embedding files that `path` means, in natural order (2 before 10); `path` alone where it is no folder.

    Raises:
        ValueError: the folder holds no `.npy` or `.safetensors` files, both, or means two things: see
            `gapkern.layout`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for n in (10, 2):
        ...     _ = save_embeddings(folder / f"img_emb_{n}.npy", torch.zeros(n, 3))
        >>> [Path(shard).name for shard in shards(folder)], size(folder)
        (['img_emb_2.npy', 'img_emb_10.npy'], (12, 3))
    """
    return layout.shards(path, name=name)


def size(path: str | os.PathLike[str], *, name: str = "path") -> tuple[int, int]:
    """Rows and columns of a file's or a folder's embeddings; files are not read for it.

    Raises:
        ValueError: as `load_embeddings`, but for its size.
    """
    rows, first = 0, None
    for shard in shards(path, name=name):
        found = open_matrix(shard, name=name)
        count, dims, dtype = found.rows, found.dims, found.dtype
        if first is None:
            first = dims, dtype, shard
        elif dims != first[0]:
            raise ValueError(
                f"{name}: expected D = {first[0]} as in the shards before, got ({count}, {dims}) in {shard}"
            )
        elif dtype != first[1]:
            raise ValueError(f"{name}: expected {first[1]} as in {first[2]}, got {dtype} in {shard}")
        rows += count
    assert first is not None
    return rows, first[0]


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; of a folder of Lance, of the names and bytes of its files.

    Raises:
        ValueError: it is a device or a pipe, which may have no end.
    """
    if os.path.isdir(path) and os.fspath(path).rstrip("/").endswith(layout.LANCE):
        there = sorted(p for p in Path(path).rglob("*") if p.is_file())
        told = "\n".join(f"{p.relative_to(path).as_posix()} {digest(p)}" for p in there)
        return hashlib.sha256(told.encode()).hexdigest()
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"path: expected a file, got {path}, which is none")
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def fingerprint(x: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values, a piece at a time.

    Example:
        >>> fingerprint(torch.zeros(2, 3)) == fingerprint(torch.zeros(3, 2))
        False
    """
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    for rows in x.detach().cpu().split(max(1, CHUNK // max(1, x[:1].numel()))):
        digest.update(rows.contiguous().view(torch.uint8).numpy() if rows.dim() > 1 else rows.numpy().tobytes())
    return digest.hexdigest()


def load_embeddings(path: str | os.PathLike[str], *, name: str = "path") -> Tensor:
    """Embeddings (N, D) from a file, or from a folder of `.npy`, `.safetensors` or tables, shard after shard.

    Mapped: `.npy` in any order of axes and bytes, `.npz` that is not compressed, `.safetensors`, `.pt` of tensors
    alone, big-ann's `.fbin`, `.u8bin`, `.i8bin`. Read into memory: columns of lists in `.parquet`, `.arrow` and
    `.lance`, HDF5, folders. Bytes and float8 become float32. `file[key]` chooses: a number in a `.npy` array (K, N, D),
    a tensor, a matrix, a column; without it, the only one of floating-point numbers is meant, or a column `embedding`,
    `embeddings`, `emb` or `vector`.

    Raises:
        ImportError: the package for the format is not installed: pyarrow, h5py, pylance.
        ValueError: the file is absent, of another format, truncated, pickled, or holds no (N, D) of floating-point
            numbers; lists are ragged or hold nulls; shards differ in D or dtype; it does not fit into memory.
    """
    parts = [open_matrix(shard, name=name) for shard in shards(path, name=name)]
    if len(parts) == 1 and parts[0].mapped:
        return parts[0].read()
    (rows, dims), dtype = size(path, name=name), parts[0].dtype
    free = _memory.available()
    if (needed := rows * dims * dtype.itemsize) > free:
        raise ValueError(
            f"{name}: expected embeddings that fit into {free / 2**30:.1f} GiB of free memory, got "
            f"{needed / 2**30:.1f} GiB in {path}"
        )
    whole, done = torch.empty(rows, dims, dtype=dtype), 0
    for part in parts:
        step = max(1, CHUNK // dims)
        for first in range(0, part.rows, step):
            some = part.read(first, first + step)
            whole[done : done + len(some)] = some
            done += len(some)
    return whole


def chunks(
    path: str | os.PathLike[str], rows: int | None = None, *, name: str = "path", finite: bool = False
) -> Iterator[Tensor]:
    """The embeddings of a file or folder, some rows at a time (by default about 4 million numbers), in memory.

    A file is mapped anew for every chunk: one mapping would keep every page it has touched. With `finite` the first row
    that holds NaN or infinity is refused, by its number in its file.

    Example:
        >>> import tempfile
        >>> file = save_embeddings(Path(tempfile.mkdtemp()) / "x.npy", torch.zeros(10, 2))
        >>> [len(part) for part in chunks(file, 4)]
        [4, 4, 2]
    """
    for shard in shards(path, name=name):
        matrix = open_matrix(shard, name=name)
        step = rows or max(1, CHUNK // matrix.dims)
        for first in range(0, matrix.rows, step):
            part = matrix.read(first, first + step)
            part = part.clone() if matrix.mapped else part
            if finite:
                _check.finite(name, part, first, where=f" of {shard}")
            yield part


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    change: Callable[[Tensor], Tensor],
    *,
    name: str = "path",
) -> Iterator[int]:
    """Writes `change(rows)` for the rows of a file to another file, a chunk at a time; yields the rows done so far.

    From a table to Parquet, the other columns come along. `target` appears only once it is complete; whether its disk
    has room for it is seen at the first chunk.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> list(convert(save_embeddings(folder / "x.npy", torch.ones(3, 2)), folder / "y.npy", lambda x: 2 * x))
        [3]
        >>> load_embeddings(folder / "y.npy").sum().item()
        12.0
    """
    (rows, dims), done = size(source, name=name), 0
    suffix, origin = Path(target).suffix, layout.parted(source)
    kept = None
    if suffix == ".parquet":
        kept = _formats.beside(Path(origin[0]), origin[1], name, max(1, CHUNK // dims))
    with replacing(target) as temporary, open(temporary, "wb") as file:
        for part in chunks(source, name=name, finite=True):
            part = change(part)
            if done == 0:
                writer = _formats.Writer(file, suffix, part.dtype, rows, part.shape[1], *(kept or ()))
            writer.write(part)
            done += len(part)
            yield done
        writer.close()


def open_matrix(path: str | os.PathLike[str], *, name: str = "path") -> "_formats.Matrix":
    """The matrix of one file, `rows` by `dims` of a `dtype`, whose rows `read(first, last)` reads.

    Going on where the last read ended is free in every format; a table or a compressed file begins anew elsewhere.

    Raises:
        ValueError: as `load_embeddings`.

    Example:
        >>> import tempfile
        >>> x = open_matrix(save_embeddings(Path(tempfile.mkdtemp()) / "x.npy", torch.eye(3)))
        >>> x.rows, x.dims, x.dtype, x.read(1, 2).tolist()
        (3, 3, torch.float32, [[0.0, 1.0, 0.0]])
    """
    text, key = layout.parted(path)
    return _formats.open_matrix(Path(text), key, name)


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a path, or what is before its [key], is a table by its ending.

    Example:
        >>> is_table("x.parquet[embedding]"), is_table("x.npy")
        (True, False)
    """
    return _formats.tables.is_table(layout.parted(path)[0])


def columns(path: str | os.PathLike[str], *, name: str = "path") -> list[str]:
    """The columns of a table; none of another file."""
    file = Path(layout.parted(path)[0])
    return _formats.tables.columns(file, name) if is_table(file) else []


def column(path: str | os.PathLike[str], of: str, *, name: str = "path") -> list[Any]:
    """A table's column `of`, as Python's own objects.

    Raises:
        ValueError: it is no table, or has no such column.
    """
    return _formats.tables.values(Path(layout.parted(path)[0]), of, name)


def load_array(path: str | os.PathLike[str], *, name: str = "path") -> np.ndarray:
    """The array of a `.npy` file of any dtype and shape, as labels and ids are, mapped.

    Raises:
        ValueError: the file is absent, of another format, truncated or pickled.
    """
    return _formats.read_npy(Path(path), name)


def save_embeddings(path: str | os.PathLike[str], x: Tensor) -> Path:
    """Writes (N, D) embeddings as `.npy`, `.safetensors` or `.parquet`, by the name's ending.

    Parquet has them in a column `embedding` of lists of a fixed size. bfloat16 needs `.safetensors`.
    """
    with replacing(path) as temporary:
        save(temporary, x)
    return Path(path)


def save(path: Path, x: Tensor) -> None:
    """Writes (N, D) embeddings to `path` itself, by its ending."""
    with open(path, "wb") as file:
        writer = _formats.Writer(file, path.suffix, x.dtype, *_check.matrix("x", x, empty=True).shape)
        writer.write(x)
        writer.close()

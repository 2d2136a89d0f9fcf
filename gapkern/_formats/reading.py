"""What every reader of foreign bytes shares: errors in one line, text, and rows that come one after the other."""

import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check

# What readers of foreign bytes raise, beside what they mean to.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    SyntaxError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# Bytes are small enough for float32; their own dtypes multiply nowhere.
WIDENED = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def reason(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__


def text(path: str | os.PathLike[str], name: str) -> str:
    """`gapkern.files.read_text`."""
    try:
        # A pipe that nobody writes into is empty then, instead of waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{name}: expected a file, got {path}, which is a device")
            os.set_blocking(file.fileno(), True)
            return file.read().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8 in {path}, got {error}") from None


def opened(file: Path, name: str) -> None:
    """Checks that a regular file of that name can be read.

    Raises:
        ValueError: it does not exist, is a folder, a device or a pipe, or may not be read.
    """
    try:
        if not file.exists():
            raise ValueError(f"{name}: expected a file, got {file}, which does not exist")
        if not file.is_file():
            raise ValueError(f"{name}: expected a file, got {file}, which is none")
        with open(file, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{name}: cannot read {file}: {reason(error)}") from None


def chosen(found: dict[str, bool], key: str | None, what: str, file: Path, name: str) -> str:
    """The key that was asked for, or the only one that may be meant.

    Args:
        found: what there is, and whether it may be meant where nothing is asked for.
        what: that is expected, such as "tensor".

    Raises:
        ValueError: there is none of that key; without one, none or several.
    """
    if key is not None and key in found:
        return key
    said = ", ".join(found) or "none"
    if key is not None:
        raise ValueError(f"{name}: expected one of {said} in {file}, got [{key}]")
    meant = [k for k, fits in found.items() if fits]
    if len(meant) != 1:
        raise ValueError(f"{name}: expected one {what} in {file}, got {said}; choose one as file[key]")
    return meant[0]


@dataclass(frozen=True)
class Matrix:
    """A matrix in a file, and its rows where they are asked for.

    Attributes:
        rows, dims: its size.
        dtype: of what `read` gives.
        part: rows from a first to a last, as a tensor or an array, in any floating-point dtype or bytes.
        mapped: whether `part` shares the file's pages, so that a copy is needed to let go of them.
    """

    file: Path
    name: str
    rows: int
    dims: int
    dtype: torch.dtype
    part: Callable[[int, int], Any]
    mapped: bool = True

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows from `first` to `last` (n, D)."""
        part = self.part(first, self.rows if last is None else min(last, self.rows))
        part = torch.from_numpy(part) if isinstance(part, np.ndarray) and part.dtype.kind in "iu" else part
        if isinstance(part, Tensor) and part.dtype in WIDENED:
            part = part.float()
        return _check.tensor(self.name, part)


def matrix(
    file: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any] | torch.dtype,
    part: Callable[[int, int], Any],
    *,
    mapped: bool = True,
    widened: bool = True,
) -> Matrix:
    """A `Matrix` of that shape and dtype.

    Args:
        widened: whether bytes are read, as float32.

    Raises:
        TypeError, ValueError: it has no rows or no columns, is no matrix, or not of floating-point numbers.
    """
    try:
        known = torch.float32
        if isinstance(dtype, np.dtype):
            if not (widened and dtype in (np.uint8, np.int8)):
                known = _check.tensor(name, np.empty(0, dtype.newbyteorder("="))).dtype
        elif not (widened and dtype in WIDENED):
            known = _check.tensor(name, torch.empty(0, dtype=dtype)).dtype
        _check.matrix(name, torch.empty(shape, dtype=known, device="meta"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{reason(error)} in {file}") from None
    return Matrix(file, name, shape[0], shape[1], known, part, mapped)


class Stream:
    """Rows that can only be read one after the other: going on is free, going back begins anew.

    Args:
        start: the pieces (first row, array) from that of a row on; what it opens closes with it.
        dims, dtype: of the array that `read` gives.
    """

    def __init__(self, start: Callable[[int], Iterator[tuple[int, np.ndarray]]], dims: int, dtype: np.dtype[Any]):
        self._start, self._dims, self._dtype = start, dims, dtype
        self._pieces: Iterator[tuple[int, np.ndarray]] | None = None
        self._row, self._piece = 0, np.empty((0, dims), dtype)

    def read(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to `last`."""
        found, done = np.empty((last - first, self._dims), self._dtype), first
        if self._pieces is None or not self._row <= first <= self._row + len(self._piece):
            self._pieces = self._start(first)
            self._row, self._piece = first, self._piece[:0]
        while done < last:
            row, piece = self._row, self._piece
            if not row <= done < row + len(piece):
                following = next(self._pieces, None)
                if following is None:
                    raise EOFError(f"expected {last} rows, got {done}")
                self._row, self._piece = following
                continue
            count = min(last, row + len(piece)) - done
            found[done - first : done - first + count] = piece[done - row : done - row + count]
            done += count
        return found

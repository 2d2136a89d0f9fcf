"""Matrices as bytes: `.npy` and `.safetensors` read by mapping, written from front to back; benchmarks' files read.

Benchmarks of nearest neighbours have HDF5 files of several matrices (VIBE, ann-benchmarks), or bare ones (big-ann:
`.fbin` float32, `.u8bin` and `.i8bin` bytes) of two 32-bit numbers, rows and columns, and the values.

A file is never written through a mapping: where the disk is full, that ends the process with SIGBUS.
"""

import errno
import io
import json
import os
import stat
import tokenize
from pathlib import Path
from typing import Any, BinaryIO

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
    OverflowError,
    RecursionError,
    tokenize.TokenError,
)
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


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


def read_npy(file: Path, name: str) -> np.ndarray:
    """The array of a `.npy` file, mapped copy-on-write.

    Raises:
        ValueError: there is no such file, it is of another format, pickled, or shorter than its header says.
    """
    opened(file, name)
    try:
        # Without its magic NumPy would take a file for an archive or a pickle.
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        array.dtype.newbyteorder("=")
    except UNREADABLE as error:
        raise ValueError(f"{name}: expected a .npy file, got {file}: {reason(error)}") from None
    return array


def read_safetensors(file: Path, key: str | None, name: str) -> Tensor:
    """A tensor of a `.safetensors` file, mapped: its only one, or that of `key`.

    Raises:
        ValueError: there is no such file or key, several tensors and no key, or another format.
    """
    from safetensors import SafetensorError, safe_open

    opened(file, name)
    try:
        with safe_open(file, "pt") as found:
            keys = list(found.keys())
            chosen = keys[0] if key is None and len(keys) == 1 else key
            if chosen in keys:
                return found.get_tensor(chosen)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{name}: expected a .safetensors file, got {file}: {reason(error)}") from None
    there = ", ".join(keys) or "none"
    if key is None:
        raise ValueError(f"{name}: expected one tensor in {file}, got {there}; choose one as file[key]")
    raise ValueError(f"{name}: expected one of {there} in {file}, got [{key}]")


BARE: dict[str, np.dtype] = {".fbin": np.dtype("<f4"), ".u8bin": np.dtype("u1"), ".i8bin": np.dtype("i1")}
HDF5 = (".hdf5", ".h5")


def read_bare(file: Path, name: str) -> np.ndarray:
    """The array (N, D) of a `.fbin`, `.u8bin` or `.i8bin` file, mapped copy-on-write.

    Raises:
        ValueError: there is no such file, or it is not of the size that its first numbers say.
    """
    opened(file, name)
    dtype, size = BARE[file.suffix], file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
    rows, dims = np.frombuffer(head.ljust(8, b"\0"), "<u4").tolist()
    needed = 8 + rows * dims * dtype.itemsize
    if size < 8 or needed != size:
        raise ValueError(
            f"{name}: expected a {file.suffix} file, got {file}: its first numbers say {rows} x {dims}, "
            f"{needed} bytes, and it has {size}"
        )
    if not rows * dims:
        return np.empty((rows, dims), dtype)
    return np.memmap(file, dtype, "c", 8, (rows, dims))


def read_hdf5(file: Path, key: str | None, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Rows of a matrix of an HDF5 file: of its only one of floating-point numbers, or of `key`.

    Raises:
        ImportError: h5py is not installed.
        ValueError: there is no such file or matrix, several and no key, or another format.
    """
    h5py = _check.extra("h5py", "h5py", "tables")
    opened(file, name)
    try:
        with h5py.File(file, "r") as found:
            there = [k for k, v in found.items() if isinstance(v, h5py.Dataset) and v.ndim == 2]
            floats = [k for k in there if found[k].dtype.kind == "f"]
            chosen = floats[0] if key is None and len(floats) == 1 else key
            if chosen in there:
                return found[chosen][rows]
    except (RuntimeError, *UNREADABLE) as error:
        raise ValueError(f"{name}: expected an HDF5 file, got {file}: {reason(error)}") from None
    said = ", ".join(there) or "none"
    if key is None:
        raise ValueError(
            f"{name}: expected one matrix of floating-point numbers in {file}, got {said}; choose one as file[key]"
        )
    raise ValueError(f"{name}: expected one of {said} in {file}, got [{key}]")


def matrix(file: Path, key: str | None, name: str, rows: slice) -> Any:
    """Those rows of a file of any of these formats, not yet checked; bytes as float32.

    Raises:
        ValueError: there is none in the file, several and no key, or it is of another format.
    """
    if file.suffix in HDF5:
        return read_hdf5(file, key, name, rows)
    if file.suffix in BARE:
        if key is not None:
            raise ValueError(f"{name}: expected no [key] of a {file.suffix} file, got [{key}] of {file}")
        array = read_bare(file, name)[rows]
        return array if array.dtype.kind == "f" else np.asarray(array, np.float32)
    if file.suffix == ".safetensors":
        found = read_safetensors(file, key, name)
        return found[rows] if found.dim() else found
    if file.suffix != ".npy":
        opened(file, name)
        others = ", ".join((*BARE, *HDF5))
        raise ValueError(f"{name}: expected a .npy or .safetensors file, got {file}; of benchmarks' files {others}")
    array = read_npy(file, name)
    if key is not None:
        if not key.isdecimal() or array.ndim != 3 or int(key) >= len(array):
            raise ValueError(
                f"{name}: expected [K] to choose from an array (K, N, D), got [{key}] of shape {array.shape} in {file}"
            )
        array = array[int(key)]
    return array[rows] if array.ndim else array


class Writer:
    """Writes a matrix of known shape to a new file, rows after rows.

    All of its room on the disk is taken at once, so that a full disk is seen before the work.

    Args:
        file: open for writing, at its start.
        suffix: ".npy" or ".safetensors".
        dtype, rows, dims: of the matrix.

    Raises:
        ValueError: another suffix, or a dtype that the format has not.
        OSError: there is no room.
    """

    def __init__(self, file: BinaryIO, suffix: str, dtype: torch.dtype, rows: int, dims: int):
        self._file, self._dtype, self._shape = file, dtype, (rows, dims)
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
            raise ValueError(f"path: expected a name ending in .npy or .safetensors, got one in {suffix or 'nothing'}")
        if self._dtype == torch.bfloat16:
            raise ValueError("path: .npy has no bfloat16; expected a name ending in .safetensors")
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=self._dtype).numpy().dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": self._shape})
        return header.getvalue()

    def write(self, rows: Tensor) -> None:
        """Appends rows (n, D)."""
        self._file.write(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)


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

"""NumPy's `.npy` and `.npz`, and benchmarks' matrices: big-ann's bare ones and HDF5, read by mapping or row by row.

Benchmarks of nearest neighbours have HDF5 files of several matrices (VIBE, ann-benchmarks), or bare ones (big-ann:
`.fbin` float32, `.u8bin` and `.i8bin` bytes) of two 32-bit numbers, rows and columns, and the values.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gapkern import _check
from gapkern._formats.reading import UNREADABLE, Matrix, Stream, chosen, matrix, opened, reason

BARE: dict[str, np.dtype] = {".fbin": np.dtype("<f4"), ".u8bin": np.dtype("u1"), ".i8bin": np.dtype("i1")}
HDF5 = (".hdf5", ".h5")
PIECE = 2**22  # numbers that are decompressed at a time


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


def npy(file: Path, key: str | None, name: str) -> Matrix:
    """The matrix of a `.npy` file, or that of a number in an array (K, N, D)."""

    def whole() -> np.ndarray:
        array = read_npy(file, name)
        return array if key is None else array[int(key)]

    array = read_npy(file, name)
    if key is not None and (not key.isdecimal() or array.ndim != 3 or int(key) >= len(array)):
        raise ValueError(
            f"{name}: expected [K] to choose from an array (K, N, D), got [{key}] of shape {array.shape} in {file}"
        )
    array = whole()
    # Mapped anew for every part: one mapping would keep every page it has touched.
    return matrix(file, name, array.shape, array.dtype, lambda a, b: whole()[a:b], widened=False)


@dataclass(frozen=True)
class _Member:
    """An array in an archive: where its numbers begin within the member, and within the file where it is stored."""

    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    head: int
    place: int | None


def npz(file: Path, key: str | None, name: str) -> Matrix:
    """A matrix of a `.npz` file: its only one of floating-point numbers, or of `key`; mapped unless compressed.

    Raises:
        ValueError: there is no such file or matrix, several and no key, objects, or another format.
    """
    opened(file, name)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {m.name: m for m in (_member(archive, info) for info in archive.infolist()) if m is not None}
        fits = {k: len(m.shape) == 2 and m.dtype.kind == "f" for k, m in members.items()}
    except UNREADABLE as error:
        raise ValueError(f"{name}: expected a .npz file, got {file}: {reason(error)}") from None
    member = members[chosen(fits, key, "matrix of floating-point numbers", file, name)]
    if member.dtype.hasobject:
        raise ValueError(
            f"{name}: expected numbers in {file}[{member.name}], got pickled objects, which are not loaded"
        )
    shape, place = member.shape, member.place
    if place is None:
        found = matrix(file, name, shape, member.dtype, lambda a, b: _guarded(stream.read, a, b, file, name))
        stream = Stream(lambda first: _pieces(file, member), found.dims, member.dtype)
        return Matrix(file, name, found.rows, found.dims, found.dtype, found.part, mapped=False)
    order: Any = "F" if member.fortran else "C"

    def mapped(first: int, last: int) -> np.ndarray:
        return np.memmap(file, member.dtype, "c", place, shape, order)[first:last]

    found = matrix(file, name, shape, member.dtype, lambda a, b: _guarded(mapped, a, b, file, name))
    found.part(0, 0)
    return found


def _guarded(read: Any, first: int, last: int, file: Path, name: str) -> Any:
    try:
        return read(first, last)
    except UNREADABLE as error:
        raise ValueError(f"{name}: cannot read {file}: {reason(error)}") from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member | None:
    if not info.filename.endswith(".npy"):
        return None
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        head = stream.tell()
    place = None
    if info.compress_type == zipfile.ZIP_STORED and archive.fp is not None:
        archive.fp.seek(info.header_offset + 26)
        lengths = np.frombuffer(archive.fp.read(4), "<u2")
        place = info.header_offset + 30 + int(lengths.sum()) + head
    return _Member(info.filename.removesuffix(".npy"), shape, fortran, dtype, head, place)


def _pieces(file: Path, member: _Member) -> Iterator[tuple[int, np.ndarray]]:
    rows, dims = member.shape
    with zipfile.ZipFile(file) as archive, archive.open(f"{member.name}.npy") as stream:
        stream.seek(member.head)
        if member.fortran:
            yield 0, _numbers(stream, member.dtype, rows * dims).reshape(dims, rows).T
            return
        step = max(1, PIECE // dims)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield first, _numbers(stream, member.dtype, count * dims).reshape(count, dims)


def _numbers(stream: IO[bytes], dtype: np.dtype[Any], count: int) -> np.ndarray:
    found = stream.read(count * dtype.itemsize)
    if len(found) < count * dtype.itemsize:
        raise EOFError("it ends within its numbers")
    return np.frombuffer(found, dtype)


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


def bare(file: Path, key: str | None, name: str) -> Matrix:
    """The matrix of a bare file; bytes as float32."""
    if key is not None:
        raise ValueError(f"{name}: expected no [key] of a {file.suffix} file, got [{key}] of {file}")

    def part(first: int, last: int) -> np.ndarray:
        array = read_bare(file, name)[first:last]
        return array if array.dtype.kind == "f" else np.asarray(array, np.float32)

    array = read_bare(file, name)
    return matrix(file, name, array.shape, array.dtype, part)


def hdf5(file: Path, key: str | None, name: str) -> Matrix:
    """A matrix of an HDF5 file: its only one of floating-point numbers, or of `key`.

    Raises:
        ImportError: h5py is not installed.
        ValueError: there is no such file or matrix, several and no key, or another format.
    """
    h5py = _check.extra("h5py", "h5py", "tables")
    opened(file, name)

    def part(first: int, last: int) -> Any:
        try:
            with h5py.File(file, "r") as found:
                return found[meant][first:last]
        except (RuntimeError, *UNREADABLE) as error:
            raise ValueError(f"{name}: cannot read {file}: {reason(error)}") from None

    try:
        with h5py.File(file, "r") as found:
            everything = dict(found.items())
            found.visititems(lambda path, item: everything.update({path: item}))  # in groups, too
            matrices = {k: v for k, v in everything.items() if isinstance(v, h5py.Dataset) and v.ndim == 2}
            there = {k: v.dtype for k, v in matrices.items()}
            shapes = {k: tuple(v.shape) for k, v in matrices.items()}
    except (RuntimeError, *UNREADABLE) as error:
        raise ValueError(f"{name}: expected an HDF5 file, got {file}: {reason(error)}") from None
    fits = {k: dtype.kind == "f" for k, dtype in there.items()}
    meant = chosen(fits, key, "matrix of floating-point numbers", file, name)
    return matrix(file, name, shapes[meant], there[meant], part, mapped=False, widened=False)

"""Matrices as bytes, one reader for all: mapped where a format can be, else streamed, row by row.

`open_matrix` knows a file by its ending. `file[key]` chooses among several matrices, or a table's column.
"""

from pathlib import Path

from gapkern._formats import arrays, tables, tensors
from gapkern._formats.arrays import BARE, HDF5, read_npy
from gapkern._formats.reading import UNREADABLE, Matrix, opened, reason, text
from gapkern._formats.tensors import read_safetensors
from gapkern._formats.writing import Writer, beside, reserve

_READERS = {
    ".npy": arrays.npy,
    ".safetensors": tensors.safetensors,
    ".npz": arrays.npz,
    **dict.fromkeys(tensors.PICKLED, tensors.pickled),
    **dict.fromkeys(tables.SUFFIXES, tables.table),
    **dict.fromkeys(BARE, arrays.bare),
    **dict.fromkeys(HDF5, arrays.hdf5),
}
SUFFIXES = tuple(_READERS)


def open_matrix(file: Path, key: str | None, name: str) -> Matrix:
    """The matrix of a file of any of these formats, or that of `key` in it.

    Raises:
        ImportError: what reads the format is not installed.
        ValueError: there is none in the file, several and no key, or it is of another format.
    """
    if file.suffix not in _READERS:
        opened(file, name)
        others = ", ".join(SUFFIXES[2:])
        raise ValueError(f"{name}: expected a .npy or .safetensors file, got {file}; others that are read: {others}")
    return _READERS[file.suffix](file, key, name)


__all__ = [
    "SUFFIXES",
    "UNREADABLE",
    "Matrix",
    "Writer",
    "beside",
    "open_matrix",
    "opened",
    "read_npy",
    "read_safetensors",
    "reason",
    "reserve",
    "tables",
    "text",
]

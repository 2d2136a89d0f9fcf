"""Embeddings in every format: a writer each, and that what is read is what was written."""

import numpy as np
import pytest
import torch

from gapkern import files
from gapkern.embeddings import Embeddings

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")
from safetensors.torch import save_file  # noqa: E402

ROWS, DIMS = 23, 5
NAMES = [f"row {i}" for i in range(ROWS)]


def drawn(dtype=np.float32, rows=ROWS, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, DIMS)).astype(dtype)


def lists(matrix, kind="fixed"):
    flat = pa.array(np.ascontiguousarray(matrix).ravel())
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
    offsets = np.arange(len(matrix) + 1) * matrix.shape[1]
    if kind == "large":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def table(matrix, kind="fixed", column="embedding"):
    return pa.table({"key": NAMES[: len(matrix)], column: lists(matrix, kind), "n": list(range(len(matrix)))})


def parquet(path, matrix, kind="fixed", column="embedding", **how):
    pq.write_table(table(matrix, kind, column), path, **how)
    return path


def arrow_stream(path, matrix, options=None):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(matrix).schema, options=options) as writer:
        writer.write_table(table(matrix), max_chunksize=7)
    return path


def arrow_file(path, matrix):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table(matrix).schema) as writer:
        writer.write_table(table(matrix), max_chunksize=7)
    return path


def npz(path, matrix, save=np.savez):
    with open(path, "wb") as file:
        save(file, embedding=matrix, labels=np.arange(len(matrix)))
    return path


def npy(path, array):
    np.save(path, array)
    return path


def pt(path, value, **how):
    torch.save(value, path, **how)
    return path


def tensors(path, **named):
    save_file(named, path)
    return path


def hdf5(path, array):
    with h5py.File(path, "w") as file:
        file["train"] = array
    return path


def datasets(path, matrix):
    found = pytest.importorskip("datasets").Dataset.from_dict({"key": NAMES, "embedding": matrix.tolist()})
    found = found.cast_column("embedding", pytest.importorskip("datasets").List(found.features["embedding"].feature))
    found.save_to_disk(path, num_shards=2)
    return path


def lance(path, matrix):
    pytest.importorskip("lance").write_dataset(table(matrix), str(path), max_rows_per_file=9)
    return path


lz4 = pa.ipc.IpcWriteOptions(compression="lz4")
WAYS = {
    "parquet, lists": lambda d, x: parquet(d / "x.parquet", x, "list"),
    "parquet, fixed size": lambda d, x: parquet(d / "x.parquet", x, "fixed", row_group_size=6),
    "parquet, large lists": lambda d, x: parquet(d / "x.parquet", x, "large", row_group_size=1),
    "arrow stream": lambda d, x: arrow_stream(d / "x.arrow", x),
    "arrow stream, lz4": lambda d, x: arrow_stream(d / "x.arrow", x, lz4),
    "arrow file": lambda d, x: arrow_file(d / "x.feather", x),
    "npz": lambda d, x: npz(d / "x.npz", x),
    "npz, compressed": lambda d, x: npz(d / "x.npz", x, np.savez_compressed),
    "npz, compressed, Fortran": lambda d, x: npz(d / "x.npz", np.asfortranarray(x), np.savez_compressed),
    "npz, Fortran": lambda d, x: npz(d / "x.npz", np.asfortranarray(x)),
    "npy, Fortran": lambda d, x: npy(d / "x.npy", np.asfortranarray(x)),
    "npy, big-endian": lambda d, x: npy(d / "x.npy", x.astype(x.dtype.newbyteorder(">"))),
    "npz, big-endian": lambda d, x: npz(d / "x.npz", x.astype(x.dtype.newbyteorder(">"))),
    "hdf5, big-endian": lambda d, x: hdf5(d / "x.h5", x.astype(x.dtype.newbyteorder(">"))),
    "pt": lambda d, x: pt(d / "x.pt", torch.from_numpy(x)),
    "pt, transposed": lambda d, x: pt(d / "x.pt", torch.from_numpy(x.T.copy()).T),
    "pt, before 1.6": lambda d, x: pt(d / "x.pt", torch.from_numpy(x), _use_new_zipfile_serialization=False),
    "pt, state": lambda d, x: pt(d / "x.pth", {"w": torch.nn.Parameter(torch.from_numpy(x)), "b": torch.zeros(3)}),
    "datasets": lambda d, x: datasets(d / "saved", x),
    "lance": lambda d, x: lance(d / "x.lance", x),
}


def same(path, wanted):
    """Whole, by parts of any size, from any row on, and by size alone."""
    wanted = torch.from_numpy(wanted) if isinstance(wanted, np.ndarray) else wanted
    whole = files.load_embeddings(path)
    assert whole.dtype == wanted.dtype
    assert torch.equal(whole, wanted)
    assert files.size(path) == tuple(wanted.shape)
    for rows in (1, 4, 100):
        assert torch.equal(torch.cat(list(files.chunks(path, rows))), wanted)
    there = Embeddings(path)
    assert (len(there), there.dims, there.dtype) == (*wanted.shape, wanted.dtype)
    for first, last in ((20, 23), (3, 11), (4, 5), (0, 23), (22, 22)):
        assert torch.equal(there[first:last], wanted[first:last])

"""Every format of embeddings, as its own library writes it: read whole, in parts, from any row, and refused."""

import zipfile

import numpy as np
import pytest
import torch

from gapkern import files
from gapkern.embeddings import provenance
from tests.written import (
    DIMS,
    ROWS,
    WAYS,
    arrow_stream,
    drawn,
    hdf5,
    lists,
    lz4,
    npy,
    npz,
    parquet,
    pt,
    same,
    tensors,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_keep_embeddings(way, tmp_path):
    for dtype in (np.float32,) if way in ("datasets", "lance") else (np.float32, np.float64, np.float16):
        if way == "parquet, large lists" and dtype == np.float16:
            continue
        matrix = drawn(dtype)
        path = WAYS[way](tmp_path, matrix)
        if way == "datasets":
            matrix = matrix.astype(np.float64)
        same(path, matrix)


@pytest.mark.parametrize(
    ("dtype", "read"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, torch.float32),
    ],
)
def test_small_floats_in_safetensors_and_pt(dtype, read, tmp_path):
    x = torch.from_numpy(drawn()).to(dtype)
    same(tensors(tmp_path / "x.safetensors", x=x), x.to(read))
    same(pt(tmp_path / "x.pt", x), x.to(read))


def test_bytes_in_columns_and_archives_are_float32(tmp_path):
    matrix = np.random.default_rng(0).integers(-120, 120, (ROWS, DIMS)).astype(np.int8)
    same(f"{parquet(tmp_path / 'x.parquet', matrix)}[embedding]", matrix.astype(np.float32))
    same(f"{npz(tmp_path / 'x.npz', matrix)}[embedding]", matrix.astype(np.float32))


def test_a_mapped_file_is_not_read_for_a_part(tmp_path, monkeypatch):
    """A big-endian file used to be converted whole for its size, and for each part."""
    path = npy(tmp_path / "x.npy", drawn(">f4"))
    converted = []
    real = np.ndarray.astype

    class Counting(np.memmap):
        def astype(self, *rest, **more):
            converted.append(len(self))
            return real(self, *rest, **more)

    opened = np.load
    monkeypatch.setattr(np, "load", lambda *a, **k: opened(*a, **k).view(Counting))
    assert files.size(path) == (ROWS, DIMS)
    assert sum(len(part) for part in files.chunks(path, 4)) == ROWS
    assert max(converted) == 4


@pytest.mark.parametrize("how", ["parquet", "arrow", "npz"])
def test_going_on_reads_no_row_twice(how, tmp_path, monkeypatch):
    from gapkern._formats import arrays, tables

    monkeypatch.setattr(tables, "BATCH", 4 * DIMS)
    monkeypatch.setattr(arrays, "PIECE", 4 * DIMS)
    seen = []
    kept = tables._values
    monkeypatch.setattr(tables, "_values", lambda array, *rest: seen.append(len(array)) or kept(array, *rest))
    numbers = arrays._numbers
    monkeypatch.setattr(arrays, "_numbers", lambda s, d, count: seen.append(count // DIMS) or numbers(s, d, count))
    matrix = drawn()
    path = {
        "parquet": lambda: parquet(tmp_path / "x.parquet", matrix),
        "arrow": lambda: arrow_stream(tmp_path / "x.arrow", matrix, lz4),
        "npz": lambda: npz(tmp_path / "x.npz", matrix, np.savez_compressed),
    }[how]()
    found = files.open_matrix(path)
    seen.clear()
    parts = [found.read(first, min(first + 3, ROWS)) for first in range(0, ROWS, 3)]
    assert np.array_equal(torch.cat(parts).numpy(), matrix)
    assert sum(seen) == ROWS
    assert max(seen) <= 7
    assert np.array_equal(found.read(2, 4).numpy(), matrix[2:4])


def test_which_column_is_meant(tmp_path):
    a, b = drawn(), drawn(seed=1)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"title": lists(a), "embedding": lists(b)}), path)
    assert np.array_equal(files.load_embeddings(path), b)
    assert np.array_equal(files.load_embeddings(f"{path}[title]"), a)
    assert provenance.made_from(f"{path}[title]")["key"] == "title"
    pq.write_table(pa.table({"image": lists(a), "text": lists(b), "n": [0] * ROWS}), path)
    with pytest.raises(
        ValueError, match=r"^path: expected one column .*got image, text; choose one as file\[column\]$"
    ):
        files.load_embeddings(path)


def nulls(values, kind=None):
    return pa.table({"x": pa.array(values, kind)})


REFUSED = {
    "wrong column": ("x.parquet[y]", lambda: nulls([[1.0]]), r"expected one of x in .*, got \[y\]"),
    "no column": ("x.parquet", lambda: nulls([1.0]), "expected one column of lists of floating-point.*none among x"),
    "numbers alone": ("x.parquet[x]", lambda: nulls([1.0]), "expected lists of floating-point numbers .*, got double"),
    "texts": ("x.parquet[x]", lambda: nulls([["a"]]), "expected lists of .*, got list<"),
    "lists of lists": ("x.parquet[x]", lambda: nulls([[[1.0]]]), "expected lists of floating-point numbers"),
    "ragged": (
        "x.parquet",
        lambda: nulls([[1.0, 2.0]] * 4 + [[1.0]]),
        "expected lists of one length.*, got 2 numbers in row 0 and 1 in row 4",
    ),
    "no list": ("x.parquet", lambda: nulls([[1.0]] * 3 + [None]), "expected a list in each row .*, got null in row 3"),
    "no list, fixed": (
        "x.parquet",
        lambda: nulls([[1.0]] * 3 + [None], pa.list_(pa.float32(), 1)),
        "expected a list in each row .*, got null in row 3",
    ),
    "no number": ("x.parquet", lambda: nulls([[1.0, 2.0], [1.0, None]]), "expected numbers .*, got null in row 1"),
    "empty lists": ("x.parquet", lambda: nulls([[], []], pa.list_(pa.float32())), "expected at least one column"),
    "no rows": ("x.parquet", lambda: nulls([], pa.list_(pa.float32())), "expected at least one row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_table_may_not_hold_is_one_line(case, tmp_path):
    name, made, message = REFUSED[case]
    pq.write_table(made(), tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=f"^path: {message}") as error:
        files.load_embeddings(tmp_path / name)
    assert "\n" not in str(error.value)


def test_nan_is_refused_by_its_row_in_every_format(tmp_path):
    matrix = drawn()
    matrix[17, 2] = np.nan
    for way in ("parquet, fixed size", "arrow stream", "npz, compressed", "pt"):
        path = WAYS[way](tmp_path, matrix)
        with pytest.raises(ValueError, match="path: expected finite values, got NaN or infinity, first in row 17 of"):
            list(files.chunks(path, 4, finite=True))


class Mine:
    pass


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Mine(), "expected tensors alone in .*objects, which are not loaded"),
        ({"x": torch.zeros(2, 2), "f": Mine()}, "expected tensors alone"),
        ({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, r"expected one matrix.*got a, b; choose one as file\[key\]"),
        ({"a": 1}, "expected a tensor, or a dict of them, in .*, got dict"),
        (torch.ones(2, 2, dtype=torch.int64), "expected float32, float16, bfloat16 or float64, got torch.int64"),
        (torch.ones(2), r"expected shape \(N, D\)"),
        (torch.eye(3).to_sparse(), "expected a dense tensor"),
    ],
)
def test_what_torch_saved_is_tensors_or_one_line(value, message, tmp_path):
    with pytest.raises(ValueError, match=f"^path: {message}") as error:
        files.load_embeddings(pt(tmp_path / "x.pt", value))
    assert "\n" not in str(error.value)


def test_archives_hold_one_matrix_or_are_asked(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=drawn(), b=drawn(seed=1))
    with pytest.raises(ValueError, match="got a, b; choose one"):
        files.load_embeddings(path)
    assert np.array_equal(files.load_embeddings(f"{path}[b]"), drawn(seed=1))
    np.savez(path, a=np.array([[Mine()]]))
    with pytest.raises(ValueError, match="pickled objects, which are not loaded"):
        files.load_embeddings(f"{path}[a]")


def test_matrices_in_groups_of_hdf5_are_found(tmp_path):
    path = hdf5(tmp_path / "x.h5", np.zeros((ROWS, 2), np.int32))
    with h5py.File(path, "a") as file:
        file["group/deep/x"] = drawn()
    assert np.array_equal(files.load_embeddings(path), drawn())
    assert np.array_equal(files.load_embeddings(f"{path}[group/deep/x]"), drawn())
    with h5py.File(path, "a") as file:
        file["y"] = drawn(seed=1)
    with pytest.raises(ValueError, match="got train, y, group/deep/x; choose one"):
        files.load_embeddings(path)
    assert np.array_equal(files.load_embeddings(f"{path}[y]"), drawn(seed=1))


def refusal(path):
    try:
        files.load_embeddings(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("way", ["parquet, lists", "arrow stream", "arrow file", "npz", "npz, compressed", "pt"])
def test_damaged_files_are_one_line(way, tmp_path):
    path = WAYS[way](tmp_path, drawn())
    data = path.read_bytes()
    refused = 0
    for damaged in (b"", b"PK", data[: len(data) // 2], data[:-9], bytes(60) + data[60:]):
        path.write_bytes(damaged)
        said = refusal(path)
        refused += said is not None
        assert said is None or (said.startswith("path: ") and "\n" not in said)
    assert refused >= 4
    path.unlink()
    with pytest.raises(ValueError, match="which does not exist"):
        files.load_embeddings(path)


def test_an_archive_that_lies_about_its_rows(tmp_path):
    path = npz(tmp_path / "x.npz", drawn(), np.savez_compressed)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("embedding.npy")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding.npy", data.replace(b"(23, 5), ", b"(99, 5), "))
    with pytest.raises(ValueError, match=r"path: cannot read .*: it ends within its numbers"):
        files.load_embeddings(path)

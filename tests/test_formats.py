"""Every format of embeddings, as its own library writes it: read whole, in parts, from any row, and refused."""

import json
import zipfile

import numpy as np
import pytest
import torch

from gapkern import embeddings, files, layout
from gapkern.cli import main
from gapkern.embeddings import Embeddings, provenance, shifted, verification
from gapkern.embeddings.labels import Side, load

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


def test_folders_of_tables(tmp_path):
    matrix = drawn()
    folder = tmp_path / "data"
    folder.mkdir()
    for i, low in ((2, 0), (10, 12)):
        pq.write_table(table(matrix).slice(low, 12), folder / f"train-{i}.parquet")
    (folder / "README.md").write_text("x")
    same(folder, matrix)
    same(f"{folder}[embedding]", matrix)
    assert Embeddings(folder).keys() == NAMES
    assert provenance.described(folder)["order"] == embeddings.folder.keys.order(NAMES)
    pq.write_table(table(matrix), folder / "test-0.parquet")
    with pytest.raises(ValueError, match=r"expected the shards of one matrix in .*test-\*.parquet \(1\), train-"):
        files.load_embeddings(folder)
    np.save(folder / "img_emb_0.npy", matrix[:3])  # as clip-retrieval's, with tables beside
    assert files.size(folder) == (3, DIMS)


def test_a_folder_that_datasets_saved(tmp_path):
    module = pytest.importorskip("datasets")
    matrix = drawn()
    saved = datasets(tmp_path / "one", matrix)
    (saved / "cache-0.arrow").write_bytes(b"not one of the list")
    assert Embeddings(saved).keys() == NAMES
    same(saved, matrix.astype(np.float64))
    split = module.load_from_disk(saved)
    module.DatasetDict({"train": split, "test": split.select(range(3))}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"expected one split in .*, got train, test: name one, such as .*/two/train"):
        files.load_embeddings(tmp_path / "two")
    assert files.size(tmp_path / "two" / "test") == (3, DIMS)
    module.DatasetDict({"train": split}).save_to_disk(tmp_path / "single")
    with layout.notes() as said:
        same(tmp_path / "single", matrix.astype(np.float64))
    assert said == [f"path: {tmp_path / 'single' / 'train'}"]
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(ValueError, match="expected the names of Arrow's files"):
        files.load_embeddings(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parquet_is_written(dtype, tmp_path):
    x = torch.from_numpy(drawn()).to(dtype)
    path = files.save_embeddings(tmp_path / "x.parquet", x)
    same(path, x)
    read = pq.read_table(path)
    assert read.schema.field("embedding").type.list_size == DIMS
    assert np.array_equal(np.stack(read["embedding"].to_numpy()), x.numpy())
    with pytest.raises(ValueError, match=r"path: \.parquet has no bfloat16"):
        files.save_embeddings(path, x.bfloat16())
    embeddings.write_folder(tmp_path / "out", "img_emb", [x[:9], x[9:]], suffix=".parquet", names=NAMES)
    assert torch.equal(Embeddings(tmp_path / "out")[:], x)
    assert verification.verify(tmp_path / "out")["img_emb"]["rows"] == ROWS


def test_labels_are_read_from_columns_and_joined_by_key(tmp_path):
    matrix = drawn()
    path = parquet(tmp_path / "x.parquet", matrix)
    order = np.random.default_rng(3).permutation(ROWS)
    pq.write_table(
        pa.table({"key": [NAMES[i] for i in order], "label": [int(i) % 4 for i in order]}), tmp_path / "l.parquet"
    )
    wanted = torch.arange(ROWS) % 4
    rows = Side(str(path), ROWS, "images")
    assert torch.equal(load(str(tmp_path / "l.parquet"), rows, 4, "classes"), wanted)
    assert torch.equal(load(f"{tmp_path / 'l.parquet'}[label]", rows, 4, "classes"), wanted)
    stored = Side(str(npy(tmp_path / "x.npy", matrix)), ROWS, "images")
    assert torch.equal(load(f"{path}[n]", stored, ROWS, "classes"), torch.arange(ROWS))
    (tmp_path / "several").mkdir()
    for i, low in enumerate((0, 9)):
        pq.write_table(
            pq.read_table(tmp_path / "l.parquet").slice(low, 9 if i == 0 else 99), tmp_path / f"several/{i}.parquet"
        )
    for text in (f"{tmp_path}/several", f"{tmp_path}/several[label]"):
        assert torch.equal(load(text, rows, 4, "classes"), wanted)
    with pytest.raises(ValueError, match="labels: expected a column label or labels"):
        load(str(path), rows, 4, "classes")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A table of documents, with captions, images' and texts' embeddings; and the same as .npy."""
    folder = tmp_path_factory.mktemp("both")
    images, texts = drawn(rows=40) + 2, drawn(rows=40, seed=1)
    ids = [f"{i:03d}.jpg" for i in range(40)]
    columns = {"id": ids, "image": lists(images), "text": lists(texts, "list"), "caption": [f"c {i}" for i in ids]}
    whole = pa.table(columns)
    (folder / "data").mkdir()
    for i in range(2):
        pq.write_table(whole.slice(20 * i, 20), folder / "data" / f"part-{i}.parquet")
    for name, matrix in (("images", images), ("texts", texts)):
        np.save(folder / f"{name}.npy", matrix)
    return folder, images, texts


def told(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.faiss
def test_every_verb_takes_a_folder_of_tables(both, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    folder, _, _ = both
    monkeypatch.chdir(folder)
    x, t = "data[image]", "data[text]"

    def alike(verb, *rest):
        """The same figures from tables and from .npy; what they were made from is said."""
        mine = told(capsys, *(each for each in verb), x, t, *rest)
        theirs = told(capsys, *(each for each in verb), "images.npy", "texts.npy", *rest)
        inputs = mine.pop("inputs", None)
        theirs.pop("inputs", None)
        for row in (*mine.get("rows", []), *theirs.get("rows", [])):
            row.pop("seconds", None)
        assert mine == theirs
        return inputs

    inputs = alike(["gap"])
    assert [len(inputs[side]["sha256"]) for side in ("images", "texts")] == [2, 2]
    assert (inputs["images"]["key"], inputs["texts"]["key"]) == ("image", "text")
    assert inputs["images"]["order"] == inputs["texts"]["order"]
    alike(["robust"], "--gaussian", "0.1", "--labels", "paired")
    alike(["shift", "compare"], "--labels", "paired", "--components", "exact")
    for verb in ("shift", "project"):
        fits = [
            told(capsys, verb, "fit", *sides, "--out", tmp_path / f"{verb}.safetensors")
            for sides in ((x, t), ("images.npy", "texts.npy"))
        ]
        assert fits[0]["components"] == fits[1]["components"]
    plan = told(capsys, "index", x, "--out", tmp_path / "index")["plan"]
    assert plan["order"] == inputs["images"]["order"]
    found = told(capsys, "search", tmp_path / "index", t, "--k", 3)
    assert told(capsys, "index", "images.npy", "--out", tmp_path / "other")["count"] == 40
    assert found["ids"] == told(capsys, "search", tmp_path / "other", "texts.npy", "--k", 3)["ids"]
    told(capsys, "eval", "--task", "zeroshot_retrieval", "--images", x, "--texts", t, "--labels", "paired")
    repaired = told(capsys, "index", "repair", tmp_path / "other", "--queries", t, "--embeddings", x)
    assert repaired["inputs"]["embeddings"]["key"] == "image"


def test_moved_tables_keep_their_other_columns(both, tmp_path, capsys, monkeypatch):
    folder, _, _ = both
    monkeypatch.chdir(folder)
    assert main(["shift", "fit", "data[image]", "data[text]", "--out", str(tmp_path / "s.safetensors")]) == 0
    for source, out, column in (("data[text]", tmp_path / "moved", "text"), ("data[image]", tmp_path / "m2", "image")):
        apply = ["shift", "apply", tmp_path / "s.safetensors", source, "--out", out]
        first = told(capsys, *apply, "--side", "gallery")
        assert first["rows"] == 40
        before, after = pq.read_table("data"), pq.read_table(sorted(out.glob("*.parquet")))
        assert after.schema.types == before.schema.types
        assert after.drop_columns(column).equals(before.drop_columns(column))
        np.save(tmp_path / "plain.npy", files.load_embeddings(source).numpy())
        told(capsys, "shift", "apply", tmp_path / "s.safetensors", tmp_path / "plain.npy", "--out", tmp_path / "p.npy")
        assert np.array_equal(files.load_embeddings(f"{out}[{column}]"), np.load(tmp_path / "p.npy"))
        assert told(capsys, *apply, "--side", "gallery") == first  # all were there already
    one = tmp_path / "one.parquet"
    told(capsys, "shift", "apply", tmp_path / "s.safetensors", "data/part-0.parquet[text]", "--out", one)
    assert pq.read_table(one)["caption"].to_pylist() == [f"c {i:03d}.jpg" for i in range(20)]
    assert provenance.described(f"{one}[text]")["transforms"][0]["alpha"] == 1.0
    with pytest.raises(ValueError, match="expected embeddings that no shift has moved"):
        shifted.check_unmoved(f"{one}[text]")


def test_lance_is_hashed_and_moved(tmp_path, capsys):
    path = lance(tmp_path / "x.lance", drawn())
    assert Embeddings(path).keys() == NAMES
    hashed = provenance.made_from(path)["sha256"]
    assert hashed == provenance.made_from(f"{path}/")["sha256"]
    np.save(tmp_path / "q.npy", drawn(seed=5))
    assert main(["shift", "fit", str(path), str(tmp_path / "q.npy"), "--out", str(tmp_path / "s.safetensors")]) == 0
    moved = tmp_path / "moved.parquet"
    told(capsys, "shift", "apply", tmp_path / "s.safetensors", path, "--out", moved)
    assert pq.read_table(moved)["n"].to_pylist() == list(range(ROWS))

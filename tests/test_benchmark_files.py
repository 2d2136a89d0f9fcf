"""Files of nearest-neighbour benchmarks: big-ann's bare matrices and the HDF5 files of VIBE and ann-benchmarks."""

import struct

import numpy as np
import pytest
import torch

from gapkern import files
from gapkern.cli import main

DTYPES = {".fbin": np.float32, ".u8bin": np.uint8, ".i8bin": np.int8}


def bare(path, matrix):
    """As big-ann's datasets.py describes them: rows, columns, values."""
    path.write_bytes(struct.pack("<II", *matrix.shape) + matrix.tobytes())
    return path


def drawn(suffix, rows=11, dims=5):
    return np.random.default_rng(0).integers(0, 120, (rows, dims)).astype(DTYPES[suffix])


@pytest.mark.parametrize("suffix", DTYPES)
def test_bare_matrices(suffix, tmp_path):
    matrix = drawn(suffix)
    path = bare(tmp_path / f"base.10M{suffix}", matrix)
    loaded = files.load_embeddings(path)
    assert loaded.dtype == torch.float32
    assert np.array_equal(loaded.numpy(), matrix.astype(np.float32))
    assert files.size(path) == (11, 5)
    parts = list(files.chunks(path, 4))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert torch.equal(torch.cat(parts), loaded)


def test_only_a_bare_file_s_wanted_rows_are_converted(tmp_path, monkeypatch):
    path = bare(tmp_path / "x.u8bin", drawn(".u8bin", 100))
    converted = []
    real = np.asarray
    monkeypatch.setattr(np, "asarray", lambda x, *rest: converted.append(len(x)) or real(x, *rest))
    assert files.size(path) == (100, 5)
    assert sum(len(part) for part in files.chunks(path, 30)) == 100
    assert max(converted) <= 30


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("damage", ["empty", "short", "long", "head"])
def test_a_bare_file_of_another_size_is_one_line(suffix, damage, tmp_path):
    path = bare(tmp_path / f"x{suffix}", drawn(suffix))
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"0", "head": data[:5]}[damage])
    with pytest.raises(ValueError, match=f"path: expected a {suffix} file, got .*: its first numbers say"):
        files.load_embeddings(path)
    for head in ((0, 5), (11, 0)):
        path.write_bytes(struct.pack("<II", *head))
        with pytest.raises(ValueError, match="path: expected"):
            files.load_embeddings(path)
    with pytest.raises(ValueError, match="path: expected no"):
        files.load_embeddings(f"{path}[a]")


@pytest.fixture
def vibe(tmp_path):
    """VIBE's layout: train, test, neighbors, distances, avg_distances."""
    h5py = pytest.importorskip("h5py")
    generator = np.random.default_rng(1)
    train, test = (generator.standard_normal((n, 6)).astype(np.float32) for n in (20, 7))
    with h5py.File(tmp_path / "imagenet-align-640-normalized.hdf5", "w") as file:
        file.attrs["distance"], file.attrs["dimension"], file.attrs["point_type"] = "normalized", 6, "float"
        file["train"], file["test"] = train, test
        file["neighbors"] = (-test @ train.T).argsort(1)[:, :5].astype(np.int32)
        file["distances"] = np.sort(-test @ train.T, 1)[:, :5]
        file["avg_distances"] = np.zeros(7, np.float32)
    return tmp_path / "imagenet-align-640-normalized.hdf5", train, test


def test_matrices_in_hdf5(vibe):
    path, train, test = vibe
    for key, matrix in (("train", train), ("test", test)):
        assert np.array_equal(files.load_embeddings(f"{path}[{key}]").numpy(), matrix)
        assert files.size(f"{path}[{key}]") == matrix.shape
        assert np.array_equal(torch.cat(list(files.chunks(f"{path}[{key}]", 3))).numpy(), matrix)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "expected one matrix of floating-point numbers in .*, got distances, neighbors, test, train; choose one"),
        ("[nothing]", "expected one of distances, neighbors, test, train in .*, got .nothing."),
        ("[avg_distances]", "got .avg_distances."),
        ("[neighbors]", "path: expected float16, float32 or float64, got an array of int32"),
    ],
)
def test_what_an_hdf5_file_has_not_is_one_line(vibe, key, message):
    with pytest.raises(ValueError, match=message) as error:
        files.load_embeddings(f"{vibe[0]}{key}")
    assert "\n" not in str(error.value)


def test_damaged_hdf5_is_one_line(vibe):
    path = vibe[0]
    data = path.read_bytes()
    for damaged in (b"", b"PK", data[: len(data) // 2], bytes(100) + data[100:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="path: expected an HDF5 file, got"):
            files.load_embeddings(f"{path}[train]")


@pytest.mark.faiss
def test_verbs_take_them(vibe, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    path, train, test = vibe
    bare(tmp_path / "queries.fbin", test)
    assert main(["project", "fit", f"{path.name}[train]", "queries.fbin", "--out", "p.safetensors"]) == 0
    assert main(["index", f"{path.name}[train]", "--metric", "ip", "--out", "index"]) == 0
    capsys.readouterr()
    assert main(["search", "index", "queries.fbin", "--k", "5", "--out", "found.npz"]) == 0
    assert np.array_equal(np.load("found.npz")["ids"], (-test @ train.T).argsort(1)[:, :5])
    assert main(["gap", f"{path.name}[test]", "queries.fbin"]) == 0

"""Reading embeddings and writing whole files or none."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gapkern import files
from gapkern.testing import hears_interrupts
from tests.warm import peak_memory


def test_npy_and_safetensors_round_trip(tmp_path):
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.randn(5, 3).to(dtype)
        for name in ("x.npy", "x.safetensors"):
            loaded = files.load_embeddings(files.save_embeddings(tmp_path / name, x))
            assert loaded.dtype == dtype
            assert torch.equal(loaded, x)
    x = torch.randn(5, 3).bfloat16()
    assert torch.equal(files.load_embeddings(files.save_embeddings(tmp_path / "b.safetensors", x)), x)
    with pytest.raises(ValueError, match=r"path: \.npy has no bfloat16; expected a name ending in \.safetensors"):
        files.save_embeddings(tmp_path / "b.npy", x)


def test_one_matrix_of_a_stack(tmp_path):
    stack = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    np.save(tmp_path / "pair.npy", stack)
    save_file(
        {"images": torch.from_numpy(stack[0]), "texts": torch.from_numpy(stack[1])}, tmp_path / "pair.safetensors"
    )
    for name in ("pair.npy[1]", "pair.safetensors[texts]"):
        assert torch.equal(files.load_embeddings(f"{tmp_path}/{name}"), torch.from_numpy(stack[1]))


def _counter(file, key):
    """A number of this process in /proc."""
    with open(f"/proc/self/{file}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_files_are_mapped_not_read(tmp_path):
    np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.float16, shape=(2**22, 256))  # 2 GiB, sparse
    read, resident = _counter("io", "rchar"), _counter("status", "VmRSS")
    x = files.load_embeddings(tmp_path / "big.npy")
    assert x.shape == (2**22, 256)
    assert _counter("io", "rchar") - read < 2**20
    assert _counter("status", "VmRSS") - resident < 2**15, "32 MiB of pages"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shift_is_fitted_to_a_file_without_reading_it_whole(tmp_path):
    generator = np.random.default_rng(0)
    big = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.float16, shape=(2**20, 256))
    rows = generator.standard_normal((2**16, 256), dtype=np.float32)
    for first in range(0, 2**20, 2**16):
        big[first : first + 2**16] = rows
    big.flush()
    setup = f"""
from gapkern import MeanShift, files
shift = MeanShift(n_components=8)
shift.partial_fit(queries=next(files.chunks({str(tmp_path / "big.npy")!r}, 4096)) + 1)
"""
    code = f"""
for rows in files.chunks({str(tmp_path / "big.npy")!r}):
    shift.partial_fit(rows)
assert 14 < float(shift.gap_vector_.norm()) < 18
"""
    assert peak_memory(code, setup=setup) < 400, "the file has 512 MiB, the same in float64 2 GiB"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "path: expected a file, got .*, which does not exist"),
        (lambda p: p.mkdir(), r"path: expected \.npy or \.safetensors files in the folder .*, got neither"),
        (lambda p: p.write_bytes(b"no array"), r"path: expected a \.npy file, got"),
        (lambda p: p.write_bytes(b""), r"path: expected a \.npy file, got"),
        (lambda p: np.save(p, np.array([{"a": 1}], dtype=object)), r"path: expected a \.npy file, got"),
        (lambda p: np.save(p, np.zeros((2, 3), dtype=np.int64)), "path: expected float16, float32 or float64"),
        (lambda p: np.save(p, np.zeros(3, dtype=np.float32)), r"path: expected shape \(N, D\), got \(3,\)"),
        (lambda p: np.save(p, np.zeros((0, 3), dtype=np.float32)), "path: expected at least one row"),
        (
            lambda p: np.save(p, np.zeros((2, 2, 3), dtype=np.float32)),
            r"path: expected shape \(N, D\), got \(2, 2, 3\)",
        ),
    ],
)
def test_what_is_no_embedding_file_is_named(tmp_path, make, message):
    path = tmp_path / "x.npy"
    make(path)
    with pytest.raises(ValueError, match=message):
        files.load_embeddings(path)


def test_truncated_and_foreign_files_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 30), dtype=np.float32))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"path: expected a \.npy file, got .*cut\.npy"):
        files.load_embeddings(tmp_path / "cut.npy")
    (tmp_path / "x.safetensors").write_text("{}")
    with pytest.raises(ValueError, match=r"path: expected a \.safetensors file, got"):
        files.load_embeddings(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"path: expected one tensor in .*, got a, b; choose one as file\[key\]"):
        files.load_embeddings(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="path: expected one of a, b"):
        files.load_embeddings(f"{tmp_path}/two.safetensors[c]")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"path: expected a \.npy or \.safetensors file, got"):
        files.load_embeddings(tmp_path / "x.csv")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        files.write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


_KILLED = """
import sys, time
from gapkern import files
def slow(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(3600)
files.write(sys.argv[1], slow)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_write_leaves_the_old_file(tmp_path, sent):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=hears_interrupts,
    ) as run:
        assert run.stdout.readline() == b"writing\n"
        run.send_signal(sent)
    assert path.read_text() == "old"


def test_json_is_strict(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [np.float32(1.5), torch.tensor(2)], "c": tmp_path})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, 2], "c": str(tmp_path)}


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: cannot write to the folder .*: Not a directory"):
        files.folder(tmp_path / "file" / "inner")
    with pytest.raises(ValueError, match="path: cannot write"):
        files.write(tmp_path / "absent" / "x", lambda p: p.write_text(""))
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match=r"out: cannot write to the folder .*: Permission denied"):
            files.folder(tmp_path / "new")


@pytest.fixture
def sharded(tmp_path):
    """A folder of shards in natural order, and the whole."""
    x = torch.randn(50, 6)
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for n, part in enumerate(x.split(5)):
        files.save_embeddings(folder / f"img_emb_{n}.npy", part)
    (folder / "notes.txt").write_text("not embeddings")
    return folder, x


def test_a_folder_of_shards_is_one_matrix_in_natural_order(sharded):
    folder, x = sharded
    assert files.size(folder) == (50, 6)
    assert torch.equal(files.load_embeddings(folder), x)
    assert torch.equal(torch.cat(list(files.chunks(folder, 3))), x)


def test_shards_that_do_not_belong_together(sharded):
    folder, x = sharded
    save_file({"x": x}, folder / "more.safetensors")
    with pytest.raises(ValueError, match=r"files in the folder .*, got \.npy and \.safetensors"):
        files.load_embeddings(folder)
    (folder / "more.safetensors").unlink()
    files.save_embeddings(folder / "img_emb_10.npy", x.half())
    with pytest.raises(ValueError, match=r"path: expected torch\.float32 as in .*_0\.npy, got .*float16 in .*_10\."):
        files.load_embeddings(folder)
    files.save_embeddings(folder / "img_emb_10.npy", x[:, :4].contiguous())
    with pytest.raises(ValueError, match=r"path: expected D = 6 as in the shards before, got \(50, 4\) in .*_10\.npy"):
        files.load_embeddings(folder)


def test_a_folder_larger_than_memory_is_refused_before_it_is_read(sharded, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"path: expected embeddings that fit into 0\.0 GiB of free memory, got"):
        files.load_embeddings(sharded[0])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_conversion_that_fails_leaves_the_old_file(tmp_path, suffix):
    source, target = files.save_embeddings(tmp_path / "x.npy", torch.ones(9, 2)), tmp_path / f"y{suffix}"
    assert list(files.convert(source, target, lambda x: 2 * x)) == [9]
    before = target.read_bytes()

    def broken(x):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        list(files.convert(source, target, broken))
    assert target.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2

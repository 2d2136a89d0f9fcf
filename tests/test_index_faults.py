"""`gapkern index` and `search` where something goes wrong: full disks, two runs, other bytes, odd options."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from gapkern import MeanShift, cli, files
from gapkern.retrieval import GapIndex, disk, store
from tests import warm
from tests.scenes import searched, strict, truth

pytestmark = pytest.mark.faiss


@pytest.fixture
def gallery(tmp_path):
    queries, rows = searched("spread")
    np.save(tmp_path / "x.npy", rows.numpy())
    np.save(tmp_path / "q.npy", queries[:6].numpy())
    return tmp_path


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("factory", ["IVF8,Flat", "Flat"])
def test_a_full_disk_at_every_size_is_a_line_and_the_next_run_ends(factory, gallery, monkeypatch):
    """A file may have only so many bytes, as a disk that is full: flushed, or met by the last close alone."""
    disk.build(gallery / "x.npy", gallery / "straight", factory, block=250)
    sizes = sorted({p.stat().st_size for p in (gallery / "straight").iterdir()})
    out, stopped = gallery / "index", 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in sorted({*(s - 1 for s in sizes), *range(500, sizes[-1], sizes[-1] // 12)}):
        shutil.rmtree(out, ignore_errors=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        said = ""
        try:
            disk.build(gallery / "x.npy", out, factory, block=250)
        except ValueError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        stopped += bool(said)
        assert not said or (said.startswith(f"path: cannot write {out}/") and "File too large" in said)
        left = [p for p in (*out.glob("*"), *out.glob("unfinished/*")) if ".tmp" in p.name]
        assert not left, "nothing half written"
        disk.build(gallery / "x.npy", out, factory, block=250)
        assert contents(out) == contents(gallery / "straight")
    assert stopped >= 5


def test_what_only_the_last_flush_meets_is_met(gallery, monkeypatch):
    """FAISS's own writer reports no error of its close."""
    index = GapIndex().add(torch.eye(4))
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left on device"):
        store.write_index(index.faiss_index, full)

    def write(index, path):
        with open(full, "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(store, "write_index", write)
    with pytest.raises(ValueError, match=r"path: cannot write .*/index.*: No space left on device"):
        index.save(gallery / "index")
    assert not (gallery / "index").exists() or not any((gallery / "index").iterdir())


def test_one_run_at_a_time_in_a_folder(gallery):
    entered, leave = threading.Event(), threading.Event()

    def wait(stage, done, total):
        entered.set()
        leave.wait(60)

    first = threading.Thread(target=lambda: disk.build(gallery / "x.npy", gallery / "index", "SQ8", progress=wait))
    first.start()
    assert entered.wait(60)
    try:
        for act in (
            lambda: disk.build(gallery / "x.npy", gallery / "index", "Flat"),
            lambda: GapIndex().add(torch.eye(4)).save(gallery / "index"),
        ):
            with pytest.raises(ValueError, match="path: expected a folder that no other run writes, got"):
                act()
    finally:
        leave.set()
        first.join()
    assert GapIndex.load(gallery / "index").factory == "SQ8"


def test_what_a_killed_run_left_is_cleared_away(gallery):
    out = files.folder(gallery / "index" / "unfinished").parent
    for name in (".index.tmp.faiss", ".lists.tmp.ivfdata", "unfinished/.trained.faiss.abc.tmp.faiss"):
        (out / name).write_bytes(b"half")
    disk.build(gallery / "x.npy", out, "Flat")
    assert len(list(out.iterdir())) == 2, "index and manifest"


def test_other_bytes_of_the_same_size_and_time_are_another_gallery(gallery):
    path = gallery / "x.npy"
    disk.build(path, gallery / "index", "Flat")
    same = disk.build(path, gallery / "index", "Flat")
    times, rows = path.stat(), np.load(path)
    rows[7] = 9
    np.save(path, rows)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    changed = disk.build(path, gallery / "index", "Flat")
    assert changed["files"] != same["files"]
    assert GapIndex.load(gallery / "index").search(rows[7:8], 1)[1].item() == 7
    os.utime(path)
    assert disk.build(path, gallery / "index", "Flat") == changed, "a touch is none"


def test_an_index_without_its_files_is_built_anew(gallery):
    first = disk.build(gallery / "x.npy", gallery / "index", "IVF8,Flat")
    for kind in ("index", "lists"):
        (gallery / "index" / first["files"][kind]["name"]).unlink()
        assert disk.build(gallery / "x.npy", gallery / "index", "IVF8,Flat") == first
        GapIndex.load(gallery / "index", verify=True)


@pytest.mark.filterwarnings("ignore:.*FAISS")
def test_lists_in_a_file_are_read_into_memory_unless_mapped(gallery):
    rows = np.load(gallery / "x.npy")
    disk.build(gallery / "x.npy", gallery / "index", "IVF8,Flat", block=100)
    loaded = GapIndex.load(gallery / "index").add(rows[:1])
    assert max(loaded.ids()) == 600
    mapped = GapIndex.load(gallery / "index", mmap=True)
    for act in (lambda: mapped.add(rows[:1]), lambda: mapped.remove_ids([1])):
        with pytest.raises(ValueError, match="got one mapped from files; load it with mmap=False"):
            act()
    mapped.set_parameters("nprobe=8")
    expected = truth(torch.from_numpy(rows[:9]), torch.from_numpy(rows))[0][:, :4]
    assert torch.equal(mapped.search(torch.from_numpy(rows[:9]), 4)[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, "expected the files of an index"),
        ({"count": "3"}, "expected the count of an index"),
        ({"factory": None}, "expected the factory of an index"),
        ({"dims": True}, "expected the dims of an index"),
        ({"files": {"index": {"name": "../x.npy", "bytes": 1, "sha256": ""}}}, "expected the files of an index"),
    ],
)
def test_manifests_that_are_none_of_ours(gallery, change, message):
    disk.build(gallery / "x.npy", gallery / "index", "Flat")
    path = gallery / "index" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"path: {message}"):
        GapIndex.load(gallery / "index")


def test_stdout_is_the_answer_alone(gallery):
    """As processes: what C prints is on their descriptors."""
    builds = [["index", "x.npy", "--out", "ivf", "--factory", "IVF8,Flat"], ["search", "ivf", "q.npy", "--k", "3"]]
    for command in builds:
        done = warm.gapkern(*command, "--json", cwd=gallery)
        assert (done.returncode, done.stderr) == (0, "")
        assert set(strict(done.stdout)) >= ({"ids", "distances"} if command[0] == "search" else {"count"})


_NOISY = """
import ctypes, os, sys
from gapkern import cli
from gapkern.cli import gap
run = gap.run
def noisy(arguments):
    print("from Python")
    ctypes.CDLL(None).puts(b"from C, unflushed")
    os.write(1, b"from a thread\\n")
    os.system("echo from a child")
    return run(arguments)
gap.run = noisy
sys.exit(cli.main(sys.argv[1:]))
"""


def test_whatever_prints_meanwhile_goes_to_stderr(gallery):
    words = ["gap", "x.npy", "x.npy", "--json"]
    done = warm.run(_NOISY, *words, cwd=gallery)
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)
    for source in ("Python", "C, unflushed", "a thread", "a child"):
        assert f"from {source}\n" in done.stderr
    command = [sys.executable, "-c", _NOISY, *words]
    with subprocess.Popen(command, cwd=gallery, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as piped:
        piped.stdout.close()
        assert b"Traceback" not in piped.stderr.read()


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_answer_that_cannot_be_written_is_a_line(gallery, more):
    done = warm.gapkern("gap", "x.npy", "x.npy", *more, cwd=gallery, stdout="/dev/full")
    assert (done.returncode, done.stderr) == (
        2,
        "gapkern gap: cannot write to the standard output: No space left on device\n",
    )


@pytest.mark.parametrize(
    "verb",
    [
        ["gap", "x.npy", "x2.npy"],
        ["index", "x.npy", "--out", "index", "--factory", "SQ8"],
        ["index", "x.npy", "--compare", "q.npy", "--factory", "Flat", "SQ8"],
        ["search", "three", "q.npy", "--k", "5"],
        ["shift", "fit", "x.npy", "x2.npy", "--out", "s.safetensors"],
        ["robust", "q.npy", "q.npy", "--gaussian", "0.1"],
        ["robust", "q.npy", "q2.npy", "--gaussian", "0.1", "--project", "--metric", "ip"],
        ["shift", "compare", "x.npy", "x2.npy", "--components", "exact", "2", "--labels", "paired"],
        ["shift", "compare", "x.npy", "x2.npy", "--components", "exact", "2"],
        ["shift", "apply", "fitted.safetensors", "x.npy", "--out", "moved.npy"],
        ["shift", "apply", "fitted.safetensors", "folder", "--out", "moved"],
        ["project", "fit", "q.npy", "x2.npy", "--out", "p.safetensors"],
        ["project", "apply", "fitted.safetensors", "x.npy", "--side", "queries", "--out", "moved.npy"],
        ["eval", "--images", "x2.npy", "--texts", "x.npy", "--labels", "paired", "--task", "zeroshot_retrieval"],
        ["eval", "--images", "few.npy", "--texts", "few.npy", "--labels", "labels.npy", "--gaussian", "0.1"],
        ["build", "results", "--out", "r.csv"],
        ["doctor"],
    ],
)
def test_every_verb_answers_in_strict_json(gallery, verb, monkeypatch, capsys):
    monkeypatch.chdir(gallery)
    np.save("x2.npy", np.load("x.npy") + 1)
    np.save("q2.npy", np.load("q.npy") + 1)
    np.save("few.npy", np.load("x.npy")[:3])
    np.save("labels.npy", np.arange(3))
    (gallery / "folder").mkdir()
    np.save("folder/x.npy", np.load("x.npy"))
    GapIndex().add(torch.from_numpy(np.load("x.npy")[:3])).save("three")
    MeanShift(n_components=2).fit(np.load("x.npy"), np.load("x2.npy")).save("fitted.safetensors")
    if verb[0] == "build":
        few = ["--images", "few.npy", "--texts", "few.npy", "--labels", "labels.npy"]  # acc5 of three classes is NaN
        assert cli.main(["eval", *few, "--out", "results"]) == 0
    capsys.readouterr()
    assert cli.main([*verb, "--json"]) == 0, capsys.readouterr().err
    assert strict(capsys.readouterr().out)


def test_neighbours_that_are_missing(gallery, monkeypatch, capsys):
    monkeypatch.chdir(gallery)
    GapIndex().add(torch.from_numpy(np.load("x.npy")[:3])).save("three")
    assert cli.main(["search", "three", "q.npy", "--k", "5"]) == 0
    out = capsys.readouterr().out
    assert "e+38" not in out
    assert out.splitlines()[1].split()[-2:] == ["-", "-"]
    assert cli.main(["search", "three", "q.npy", "--k", "5", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["ids"][0][3:] == found["distances"][0][3:] == [None, None]
    for name in ("r.json", "r.npz", "r.parquet"):
        assert cli.main(["search", "three", "q.npy", "--k", "5", "--out", name]) == 0
    assert strict((gallery / "r.json").read_text()) == found
    assert (np.load("r.npz")["ids"][:, 3:] == -1).all()
    import pandas

    assert len(pandas.read_parquet("r.parquet")) == 6 * 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "index", "q.npy", "--k", "1000000000"],
        ["search", "index", "q.npy", "--k", "0"],
        ["index", "x.npy", "--out", "new", "--factory", "IVF0,Flat"],
        ["index", "x.npy", "--out", "new", "--factory", "IVF1000000000,Flat"],
        ["index", "x.npy", "--out", "new", "--factory", "IVF8,PQ4x0"],
        ["index", "x.npy", "--out", "new", "--sample", "0"],
        ["index", "x.npy", "--out", "new", "--block", "0"],
        ["index", "x.npy", "--compare", "q.npy", "--k", "1000000000"],
    ],
)
def test_numbers_that_cannot_be(gallery, monkeypatch, capsys, arguments):
    monkeypatch.chdir(gallery)
    GapIndex().add(torch.from_numpy(np.load("x.npy"))).save("index")
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (gallery / "new").exists()


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("IVF8,Flat", "nprobe=0"),
        ("IVF8,Flat", "nprobe=-1"),
        ("IVF8,Flat", "nprobe=few"),
        ("HNSW8", "efSearch=0"),
        ("PQ4x4np,RFlat", "k_factor_rf=0.0"),
        ("IVF8_HNSW8,Flat", "nprobe=3,quantizer_efSearch=-2"),
        ("Flat", "nprobe=3"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*FAISS")
def test_parameters_that_cannot_be(factory, text):
    rows = searched("spread")[1]
    index = GapIndex(factory).train(rows).add(rows)
    with pytest.raises(ValueError, match=f"text: expected FAISS search parameters of .*, got '{text}'"):
        index.set_parameters(text)


def test_more_neighbours_than_memory(monkeypatch):
    from gapkern import _memory

    monkeypatch.setattr(_memory, "available", lambda: 10**6)
    index = GapIndex().add(torch.eye(3))
    with pytest.raises(ValueError, match=r"k: expected neighbours that fit into .* of free memory, got 50000"):
        index.search(torch.eye(3), 50_000)
    index.search(torch.eye(3), 5_000)

"""What surrounds a run: terminals without an alphabet, closed and full outputs, interrupts, memory, other runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gapkern import MeanShift, _lock, _memory, files
from gapkern.cli import boundary, common, main
from gapkern.testing import hears_interrupts
from tests import warm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Texts and images (30, 16), a gap away, as .npy; a shift."""
    folder = tmp_path_factory.mktemp("surroundings")
    draw = np.random.default_rng(0)
    texts = draw.standard_normal((30, 16)).astype(np.float32)
    np.save(folder / "texts.npy", texts)
    np.save(folder / "images.npy", texts + 0.05 * draw.standard_normal((30, 16)).astype(np.float32) + 1)
    MeanShift(n_components=4).fit(texts, np.load(folder / "images.npy")).save(folder / "shift.safetensors")
    return folder


@pytest.fixture
def pair(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gapkern(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "gapkern", *map(str, words)], capture_output=True, check=False, **options
    )


ROBUST = ("robust", "images.npy", "texts.npy", "--gaussian", "0.1", "--alphas", "0,1")


def test_an_ascii_terminal_gets_every_table(pair):
    plain = {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for variables in plain:
        done = gapkern(*ROBUST, "--out", "out", env={**os.environ, **variables})
        assert (done.returncode, done.stderr) == (0, b"")
        assert b" alpha " in done.stdout.split(b"\n")[0]
        assert json.loads((pair / "out" / "robustness.json").read_text())[1]["alpha"] == 1
        shutil.rmtree(pair / "out")


@pytest.mark.parametrize("how", ["closed", "full", "head"])
def test_an_output_that_takes_nothing(pair, how):
    words = "gap images.npy texts.npy --out gap.json"
    if how == "full":
        done = warm.gapkern(*words.split(), stdout="/dev/full")
    else:
        shell = {"closed": ">&-", "head": "| true; exit ${PIPESTATUS[0]}"}[how]
        command = ["bash", "-c", f"{sys.executable} -m gapkern {words} {shell}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (2 if how == "full" else 0)
    if how == "full":
        assert re.fullmatch("gapkern gap: cannot .*write.*: No space left on device\n", done.stderr)
    else:
        assert done.stderr == ""
    assert json.loads((pair / "gap.json").read_text())["centroid_distance"] > 3


def test_an_interrupt_is_one_line(pair):
    np.save("big.npy", np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32))
    command = [
        sys.executable,
        "-m",
        "gapkern",
        "robust",
        "big.npy",
        "big.npy",
        "--uniform",
        "0.1",
        "--trials",
        "100000",
        "--out",
        "out",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=hears_interrupts) as run:
        while not (pair / "out" / "unfinished.jsonl").exists():
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.communicate()[1] == b"gapkern robust: interrupted\n"
    assert run.returncode == 130
    assert os.listdir(pair / "out") == ["unfinished.jsonl"]


def test_an_error_of_our_own_is_told_from_a_mistake(pair, capsys, monkeypatch):
    from gapkern.cli import gap

    def broken(arguments):
        raise KeyError("field")

    monkeypatch.setattr(gap, "run", broken)
    assert main(["gap", "a", "b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gapkern gap: internal error: KeyError: 'field' (please report it")
    assert error.count("\n") == 1
    assert main(["--debug", "gap", "a", "b"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_speaks_of_peers_is_no_lost_rank(pair, capsys, monkeypatch):
    from gapkern.cli import eval as verb

    def broken(*_):
        raise RuntimeError("a peer of the store timed out")

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(verb, "_one", broken)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("the process was ended"))
    assert main(["eval", "--images", "images.npy", "--texts", "texts.npy", "--labels", "labels.npy"]) == 1
    assert "internal error: RuntimeError: a peer of the store timed out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a\nb"), "cannot read or write a b: Permission denied"),
        (OSError(28, "No space left on device"), "cannot read or write: No space left on device"),
        (MemoryError(), "expected work that fits into memory, got too much"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "expected work that fits into memory, got Def"),
        (ValueError("one\n  two\x1b[2J"), r"one two\x1b[2J"),
        (FileExistsError("x"), "x"),
        (RuntimeError("the store has a peer"), None),
        (AttributeError("x"), None),
    ],
)
def test_mistakes_are_known_by_their_type(error, line):
    said = boundary.mistake(error)
    assert said is None if line is None else said.startswith(line)


def test_tables_are_plain_text_and_whole(capsys):
    common.table(["query", *map(str, range(20))], [["pair.safetensors[texts] :smile: [/b]", *["31512 (1.2345)"] * 20]])
    head, row, *_ = capsys.readouterr().out.split("\n")
    assert row.split() == ["pair.safetensors[texts]", ":smile:", "[/b]", *["31512", "(1.2345)"] * 20]
    assert len(head.split()) == 21


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("shift", "fit", "texts.npy", "images.npy", "--out", "x.npy"),
            "shift: out: expected a name ending in .safetensors, got one in .npy",
        ),
        (
            ("shift", "fit", "texts.npy", "images.npy", "--out", "folder.safetensors"),
            "shift: path: cannot write folder.safetensors: it is a folder",
        ),
        (("shift", "apply", "shift.safetensors", "texts.npy", "--out", "."), "path: cannot write .: it is a folder"),
        (("shift", "apply", "shift.safetensors", "texts.npy", "--out", "/dev/null"), "it is no regular file"),
        (("gap", "images.npy", "texts.npy", "--out", "folder.safetensors"), "path: cannot write folder.safetensors"),
        (("gap", "pipe.npy", "texts.npy"), "gap: images: expected a file, got pipe.npy, which is none"),
        (("gap", "images.npy", "loop.npy"), "gap: texts: expected a file, got loop.npy, which does not exist"),
        (("gap", "images.npy", "zip.npy"), "gap: texts: expected a .npy file, got zip.npy: "),
        (("gap", "images.npy", "huge.npy"), "gap: texts: expected a .npy file, got huge.npy: mmap length is greater"),
        (("gap", "images.npy", "nothing.safetensors"), "texts: expected one tensor in nothing.safetensors, got none"),
        ((*ROBUST, "--out", "texts.npy"), "robust: out: cannot write to the folder texts.npy: it is a file"),
        (
            ("shift", "fit", "mixed", "images.npy", "--out", "s"),
            "shift: gallery: expected torch.float32 as in mixed/x_0.npy, got torch.float16 in mixed/x_1.npy",
        ),
        (("shift", "apply", "shift.safetensors", "mixed", "--out", "new"), "embeddings: expected torch.float32 as in"),
        (("gap", "./mixed", "images.npy"), "gap: images: expected torch.float32 as in mixed/x_0.npy"),
    ],
)
def test_what_can_be_seen_beforehand_is_refused_before_the_work(pair, capsys, monkeypatch, words, message):
    (pair / "folder.safetensors").mkdir()
    (pair / "mixed").mkdir()
    np.save("mixed/x_0.npy", np.load("texts.npy")[:20])
    np.save("mixed/x_1.npy", np.load("texts.npy")[20:].astype(np.float16))
    os.mkfifo("pipe.npy")
    (pair / "loop.npy").symlink_to("loop.npy")
    np.savez("zip", np.zeros(3))
    os.rename("zip.npz", "zip.npy")
    save_file({}, "nothing.safetensors")
    with open("huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 512)})
    before = sorted(os.listdir())
    monkeypatch.setattr(MeanShift, "partial_fit", lambda *_, **__: pytest.fail("the work was begun"))
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == before, "not even an empty folder"


def test_what_a_table_needs_is_asked_for_before_the_work(pair, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setattr(MeanShift, "fit", lambda *_: pytest.fail("the work was begun"))
    assert main([*ROBUST, "--out", "out"]) == 2
    assert "pandas is needed here; run `pip install 'gapkern[tables]'`" in capsys.readouterr().err
    assert not (pair / "out").exists()


def test_the_row_that_is_named_is_the_files(pair, capsys):
    x = np.zeros((90_000, 64), np.float16)
    x[70_000, 3] = np.nan
    np.save("x.npy", x)
    (pair / "shards").mkdir()
    np.save("shards/a_0.npy", x[:100])
    np.save("shards/a_1.npy", x[69_990:70_005])
    with pytest.raises(ValueError, match=r"gallery: expected finite values, got NaN or infinity, first in row 70000$"):
        MeanShift().fit(x, x)
    np.save("wide.npy", np.zeros((4, 64), np.float32))
    for words, where in (
        (("fit", "x.npy", "wide.npy", "--out", "s"), "gallery: .* first in row 70000 of x.npy"),
        (("fit", "wide.npy", "shards", "--out", "s"), "queries: .* first in row 10 of shards/a_1.npy"),
    ):
        assert main(["shift", *words]) == 2
        assert re.search(where, capsys.readouterr().err)
    MeanShift(n_components=0).fit(np.eye(4, 64), np.ones((4, 64))).save("s.safetensors")
    for source, where in (("x.npy", "row 70000 of x.npy"), ("shards", "row 10 of shards/a_1.npy")):
        assert main(["shift", "apply", "s.safetensors", source, "--out", "moved.npy"]) == 2
        assert f"embeddings: expected finite values, got NaN or infinity, first in {where}" in capsys.readouterr().err


def test_two_runs_into_one_folder(pair, capsys):
    (pair / "shards").mkdir()
    np.save("shards/a_0.npy", np.load("texts.npy"))
    apply = ["shift", "apply", "shift.safetensors", "shards", "--out", "out"]
    reproduce = ["reproduce", "thm3.1", "--quick", "--out", "out"]
    with _lock.locked("out"):
        for words in (apply, [*ROBUST, "--out", "out"], reproduce, ["demo", "--out", "out", "--steps", "1"]):
            assert main(list(words)) == 2
            assert capsys.readouterr().err == (
                f"gapkern {words[0]}: out: expected a folder that no other run writes, got out\n"
            )
        assert os.listdir("out") == [_lock.LOCK]
    assert main(apply) == 0
    moved = MeanShift.load("shift.safetensors").transform(np.load("texts.npy"))
    assert np.array_equal(np.load("out/a_0.npy"), moved)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_files_are_byte_for_byte_what_numpy_and_safetensors_write(tmp_path, suffix, dtype):
    x = torch.randn(9, 5).to(dtype)
    if suffix == ".safetensors":
        files.save_embeddings(tmp_path / "ours.safetensors", x)
        save_file({"embeddings": x}, tmp_path / "theirs.safetensors")
    elif dtype != torch.bfloat16:
        files.save_embeddings(tmp_path / "ours.npy", x)
        np.save(tmp_path / "theirs.npy", x.numpy())
    else:
        return
    assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_conversion_takes_its_room_at_once(tmp_path, monkeypatch, suffix):
    source = files.save_embeddings(tmp_path / "x.npy", torch.ones(64, 2))
    monkeypatch.setattr(files, "CHUNK", 16)
    sizes = []
    for done in files.convert(source, tmp_path / f"y{suffix}", lambda x: 2 * x):
        (temporary,) = (p for p in tmp_path.iterdir() if p.name.startswith("."))
        sizes.append((done, temporary.stat().st_size))
    whole = (tmp_path / f"y{suffix}").stat().st_size
    assert sizes == [(n, whole) for n in range(8, 65, 8)]
    assert torch.equal(files.load_embeddings(tmp_path / f"y{suffix}"), torch.full((64, 2), 2.0))


def _system(root, available, groups, mounts, values):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, value in values.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value)


UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
FIRST = (
    "35 31 0:32 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup c rw,cpu\n"
)
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
MB = 2**20


@pytest.mark.parametrize(
    ("groups", "mounts", "values", "expected"),
    [
        ("0::/\n", UNIFIED, {}, 500 * MB),
        ("0::/a/b\n", UNIFIED, {f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/b/memory.current": "1\n"}, 500 * MB),
        (
            "0::/a/b\n",
            UNIFIED,
            {
                f"{V2}/a/memory.max": f"{200 * MB}\n",
                f"{V2}/a/memory.current": f"{150 * MB}\n",
                f"{V2}/a/memory.stat": f"anon 1\ninactive_file {60 * MB}\nactive_file {20 * MB}\n",
                f"{V2}/a/b/memory.max": "max\n",
            },
            130 * MB,
        ),
        (
            "0::/\n",
            UNIFIED,
            {
                f"{V2}/memory.max": "max",
                f"{V2}/memory.high": f"{90 * MB}",
                f"{V2}/memory.current": "0",
                f"{V2}/memory.stat": "anon 0\n",
            },
            90 * MB,
        ),
        (
            "0::/\n",
            UNIFIED,
            {
                f"{V2}/memory.max": f"{50 * MB}",
                f"{V2}/memory.current": f"{60 * MB}",
                f"{V2}/memory.stat": "anon 0\n",
            },
            0,
        ),
        (
            "4:cpu:/x\n3:memory:/docker/7\n0::/\n",
            FIRST.format("/docker/7"),
            {
                f"{V1}/memory.limit_in_bytes": f"{300 * MB}",
                f"{V1}/memory.usage_in_bytes": f"{100 * MB}",
                f"{V1}/memory.stat": f"inactive_file 0\ntotal_inactive_file {30 * MB}\n",
            },
            230 * MB,
        ),
        (
            "3:memory:/\n",
            FIRST.format("/"),
            {
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/memory.usage_in_bytes": "5",
                f"{V1}/memory.stat": "",
            },
            500 * MB,
        ),
    ],
)
def test_free_memory_is_what_the_system_and_the_groups_leave(tmp_path, monkeypatch, groups, mounts, values, expected):
    _system(tmp_path, 500 * MB, groups, mounts, values)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}[name])
    assert _memory.available(tmp_path) == expected


def test_without_proc_it_is_what_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    assert _memory.available(tmp_path) == 40960

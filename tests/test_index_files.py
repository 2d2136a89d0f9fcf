"""Indexes built from files block by block, killed and taken up, and the command line of index and search."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gapkern import MeanShift, cli, files
from gapkern.retrieval import GapIndex, disk
from gapkern.testing import clip_like
from tests.scenes import truth

pytestmark = pytest.mark.faiss


@pytest.fixture
def folder(tmp_path):
    """A gallery in shards, and queries."""
    images, texts = clip_like(2100, 32)
    (tmp_path / "texts").mkdir()
    for n, part in enumerate(texts.split(700)):
        files.save_embeddings(tmp_path / "texts" / f"text_emb_{n}.npy", part)
    files.save_embeddings(tmp_path / "images.npy", images[:50])
    return tmp_path


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF8,Flat", "SQ8", "IVF8,SQ8", "OPQ4,IVF8,PQ4x4", "HNSW8", "IVF8,PQ4x4fs"]
)
def test_an_index_from_files_is_the_index_of_memory(folder, factory):
    texts, images = files.load_embeddings(folder / "texts"), files.load_embeddings(folder / "images.npy")
    shift = MeanShift(n_components=4).fit(texts, images)
    manifest = disk.build(folder / "texts", folder / "index", factory, shift=shift, block=400)
    assert (manifest["count"], manifest["dims"]) == (2100, 32)
    loaded = GapIndex.load(folder / "index", verify=True)
    assert sorted(loaded.ids()) == list(range(2100))
    memory = GapIndex(factory, shift=shift).train(texts).add(texts)
    expected, got = memory.search(images, 5), loaded.search(images, 5)
    assert (expected[1] == got[1]).double().mean() > 0.99
    shutil.move(folder / "index", folder / "moved")
    assert torch.equal(GapIndex.load(folder / "moved").search(images, 5)[1], got[1]), "the folder may move"
    GapIndex.load(folder / "moved").save(folder / "copy")
    shutil.rmtree(folder / "moved")
    assert torch.equal(GapIndex.load(folder / "copy").search(images, 5)[1], got[1])


def _build(folder, *more):
    command = [sys.executable, "-m", "gapkern", "index", folder / "texts", "--factory", "IVF8,SQ8", "--block", "150"]
    return subprocess.Popen([*command, "--out", *more], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_build_killed_ten_times_gives_the_same_bytes(folder):
    started = time.perf_counter()
    assert _build(folder, folder / "straight").wait() == 0
    whole = time.perf_counter() - started
    generator, killed = np.random.default_rng(0), 0
    out = folder / "killed"
    while killed < 10:
        run = _build(folder, out)
        # Mostly in the part after the imports, where files are written.
        deadline = time.perf_counter() + generator.uniform(0.5, 1.0) * whole
        while time.perf_counter() < deadline and run.poll() is None:
            time.sleep(0.005)
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed += 1
        else:
            shutil.rmtree(out)
    assert _build(folder, out).wait() == 0
    assert contents(out) == contents(folder / "straight")
    assert sorted(GapIndex.load(out).ids()) == list(range(2100))


def test_a_build_goes_on_where_it_stopped_at_every_step(folder, monkeypatch):
    """The same at each file that is put in its place: stopped there, taken up, the same bytes."""
    disk.build(folder / "texts", folder / "straight", "IVF8,SQ8", block=500)
    replace, out = disk.os.replace, folder / "stopped"
    stops = 0
    while True:
        left = stops + 1

        def stop(source, target):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(disk.os, "replace", stop)
        shutil.rmtree(out, ignore_errors=True)
        try:
            disk.build(folder / "texts", out, "IVF8,SQ8", block=500)
        except KeyboardInterrupt:
            stops += 1
            monkeypatch.setattr(disk.os, "replace", replace)
            disk.build(folder / "texts", out, "IVF8,SQ8", block=500)
            assert contents(out) == contents(folder / "straight")
            continue
        break
    assert stops == 10, "plan, trained index, five blocks, lists, index, manifest"


def test_another_plan_starts_anew_and_replaces_the_old_index_at_the_end(folder):
    out = folder / "index"
    disk.build(folder / "texts", out, "Flat")
    files.write_json(files.folder(out / "unfinished") / "plan.json", {"another": "plan"})
    (out / "unfinished" / "block-000000.faiss").write_bytes(b"of another gallery")
    np.save(folder / "ids.npy", np.arange(2100)[::-1] + 5)
    disk.build(folder / "texts", out, "SQ8", ids=folder / "ids.npy", block=800)
    loaded = GapIndex.load(out)
    assert (loaded.factory, loaded.ids()[0], len(list(out.iterdir()))) == ("SQ8", 2104, 2)


def test_command_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["shift", "fit", "texts", "images.npy", "--out", "shift.safetensors", "--components", "4"]) == 0
    capsys.readouterr()
    arguments = ["index", "texts", "--out", "index", "--factory", "IVF8,Flat", "--shift", "shift.safetensors", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 2100
    assert (
        cli.main(["search", "index", "images.npy", "--k", "3", "--parameters", "nprobe=8", "--json", "--verify"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    shift = MeanShift.load("shift.safetensors")
    expected = truth(files.load_embeddings("images.npy"), shift.transform(files.load_embeddings("texts")))[0][:, :3]
    assert found["ids"] == expected.tolist()
    for out in ("r.npz", "r.parquet", "r.json"):
        assert cli.main(["search", "index", "images.npy", "--k", "3", "--parameters", "nprobe=8", "--out", out]) == 0
    assert np.array_equal(np.load("r.npz")["ids"], expected)
    import pandas

    frame = pandas.read_parquet("r.parquet")
    assert frame["id"].tolist() == expected.flatten().tolist()
    assert json.loads((folder / "r.json").read_text())["ids"] == expected.tolist()
    capsys.readouterr()
    compare = ["index", "texts", "--compare", "images.npy", "--factory", "Flat", "SQ4", "--labels", "paired"]
    assert cli.main([*compare, "--out", "table"]) == 0
    assert "SQ4" in capsys.readouterr().out
    assert {p.name for p in (folder / "table").iterdir()} == {"quantisers.json", "quantisers.csv", "quantisers.png"}
    assert cli.main(["search", "index", "images.npy", "--out", "r.txt"]) == 2
    assert "expected a name ending in .npz, .parquet or .json, got r.txt" in capsys.readouterr().err

"""Indexes built from files block by block, killed and taken up, and the command line of index and search."""

import json
import random
import shutil
import time

import numpy as np
import pytest
import torch

from gapkern import MeanShift, cli, files
from gapkern.retrieval import GapIndex, compare_quantisers, disk, stored
from gapkern.testing import clip_like
from tests.scenes import HANGS, Forks, truth

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


@pytest.mark.slow
def test_a_build_killed_ten_times_gives_the_same_bytes(folder):
    def build(out):
        return ["index", folder / "texts", "--factory", "IVF8,SQ8", "--block", "100", "--out", out]

    def steps():
        return len(list(out.rglob("*.faiss")))

    chance, killed = random.Random(0), 0
    out = folder / "killed"
    with Forks("faiss, gapkern.retrieval.disk, gapkern.cli.index") as forks:
        forks.start(build(folder / "straight"))
        assert forks.status() == 0
        while killed < 10:
            child = forks.start(build(out))
            # Before the first file (every third time), else once another is there; and a moment later.
            wanted = steps() + 1 if killed % 3 else 0
            deadline = time.monotonic() + HANGS
            while steps() < wanted and not (out / "manifest.json").exists() and time.monotonic() < deadline:
                time.sleep(0.0002)
            time.sleep(chance.random() * 0.01)
            if forks.kill(child):
                killed += 1
            else:
                shutil.rmtree(out)
        forks.start(build(out))
        assert forks.status() == 0
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
    assert {p.name for p in (folder / "table").iterdir()} == {
        "quantisers.json",
        "quantisers.csv",
        "quantisers.png",
        "inputs.json",
    }
    assert cli.main(["search", "index", "images.npy", "--out", "r.txt"]) == 2
    assert "expected a name ending in .npz, .parquet or .json, got r.txt" in capsys.readouterr().err


def test_an_index_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Between the manifest and the files that it names another run may finish."""
    rows = torch.eye(5, 8)
    GapIndex().add(rows).save(tmp_path / "index")
    read, replaced = stored.read, []

    def replace_first(path, *more):
        if not replaced:
            replaced.append(GapIndex().add(2 * rows).save(tmp_path / "index"))
        return read(path, *more)

    monkeypatch.setattr(stored, "read", replace_first)
    assert torch.equal(GapIndex.load(tmp_path / "index").search(rows, 1)[0], torch.ones(5, 1))
    for path in (tmp_path / "index").glob("index-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"path: expected the file .* which does not exist"):
        GapIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: GapIndex("IVF32,Flat").train(x),
        lambda x: compare_quantisers(x, x, ["IVF32,Flat"]),
        lambda x: GapIndex("Flat", "ip", MeanShift().fit(x, x + 1)),
    ],
)
def test_a_warning_names_the_line_that_called(call):
    with pytest.warns(UserWarning, match=r"FAISS: clustering|metric='ip'") as caught:
        call(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    assert {warning.filename for warning in caught} == {__file__}


def test_codes_in_blocks_are_decoded_from_a_file_as_before(tmp_path):
    torch.manual_seed(3)
    gallery = torch.randn(600, 96)
    index = GapIndex("IVF8,PQ48x4fs")
    index.train(gallery)
    index.add(gallery)
    index.save(tmp_path / "index")
    loaded = GapIndex.load(tmp_path / "index")
    for row in (0, 3, 599):
        assert np.array_equal(loaded.reconstruct(row), index.reconstruct(row))

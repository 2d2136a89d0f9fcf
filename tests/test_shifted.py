"""What was made from what: shifted folders and files follow their sources, and a folder has one meaning."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift
from gapkern.embeddings import Embeddings, described, model_of, verify, write_folder

pytestmark = pytest.mark.usefixtures("empty_folder")


def refused(run, *line):
    status, out, err = run(*line)
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    return err


def draw(seed, rows=12):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x + torch.eye(6)[0] * (seed % 2), dim=1)


@pytest.fixture
def made(run):
    """A gallery in four shards with keys, queries, and a shift fitted on them."""
    gallery, queries = draw(1), draw(2)
    write_folder("g", "text_emb", gallery.split(3), model="tiny/1", names=[f"t{i}" for i in range(12)])
    write_folder("q", "img_emb", [queries], model="tiny/1")
    assert run("shift", "fit", "g", "q", "--out", "s.safetensors", "--components", "2")[0] == 0
    return gallery, queries, MeanShift.load("s.safetensors")


def moved(shift, x):
    return shift.transform(x)


def test_a_moved_folder_knows_its_model_its_rows_and_its_shift(run, made):
    gallery, queries, shift = made
    status, _, err = run("shift", "apply", "s.safetensors", "g", "--out", "m")
    assert status == 0
    assert "gapkern shift: embeddings: g/text_emb" in err
    found = Embeddings("m")
    assert torch.equal(found[:], moved(shift, gallery))
    assert (found.model, found.order) == ("tiny/1", Embeddings("g").order)
    assert found.keys() == [f"t{i}" for i in range(12)]
    assert found.manifest["transforms"][0]["alpha"] == shift.alpha
    assert found.manifest["made_from"] == [entry["sha256"] for entry in Embeddings("g").manifest["shards"]]
    assert verify("m")
    again = "embeddings: expected embeddings that no shift has moved, got m, moved by mean_shift of alpha 1.0"
    assert again in refused(run, "shift", "apply", "s.safetensors", "m", "--out", "twice")
    assert not os.path.exists("twice")
    np.save("labels.npy", np.arange(12))
    line = ["--images", "q", "--texts", "m", "--labels", "labels.npy"]
    assert "moved by" in refused(run, "eval", *line, "--shift", "s.safetensors")
    status, out, _ = run("eval", *line, "--json", "--device", "cpu")
    result = json.loads(out)["results"][0]
    unit = torch.nn.functional.normalize(moved(shift, gallery), dim=1)
    expected = (torch.cdist(queries, unit).argmin(1) == torch.arange(12)).double().mean()
    assert result["metrics"]["acc1"] == pytest.approx(float(expected))
    assert result["inputs"]["texts"]["transforms"] == found.manifest["transforms"]


def test_changed_sources_are_moved_again(run, made):
    gallery, _, shift = made
    for name in os.listdir("g/text_emb"):
        if name.endswith(".npy"):
            os.makedirs("plain", exist_ok=True)
            shutil.copy(f"g/text_emb/{name}", "plain")
    apply = ["shift", "apply", "s.safetensors", "plain", "--out", "m"]
    assert run(*apply)[0] == 0
    times = {name: os.stat(f"m/{name}").st_mtime_ns for name in os.listdir("m") if name.endswith(".npy")}
    before = os.stat("plain/text_emb_2.npy")
    other = draw(9, 3)
    np.save("plain/text_emb_2.npy", other.numpy())
    os.utime("plain/text_emb_2.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    status, out, _ = run(*apply)
    assert (status, "3 of 4 shards were there already" in out) == (0, True)
    expected = torch.cat([gallery[:6], other, gallery[9:]])
    assert torch.equal(Embeddings("m")[:], moved(shift, expected))
    assert {n for n, t in times.items() if os.stat(f"m/{n}").st_mtime_ns != t} == {"text_emb_2.npy"}
    np.save("m/text_emb_1.npy", np.load("m/text_emb_0.npy"))  # a result that is no longer its source's
    assert run(*apply)[0] == 0
    assert torch.equal(Embeddings("m")[:], moved(shift, expected))
    shutil.rmtree("plain")
    os.makedirs("plain")
    for i, part in enumerate(expected.split(7)):  # in fewer shards
        np.save(f"plain/text_emb_{i}.npy", part.numpy())
    assert run(*apply)[0] == 0
    assert torch.equal(Embeddings("m")[:], moved(shift, expected))
    assert sorted(n for n in os.listdir("m") if n.endswith(".npy")) == ["text_emb_0.npy", "text_emb_1.npy"]
    np.save("m/stray.npy", np.zeros((2, 6), np.float32))
    assert "which holds other files (stray.npy)" in refused(run, *apply)


def test_unfinished_results_are_not_read(run, made):
    run("shift", "apply", "s.safetensors", "g", "--out", "m")
    os.remove("m/manifest.json")
    os.remove("m/text_emb_3.npy")
    assert "gallery: expected a finished folder, got m, whose shift apply has not ended: run it again" in refused(
        run, "shift", "compare", "m", "q"
    )
    assert run("shift", "apply", "s.safetensors", "g", "--out", "m")[0] == 0
    assert len(Embeddings("m")) == 12


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_single_files_are_described(run, made, suffix):
    from gapkern import files

    gallery, _, shift = made
    files.save_embeddings(f"x{suffix}", gallery)
    line = ["shift", "apply", "s.safetensors", f"x{suffix}", "--model", "tiny/1", "--out"]
    assert "out: expected another file than that of the embeddings" in refused(run, *line, f"x{suffix}")
    os.link(f"x{suffix}", f"link{suffix}")
    assert "out: expected another file" in refused(run, *line, f"link{suffix}")
    assert torch.equal(files.load_embeddings(f"x{suffix}"), gallery)
    assert run(*line, f"y{suffix}")[0] == 0
    assert torch.equal(files.load_embeddings(f"y{suffix}"), moved(shift, gallery))
    assert (model_of(f"y{suffix}"), described(f"y{suffix}")["made_from"]) == ("tiny/1", [files.digest(f"x{suffix}")])
    line = ["shift", "apply", "s.safetensors", f"y{suffix}", "--out", f"z{suffix}"]
    assert "moved by mean_shift" in refused(run, *line)
    files.save_embeddings(f"y{suffix}", gallery)  # another file of that name is not the described one
    assert run(*line)[0] == 0


@pytest.fixture
def mixed(run):
    """A folder of `embed`: shards of texts, and class vectors beside them."""
    write_folder("t20", "text_emb", [draw(1, 20)], model="tiny/1")
    np.save("t20/classes.npy", draw(3, 5).numpy())
    np.save("t20/labels.npy", np.arange(20))
    np.save("images.npy", draw(2, 20).numpy())
    return run


def test_every_verb_takes_the_same_shards(mixed):
    run = mixed
    said = "t20/text_emb"
    for line in (
        ["gap", "images.npy", "t20"],
        ["shift", "fit", "t20", "images.npy", "--out", "s.safetensors", "--components", "2"],
        ["shift", "apply", "s.safetensors", "t20", "--out", "moved"],
        ["shift", "compare", "t20", "images.npy", "--components", "2"],
        ["robust", "images.npy", "t20", "--gaussian", "1", "--components", "2"],
        ["index", "t20", "--compare", "images.npy", "--factory", "Flat"],
        ["index", "t20", "--out", "index"],
        ["search", "index", "t20", "--k", "1", "--json"],
    ):
        if line[0] == "index":
            pytest.importorskip("faiss")
        status, out, err = run(*line)
        assert status == 0, (line, err)
        assert said in err, (line, err)
        if line[0] == "search":
            assert np.ravel(json.loads(out)["ids"]).tolist() == list(range(20))
    assert json.loads(Path("index/manifest.json").read_text())["count"] == 20
    x, y = np.load("images.npy"), np.load("t20/text_emb/text_emb_0.npy")
    gap = json.loads(run("gap", "images.npy", "t20", "--json")[1])["centroid_distance"]
    assert gap == pytest.approx(float(np.linalg.norm(x.mean(0) - y.mean(0))), abs=1e-6)


VERBS = [
    ["shift", "fit", "f", "images.npy", "--out", "s.safetensors"],
    ["shift", "apply", "s.safetensors", "f", "--out", "moved"],
    ["shift", "compare", "images.npy", "f"],
    ["robust", "f", "images.npy", "--gaussian", "1"],
    ["robust", "images.npy", "f", "--gaussian", "1"],
    ["index", "f", "--out", "index"],
    ["index", "images.npy", "--compare", "f", "--factory", "Flat"],
    ["embed", "--verify", "f"],
]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["img_emb_0.npy", "text_emb_0.npy"],
            "expected the shards of one matrix in f, got img_emb_*.npy (1), text_emb_*",
        ),
        (["a.npy", "b.npy"], "expected the shards of one matrix in f, got a.npy (1), b.npy (1)"),
        (["x_1.npy", "x_01.npy"], "expected each shard once in f, got"),
        (
            ["x_1.npy", "x_1.safetensors"],
            "expected .npy or .safetensors files in the folder f, got .npy and .safetensors",
        ),
        (["img_emb/x_0.npy", "text_emb/y_0.npy"], "f, got img_emb and text_emb"),
        (["img_emb/x_0.npy", "x_0.npy"], "expected img_emb or text_emb in f, got img_emb and x_*.npy"),
        (["labels.npy"], "expected embeddings in the folder f, got labels.npy"),
        ([], "expected .npy or .safetensors files in the folder f, got neither"),
    ],
)
def test_two_meanings_are_refused(mixed, names, message):
    from gapkern import files

    run = mixed
    MeanShift(n_components=2).fit(draw(1), draw(2)).save("s.safetensors")
    os.makedirs("f")
    for i, name in enumerate(names):
        os.makedirs(os.path.dirname(f"f/{name}"), exist_ok=True)
        files.save_embeddings(f"f/{name}", draw(i, 20))
    for line in VERBS:
        if line[:2] == ["embed", "--verify"] and "and text_emb" in message:
            continue  # both are verified
        if line[0] == "index":
            pytest.importorskip("faiss")
        assert message in refused(run, *line), line
        assert not os.path.exists("moved")


def test_class_vectors_alone_are_the_embeddings(mixed):
    run = mixed
    os.makedirs("only")
    shutil.copy("t20/classes.npy", "only")
    status, out, err = run("gap", "only", "t20/classes.npy", "--json")
    assert (status, json.loads(out)["centroid_distance"]) == (0, 0)
    assert "images: classes.npy in only" in err

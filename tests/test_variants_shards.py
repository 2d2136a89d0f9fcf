"""Shards, shifts, indexes and results made from other rows than those beside them meet by name, or one line refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift, files, layout
from gapkern.embeddings import Embeddings, keys, verify, write_folder
from tests.rows_of import numbers, refused

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.usefixtures("coded_models")


def stored(folder, x, size, names=None, kind="img_emb"):
    parts = [torch.from_numpy(x[i : i + size]) for i in range(0, len(x), size)]
    return write_folder(folder, kind, parts, model="mine", names=names)


def test_shards_in_another_order_are_other_rows(run):
    x = numbers(6)
    stored("a", x, 2, [f"k{i}" for i in range(6)])
    first, second = Path("a/img_emb/img_emb_0.npy"), Path("a/img_emb/img_emb_1.npy")
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert "holds img_emb_1.npy's rows" in refused(run, "embed", "--verify", "a")
    np.save("y.npy", numbers(6, 1))
    status, out, _ = run("gap", "a", "y.npy", "--json")
    told = json.loads(out)["inputs"]["images"]
    assert status == 0
    assert told["sha256"] == [files.digest(p) for p in (first, second, "a/img_emb/img_emb_2.npy")]


def test_keys_that_come_twice_across_shards(run):
    with pytest.raises(ValueError, match="expected each row's key once, got 'k1' twice"):
        stored("a", numbers(4), 2, ["k0", "k1", "k2", "k1"])
    assert not list(Path("a").rglob("*.npy"))


def test_a_shift_follows_fewer_shards(run):
    x, y = numbers(12), numbers(12, 1) + 1
    np.save("y.npy", y)
    stored("a", x, 2)
    MeanShift(n_components=0).fit(x, y).save("s.safetensors")
    assert run("shift", "apply", "s.safetensors", "a", "--out", "moved")[0] == 0
    for size in (5, 12, 3):
        for old in Path("a/img_emb").iterdir():
            old.unlink()
        stored("a", x, size)
        status, _, err = run("shift", "apply", "s.safetensors", "a", "--out", "moved")
        assert status == 0, err
        assert np.allclose(Embeddings("moved")[:].numpy(), x + (y.mean(0) - x.mean(0)), atol=1e-5)
        assert len(list(Path("moved").glob("*.npy"))) == -(-12 // size)
        assert verify("moved")
    assert "expected embeddings that no shift has moved" in refused(
        run, "shift", "apply", "s.safetensors", "moved", "--out", "twice"
    )


def test_a_note_names_no_files_elsewhere(run):
    x = numbers(4)
    stored("a", x, 2)
    Path("kept.npy").write_bytes(b"mine")
    MeanShift(n_components=0).fit(x, x + 1).save("s.safetensors")
    assert run("shift", "apply", "s.safetensors", "a", "--out", "deep/moved")[0] == 0
    note = Path("deep/moved/shift.json")
    told = json.loads(note.read_text())
    for name in ("../../kept.npy", str(Path("kept.npy").absolute()), "..", "", "shift.json", "a/b.npy"):
        note.write_text(json.dumps(told | {"shards": {**told["shards"], name: {}}}))
        message = refused(run, "shift", "apply", "s.safetensors", "a", "--out", "deep/moved")
        assert "expected the names of shards" in message, message
    assert Path("kept.npy").read_bytes() == b"mine"


def test_a_gallery_that_changed_after_its_index(run):
    pytest.importorskip("faiss")
    x, y = numbers(40), numbers(3, 1)
    np.save("y.npy", y)
    names = [f"k{i}" for i in range(40)]
    stored("a", x, 7, names)

    def searched():
        status, out, err = run("search", "index", "y.npy", "--k", "4", "--json")
        assert status == 0, err
        return np.asarray(json.loads(out)["ids"])

    def right(rows):
        return ((y[:, None].astype(float) - rows[None]) ** 2).sum(2).argsort(1, kind="stable")[:, :4]

    assert run("index", "a", "--out", "index")[0] == 0
    assert np.array_equal(searched(), right(x))
    manifest = json.loads(Path("index/manifest.json").read_text())
    assert manifest["plan"]["order"] == keys.order(names) == Embeddings("a").order
    # Rows of the same size and time, in another order and under their own names.
    for old in Path("a").rglob("*.*"):
        old.unlink()
    stored("a", x[::-1].copy(), 7, names[::-1])
    assert run("index", "a", "--out", "index")[0] == 0
    assert np.array_equal(searched(), right(x[::-1]))
    assert json.loads(Path("index/manifest.json").read_text())["plan"]["order"] == keys.order(names[::-1])


def test_results_say_what_they_were_made_from(run):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    x, y = numbers(12), numbers(12, 1) + 1
    stored("a", x, 5, [f"k{i}" for i in range(12)], "text_emb")
    np.save("y.npy", y)
    np.save("labels.npy", np.arange(12))
    gallery = {"sha256": [files.digest(p) for p in layout.shards("a")], "order": Embeddings("a").order}
    queries, labels = {"sha256": [files.digest("y.npy")]}, {"sha256": [files.digest("labels.npy")]}
    assert run("shift", "fit", "a", "y.npy", "--out", "s.safetensors", "--components", "0")[0] == 0
    from safetensors import safe_open

    with safe_open("s.safetensors", "pt") as file:
        assert eval(file.metadata()["made_from"]) == {"gallery": gallery, "queries": queries}
    shift = MeanShift.load("s.safetensors")
    assert np.allclose(shift.shift_vector_, y.mean(0, dtype=float) - x.mean(0, dtype=float))
    status, out, err = run(
        "robust",
        "y.npy",
        "a",
        "--gaussian",
        "0.1",
        "--alphas",
        "0,1",
        "--labels",
        "labels.npy",
        "--shift",
        "s.safetensors",
        "--out",
        "swept",
        "--json",
    )
    assert status == 0, err
    wanted = {
        "queries": queries,
        "gallery": gallery,
        "labels": labels,
        "shift": {
            "name": "mean_shift",
            "shift": files.fingerprint(shift.shift_vector_),
            "alpha": 1.0,
            "normalize": False,
            "moves": "gallery",
            "fitted_here": False,
        },
    }
    assert json.loads(out)["inputs"] == json.loads(Path("swept/inputs.json").read_text()) == wanted
    status, out, _ = run(
        "index", "a", "--compare", "y.npy", "--factory", "SQ8", "--labels", "labels.npy", "--json", "--out", "kinds"
    )
    assert status == 0
    found = json.loads(out)["inputs"]
    assert found == json.loads(Path("kinds/inputs.json").read_text())
    assert (found["gallery"], found["compare"], found["labels"]) == (gallery, queries, labels)
    assert run("index", "a", "--out", "built")[0] == 0
    status, out, _ = run("search", "built", "y.npy", "--k", "1", "--json", "--out", "found.json")
    assert status == 0
    assert json.loads(out) == json.loads(Path("found.json").read_text())
    assert json.loads(out)["inputs"] == {
        "index": {"sha256": files.digest("built/manifest.json")},
        "queries": queries,
    }
    status, out, _ = run("gap", "y.npy", "a", "--json", "--out", "gap.json")
    told = json.loads(out)
    assert told == json.loads(Path("gap.json").read_text())
    assert told["inputs"] == {"images": queries, "texts": gallery}
    status, out, err = run("shift", "compare", "a", "y.npy", "--components", "0", "--labels", "labels.npy", "--json")
    assert status == 0, err
    assert json.loads(out)["inputs"] == {"gallery": gallery, "queries": queries, "labels": labels}
    assert told["centroid_distance"] == pytest.approx(float(np.linalg.norm(x.mean(0) - y.mean(0))), rel=1e-5)
    status, out, err = run("eval", "--images", "y.npy", "--texts", "a", "--labels", "labels.npy", "--json")
    assert status == 0, err
    assert json.loads(out)["results"][0]["inputs"] == {"images": queries, "texts": gallery, "labels": labels}


def test_pairs_of_a_report_meet_by_name(run):
    from gapkern.experiments.reproduce.embeddings import from_files

    x = numbers(6)
    names = [f"k{i}" for i in range(6)]
    stored("a", x, 6, names)
    stored("b", x[::-1].copy(), 6, names[::-1], "text_emb")
    np.save("right.npy", np.arange(6)[::-1].copy())
    source = from_files("a", "b", labels="right.npy")
    assert source.facts["inputs"]["gallery"]["order"] == keys.order(names[::-1])
    assert source.facts["inputs"]["labels"] == {"sha256": [files.digest("right.npy")]}
    np.save("wrong.npy", np.arange(1, 7))
    with pytest.raises(ValueError, match=r"expected values in \[0, 6\), gallery rows, got 6 in row 5; they count"):
        from_files("a", "b", labels="wrong.npy")


@pytest.mark.parametrize("value", ["1.0", True, [1.0], {"a": 1}])
def test_metrics_are_numbers(run, value):
    result = dict.fromkeys(("dataset", "model", "pretrained", "task", "language"), "x")
    Path("result.json").write_text(json.dumps(result | {"metrics": {"acc1": value}}))
    assert "expected numbers for metrics" in refused(run, "build", "result.json", "--out", "table.csv")
    assert not Path("table.csv").exists()
    Path("result.json").write_text(json.dumps(result | {"metrics": {"acc1": 0.25, "acc5": None}}))
    assert run("build", "result.json", "--out", "table.csv")[0] == 0
    with open("table.csv", encoding="utf-8", newline="") as file:
        assert [(row["acc1"], row["acc5"]) for row in csv.DictReader(file)] == [("0.25", "")]

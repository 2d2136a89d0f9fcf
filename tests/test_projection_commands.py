"""The projection on the command line: shift, index, sweep, eval, compare and embeddings' folders."""

import numpy as np
import pytest
import torch

from gapkern import Gaussian, Projection
from gapkern.embeddings import Embeddings, described, write_folder
from gapkern.gap import transforms
from gapkern.robustness import robustness
from tests.projected import METRICS, order, pairs
from tests.scenes import strict

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def stored(run):
    gallery, queries, near = pairs()
    for name, x in {"g": gallery, "q": queries, "near": near}.items():
        np.save(f"{name}.npy", x.numpy())
    return gallery, queries, near


@pytest.mark.faiss
@pytest.mark.parametrize("metric", METRICS)
def test_from_the_command_line(run, stored, metric):
    gallery, queries, near = stored
    line = ("project", "fit", "g.npy", "q.npy", "--out", "p.safetensors", "--components", "exact", "--metric", metric)
    status, out, err = run(*line, "--json")
    assert (status, err) == (0, "")
    facts = strict(out)
    assert (facts["components"], facts["dims"], facts["agreement"], facts["metric"]) == (39, 64, 1.0, metric)
    projection = Projection.load("p.safetensors")
    assert facts["offset"] == projection.offset_
    assert "projection: p.safetensors" in run(*line)[1]

    assert run("project", "apply", "p.safetensors", "q.npy", "--side", "queries", "--out", "moved.npy")[0] == 0
    assert np.array_equal(np.load("moved.npy"), projection.transform_queries(queries.numpy()))
    note = described("moved.npy")["transforms"]
    assert note == [{**transforms.facts(projection), "side": "queries"}]
    status, out, err = run("project", "apply", "p.safetensors", "moved.npy", "--side", "queries", "--out", "twice.npy")
    assert (status, out) == (2, "")
    assert "got moved.npy, moved by projection of 39 components" in err

    by = METRICS[metric]
    assert run("index", "g.npy", "--out", "index", "--metric", by, "--shift", "p.safetensors")[0] == 0
    found = strict(run("search", "index", "q.npy", "--k", "5", "--json")[1])
    assert found["ids"] == order(queries, gallery, metric)[:, :5].tolist()
    compared = (
        "index",
        "g.npy",
        "--compare",
        "q.npy",
        "--metric",
        by,
        "--factory",
        "Flat",
        "SQ8",
        "--shift",
        "p.safetensors",
        "--json",
    )
    assert [row["agreement"] for row in strict(run(*compared)[1])["rows"]][:2] == [1.0, 1.0]

    swept = ("robust", "q.npy", "g.npy", "--gaussian", "0.5", "--labels", "near.npy", "--json")
    without, with_it = strict(run(*swept, "--shift", "p.safetensors")[1])["rows"]
    truth = robustness(queries, gallery, Gaussian(0.5), labels=near, shift=projection, metric=metric)
    assert with_it["robustness"] == pytest.approx(truth.robustness, abs=1e-9)
    assert (without["alpha"], with_it["alpha"]) == (0, 1)
    assert with_it["robustness"] >= without["robustness"]
    assert with_it["clean_accuracy"] == without["clean_accuracy"]
    here = strict(run(*swept, "--project", "--components", "exact", "--metric", metric)[1])["rows"]
    assert here[1]["robustness"] == pytest.approx(truth.robustness, abs=1e-9)
    wrong = "ip" if metric == "l2" else "l2"
    assert run(*swept, "--shift", "p.safetensors", "--metric", wrong)[0] == 2


def test_eval_with_a_projections_file(run, stored):
    gallery, queries, near = stored
    unit = torch.nn.functional.normalize
    np.save("g1.npy", unit(gallery, dim=1).numpy())
    np.save("q1.npy", unit(queries, dim=1).numpy())
    for metric in ("l2", "ip"):
        line = ("g1.npy", "q1.npy", "--out", f"{metric}.safetensors", "--components", "exact", "--metric", metric)
        assert run("project", "fit", *line)[0] == 0
    line = ("eval", "--images", "q1.npy", "--texts", "g1.npy", "--labels", "near.npy", "--json")
    plain, projected = strict(run(*line, "--shift", "l2.safetensors")[1])["results"]
    expected = float((order(unit(queries, dim=1), unit(gallery, dim=1), "l2")[:, 0] == near).double().mean())
    assert plain["metrics"]["acc1"] == projected["metrics"]["acc1"] == expected
    assert (projected["transform"]["name"], projected["transform"]["shift"]) == ("projection", "l2")
    plain, projected = strict(run(*line, "--shift", "ip.safetensors")[1])["results"]
    assert plain["metrics"]["acc1"] == projected["metrics"]["acc1"] == expected
    assert (plain["transform"], projected["transform"]["metric"]) == ({"name": "none", "metric": "ip"}, "ip")


def test_compare_has_none_the_shift_and_the_projection(run, stored):
    line = ("shift", "compare", "g.npy", "q.npy", "--components", "exact", "20", "--labels", "near.npy")
    found = strict(run(*line, "--json")[1])
    gallery, queries, near = stored
    assert found["clean_accuracy"] == float((order(queries, gallery, "l2")[:, 0] == near).double().mean())
    for shift, projection in zip(found["rows"], found["projections"], strict=True):
        assert shift["closed"] == pytest.approx(projection["closed"], abs=1e-9)
        assert shift["k"] == projection["k"]
    assert found["projections"][0]["agreement"] == found["rows"][0]["agreement"] == 1
    after = order(Projection(20).fit(gallery).transform_queries(queries), gallery, "l2")[:, 0]
    assert found["projections"][1]["accuracy"] == float((after == near).double().mean())
    table = [text.split() for text in run(*line)[1].split("\n")]
    assert [row[0] for row in table if row and row[0] in ("none", "shift", "projection")] == [
        "none",
        "shift",
        "shift",
        "projection",
        "projection",
    ]


def test_a_folder_is_rotated_and_knows_by_what(run):
    gallery, queries, _ = pairs()
    write_folder("g", "text_emb", gallery.split(9), model="tiny/1")
    write_folder("q", "img_emb", [queries], model="tiny/1")
    assert run("project", "fit", "g", "q", "--out", "p.safetensors", "--components", "12", "--reduce")[0] == 0
    projection = Projection.load("p.safetensors")
    assert projection.model == "tiny/1"
    for side, move in (("gallery", projection.transform), ("queries", projection.transform_queries)):
        name, rows = side[0], gallery if side == "gallery" else queries
        assert run("project", "apply", "p.safetensors", name, "--side", side, "--out", f"{name}12")[0] == 0
        told = described(f"{name}12")
        assert (told["dims"], told["rows"], told["model"]) == (12, len(rows), "tiny/1")
        assert told["transforms"] == [{**transforms.facts(projection), "side": side}]
        torch.testing.assert_close(Embeddings(f"{name}12")[:], move(rows), rtol=0, atol=1e-6)
    status, out, _ = run("project", "apply", "p.safetensors", "g", "--side", "gallery", "--out", "g12")
    assert "(5 of 5 shards were there already)" in out
    status, _, err = run("shift", "fit", "g12", "q12", "--out", "s.safetensors")
    assert status == 0
    assert "gallery: a shift or a projection has moved these already" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("project", "apply", "g.npy", "q.npy", "--side", "queries", "--out", "o.npy"), "path: expected a safetensors"),
        (("project", "apply", "p.safetensors", "q.npy", "--out", "o.npy"), "--side"),
        (("project", "apply", "p.safetensors", "near2.npy", "--side", "queries", "--out", "o.npy"), "expected D = 64"),
        (("shift", "apply", "p.safetensors", "q.npy", "--out", "o.npy", "--alpha", "0.5"), "alpha: expected none"),
        (("project", "fit", "g.npy", "q.npy", "--out", "o.txt"), "out: expected a name ending in .safetensors"),
        (
            ("project", "fit", "g.npy", "q.npy", "--out", "o.safetensors", "--components", "-1"),
            "n_components: expected",
        ),
        (
            ("robust", "q.npy", "g.npy", "--gaussian", "1", "--project", "--shift", "p.safetensors"),
            "project: expected it",
        ),
        (
            ("robust", "q.npy", "g.npy", "--gaussian", "1", "--project", "--alphas", "0.5"),
            "alphas: expected 0, without",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(run, stored, line, message):
    gallery, queries, _ = stored
    Projection("exact").fit(gallery, queries).save("p.safetensors")
    np.save("near2.npy", np.ones((3, 5), np.float32))
    status, out, err = run(*line)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_auto_keeps_as_many_neighbours_as_the_command_asks(run):
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(600, 40, generator=generator) * torch.linspace(1, 0.2, 40)
    queries = gallery[:150] + 0.05 * torch.randn(150, 40, generator=generator)
    for name, x in {"g": gallery, "q": queries}.items():
        np.save(f"{name}.npy", x.numpy())
    line = ("project", "fit", "g.npy", "q.npy", "--components", "auto", "--neighbours", 10, "--out")
    assert run(*line, "ten.safetensors")[0] == 0
    found, expected = Projection.load("ten.safetensors"), Projection(neighbours=10).fit(gallery, queries)
    assert (found.neighbours, found.n_components_) == (10, expected.n_components_)
    assert found.n_components_ > Projection().fit(gallery, queries).n_components_
    assert "neighbours: expected" in run(*line, "x", "--neighbours", 0)[2]

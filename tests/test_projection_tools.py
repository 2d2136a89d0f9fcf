"""The projection where it is used: indexes, their files, quantisers, sweeps and evaluation."""

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Projection, sweep
from gapkern.evaluation import classification, retrieval
from gapkern.evaluation.settings import Settings
from gapkern.gap import transforms
from gapkern.ranks import Rows
from gapkern.robustness import robustness
from tests.projected import METRICS, order, pairs


@pytest.mark.faiss
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_an_index_finds_the_same_neighbours(factory, metric, reduce, tmp_path):
    from gapkern.retrieval import GapIndex, disk

    gallery, queries, _ = pairs(rows=200, dims=256)
    projection = Projection("exact", metric, reduce=reduce).fit(gallery)
    index = GapIndex(factory, METRICS[metric], projection).train(gallery).add(gallery)
    index.set_parameters("nprobe=4" if index.nlist else "efSearch=200") if factory != "Flat" else None
    assert (index.d, index.faiss_index.d) == (256, 199 if reduce else 256)
    found = index.search(queries, 10)
    if factory == "HNSW16":  # a graph misses some rows, and the same ones
        unit = torch.nn.functional.normalize(gallery, dim=1) if metric == "cosine" else gallery
        plain = GapIndex(factory, METRICS[metric]).add(unit).set_parameters("efSearch=200").search(queries, 10)[1]
        assert float((found[1] == plain).double().mean()) > 0.99
    else:
        assert torch.equal(found[1], order(queries, gallery, metric)[:, :10])
    index.save(tmp_path / "index")
    loaded = GapIndex.load(tmp_path / "index")
    assert isinstance(loaded.shift, Projection)
    if index.nlist:
        loaded.set_parameters("nprobe=4")
    assert all(torch.equal(a, b) for a, b in zip(loaded.search(queries, 10), found, strict=True)) or factory == "HNSW16"
    np.save(tmp_path / "g.npy", gallery.numpy())
    manifest = disk.build(tmp_path / "g.npy", tmp_path / "built", factory, METRICS[metric], projection)
    assert (manifest["dims"], manifest["count"]) == (256, 200)
    built = GapIndex.load(tmp_path / "built", mmap=True)
    if factory == "Flat":
        assert all(torch.equal(a, b) for a, b in zip(built.search(queries, 10), found, strict=True))


@pytest.mark.faiss
def test_an_index_stores_what_it_stored_without_a_projection():
    from gapkern.retrieval import GapIndex
    from gapkern.retrieval._faiss import faiss

    gallery, queries, _ = pairs()
    projection = Projection("exact").fit(gallery, queries)
    plain, projected = (GapIndex("SQ8", shift=s).train(gallery).add(gallery) for s in (None, projection))
    one, other = (faiss().serialize_index(index.faiss_index) for index in (plain, projected))
    assert np.array_equal(one, other)
    by_hand = plain.search(projection.transform_queries(queries), 5)
    assert all(torch.equal(a, b) for a, b in zip(projected.search(queries, 5), by_hand, strict=True))


@pytest.mark.faiss
@pytest.mark.filterwarnings("ignore:.*FAISS")
@pytest.mark.parametrize("factory", ["RaBitQ", "Flat"])
def test_a_centred_projection_is_rabitqs(factory, run, real_data, empty_folder):
    """By inner product its scores err by what the error has along y - centre. From a file, through an index."""
    from gapkern.retrieval import GapIndex

    images, texts = (torch.from_numpy(t) for t in real_data("clip"))
    gallery = texts[:50]
    np.save("g.npy", gallery.numpy())
    np.save("q.npy", images.numpy())
    line = ("project", "fit", "g.npy", "q.npy", "--metric", "ip", "--components", "exact")
    assert run(*line, "--centred", "--out", "centred.safetensors")[0] == 0
    assert run(*line, "--out", "linear.safetensors")[0] == 0
    assert run(*line, "--centred", "--reduce", "--out", "x")[2].startswith("gapkern project: centred: expected False")
    exact = order(images, gallery, "ip")[:, 0]
    kept = {}
    for name in ("centred", "linear"):
        shift = transforms.load(f"{name}.safetensors")
        assert transforms.facts(shift).get("centred", False) is (name == "centred")
        found = GapIndex(factory, "ip", shift).train(gallery).add(gallery).search(images, 1)[1][:, 0]
        kept[name] = float((found == exact).double().mean())
    if factory == "Flat":
        assert kept == {"centred": 1.0, "linear": 1.0}
    else:
        assert kept["centred"] > kept["linear"] + 0.2


@pytest.mark.faiss
@pytest.mark.parametrize(
    ("metric", "make", "message"),
    [
        ("ip", lambda x: Projection("exact", "l2").fit(x), "shift: expected a projection of metric='ip', got one"),
        ("l2", lambda x: Projection("exact", "ip").fit(x), "shift: expected a projection of metric='l2', got one"),
        ("l2", lambda x: Projection("exact", "cosine").fit(x), "shift: expected a projection of metric='l2'"),
        ("l2", lambda x: Projection(), "shift: expected a fitted Projection, got Projection"),
        ("l2", lambda x: MeanShift(), "shift: expected a fitted MeanShift, got MeanShift"),
        ("l2", lambda x: Projection("exact", reduce=True).fit(x[:1]), "shift: expected a projection that keeps"),
    ],
)
def test_a_projection_that_does_not_fit_the_index(metric, make, message):
    from gapkern.retrieval import GapIndex

    gallery, _, _ = pairs()
    with pytest.raises(ValueError, match=message):
        GapIndex("Flat", metric, make(gallery))
    with pytest.raises(ValueError, match="d: expected D = 64 as the shift, got 5"):
        GapIndex(shift=Projection("exact").fit(gallery), d=5)
    with pytest.raises(TypeError, match="shift: expected a MeanShift or a Projection, got str"):
        GapIndex(shift="exact")


@pytest.mark.faiss
@pytest.mark.filterwarnings("ignore:.*FAISS")
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_quantisers_gain_under_both_metrics(metric):
    from gapkern.retrieval import compare_quantisers

    gallery, queries, near = pairs(rows=120, dims=256, spread=0.2)
    projection = Projection("exact", metric).fit(gallery, queries)
    factories = ["Flat", "SQ8", "RaBitQ"]
    result = compare_quantisers(queries, gallery, factories, shift=projection, metric=metric, positives=near)
    rows = {(row["factory"], row["shift"]): row for row in result.rows}
    assert all(rows["Flat", shift]["agreement"] == 1 for shift in (False, True))
    assert rows["Flat", True]["recall@1"] == rows["Flat", False]["recall@1"]
    for name in ("agreement", "overlap@10"):
        assert rows["RaBitQ", True][name] > rows["RaBitQ", False][name]
    gap = queries.double().mean(0) - gallery.double().mean(0)
    hull = torch.linalg.qr((gallery[1:] - gallery[0]).double().T)[0]
    assert result.orthogonality == pytest.approx(float((gap - hull @ (hull.T @ gap)).norm() / gap.norm()), abs=1e-6)
    alone = compare_quantisers(queries, gallery, ["Flat"], metric="ip")
    assert [row["agreement"] for row in alone.rows] == [1.0, pytest.approx(1.0, abs=0.01)]


@pytest.mark.faiss
@pytest.mark.filterwarnings("ignore:.*FAISS")
def test_codes_about_centres_are_compared_with_queries_about_them():
    """By inner product RaBitQ's first neighbours are those of repair's centred projection, other codes' are not."""
    from gapkern._search import best
    from gapkern.retrieval import GapIndex, compare_quantisers

    gallery, queries, _ = pairs(rows=120, dims=256, spread=0.2)
    gallery, queries = gallery + 1, queries + 1
    plain = Projection("exact", "ip").fit(gallery, queries)
    centred = Projection("exact", "ip", centred=True).fit(gallery, queries)
    torch.testing.assert_close(
        plain.about_mean().transform_queries(queries), centred.transform_queries(queries), rtol=0, atol=1e-6
    )
    assert centred.about_mean() is centred
    assert Projection("exact").fit(gallery).about_mean().metric == "l2"
    found = {}
    for name, shift in (("plain", plain), ("centred", centred)):
        result = compare_quantisers(queries, gallery, ["SQ4", "RaBitQ"], shift=shift, metric="ip")
        found[name] = {row["factory"]: row["agreement"] for row in result.rows if row["shift"]}
        index = GapIndex("RaBitQ", "ip", shift, d=256).train(gallery).add(gallery)
        first = index.search(queries, 1)[1][:, 0]
        found[name]["alone"] = float((first == best(queries, gallery, "ip")).double().mean())
    assert found["plain"]["RaBitQ"] == found["centred"]["RaBitQ"] == found["centred"]["alone"] > found["plain"]["alone"]


def test_a_sweep_without_and_with_a_projection(tmp_path):
    gallery, queries, near = pairs(spread=0.2)
    noise = Gaussian(0.05, "per_coordinate")
    for metric in ("l2", "ip"):
        projection = Projection("exact", metric).fit(gallery, queries)
        result = sweep(
            queries, gallery, [0, 1], noise, near, shift=projection, metric=metric, journal=tmp_path / metric
        )
        for row, shift in zip(result.rows, (None, projection), strict=True):
            alone = robustness(queries, gallery, noise, labels=near, shift=shift, metric=metric)
            assert (row["robustness"], row["clean_accuracy"]) == (alone.robustness, alone.clean_accuracy)
        assert result.rows[1]["robustness"] > result.rows[0]["robustness"] + 0.03
        assert result.rows[1]["clean_accuracy"] == result.rows[0]["clean_accuracy"]
        again = sweep(queries, gallery, [0, 1], noise, near, shift=projection, metric=metric, journal=tmp_path / metric)
        assert again.rows == result.rows
    shifted = sweep(queries, gallery, [1], noise, near, shift=MeanShift(n_components="exact").fit(gallery, queries))
    projected = sweep(queries, gallery, [1], noise, near, shift=Projection("exact").fit(gallery, queries))
    assert projected.rows[0]["robustness"] > shifted.rows[0]["robustness"]
    with pytest.raises(ValueError, match=r"alphas: expected 0, without, or 1, with a projection, got \[0.5\]"):
        sweep(queries, gallery, [0.5], noise, shift=projection, metric="ip")
    with pytest.raises(ValueError, match="shift: expected a projection of metric='l2', got one of metric='ip'"):
        sweep(queries, gallery, [1], noise, shift=projection)


def test_tasks_are_as_accurate_and_survive_more_noise():
    gallery, queries, near = pairs()
    rows, classes = Rows(queries, 0, len(queries)), gallery
    unit = torch.nn.functional.normalize
    projection = Projection("exact").fit(unit(gallery, dim=1), unit(queries, dim=1))
    settings = Settings(projection, (Gaussian(0.3),), seeds=range(5), label="p")
    plain, noisy, same, gained = classification(rows, near, classes, settings)
    assert plain.metrics == same.metrics
    assert gained.metrics["acc1"] > noisy.metrics["acc1"]
    assert same.transform == {
        **transforms.facts(projection),
        "shift": "p",
        "offset": projection.offset_,
        "agreement": 1.0,
    }
    found = retrieval(rows, Rows(gallery, 0, len(gallery)), near[: len(gallery)], (1, 5), settings)
    # Where texts ask, nothing is projected; where images ask, no neighbour changes.
    assert found[0].metrics == found[2].metrics
    by_texts = [m for m in found[1].metrics if m.startswith("image_retrieval")]
    assert all(found[1].metrics[m] == found[3].metrics[m] for m in by_texts)
    assert Settings(Projection("exact", "ip").fit(gallery)).metric == "ip"


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_evaluation_is_by_the_projections_metric(metric):
    """With noise on the texts, whose rows differ in length then."""
    from gapkern.perturb import perturb

    gallery, queries, near = pairs()
    gallery, queries = (torch.nn.functional.normalize(x, dim=1) for x in (gallery, queries))
    projection, noise = Projection("exact", metric).fit(gallery), Gaussian(0.6)
    settings = Settings(projection, [noise], seeds=[3])
    found = classification(Rows(queries, 0, len(queries)), near, gallery, settings)
    disturbed = perturb(gallery, noise, 3)
    for outcome, rows in zip(found, (gallery, disturbed, gallery, disturbed), strict=True):
        moved = projection.transform_queries(queries) if outcome.transform["name"] == "projection" else queries
        right = order(moved, rows, metric)[:, 0] == near
        assert outcome.metrics["acc1"] == float(right.double().mean())
        assert outcome.transform["metric"] == metric
    assert found[3].metrics["acc1"] > found[1].metrics["acc1"]
    by_distance = order(queries, disturbed, "l2")[:, 0] == near
    assert found[1].metrics["acc1"] != float(by_distance.double().mean()), "or the metric would not matter here"


@pytest.mark.faiss
@pytest.mark.parametrize(
    ("name", "asks", "rows", "l2", "ip"),
    [
        ("clip", 0, 50, (0.706, 0.760, 0.809), (0.753, 0.902)),
        ("clip", 1, 50, (0.731, 0.788, 0.837), (0.782, 0.913)),
        ("videoclip", 1, 100, (0.635, 0.732, 0.789), (0.722, 0.836)),
    ],
)
def test_models_embeddings_keep_their_neighbours_and_survive_more_noise(real_data, name, asks, rows, l2, ip):
    """Without, shifted, projected; by inner product without and projected."""
    from gapkern.retrieval import GapIndex, recall

    features = torch.from_numpy(real_data(name))
    queries, gallery = features[asks].contiguous(), features[1 - asks][:rows].contiguous()
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    noise = Gaussian(0.04)
    found = [row["robustness"] for row in sweep(queries, gallery, [0, 1], noise, shift=shift).rows]
    for metric in ("l2", "ip"):
        projection = Projection("exact", metric).fit(gallery, queries)
        plain, projected = (GapIndex("Flat", metric, s).add(gallery) for s in (None, projection))
        assert torch.equal(projected.search(queries, 10)[1], plain.search(queries, 10)[1])
        pairs = range(rows)
        assert recall(queries[:rows], None, pairs, index=projected) == recall(queries[:rows], None, pairs, index=plain)
        measured = [
            r["robustness"] for r in sweep(queries, gallery, [0, 1], noise, shift=projection, metric=metric).rows
        ]
        if metric == "l2":
            assert [*found, measured[1]] == pytest.approx(l2, abs=0.002)
            assert measured[1] >= found[1]
        else:
            assert measured == pytest.approx(ip, abs=0.01)

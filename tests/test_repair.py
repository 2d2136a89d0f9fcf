"""`gapkern index repair`: what projecting the queries buys in indexes of others, computed again by hand."""

import numpy as np
import pytest
import torch

from gapkern import MeanShift, Projection
from gapkern.retrieval import GapIndex, repair
from gapkern.theory import certify
from tests.scenes import strict

faiss = pytest.importorskip("faiss")
pytestmark = [pytest.mark.faiss, pytest.mark.filterwarnings("ignore:.*FAISS"), pytest.mark.usefixtures("empty_folder")]
FACTORIES = ["Flat", "IVF8,Flat", "HNSW16", "SQ4", "PQ16x4np", "RaBitQ", "IVF8,RaBitQ", "IDMap2,SQ4", "PCA32,SQ8"]


def embeddings(rows=400, dims=96, rank=24, queries=120):
    """A gallery in few dimensions, and queries that a gap and an offset take out of them."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dims, rank, generator=generator))[0]
    gallery = torch.randn(rows, rank, generator=generator) @ basis.T
    near = gallery[torch.randint(rows, (queries,), generator=generator)]
    return gallery, near + 0.5 * torch.randn(queries, dims, generator=generator) + 0.2


def exact(queries, gallery, k, metric):
    y, x = queries.double(), gallery.double()
    cost = (y[:, None] - x).square().sum(2) if metric == "l2" else -y @ x.T
    return cost.argsort(dim=1, stable=True)[:, :k]


def written(path, factory, gallery, metric):
    index = faiss.index_factory(
        gallery.shape[1], factory, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    )
    index.train(gallery.numpy())
    if factory.startswith("IDMap"):
        index.add_with_ids(gallery.numpy(), 1000 + 2 * np.arange(len(gallery)))
    else:
        index.add(gallery.numpy())
    faiss.write_index(index, str(path))
    return index


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_the_figures_are_those_by_hand(factory, metric, tmp_path):
    gallery, queries = embeddings()
    index = written(tmp_path / "x.index", factory, gallery, metric)
    before = (tmp_path / "x.index").read_bytes()
    found, projection = repair(tmp_path / "x.index", queries, embeddings=gallery, n_components="exact", k=5)
    assert (tmp_path / "x.index").read_bytes() == before

    by_hand = Projection("exact", metric).fit(gallery, queries[::2])
    torch.testing.assert_close(projection.basis_ @ projection.basis_.T, by_hand.basis_ @ by_hand.basis_.T)
    held = queries[1::2]
    true = exact(held, gallery, 5, metric).numpy()
    true = 1000 + 2 * true if factory.startswith("IDMap") else true
    figures = []
    for x in (held, projection.transform_queries(held)):
        ids = index.search(x.numpy(), 5)[1]
        figures += [(ids[:, 0] == true[:, 0]).mean(), np.mean([len({*a} & {*b}) / 5 for a, b in zip(ids, true)])]  # noqa: B905
    named = (found.agreement_before, found.recall_before, found.agreement_after, found.recall_after)
    assert named == pytest.approx(figures, abs=1e-12)
    assert (found.metric, found.vectors, found.dims, found.rows, found.kept) == (metric, 400, 96, "embeddings", 1.0)
    assert (found.fitted, found.held_out, found.components, found.k) == (60, 60, 24, 5)
    if factory in ("RaBitQ", "IVF8,RaBitQ"):
        assert found.worth
        assert found.recall_after > found.recall_before + 0.02
    if factory in ("Flat", "HNSW16", "IVF8,Flat"):
        # Every score moves by the same: the same rows are visited.
        assert (found.agreement_after, found.gain) == (found.agreement_before, pytest.approx(0, abs=0.01))
        assert not found.worth or factory != "Flat"


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "SQ6", "SQ4", "PQ48x4np", "IDMap2,SQ6", "IVF8,SQ6", "IVF8,PQ48x4np", "PCA24,SQ6"],
)
def test_what_is_certified_is_what_the_index_finds(factory, metric, tmp_path):
    """FAISS's own answers, with all lists visited: a certified neighbour is always the first of them."""
    gallery, queries = embeddings(queries=400)
    index = written(tmp_path / "x.index", factory, gallery, metric)
    line = {"parameters": "nprobe=8"} if "IVF" in factory else {}
    found, projection = repair(tmp_path / "x.index", queries, embeddings=gallery, n_components="exact", **line)
    if metric == "ip" and "PCA" in factory:
        assert found.certified_before is found.certified_after is None
        return
    if "IVF" in factory:
        index.nprobe = 8
    held = queries[1::2]
    true = exact(held, gallery, 1, metric)[:, 0].numpy()
    true = 1000 + 2 * true if factory.startswith("IDMap") else true
    ids = np.arange(len(gallery)) if not factory.startswith("IDMap") else 1000 + 2 * np.arange(len(gallery))
    module = faiss.downcast_index(index)
    inner = faiss.downcast_index(module.index) if factory.startswith("IDMap") else module
    if "IVF" in factory:
        inner.make_direct_map()
    decoded = inner.reconstruct_n(0, len(ids))
    sure = certify(held, gallery, decoded, projection)
    for one, x in ((sure.before, held), (sure.after, projection.transform_queries(held))):
        right = index.search(x.numpy(), 1)[1][:, 0] == true
        assert not (one.certified.numpy() & ~right).any()
    shares = [float(one.certified.double().mean()) for one in (sure.before, sure.after)]
    assert [found.certified_before, found.certified_after] == pytest.approx(shares, abs=1e-12)
    if factory == "SQ4":
        assert found.certified_after > found.certified_before + 0.05


def test_rabitq_by_inner_product_wants_queries_near_its_centre(tmp_path):
    gallery, queries = embeddings()
    index = written(tmp_path / "x.index", "RaBitQ", gallery + 1, "ip")
    found, projection = repair(tmp_path / "x.index", queries + 1, embeddings=gallery + 1, n_components="exact")
    assert projection.centred
    true = exact((queries + 1)[1::2], gallery + 1, 10, "ip").numpy()
    plain = Projection("exact", "ip").fit(gallery + 1).transform_queries((queries + 1)[1::2]).numpy()
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(index.search(plain, 10)[1], true, strict=True)])
    assert found.recall_after > recall + 0.05
    assert found.recall_after > found.recall_before + 0.05


@pytest.mark.parametrize("factory", ["RaBitQ", "IVF8,RaBitQ", "PQ48x4fs", "IVF8,PQ48x4fs", "SQ4,RFlat", "IVF8,PQ8+16"])
def test_other_scores_than_those_of_the_codes_are_not_certified(factory, tmp_path):
    gallery, queries = embeddings(600)
    written(tmp_path / "x.index", factory, gallery, "l2")
    found, _ = repair(tmp_path / "x.index", queries, embeddings=gallery)
    assert found.certified_before is found.certified_after is None


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "IDMap,Flat", "SQ8", "IVF8,SQ8", "OPQ8,PQ8x4"])
def test_without_embeddings_rows_are_what_the_index_holds(factory, tmp_path):
    gallery, queries = embeddings()
    index = written(tmp_path / "x.index", factory, gallery, "l2")
    if "IVF" in factory:
        index.nprobe = 8
    found, _ = repair(tmp_path / "x.index", queries, parameters="nprobe=8" if "IVF" in factory else None, k=5)
    raw = factory in ("Flat", "IVF8,Flat", "HNSW16", "IDMap,Flat")
    assert found.rows == ("index" if raw else "codes")
    if factory != "HNSW16":
        # What codes decode to is searched without error.
        assert found.agreement_before >= 0.98
        assert found.recall_before >= 0.98


def test_from_the_command_line(run, tmp_path):
    gallery, queries = embeddings()
    np.save("g.npy", gallery.numpy())
    np.save("q.npy", queries.numpy())
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "knn.index", "RaBitQ", gallery, "l2")
    written(tmp_path / "flat.faiss", "Flat", gallery, "l2")
    line = ("index", "repair", "folder", "--queries", "q.npy", "--embeddings", "g.npy", "--out", "p.safetensors")
    status, out, err = run(*line, "--components", "exact")
    assert (status, err) == (0, "")
    assert "projection: p.safetensors" in out
    projection = Projection.load("p.safetensors")
    facts = strict(run(*line, "--components", "exact", "--json")[1])
    assert (facts["out"], facts["worth"], facts["components"]) == ("p.safetensors", True, 24)
    assert facts["recall_after"] > facts["recall_before"]

    GapIndex().add(gallery).save("index")
    moved = strict(run("search", "index", "q.npy", "--k", "3", "--project", "p.safetensors", "--json")[1])
    by_hand = GapIndex(shift=projection).add(gallery).search(queries, 3)
    assert moved["ids"] == by_hand[1].tolist() == exact(queries, gallery, 3, "l2").tolist()
    np.testing.assert_allclose(moved["distances"], by_hand[0].numpy())

    status, out, _ = run("index", "repair", "flat.faiss", "--queries", "q.npy", "--out", "none.safetensors")
    assert status == 0
    assert "nothing to gain: recall@10 changes by " in out
    assert not (tmp_path / "none.safetensors").exists()
    # A gallery of that name is still one.
    np.save("repair.npy", gallery.numpy())
    assert run("index", "repair.npy", "--out", "other")[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("nothing.index",), "existing: expected FAISS's file of an index or a folder with one, got nothing.index"),
        (("q.npy",), "existing: expected an index that FAISS"),
        (("empty",), "existing: expected one of .index .faiss .bin .ivf in the folder empty, got none"),
        (("two",), "in the folder two, got a.index, b.index"),
        (("binary.index",), "existing: expected an index that FAISS"),
        (("cut.index",), "existing: expected an index that FAISS"),
        (("blank.index",), "existing: expected an index with vectors, got none"),
        (("l1.index",), "existing: expected an index by L2 or inner product"),
        (("shifted",), "existing: expected an index without a shift or a projection"),
        (("x.index", "--k", "0"), "k: expected an integer >= 1"),
        (("x.index", "--embeddings", "q.npy"), "embeddings: expected shape (400, 96)"),
        (("x.index", "--queries", "few.npy"), "queries: expected 4 or more"),
        (("x.index", "--queries", "narrow.npy"), "queries: expected D = 96"),
        (("x.index", "--components", "-2"), "n_components: expected"),
        (("x.index", "--parameters", "nprobe=3"), "text: expected FAISS search parameters"),
        (("x.index", "--out", "p.txt"), "out: expected a name ending in .safetensors"),
    ],
)
def test_what_is_no_index_is_one_line(run, tmp_path, line, message):
    gallery, queries = embeddings()
    for name, rows in {"q": queries, "few": queries[:3], "narrow": queries[:, :9].contiguous()}.items():
        np.save(f"{name}.npy", rows.numpy())
    for name in ("empty", "two"):
        (tmp_path / name).mkdir()
    for name in ("x.index", "two/a.index", "two/b.index"):
        written(tmp_path / name, "Flat", gallery, "l2")
    data = (tmp_path / "x.index").read_bytes()
    (tmp_path / "cut.index").write_bytes(data[: len(data) // 2])
    faiss.write_index(faiss.IndexFlatL2(96), "blank.index")
    other = faiss.IndexFlat(96, faiss.METRIC_L1)
    other.add(gallery.numpy())
    faiss.write_index(other, "l1.index")
    binary = faiss.IndexBinaryFlat(96)
    binary.add(np.zeros((3, 12), np.uint8))
    faiss.write_index_binary(binary, "binary.index")
    GapIndex(shift=MeanShift().fit(gallery, queries)).add(gallery).save("shifted")
    more = () if "--queries" in line else ("--queries", "q.npy")
    status, out, err = run("index", "repair", *line, *more)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_projection_that_does_not_fit_the_search(run):
    gallery, queries = embeddings()
    np.save("q.npy", queries.numpy())
    GapIndex(model="a/1").add(gallery).save("index")
    made = {
        "ip": Projection("exact", "ip").fit(gallery),
        "reduced": Projection("exact", reduce=True).fit(gallery),
        "narrow": Projection("exact").fit(gallery[:, :9]),
        "other": Projection("exact", model="b/1").fit(gallery),
    }
    for name, projection in made.items():
        projection.save(f"{name}.safetensors")
        status, out, err = run("search", "index", "q.npy", "--project", f"{name}.safetensors")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "project: expected" in err

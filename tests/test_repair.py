"""`gapkern index repair`: what projecting the queries buys in indexes of others, computed again by hand."""

import hashlib

import numpy as np
import pytest
import torch

from gapkern import MeanShift, Projection
from gapkern.retrieval import GapIndex, repair
from gapkern.theory import certify
from tests.scenes import strict

faiss = pytest.importorskip("faiss")
pytestmark = [pytest.mark.faiss, pytest.mark.filterwarnings("ignore:.*FAISS"), pytest.mark.usefixtures("empty_folder")]
FACTORIES = [
    *("Flat", "IVF8,Flat", "HNSW16", "SQ8", "SQ4", "PQ16x4np", "IVF8,PQ16x4np", "OPQ16,PQ16x4np", "RaBitQ"),
    *("IVF8,RaBitQ", "IDMap2,SQ4", "PCA32,SQ8"),
]


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

    # FAISS's file itself, and ours that holds the same codes.
    before = (tmp_path / "folder" / "knn.index").read_bytes()
    theirs = strict(run("search", "folder", "q.npy", "--k", "3", "--project", "p.safetensors", "--json")[1])
    by_codes = faiss.read_index("folder/knn.index").search(projection.transform_queries(queries).numpy(), 3)[1]
    assert theirs["ids"] == by_codes.tolist()
    assert theirs["inputs"]["index"]["sha256"] == hashlib.sha256(before).hexdigest()
    assert facts["inputs"]["existing"] == theirs["inputs"]["index"]
    assert set(facts["inputs"]) == {"existing", "queries", "embeddings"}
    assert (tmp_path / "folder" / "knn.index").read_bytes() == before

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


def in_parts(folder, matrix, sizes=(150, 250), start=9):
    """Shards whose numbers sort otherwise as texts: 9 and 10."""
    folder.mkdir(parents=True)
    for number, part in enumerate(matrix.split(sizes), start):
        np.save(folder / f"img_emb_{number}.npy", part.numpy())


def test_the_embeddings_of_autofaiss_are_found_in_the_order_of_its_ids(run, tmp_path):
    gallery, queries = embeddings()
    np.save("q.npy", queries.numpy())
    in_parts(tmp_path / "embeddings", gallery)
    # autofaiss reads img_emb_10 before img_emb_9.
    as_texts = torch.cat([gallery[150:], gallery[:150]])
    written(tmp_path / "knn.index", "RaBitQ", as_texts, "ip")
    (tmp_path / "index_infos.json").write_text('{"index_key": "RaBitQ", "nb vectors": 400}')
    found = strict(run("index", "repair", ".", "--queries", "q.npy", "--json")[1])
    assert (found["rows"], found["index"], found["metric"]) == ("embeddings", "IndexRaBitQ", "ip")
    by_hand, _ = repair(tmp_path / "knn.index", queries, embeddings=as_texts)
    assert by_hand.to_dict().items() <= found.items()
    assert found["recall_after"] > found["recall_before"]
    out = run("index", "repair", "knn.index", "--queries", "q.npy")[1:]
    assert "embeddings: embeddings" in "".join(out)
    (tmp_path / "embeddings").rename(tmp_path / "elsewhere")
    named = strict(run("index", "repair", ".", "--queries", "q.npy", "--embeddings", "elsewhere", "--json")[1])
    assert {**named, "inputs": {}} == {**found, "inputs": {}}


def test_the_embeddings_of_clip_retrieval_are_those_of_the_side(run, tmp_path):
    texts, images = embeddings(queries=400)
    np.save("q.npy", images[:100].numpy())
    (tmp_path / "metadata").mkdir()
    for side, rows in (("img", images), ("text", texts)):
        (tmp_path / f"{side}_emb").mkdir()
        np.save(tmp_path / f"{side}_emb" / f"{side}_emb_0.npy", rows.numpy())
    written(tmp_path / "image.index", "SQ4", images, "ip")
    written(tmp_path / "text.index", "RaBitQ", texts, "ip")
    status, out, err = run("index", "repair", ".", "--queries", "q.npy")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "got image.index, text.index; name it" in err
    for name, rows in (("text.index", texts), ("image.index", images)):
        found = strict(run("index", "repair", name, "--queries", "q.npy", "--json")[1])
        by_hand, _ = repair(tmp_path / name, images[:100], embeddings=rows)
        assert found["rows"] == "embeddings"
        assert by_hand.to_dict().items() <= found.items()
    # Of two sets of the size, the one that the codes stand for.
    (tmp_path / "text.index").rename("knn.index")
    (tmp_path / "image.index").unlink()
    found = strict(run("index", "repair", ".", "--queries", "q.npy", "--json")[1])
    assert (found["rows"], found["recall_before"]) == (
        "embeddings",
        repair("knn.index", images[:100], embeddings=texts)[0].recall_before,
    )
    (tmp_path / "embeddings").mkdir()
    np.save(tmp_path / "embeddings" / "copy.npy", texts.numpy())
    status, out, err = run("index", "repair", ".", "--queries", "q.npy")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "embeddings: expected one set beside" in err


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "RaBitQ", "IVF8,PQ16x4np", "OPQ16,PQ16x4np", "HNSW16"])
def test_embeddings_of_another_order_or_origin_are_refused(factory, tmp_path):
    gallery, queries = embeddings()
    written(tmp_path / "x.index", factory, gallery, "l2")
    assert repair(tmp_path / "x.index", queries, embeddings=gallery)[0].rows == "embeddings"
    for other in (gallery.flip(0), torch.randn(400, 96, generator=torch.Generator().manual_seed(1))):
        with pytest.raises(ValueError, match="embeddings: expected the rows that are in "):
            repair(tmp_path / "x.index", queries, embeddings=other)


@pytest.mark.parametrize(
    ("factory", "metric"),
    [*((factory, "l2") for factory in FACTORIES), *((factory, "ip") for factory in ("Flat", "IVF8,Flat", "RaBitQ"))],
)
def test_an_index_of_others_is_searched_as_it_is(factory, metric, tmp_path):
    gallery, queries = embeddings()
    index = written(tmp_path / "x.index", factory, gallery, metric)
    projection = Projection("exact", metric).fit(gallery)
    for shift, asked in ((None, queries), (projection, projection.transform_queries(queries))):
        found = GapIndex.from_faiss(tmp_path / "x.index", shift).search(queries, 5)[1].numpy()
        theirs = exact(asked, gallery, 5, metric).numpy() if factory == "Flat" else index.search(asked.numpy(), 5)[1]
        assert (found == theirs).mean() > (0.999 if factory == "Flat" else 0.97)  # equal distances go by their ids
        assert {*found.ravel()} <= {*GapIndex.from_faiss(tmp_path / "x.index").ids()}


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (lambda x: Projection("exact", "ip").fit(x), "shift: expected a projection of metric='l2'"),
        (lambda x: Projection("exact", reduce=True).fit(x), "shift: expected a projection that keeps the width"),
        (lambda x: Projection("exact").fit(x[:, :9]), "shift: expected D = 96"),
        (lambda x: MeanShift().fit(x, x + 1), "shift: expected a Projection, got MeanShift"),
    ],
)
def test_a_shift_that_does_not_fit_an_index_of_others(shift, message, tmp_path):
    gallery, _ = embeddings()
    written(tmp_path / "x.index", "SQ8", gallery, "l2")
    with pytest.raises((TypeError, ValueError), match=message):
        GapIndex.from_faiss(tmp_path / "x.index", shift(gallery))
    outer = faiss.IndexPreTransform(faiss.PCAMatrix(96, 32), faiss.IndexIDMap(faiss.IndexFlatL2(32)))
    outer.train(gallery.numpy())
    outer.add_with_ids(gallery.numpy(), np.arange(400)) if hasattr(outer, "add_with_ids") else None
    faiss.write_index(outer, str(tmp_path / "inner.index"))
    with pytest.raises(ValueError, match="path: expected"):
        GapIndex.from_faiss(tmp_path / "inner.index")


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

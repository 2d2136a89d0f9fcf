"""Mixed galleries: equal to the published formulas document by document, and to scikit-learn's NDCG."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkern import MeanShift
from gapkern.cli import main
from gapkern.evaluation import mixed_retrieval
from gapkern.gap import MixedShift, NotFittedError, fuse
from gapkern.reference import mixed as plain
from tests.scenes import strict

NAMES = ("image", "text", "fused")


def documents(rows=60, dims=24, seed=0):
    """Images, texts and queries of the same things, each side with an offset of its own."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, rows, dims, generator=generator, dtype=torch.float64)
    offset = 3 * torch.randn(3, dims, generator=generator, dtype=torch.float64)
    offset[2] = offset[1] + 0.3 * offset[2]  # queries are texts
    scale = 0.5 + torch.rand(3, rows, 1, generator=generator, dtype=torch.float64)
    return (scale * (meaning + 0.8 * noise + offset[:, None])).unbind(0)


def mixed(images, texts):
    """One modality each, by turns: gallery, names, labels."""
    names = [NAMES[i % 3] for i in range(len(images))]
    both = fuse(texts, images)
    rows = torch.stack([{"image": images, "text": texts, "fused": both}[name][i] for i, name in enumerate(names)])
    return rows, names, torch.arange(len(images))


def published(images, texts, queries, names, weight=0.5):
    """The means, the gallery and the queries as the paper has them, one document after the other."""

    def mean(rows):
        return torch.stack([plain.unit(row) for row in rows]).mean(0)

    of_text = mean(texts[[i for i, name in enumerate(names) if name == "text"]])
    of_image = mean(images[[i for i, name in enumerate(names) if name == "image"]])
    rows = [
        plain.document(
            None if name == "image" else texts[i], None if name == "text" else images[i], of_text, of_image, weight
        )
        for i, name in enumerate(names)
    ]
    return torch.stack(rows), torch.stack([plain.query(y, mean(queries)) for y in queries])


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_means_are_the_published_ones(weight):
    images, texts, queries = documents()
    gallery, names, _ = mixed(images, texts)
    fused = fuse(texts, images, weight)
    gallery = torch.where(torch.tensor([name == "fused" for name in names])[:, None], fused, gallery)
    shift = MixedShift(weight=weight).fit(gallery, queries, names)
    expected, asked = published(images, texts, queries, names, weight)
    torch.testing.assert_close(shift.transform(gallery, names), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(shift.transform_queries(queries), asked, rtol=0, atol=1e-12)
    assert shift.modalities_ == ["image", "text"]
    assert isinstance(shift.transform(gallery.float().numpy(), np.array(names)), np.ndarray)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_figures_are_those_of_the_definitions(metric):
    images, texts, queries = documents(rows=40)
    gallery = torch.cat([images, texts, fuse(texts, images)])
    names = [name for name in NAMES for _ in range(40)]
    labels, held = torch.arange(40) // 2, (torch.arange(40) // 2).repeat(3)
    found = mixed_retrieval(queries, gallery, names, labels, held, ks=(1, 3), depth=4, metric=metric)

    y, x = queries, gallery
    if metric == "cosine":
        y, x = (torch.stack([plain.unit(row) for row in t]) for t in (y, x))
    scores = y @ x.T if metric != "l2" else -(y[:, None] - x).square().sum(2)
    gains = (labels[:, None] == held).double()
    assert found.ndcg == pytest.approx(np.mean([plain.ndcg(*q, 4) for q in zip(scores, gains, strict=True)]), abs=1e-12)
    metrics = pytest.importorskip("sklearn.metrics")
    assert found.ndcg == pytest.approx(metrics.ndcg_score(gains.numpy(), scores.numpy(), k=4), abs=1e-9)
    order = scores.argsort(1, descending=True)
    kinds = np.array(names)
    hit = np.take_along_axis(gains.numpy() > 0, order.numpy(), 1)
    assert found.recall == pytest.approx({k: hit[:, :k].any(1).mean() for k in (1, 3)})
    firsts = {name: (kinds[order[:, 0]] == name).mean() for name in NAMES}
    assert found.bias == pytest.approx(sum(abs(f - 1 / 3) for f in firsts.values()) / 2)
    for name in NAMES:
        of = hit & (kinds[order] == name)
        outranked = [
            any(kinds[j] != name and not gains[q, j] for j in order[q, : int(of[q].argmax())]) for q in range(40)
        ]
        one = found.of[name]
        assert (one.rows, one.first, one.queries) == (pytest.approx(1 / 3), pytest.approx(firsts[name]), 40)
        assert one.recall == pytest.approx({k: of[:, :k].any(1).mean() for k in (1, 3)})
        assert one.outranked == pytest.approx(np.mean(outranked))
    best = [
        any(kinds[j] != kinds[order[q, int(hit[q].argmax())]] for j in order[q, : int(hit[q].argmax())])
        for q in range(40)
    ]
    assert found.outranked == pytest.approx(np.mean(best))


def test_closing_each_gap_ends_the_bias():
    images, texts, queries = documents(rows=90, dims=32, seed=1)
    gallery, names, labels = mixed(images, texts)
    found = {
        method: mixed_retrieval(
            queries,
            gallery,
            names,
            labels,
            labels,
            metric="cosine" if method != "shift" else "l2",
            shift=None if method is None else MixedShift(method, n_components=0).fit(gallery, queries, names),
        )
        for method in (None, "means")
    }
    assert found[None].of["image"].outranked > 0.9
    assert found["means"].of["image"].outranked < 0.5
    assert found["means"].ndcg > found[None].ndcg + 0.1
    assert found["means"].bias < found[None].bias / 2


def test_a_shift_of_each_modality_keeps_its_order_and_brings_it_near():
    images, texts, queries = documents(rows=12, dims=40)
    gallery, names = torch.cat([images, texts]), ["image"] * 12 + ["text"] * 12
    shift = MixedShift("shift").fit(gallery, queries, names)
    moved = shift.transform(gallery, names)
    assert torch.equal(shift.transform_queries(queries), queries)
    for name, rows in (("image", slice(0, 12)), ("text", slice(12, 24))):
        own = MeanShift(n_components="exact").fit(gallery[rows], queries)
        torch.testing.assert_close(moved[rows], own.transform(gallery[rows]), rtol=0, atol=1e-12)
        before, after = ((queries[:, None] - x[rows]).square().sum(2) for x in (gallery, moved))
        assert torch.equal(before.argsort(1), after.argsort(1))
        assert float(after.mean()) < float(before.mean())
        torch.testing.assert_close(shift.shifts_[name], own.shift_vector_)
    torch.testing.assert_close(
        shift.transform(fuse(texts, images, 0.5), "fused") - fuse(texts, images),
        ((shift.shifts_["text"] + shift.shifts_["image"]) / 2).expand(12, -1),
    )


@pytest.mark.parametrize("method", ["means", "shift"])
def test_batches_halves_and_files_are_the_same(method, tmp_path):
    images, texts, queries = documents()
    gallery, names, _ = mixed(images, texts)
    whole = MixedShift(method, model="ViT").fit(gallery, queries, names)
    parts = MixedShift(method, model="ViT").partial_fit(queries=queries[:20])
    parts.partial_fit(gallery[:25], queries[20:50], names[:25])
    parts.merge(MixedShift(method).partial_fit(gallery[25:], queries[50:], names[25:]))
    expected = whole.transform(gallery, names)
    torch.testing.assert_close(parts.transform(gallery, names), expected, rtol=0, atol=1e-10)
    whole.save(tmp_path / "mixed.safetensors", made_from={"of": "nothing"})
    loaded = MixedShift.load(tmp_path / "mixed.safetensors")
    assert torch.equal(loaded.transform(gallery, names), expected)
    assert torch.equal(loaded.transform_queries(queries), whole.transform_queries(queries))
    assert repr(loaded) == repr(whole)
    assert torch.equal(pickle.loads(pickle.dumps(whole)).transform(gallery, names), expected)
    with pytest.raises(ValueError, match="a loaded one can be applied but not added to"):
        loaded.partial_fit(gallery, queries, names)
    with pytest.raises(ValueError, match="model: expected embeddings of ViT"):
        loaded.transform(gallery, names, model="SigLIP")
    with pytest.raises(ValueError, match=r"expected a gapkern\.MeanShift file"):
        MeanShift.load(tmp_path / "mixed.safetensors")


def test_what_is_refused():
    images, texts, queries = documents(rows=6)
    gallery, names, labels = mixed(images, texts)
    fitted = MixedShift().fit(gallery, queries, names)
    for call, error, message in (
        (
            lambda: MixedShift("mean").fit(gallery, queries, names),
            ValueError,
            "method: expected one of 'means', 'shift'",
        ),
        (lambda: MixedShift(weight=2).fit(gallery, queries, names), ValueError, "weight: expected a finite number"),
        (lambda: MixedShift().fit(gallery, queries, names[:3]), ValueError, "modality: expected 6 names"),
        (lambda: MixedShift().fit(gallery, queries, None), TypeError, "modality: expected a name for each row"),
        (lambda: MixedShift().fit(gallery, queries, [0] * 6), TypeError, "modality: expected names, got int64"),
        (lambda: MixedShift().fit(gallery, queries[:, :3], names), ValueError, "queries: expected D = 24"),
        (lambda: MixedShift().transform(gallery, names), NotFittedError, "MixedShift: call fit before use"),
        (lambda: fitted.transform(gallery, "audio"), ValueError, "modality: expected one of image, text, fused, got"),
        (
            lambda: MixedShift().fit(images, queries, "image").transform(gallery, "fused"),
            ValueError,
            "modality: expected 'text' and 'image' in the fit for 'fused', got no 'text'",
        ),
        (lambda: fuse(texts, images[:3]), ValueError, "images: expected 6 rows as in texts"),
        (
            lambda: mixed_retrieval(queries, gallery, names, labels + 9, labels),
            ValueError,
            "labels: expected a gallery",
        ),
        (lambda: mixed_retrieval(queries, gallery, names, labels, labels[:2]), ValueError, "gallery_labels: expected"),
        (
            lambda: mixed_retrieval(queries, gallery, names, labels * 1.0, labels),
            TypeError,
            "labels: expected integers",
        ),
        (
            lambda: mixed_retrieval(queries, gallery, names, labels, labels, shift=1),
            TypeError,
            "shift: expected a Mixed",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_real_captions_and_images_in_one_gallery(real_data):
    """Every other caption asks; all images and the other captions are searched. As they are, not one image is found."""
    images, texts = (torch.from_numpy(t) for t in real_data("clip"))
    asking = torch.arange(0, 500, 2)
    gallery, names = torch.cat([images, texts[1::2]]), ["image"] * 500 + ["text"] * 250
    held = torch.cat([torch.arange(500), torch.arange(1, 500, 2)])
    none = mixed_retrieval(texts[asking], gallery, names, asking, held)
    means = mixed_retrieval(
        texts[asking], gallery, names, asking, held, shift=MixedShift().fit(gallery, texts[asking], names)
    )
    assert (none.ndcg, none.of["image"].first, none.outranked) == (0, 0, 1)
    assert means.ndcg == pytest.approx(0.217, abs=0.002)
    assert means.recall[10] == pytest.approx(0.476, abs=0.005)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*line):
        status = main([str(part) for part in line])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_from_the_command_line(run):
    images, texts, queries = documents()
    for name, x in {"i": images, "t": texts, "q": queries}.items():
        np.save(f"{name}.npy", x.float().numpy())
    line = ("gap", "mixed", "i.npy", "t.npy", "q.npy")
    status, out, err = run(*line, "--fused", "0.5", "--out", "mixed.json")
    assert (status, err) == (0, "")
    assert "ndcg@10" in out
    assert "outranked" in out
    told = strict(Path("mixed.json").read_text())
    assert told == strict(run(*line, "--fused", "0.5", "--json")[1])
    x = torch.cat([images, texts, fuse(texts, images)]).float()
    names = [name for name in ("image", "text", "fused") for _ in range(60)]
    labels = torch.arange(60)
    by_hand = mixed_retrieval(queries.float(), x, names, labels, labels.repeat(3))
    assert told["methods"]["none"]["ndcg@10"] == pytest.approx(by_hand.ndcg, abs=1e-6)
    shift = MixedShift().fit(x, queries.float(), names)
    by_hand = mixed_retrieval(queries.float(), x, names, labels, labels.repeat(3), shift=shift)
    for name, value in by_hand.to_dict().items():
        if name != "modalities":
            assert told["methods"]["means"][name] == pytest.approx(value, abs=1e-6)
    one = strict(run(*line, "--split", "--seed", "3", "--json")[1])
    assert one["methods"]["none"]["modalities"]["image"]["rows"] == pytest.approx(0.5)
    assert one != strict(run(*line, "--split", "--seed", "4", "--json")[1])
    assert run(*line, "--save", "m.safetensors")[0] == 0
    assert MixedShift.load("m.safetensors").modalities_ == ["image", "text"]
    status, out, err = run("gap", "mixed", "i.npy", "t.npy", "q.npy", "--fused", "3")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "weight: expected" in err

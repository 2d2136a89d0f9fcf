"""Recall as it is defined, and what quantisers keep of it."""

import json

import numpy as np
import pytest
import torch

from gapkern import files
from gapkern.retrieval import GapIndex, compare_quantisers, recall
from gapkern.testing import clip_like
from tests.scenes import searched, truth
from tests.warm import peak_memory

pytestmark = pytest.mark.faiss


def defined(queries, gallery, positives, ks, metric="l2"):
    """Recall as it is defined, with whole matrices."""
    right = torch.zeros(len(queries), len(gallery), dtype=torch.bool)
    for q, rows in enumerate(positives):
        right[q, torch.as_tensor(rows)] = True
    result = {}
    for name, mine, a, b in (("image", right, queries, gallery), ("text", right.T, gallery, queries)):
        order = truth(a, b, metric)[0]
        for k in ks:
            hit = mine.gather(1, order[:, :k]).any(1)[mine.any(1)]
            result[f"{name}_retrieval_recall@{k}"] = float(hit.double().mean())
    return result


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("noise", "kind"), [(0.1, "spread"), (1, "spread"), (3, "grid"), (1, "equal"), (1, "far")])
@pytest.mark.parametrize(("texts", "images"), [(2500, 70), (90, 2300), (1, 1), (33, 31)])
def test_recall_is_as_defined(noise, kind, metric, texts, images):
    generator = torch.Generator().manual_seed(texts)
    gallery = torch.randn(images, 12, generator=generator)
    first = torch.randint(0, images, (texts,), generator=generator)
    queries = gallery[first] + noise * torch.randn(texts, 12, generator=generator)
    if kind == "grid":
        queries, gallery = (queries / 2).round(), (gallery / 2).round()
    if kind == "equal":
        gallery = gallery[:1].repeat(images, 1)
    if kind == "far":
        queries, gallery = queries + 100, gallery + 100
    positives = [[int(p), *([0] if q % 3 == 0 and p != 0 else [])] for q, p in enumerate(first)]
    assert recall(queries, gallery, positives, metric=metric) == defined(
        queries, gallery, positives, (1, 5, 10), metric
    )


def test_recall_takes_positives_in_every_form():
    queries, gallery = searched("spread")
    lists = [[q, q + 100] if q % 2 else [q] for q in range(150)]
    table = np.array([[q, q + 100] if q % 2 else [q, -1] for q in range(150)])
    expected = recall(queries, gallery, lists)
    for positives in (table, torch.from_numpy(table), [np.array(p) for p in lists], [tuple(p) for p in lists]):
        assert recall(queries, gallery, positives) == expected
    one = recall(queries.numpy(), gallery.half(), torch.arange(150), ks=[3], names=("text_retrieval", None))
    assert list(one) == ["text_retrieval_recall@3"]


@pytest.mark.parametrize(
    ("positives", "error", "message"),
    [
        ([0], ValueError, "positives: expected one entry for each of 2 queries, got 1"),
        ([[0], []], ValueError, "positives: expected at least one for every query, got none for query 1"),
        ([0, 3], ValueError, r"positives: expected gallery rows in \[0, 3\), got 3 for query 1"),
        ([0, -1], ValueError, r"got -1 for query 1"),
        ([0.0, 1.0], TypeError, "positives: expected integers, got float64"),
    ],
)
def test_recall_names_wrong_positives(positives, error, message):
    with pytest.raises(error, match=message):
        recall(torch.eye(3)[:2], torch.eye(3), positives)


def test_recall_by_an_index_uses_its_ids():
    queries, gallery = searched("spread")
    ids = torch.randperm(10**6)[:600]
    index = GapIndex().add(gallery, ids)
    exact_one = recall(queries, gallery, torch.arange(150), names=("image_retrieval", None))
    assert recall(queries, None, ids[:150], index=index) == exact_one
    assert recall(queries, None, ids[:150, None].repeat(1, 2), index=index) == exact_one


def test_recall_never_holds_all_scores():
    setup = """
import torch
torch.set_num_threads(2)
from gapkern.retrieval import recall
recall(torch.randn(3000, 32), torch.randn(3000, 32), torch.arange(3000))
queries, gallery = torch.randn(40000, 32), torch.randn(20000, 32)
"""
    used = peak_memory("recall(queries, gallery, torch.arange(40000) % 20000)", setup=setup)
    assert used < 300, "all scores in float32 have 3052 MiB"


def check_quantisers(images, texts):
    labels = np.arange(len(images))
    result = compare_quantisers(images, texts, positives=labels)
    rows = {(row["factory"], row["shift"]): row for row in result.rows}
    assert not result.left_out
    assert rows["Flat", False]["agreement"] == rows["Flat", False]["overlap@10"] == 1
    assert rows["Flat", False]["recall@1"] == pytest.approx(
        recall(images, texts, labels, ks=[1])["image_retrieval_recall@1"]
    )
    dims = images.shape[1]
    assert [rows[f, True]["bytes_per_vector"] for f in ("Flat", "SQ8", "SQ4")] == [4 * dims, dims, dims / 2]
    return result, rows


@pytest.mark.filterwarnings("ignore:sample. FAISS")
@pytest.mark.parametrize("name", ["clip", "convirt", "videoclip"])
def test_closing_the_gap_helps_quantisers_on_real_embeddings(real_data, name):
    images, texts = torch.from_numpy(real_data(name))
    _, rows = check_quantisers(images, texts)
    coarse = [f for f, shift in rows if shift and f != "Flat" and not f.startswith("IVF")]
    gains = [rows[f, True]["overlap@10"] - rows[f, False]["overlap@10"] for f in coarse]
    assert sum(gains) > 0
    assert rows["SQ4", True]["overlap@10"] > 0.7


@pytest.mark.filterwarnings("ignore:sample. FAISS")
def test_quantisers_on_synthetic_pairs_and_their_files(tmp_path):
    images, texts = clip_like(1000, 64)
    result, rows = check_quantisers(images, texts)
    assert rows["SQ4", True]["overlap@10"] > rows["SQ4", False]["overlap@10"]
    result.to_json(tmp_path / "q.json"), result.to_csv(tmp_path / "q.csv"), result.plot(tmp_path / "q.png")
    assert len((tmp_path / "q.csv").read_text().splitlines()) == 1 + 12
    assert json.loads((tmp_path / "q.json").read_text())["rows"] == files.plain(result.rows)
    some = compare_quantisers(images, texts, ["Flat", "PQ7"], k=3)
    assert list(some.left_out) == ["PQ7"]


def test_codes_learn_from_a_sample():
    images, texts = clip_like(800, 16)
    by_half = compare_quantisers(images, texts, ["Flat", "OPQ4,PQ4x4"], sample=400)
    # The rows that are drawn evenly are all there is: the same codes, whatever else is in the gallery.
    with pytest.warns(UserWarning, match="clustering 400 points to 256"):
        alone = compare_quantisers(images, texts, ["OPQ4,PQ4x4"], sample=400)
    timeless = [{k: v for k, v in row.items() if k != "queries_per_second"} for row in by_half.rows[2:]]
    assert timeless == [{k: v for k, v in row.items() if k != "queries_per_second"} for row in alone.rows]
    with pytest.warns(UserWarning, match="clustering 800 points to 256"):
        whole = compare_quantisers(images, texts, ["OPQ4,PQ4x4"], sample=10_000)
    assert whole.rows[0]["overlap@10"] != alone.rows[0]["overlap@10"]
    with pytest.raises(ValueError, match="sample: expected an integer >= 1, got 0"):
        compare_quantisers(images, texts, sample=0)

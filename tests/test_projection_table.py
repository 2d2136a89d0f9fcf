"""The committed tables of the projection: what they claim, in every row, and on real embeddings once more."""

import pytest

from bench import bench_indexes, bench_projection, harness

LOSS = 1e-4  # what the integrals may be off by
SETS = {"CLIP", "ConVIRT", "VideoCLIP", "digits"}


def holds(row):
    """No neighbour changes, and no way of moving does better: exactly, by either metric."""
    return (
        row["identical"] == 1
        and row["l2 projection"] >= max(row["l2 shift"], row["l2 none"]) - LOSS
        and row["ip projection"] >= row["ip none"] - LOSS
    )


def test_in_every_committed_row():
    cases = harness.load("projection")["cases"]
    assert {case["data"] for case in cases} == SETS
    assert {case["direction"] for case in cases if case["data"] == "CLIP"} == {"image to text", "text to image"}
    assert all(case["k"] == min(10, case["G"]) for case in cases)
    assert [case for case in cases if not holds(case)] == []
    assert sum(case["l2 projection"] > case["l2 shift"] + 0.01 for case in cases) > len(cases) / 3
    assert sum(case["ip projection"] > case["ip none"] + 0.01 for case in cases) > len(cases) / 3


@pytest.mark.parametrize(("name", "title"), bench_projection.MODELS.items())
def test_on_the_embeddings_once_more(name, title, real_data):
    import torch

    features = torch.from_numpy(real_data(name))
    committed = {
        (case["direction"], case["G"]): case for case in harness.load("projection")["cases"] if case["data"] == title
    }
    for direction, asks in (("image to text", 0), ("text to image", 1)):
        for size in (10, 50):
            row = bench_projection.row(features[asks], features[1 - asks][:size])
            assert holds(row)
            for value, number in row.items():
                assert number == pytest.approx(committed[direction, size][value], abs=2e-4), (direction, size, value)


def test_what_a_table_would_not_forgive():
    """The check itself can fail."""
    row = dict.fromkeys(("identical", "l2 projection", "l2 shift", "l2 none", "ip projection", "ip none"), 1.0)
    assert holds(row)
    for value, number in (("identical", 0.999), ("l2 projection", 0.9), ("ip projection", 0.9)):
        assert not holds({**row, value: number})


@pytest.mark.faiss
def test_the_table_of_indexes_is_whole():
    cases = harness.load("indexes")["cases"]
    assert {case["metric"] for case in cases} == {"l2", "ip"}
    for case in cases:
        for side in ("images", "texts"):
            some = [row for row in case["rows"] if row["asks"] == side]
            moves = [row["move"] for row in some]
            assert moves == list(bench_indexes.MOVES) * (len(moves) // 4)
            for none, _, projection, _ in zip(*[iter(some)] * 4, strict=True):
                same = ("bytes_per_vector", "seconds_to_build", "factory")
                assert all(none[key] == projection[key] for key in same), "one index"
        recall = f"recall@{case['k']}"
        codes = [r for r in case["rows"] if r["kind"] in ("RaBitQ", "IVF-RaBitQ") and r["asks"] == "images"]
        before, after = ([r[recall] for r in codes if r["move"] == move] for move in ("none", "projection"))
        assert sum(after) > sum(before) - 0.02, (case["data"], case["metric"])  # "auto" lets 1 % change


@pytest.mark.faiss
@pytest.mark.filterwarnings("ignore:.*FAISS")
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_recall_and_moves_of_the_benchmark_are_those_by_hand(metric):
    import torch

    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(400, 64, generator=generator) @ torch.linspace(1, 0, 64).diag()
    queries = gallery[:60] + 0.5 * torch.randn(60, 64, generator=generator) + 0.3
    rows = list(bench_indexes.rows(gallery, {"images": queries}, metric))
    assert [row["kind"] for row in rows[::4]] == list(bench_indexes.kinds(64, 400))
    held = queries[1::2].double()
    cost = torch.cdist(held, gallery.double()) if metric == "l2" else -held @ gallery.double().T
    order = cost.argsort(1)[:, :10]
    moves = bench_indexes.moved(gallery, queries, metric)
    by = {row["move"]: row for row in rows if row["kind"] == "Flat"}
    assert by["none"]["recall@10"] == 1
    for move in ("shift", "projection"):
        y = moves[move](queries[1::2]).double()
        after = torch.cdist(y, gallery.double()) if metric == "l2" else -y @ gallery.double().T
        found = (after.argsort(1)[:, :10, None] == order[:, None]).any(1).double().mean()
        assert by[move]["recall@10"] == pytest.approx(float(found), abs=1e-9)
    curve = [(0.2, 1000.0), (0.6, 100.0), (0.9, 10.0)]
    assert bench_indexes.at_speed(curve, 1000.0) == pytest.approx(0.2)
    assert bench_indexes.at_speed(curve, 10**1.5) == pytest.approx(0.75)

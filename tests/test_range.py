"""Norms whose squares leave float32: the right neighbours by an independent float64 computation, or a line."""

import numpy as np
import pytest
import torch

from gapkern import _search, cli
from gapkern._search import nearest
from gapkern.retrieval import GapIndex, compare_quantisers, recall

pytestmark = pytest.mark.faiss
SCALES = [1e30, 1e20, 3e18, 1e12, 1e-12, 1e-20, 1e-25, 1e-37, 1e-60, 1e-200]


def rows(scale, dtype=np.float64, seed=0, mixed=False):
    generator = np.random.default_rng(seed)
    queries, gallery = generator.standard_normal((40, 12)), generator.standard_normal((300, 12))
    queries += 0.3
    if mixed:  # rows of the middle of float32's range beside rows at its ends
        gallery[::3] *= 1e-12
        queries[::2] *= 1e-12
    return (queries * scale).astype(dtype), (gallery * scale).astype(dtype)


def costs(queries, gallery, metric="l2"):
    """float64 costs, by exact powers of two that keep squares in range."""
    q, g = queries.astype(np.float64), gallery.astype(np.float64)
    top = 2.0 ** np.floor(np.log2(max(np.abs(q).max(), np.abs(g).max())))
    q, g = q / top, g / top
    return np.stack([-(g * x).sum(1) if metric == "ip" else np.square(g - x).sum(1) for x in q])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("scale", SCALES)
def test_exact_search_is_right_at_every_scale(scale, metric, mixed):
    dtype = np.float32 if 1e-36 < scale < 1e37 else np.float64
    queries, gallery = rows(scale, dtype, mixed=mixed and scale > 1e-20)
    order = costs(queries, gallery, metric).argsort(1, kind="stable")
    found_costs, found = _search.search(torch.from_numpy(queries), torch.from_numpy(gallery), 5, metric=metric)
    assert np.array_equal(found.numpy(), order[:, :5])
    if 1e-100 < scale < 1e100:
        true = np.stack(
            [
                -(gallery.astype(np.float64) * q).sum(1)
                if metric == "ip"
                else np.square(gallery.astype(np.float64) - q).sum(1)
                for q in queries
            ]
        )
        near = np.take_along_axis(true, order[:, :5], 1)
        np.testing.assert_allclose(found_costs.numpy(), near, rtol=1e-5, atol=1e-6 * np.abs(true).max())
    positives = np.arange(40)
    hits = np.stack([(order[:, :k] == positives[:, None]).any(1) for k in (1, 5, 10)])
    got = recall(queries, gallery, positives, metric=metric, names=("r", None))
    assert list(got.values()) == list(hits.mean(1))
    if metric == "l2":
        near = nearest(torch.from_numpy(queries), torch.from_numpy(gallery))
        assert np.array_equal(near.numpy(), order[:, 0])


def test_inner_products_of_sides_at_both_ends():
    queries, gallery = rows(1.0)
    order = costs(queries, gallery, "ip").argsort(1)[:, :5]
    found = _search.search(torch.from_numpy(queries * 2.0**100), torch.from_numpy(gallery * 2.0**-100), 5, metric="ip")
    assert np.array_equal(found[1].numpy(), order)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_a_flat_index_is_right_or_refuses(scale, mixed):
    queries, gallery = rows(scale, mixed=mixed)
    index = GapIndex()
    if scale > 1e18:
        with pytest.raises(ValueError, match=r"gallery: expected (norms up to 4.6e\+18|finite values in float32)"):
            index.add(gallery)
        assert index.ntotal == 0
    elif scale < 1e-30:
        with pytest.raises(
            ValueError, match=r"gallery: expected values that float32 holds \(from 1.2e-38 on\), got a sm"
        ):
            index.add(gallery if scale < 1e-40 else gallery * 1e-5)
    else:
        held = gallery.astype(np.float32)
        order = costs(queries.astype(np.float32), held).argsort(1, kind="stable")
        distances, ids = index.add(gallery).search(queries, 5)
        assert np.array_equal(ids, order[:, :5])
        true = np.stack([np.square(held.astype(np.float64) - q.astype(np.float32)).sum(1) for q in queries])
        true = np.take_along_axis(true, order[:, :5], 1)
        np.testing.assert_allclose(distances, true, rtol=1e-5, atol=1e-38)


def test_rows_of_subnormal_numbers_keep_their_order():
    queries, gallery = (x.astype(np.float32) for x in rows(1e-40))
    order = costs(queries, gallery).argsort(1, kind="stable")
    assert np.array_equal(GapIndex().add(gallery).search(queries, 5)[1], order[:, :5])


@pytest.mark.parametrize("factory", ["SQ8", "HNSW8", "IVF4,Flat", "PQ4x4", "RaBitQ"])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e20, r"expected norms up to 4.6e\+18"),
        (1e-25, "expected norms from 1e-15 on"),
        (1e-60, "that float32 holds"),
    ],
)
def test_codes_are_not_learned_from_what_squares_lose(factory, scale, message):
    with pytest.raises(ValueError, match=message):
        GapIndex(factory, d=12).train(rows(scale)[1]).add(rows(scale)[1])


@pytest.mark.parametrize(
    ("factory", "value", "message"),
    [
        ("SQfp16", 7e4, r"gallery: expected values in \[-65504, 65504\], which the codes hold, got another, .* row 1"),
        ("IVF1,SQfp16", 7e4, "values in .-65504, 65504"),
        ("SQ8_direct", -1, r"values in \[0, 255\]"),
        ("SQ8_direct_signed", 128, r"values in \[-128, 127\]"),
    ],
)
def test_values_that_a_code_cannot_hold(factory, value, message):
    index = GapIndex(factory, d=4).train(torch.ones(50, 4))
    with pytest.raises(ValueError, match=message):
        index.add(torch.tensor([[1.0] * 4, [1.0, 1, 1, value]]))
    assert index.ntotal == 0


@pytest.mark.parametrize("scale", [1e20, 1e-60])
def test_compare_and_the_command_line_refuse_in_one_line(scale, tmp_path, capsys):
    queries, gallery = rows(scale)
    with pytest.raises(ValueError, match="gallery: expected"):
        compare_quantisers(queries, gallery, ["Flat"])
    np.save(tmp_path / "q.npy", queries), np.save(tmp_path / "g.npy", gallery)
    for command in (["--compare", f"{tmp_path}/q.npy"], ["--out", f"{tmp_path}/index"]):
        assert cli.main(["index", f"{tmp_path}/g.npy", *command]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "gallery: expected" in err
    assert not (tmp_path / "index" / "manifest.json").exists()

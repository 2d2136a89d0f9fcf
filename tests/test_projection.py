"""Projection of the queries on the gallery's hull: what it keeps and gains, and robustness by inner product."""

import math
import pickle

import numpy as np
import pytest
import torch

from gapkern.gap import MeanShift, NotFittedError, Projection
from gapkern.perturb import Gaussian, Quantize, Uniform
from gapkern.robustness import robustness


def embeddings(rows, dims, queries=40, seed=0, dtype=torch.float64):
    """A gallery (rows, dims), and queries a gap and an offset of their own away."""
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    own = torch.randn(queries, dims, generator=generator, dtype=torch.float64)
    near = gallery[torch.randint(rows, (queries,), generator=generator)]
    return gallery.to(dtype), (near + 0.6 * own + torch.linspace(-1, 2, dims, dtype=torch.float64)).to(dtype)


def scores(queries, gallery, metric):
    """(Q, G) float64, higher is better; by the definition."""
    y, x = queries.double(), gallery.double()
    if metric == "l2":
        return -(y[:, None] - x).square().sum(2)
    if metric == "cosine":
        x = x / x.norm(dim=1, keepdim=True)
    return y @ x.T


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize(("rows", "dims"), [(2, 3), (10, 64), (40, 41), (7, 7), (30, 8), (1, 5)])
def test_every_difference_of_scores_stays(metric, rows, dims):
    gallery, queries = embeddings(rows, dims)
    projection = Projection("exact", metric).fit(gallery, queries)
    moved = projection.transform_queries(queries)
    before, after = scores(queries, gallery, metric), scores(moved, gallery, metric)
    assert torch.equal(projection.transform(gallery), gallery)
    torch.testing.assert_close(before - before[:, :1], after - after[:, :1], rtol=0, atol=1e-9 * dims)
    assert projection.n_components_ == min(rows - 1, dims)
    assert projection.agreement_ == 1.0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_order_of_all_rows_is_the_same_to_the_last_bit(metric, centred, seed):
    """But for ties: rows whose scores lie closer than float64 tells, here less than one pair in a million."""
    generator = torch.Generator().manual_seed(seed)
    rows, dims = (
        int(torch.randint(2, 60, (1,), generator=generator)),
        int(torch.randint(2, 90, (1,), generator=generator)),
    )
    gallery, queries = embeddings(rows, dims, seed=seed)
    moved = Projection("exact", metric, centred=centred).fit(gallery).transform_queries(queries)
    before, after = scores(queries, gallery, metric), scores(moved, gallery, metric)
    order = before.argsort(1, descending=True)
    if not torch.equal(order, after.argsort(1, descending=True)):
        gaps = -before.gather(1, order).diff(dim=1)
        turned = -after.gather(1, order).diff(dim=1) < 0
        assert float(gaps[turned].max()) < 1e-13 * dims
    ties = gallery[torch.randint(rows, (rows,), generator=generator)]  # rows that are there more than once
    moved = Projection("exact", metric, centred=centred).fit(ties).transform_queries(queries)
    after = scores(moved, ties, metric)
    same = (ties[:, None] == ties).all(2)
    assert float((after[:, :, None] - after[:, None]).abs()[:, same].max()) < 1e-12


def test_of_all_that_keep_the_order_centred_ones_lie_nearest_the_mean():
    gallery, queries = embeddings(8, 40)
    linear, centred = (Projection("exact", "ip", centred=c).fit(gallery) for c in (False, True))
    a, b = linear.transform_queries(queries), centred.transform_queries(queries)
    mean = gallery.mean(0)
    outside = mean - linear.basis_ @ (linear.basis_.T @ mean)
    torch.testing.assert_close(b - a, outside.expand_as(a), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        added = torch.randn(40, generator=generator, dtype=torch.float64)
        added -= linear.basis_ @ (linear.basis_.T @ added)
        assert bool(((a + added - mean).norm(dim=1) >= (b - mean).norm(dim=1)).all())
        assert bool(((a + added).norm(dim=1) >= a.norm(dim=1)).all())


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_ties_stay_ties(metric):
    gallery = torch.eye(4, 9, dtype=torch.float64)
    queries = torch.full((1, 9), 0.5, dtype=torch.float64)
    queries[0, 5] = 3
    moved = Projection("exact", metric).fit(gallery).transform_queries(queries)
    after = scores(moved, gallery, metric)[0]
    assert float(after.max() - after.min()) < 1e-15


def test_the_projection_is_the_nearest_point_of_the_hull_by_least_squares():
    gallery, queries = embeddings(12, 30)
    moved = Projection("exact").fit(gallery.numpy()).transform_queries(queries.numpy())
    base, directions = gallery[0].numpy(), (gallery[1:] - gallery[0]).numpy().T
    for y, ours in zip(queries.numpy(), moved, strict=True):
        weights = np.linalg.lstsq(directions, y - base, rcond=None)[0]
        np.testing.assert_allclose(ours, base + directions @ weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_no_other_map_that_keeps_the_order_is_more_robust(metric):
    """Admissible maps differ from the projection by what they add outside the hull."""
    gallery, queries = embeddings(10, 48, seed=3)
    noise = Gaussian(0.3, "per_coordinate")
    projection = Projection("exact", metric).fit(gallery, queries)
    best = projection.transform_queries(queries)
    ours = robustness(best, gallery, noise, metric=metric).per_query
    generator = torch.Generator().manual_seed(1)
    for size in (0.1, 1.0, 5.0):
        added = size * torch.randn(queries.shape, generator=generator, dtype=torch.float64)
        added -= added @ projection.basis_ @ projection.basis_.T
        other = robustness(best + added, gallery, noise, metric=metric).per_query
        assert bool((other <= ours + 2e-5).all())
    shifted = robustness(
        queries, gallery, noise, metric=metric, shift=MeanShift(n_components="exact").fit(gallery, queries)
    )
    none = robustness(queries, gallery, noise, metric=metric)
    assert bool((shifted.per_query <= ours + 2e-5).all())
    assert float((ours - none.per_query).mean()) > 0.01
    if metric == "ip":
        assert shifted.robustness == pytest.approx(none.robustness, abs=1e-6)


def test_the_shift_is_the_projection_of_queries_with_one_common_offset():
    gallery, _ = embeddings(8, 40)
    inside = gallery.mean(0) + 0.3 * (gallery[:5] - gallery.mean(0))
    projection = Projection("exact").fit(gallery)
    offset = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset -= projection.basis_ @ (projection.basis_.T @ offset)
    shift = MeanShift(n_components="exact", moves="queries").fit(gallery, inside + offset)
    torch.testing.assert_close(
        projection.transform_queries(inside + offset), shift.transform_queries(inside + offset), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reduced_rows_give_the_same_answers(metric, dtype):
    gallery, queries = embeddings(20, 128, dtype=dtype)
    projection = Projection("exact", metric, reduce=True).fit(gallery, queries)
    small, asked = projection.transform(gallery), projection.transform_queries(queries)
    assert small.shape == (20, 19) == (20, projection.n_features_out_)
    assert asked.dtype == small.dtype == dtype
    before, after = scores(queries, gallery, metric), scores(asked, small, "l2" if metric == "l2" else "ip")
    atol = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(before - before[:, :1], after - after[:, :1], rtol=0, atol=atol)


def test_auto_takes_the_fewest_directions_that_keep_the_neighbours():
    gallery, queries = embeddings(400, 24, queries=200)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    spread = torch.tensor([3.0] * 6 + [1e-3] * 18, dtype=torch.float64)
    gallery, queries = (gallery * spread) @ basis, (queries * torch.where(spread > 1, spread, 1.0)) @ basis
    for metric in ("l2", "ip"):
        projection = Projection("auto", metric).fit(gallery, queries)
        assert 5 <= projection.n_components_ <= 8
        moved = projection.transform_queries(queries)
        kept = scores(queries, gallery, metric).argmax(1) == scores(moved, gallery, metric).argmax(1)
        assert float(kept.double().mean()) == projection.agreement_ >= 0.99
    # A share of the variance, and a number.
    assert Projection(0.5).fit(gallery).n_components_ < 6
    assert Projection(3).fit(gallery).n_components_ == 3
    assert Projection(1000).fit(gallery).n_components_ == 24


def test_batches_ranks_and_files_give_the_same_projection(tmp_path):
    gallery, queries = embeddings(50, 16)
    whole = Projection(5, model="ViT").fit(gallery, queries)
    parts = Projection(5, model="ViT").partial_fit(gallery[:20]).partial_fit(queries=queries)
    rest = Projection(5).partial_fit(gallery[20:], queries[:0])
    parts.merge(rest)
    expected = whole.transform_queries(queries)
    torch.testing.assert_close(parts.transform_queries(queries), expected, rtol=0, atol=1e-10)
    whole.save(tmp_path / "projection.safetensors")
    loaded = Projection.load(tmp_path / "projection.safetensors")
    assert torch.equal(loaded.transform_queries(queries), expected)
    assert repr(loaded) == repr(whole)
    assert (loaded.agreement_, loaded.offset_, loaded.n_components_) == (whole.agreement_, whole.offset_, 5)
    assert torch.equal(pickle.loads(pickle.dumps(whole)).transform_queries(queries), expected)
    with pytest.raises(ValueError, match="a loaded projection can be applied but not added to"):
        loaded.partial_fit(gallery)
    with pytest.raises(ValueError, match=r"expected a gapkern\.MeanShift file"):
        MeanShift.load(tmp_path / "projection.safetensors")
    with pytest.raises(ValueError, match="model: expected embeddings of ViT"):
        loaded.transform_queries(queries, model="SigLIP")


def test_offset_is_the_distance_that_the_projection_removes():
    gallery, queries = embeddings(6, 20)
    projection = Projection("exact").fit(gallery, queries)
    offsets = projection.offsets(queries.numpy())
    torch.testing.assert_close(offsets, (queries - projection.transform_queries(queries)).norm(dim=1))
    assert projection.offsets(queries[:0]).shape == (0,)
    assert projection.offset_ == pytest.approx(
        float((queries - projection.transform_queries(queries)).norm(dim=1).mean()), rel=1e-12
    )


def test_what_is_refused():
    gallery, queries = embeddings(6, 20)
    for broken, message in (
        (Projection(metric="l1"), "metric: expected one of"),
        (Projection(n_components=1.5), "n_components: expected"),
        (Projection(agreement=2), "agreement: expected"),
        (Projection(reduce="no"), "reduce: expected True or False"),
        (Projection(centred=1), "centred: expected True or False"),
        (Projection(centred=True, reduce=True), "centred: expected False with reduce=True"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            broken.fit(gallery, queries)
    with pytest.raises(ValueError, match="queries: expected"):
        Projection().fit(gallery)
    with pytest.raises(ValueError, match="queries: expected D = 20"):
        Projection("exact").fit(gallery, queries[:, :3])
    with pytest.raises(NotFittedError):
        Projection().transform_queries(queries)
    with pytest.raises(ValueError, match="queries: expected D = 20 as fitted"):
        Projection("exact").fit(gallery).transform_queries(queries[:, :3])
    assert not Projection().partial_fit(gallery).is_fitted
    assert Projection("exact").partial_fit(gallery).is_fitted
    with pytest.raises(ValueError, match="method: 'exact' is for Gaussian noise"):
        robustness(queries, gallery, Gaussian(0.1), metric="cosine", method="exact")


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("labelled", [False, True])
def test_estimators_agree_under_inner_product(metric, labelled):
    gallery, queries = embeddings(30, 24, seed=5)
    about = {"labels": torch.arange(40) % 3, "gallery_labels": torch.arange(30) % 3} if labelled else {}
    drawn = robustness(
        queries, gallery, Gaussian(0.2, "per_coordinate"), metric=metric, method="sample", trials=400, **about
    )
    assert bool((drawn.nearest == scores(queries, gallery, metric).argmax(1)).all())
    if metric == "cosine":
        assert robustness(queries, gallery, Gaussian(1.0), metric=metric, trials=2).method == "sample"
        return
    exact = robustness(queries, gallery, Gaussian(0.2, "per_coordinate"), metric=metric, **about)
    projected = robustness(
        queries, gallery, Gaussian(0.2, "per_coordinate"), metric=metric, method="projected", trials=2000, **about
    )
    assert exact.method == "exact"
    assert torch.equal(exact.nearest, drawn.nearest)
    for found, trials in ((drawn, 400), (projected, 2000)):
        spread = (exact.per_query * (1 - exact.per_query) / trials).sqrt() + 1e-3
        assert float(((found.per_query - exact.per_query).abs() / spread).max()) < 5
        assert found.robustness == pytest.approx(exact.robustness, abs=4 * found.stderr)
        if labelled:
            assert found.accuracy == pytest.approx(exact.accuracy, abs=0.03)


def test_cosine_scales_noisy_rows_to_unit_length():
    """Drawn by hand: the same noise, renormalised."""
    gallery, queries = embeddings(5, 6, dtype=torch.float32)
    noise = Gaussian(1.0, "per_coordinate")
    wins = torch.zeros(len(queries), dtype=torch.float64)
    for trial in range(20):
        noisy = noise.apply(gallery, 7, trial).double()
        cosine = queries.double() @ (noisy / noisy.norm(dim=1, keepdim=True)).T
        wins += cosine.argmax(1) == scores(queries, gallery, "cosine").argmax(1)
    found = robustness(queries, gallery, noise, metric="cosine", trials=20, seed=7)
    torch.testing.assert_close(found.per_query, wins / 20, rtol=0, atol=1e-12)


@pytest.mark.parametrize("perturbation", [Quantize(8), Uniform(0.3)])
@pytest.mark.parametrize("on", ["gallery", "queries"])
def test_other_perturbations_of_projected_queries(perturbation, on):
    gallery, queries = embeddings(9, 30)
    projection = Projection("exact", "ip").fit(gallery, queries)
    by_hand = robustness(projection.transform_queries(queries), gallery, perturbation, metric="ip", on=on, trials=5)
    ours = robustness(queries, gallery, perturbation, metric="ip", on=on, trials=5, shift=projection)
    torch.testing.assert_close(ours.per_query, by_hand.per_query, rtol=0, atol=1e-12)


def test_a_reduced_projection_is_as_robust_to_noise_inside_the_hull():
    """Before the rotation noise falls on all D dimensions, of which k matter."""
    gallery, queries = embeddings(9, 30)
    noise = Gaussian(0.2, "per_coordinate")
    whole = robustness(queries, gallery, noise, metric="ip", shift=Projection("exact", "ip").fit(gallery))
    small = robustness(
        queries, gallery, noise, metric="ip", shift=Projection("exact", "ip", reduce=True).fit(gallery), when="before"
    )
    torch.testing.assert_close(whole.per_query, small.per_query, rtol=0, atol=1e-5)


# First G rows as the gallery, all rows of the other modality as queries, noise of total variance .04; from a plain
# computation of the definitions: without, with the shift, with the projection.
PUBLISHED = [
    ("clip", 0, 1, 10, "l2", (0.861, 0.898, 0.930)),
    ("clip", 0, 1, 50, "l2", (0.706, 0.760, 0.809)),
    ("clip", 1, 0, 50, "l2", (0.731, 0.788, 0.837)),
    ("videoclip", 1, 0, 100, "l2", (0.635, 0.732, 0.789)),
    ("clip", 0, 1, 10, "ip", (0.889, 0.889, 0.985)),
    ("clip", 0, 1, 50, "ip", (0.753, 0.753, 0.902)),
    ("videoclip", 1, 0, 100, "ip", (0.722, 0.722, 0.836)),
]


@pytest.mark.parametrize(("name", "asked", "searched", "rows", "metric", "expected"), PUBLISHED)
def test_real_embeddings_keep_every_neighbour_and_gain(real_data, name, asked, searched, rows, metric, expected):
    both = real_data(name)
    queries, gallery = torch.from_numpy(both[asked]), torch.from_numpy(both[searched])[:rows]
    projection = Projection("exact", metric).fit(gallery, queries)
    before, after = scores(queries, gallery, metric), scores(projection.transform_queries(queries), gallery, metric)
    k = min(10, rows)
    assert torch.equal(before.topk(k).indices, after.topk(k).indices)
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    noise = Gaussian(0.04)
    found = [robustness(queries, gallery, noise, metric=metric, shift=s) for s in (None, shift, projection)]
    assert [r.robustness for r in found] == pytest.approx(expected, abs=0.006 if metric == "ip" else 0.0011)
    assert math.isclose(found[0].agreement, found[0].robustness)


def test_auto_keeps_as_many_neighbours_as_it_is_asked_to(tmp_path):
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(600, 40, generator=generator) * torch.linspace(1, 0.2, 40)
    queries = gallery[:150] + 0.05 * torch.randn(150, 40, generator=generator)

    def kept(projection, k):
        sides = queries.double(), projection.transform_queries(queries).double()
        before, after = (torch.cdist(side, gallery.double()).argsort(1)[:, :k] for side in sides)
        return float((before[:, :, None] == after[:, None]).any(2).double().mean())

    one, ten = (Projection(neighbours=n).fit(gallery, queries) for n in (1, 10))
    assert one.n_components_ < ten.n_components_
    assert kept(one, 1) == pytest.approx(one.agreement_)
    assert one.agreement_ >= 0.99
    assert kept(ten, 10) == pytest.approx(ten.agreement_)
    assert ten.agreement_ >= 0.99 > kept(one, 10)
    ten.save(tmp_path / "p.safetensors")
    assert Projection.load(tmp_path / "p.safetensors").get_params() == ten.get_params()
    with pytest.raises(ValueError, match="neighbours: expected an integer >= 1"):
        Projection(neighbours=0).fit(gallery, queries)

"""Gap metrics with their golden values, and the mean shift as users meet it."""

import math

import numpy as np
import pytest
import torch

from gapkern import MeanShift, gap_metrics
from gapkern._search import nearest
from gapkern.gap import BASELINES
from gapkern.gap.moments import Moments, Sample, hull
from gapkern.reference import meanshift as reference
from gapkern.testing import assert_near


def clusters(gallery=12, queries=40, dims=64, spread=0.2, seed=0):
    """A gallery within the first coordinates and queries apart from it along the last."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(gallery, dims)
    base[:, :8] = spread * torch.randn(gallery, 8, generator=generator)
    rows = torch.randint(gallery, (queries,), generator=generator)
    asked = base[rows] + 0.1 * spread * torch.randn(queries, dims, generator=generator)
    asked[:, -1] += 1.0
    return base, asked


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("centroid_distance", 0.85135),
        ("mean_pair_distance", 1.17448),
        ("rmg", 0.59146),
        ("cos_paired", 0.30992),
        ("cos_unpaired", 0.16160),
        ("cos_within_images", 0.53148),
        ("cos_within_texts", 0.51520),
    ],
)
def test_golden_values_on_real_clip_embeddings(real_data, key, value):
    images, texts = real_data("clip")
    assert gap_metrics(images, texts)[key] == pytest.approx(value, abs=1e-4 if key != "rmg" else 1e-5)


@pytest.mark.parametrize(("model", "distance"), [("clip", 0.85135), ("convirt", 0.82308), ("videoclip", 1.06689)])
def test_the_published_centroid_distances(real_data, model, distance):
    assert gap_metrics(*real_data(model))["centroid_distance"] == pytest.approx(distance, abs=1e-5)


def test_metrics_are_their_definitions():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    t = torch.randn(60, 9, generator=generator, dtype=torch.float64) + torch.linspace(0, 2, 9)
    found = gap_metrics(x, t, logit_scale=7.0)
    u, v = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(t, dim=1)
    off = ~torch.eye(60, dtype=torch.bool)
    softmax = torch.softmax(7 * u @ v.T, 1)
    singular = torch.linalg.svdvals(x - x.mean(0))
    p = singular / singular.sum()
    covariances = torch.cov(x.T), torch.cov(t.T)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).sqrt().sum()
    gap = t.mean(0) - x.mean(0)
    expected = {
        "alignment": (u - v).square().sum(1).mean(),
        "uniformity_images": torch.exp(-2 * torch.cdist(u, u)[off].square()).mean().log(),
        "uniformity_texts": torch.exp(-2 * torch.cdist(v, v)[off].square()).mean().log(),
        "cos_within_images": (u @ u.T)[off].mean(),
        "cos_unpaired": (u @ v.T)[off].mean(),
        "effective_rank_images": torch.exp(-(p * p.log()).sum()),
        "frechet": gap.square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross,
        "variance_along_gap_images": ((x @ (gap / gap.norm())).var() / covariances[0].trace()),
        "doubly_stochastic_residual": (softmax.sum(0) - 1).abs().max(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-9), name


def test_metrics_of_identical_modalities():
    x = torch.randn(20, 6)
    found = gap_metrics(x, x)
    assert found["centroid_distance"] == 0
    assert found["rmg"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(found["orthogonality"])
    assert found["frechet"] == pytest.approx(0, abs=1e-9)


def test_metrics_of_a_single_pair_are_numbers_or_nan():
    found = gap_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert found["centroid_distance"] == pytest.approx(2**0.5)
    assert math.isnan(found["rmg"])


def test_moments_do_not_cancel_far_from_the_origin():
    x = torch.randn(3000, 20, dtype=torch.float64) + 1e6
    seen = Moments.of(x)
    centred = x - x.mean(0)
    assert_near(seen.mean, x.mean(0), 1e-15)
    assert_near(seen.gram, centred.T @ centred, 1e-9)


@pytest.mark.parametrize("components", [0, 1, 3, 8])
def test_the_shift_is_the_papers(components):
    gallery, queries = clusters()
    gallery = gallery + 0.3 * torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    shift = MeanShift(n_components=components).fit(gallery, queries)
    expected = reference.shift_vector(gallery, queries, components)
    assert_near(shift.shift_vector_, expected, 1e-9)
    assert shift.n_components_ == components
    assert shift.orthogonality_ == pytest.approx(float(expected.norm() / shift.gap_vector_.norm()))


def test_closing_the_gap_makes_the_means_meet_outside_the_hull():
    gallery, queries = clusters()
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    moved = shift.transform(gallery)
    basis = hull(Moments.of(gallery), gallery)
    left = queries.double().mean(0) - moved.double().mean(0)
    assert float((left - basis @ (basis.T @ left)).norm()) < 1e-6
    assert shift.agreement_ == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_theorem_3_5_a_full_rank_shift_changes_no_neighbour(real_data, dtype, alpha):
    images, texts = (torch.from_numpy(x).to(dtype) for x in real_data("clip"))
    shift = MeanShift(alpha, n_components="exact").fit(texts, images)
    assert torch.equal(nearest(images, texts), nearest(images, shift.transform(texts)))
    other = MeanShift(alpha, n_components="exact", moves="queries").fit(texts, images)
    assert torch.equal(nearest(images, texts), nearest(other.transform_queries(images), texts))


def test_the_published_k_table_on_real_embeddings(real_data):
    images, texts = (torch.from_numpy(x) for x in real_data("clip"))
    labels = torch.arange(500)

    def recall(k):
        shift = MeanShift(n_components=k).fit(texts, images)
        return (nearest(images, shift.transform(texts)) == labels).double().mean().item(), shift.agreement_

    for k, right, kept in ((0, 0.300, 0.31), (100, 0.530, 0.78), (200, 0.556, 0.88), (499, 0.554, 0.99)):
        found = recall(k)
        assert found[0] == pytest.approx(right, abs=1e-9), k
        assert found[1] >= kept - 0.01, k


def test_auto_keeps_the_agreement_it_promises(real_data):
    images, texts = (torch.from_numpy(x) for x in real_data("clip"))
    for agreement in (0.8, 0.95, 0.99):
        shift = MeanShift(agreement=agreement).fit(texts, images)
        assert shift.agreement_ >= agreement
        fewer = MeanShift(n_components=max(0, shift.n_components_ - 40)).fit(texts, images)
        assert fewer.orthogonality_ > shift.orthogonality_
        assert fewer.agreement_ < shift.agreement_ + 0.02


def test_a_share_of_the_variance():
    gallery = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
    gallery = torch.cat([gallery, -gallery])
    shift = MeanShift(n_components=0.9).fit(gallery, gallery + 1)
    variances = torch.tensor([16.0, 4, 1, 0.25])
    assert variances[: shift.n_components_].sum() / variances.sum() >= 0.9
    assert variances[: shift.n_components_ - 1].sum() / variances.sum() < 0.9


def test_alpha_and_sides():
    gallery, queries = clusters()
    shift = MeanShift(0.5, n_components="exact").fit(gallery, queries)
    step = shift.transform(gallery).double() - gallery.double()
    assert_near(step, (0.5 * shift.shift_vector_).expand(12, -1), 1e-6)
    assert shift.transform_queries(queries) is queries
    assert shift.at(0.0).transform(gallery) is gallery
    other = MeanShift(0.5, n_components="exact", moves="queries").fit(gallery, queries)
    assert other.transform(gallery) is gallery
    assert_near(
        queries.double() - other.transform_queries(queries).double(), (0.5 * shift.shift_vector_).expand(40, -1), 1e-6
    )


def test_normalised_output_has_unit_rows():
    gallery, queries = clusters()
    moved = MeanShift(n_components="exact", normalize=True).fit(gallery, queries).transform(gallery)
    assert_near(moved.norm(dim=1), torch.ones(12), 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_come_back_as_arrays_of_their_dtype(dtype):
    gallery, queries = (x.numpy().astype(dtype) for x in clusters())
    moved = MeanShift(n_components=3).fit(gallery, queries).transform(gallery)
    assert isinstance(moved, np.ndarray)
    assert moved.dtype == dtype
    assert moved.shape == gallery.shape


def test_saved_and_loaded_shifts_do_the_same(tmp_path):
    gallery, queries = clusters()
    shift = MeanShift(0.75, n_components="exact", normalize=True).fit(gallery, queries)
    shift.save(tmp_path / "shift.safetensors")
    loaded = MeanShift.load(tmp_path / "shift.safetensors")
    assert repr(loaded) == repr(shift)
    assert torch.equal(loaded.transform(gallery), shift.transform(gallery))
    assert (loaded.n_components_, loaded.orthogonality_, loaded.agreement_) == (
        shift.n_components_,
        shift.orthogonality_,
        shift.agreement_,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["shift.safetensors"]


def test_loading_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not a tensor")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path: expected a safetensors file, got"):
        MeanShift.load(tmp_path / "text")
    with pytest.raises(ValueError, match=r"path: expected a gapkern\.MeanShift file of version 1"):
        MeanShift.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file, got .*absent"):
        MeanShift.load(tmp_path / "absent")


def test_ties_go_to_the_lowest_row_and_duplicates_to_the_first():
    gallery = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    queries = torch.tensor([[1.0, 5.0], [0.1, 0.0], [2.0, 0.1]])
    assert nearest(queries, gallery).tolist() == [0, 0, 1]
    assert nearest(queries[:0], gallery).tolist() == []


def test_near_ties_far_from_the_origin_are_decided_exactly():
    generator = torch.Generator().manual_seed(0)
    gallery = (torch.randn(300, 16, generator=generator) + 1000).half().float()
    queries = (torch.randn(200, 16, generator=generator) + 1000).half().float()
    exact = torch.cdist(queries.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(nearest(queries, gallery), exact)


def test_a_program_that_allows_rounded_products_gets_exact_neighbours():
    queries, gallery = torch.randn(500, 256).sign(), torch.randn(400, 256).sign()  # many true ties
    exact = torch.cdist(queries.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(queries, gallery), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def same_fit(a, b, tolerance=1e-12):
    assert_near(a.gap_vector_, b.gap_vector_, tolerance)
    assert float((a.shift_vector_ - b.shift_vector_).norm()) < 1e3 * tolerance * float(b.gap_vector_.norm())
    assert a.n_components_ == b.n_components_
    assert a.agreement_ == b.agreement_


@pytest.mark.parametrize("components", [3, 0.8, "exact", "auto"])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_batches_learn_what_the_whole_teaches(components, size):
    gallery, queries = clusters(gallery=90, queries=130, dims=24)
    gallery = gallery + 0.01 * torch.randn(90, 24, generator=torch.Generator().manual_seed(4))
    whole = MeanShift(n_components=components).fit(gallery, queries)
    parts = MeanShift(n_components=components)
    for rows in gallery.split(size):
        parts.partial_fit(rows)
    for rows in queries.split(size):
        parts.partial_fit(queries=rows)
    same_fit(parts, whole, 1e-11)
    halves = [
        MeanShift(n_components=components).partial_fit(gallery[a:b], queries[a:c])
        for a, b, c in ((0, 40, 40), (40, 90, 130))
    ]
    same_fit(halves[0].merge(halves[1]), whole, 1e-11)


def test_more_batches_change_the_fit():
    gallery, queries = clusters()
    shift = MeanShift(n_components=2).fit(gallery, queries)
    before = shift.gap_vector_
    shift.partial_fit(queries=queries + 1)
    assert_near(shift.gap_vector_, before + 0.5, 1e-6)
    assert shift.fit(gallery, queries).gap_vector_.equal(before), "fit starts anew"


def test_samples_are_even_and_merge():
    rows = torch.arange(20000.0)[:, None]
    counts = torch.zeros(20000)
    for start in range(40):  # another start draws other rows
        a, b = Sample(1, 500), Sample(1, 500)
        a.seen = b.seen = 10**6 * (start + 1)
        for part in rows[:12000].split(1700):
            a.update(part)
        b.seen += 17
        b.update(rows[12000:])
        a.merge(b)
        assert a.rows.shape == (500, 1)
        counts[a.rows[:, 0].long()] += 1
    assert counts.sum() == 40 * 500
    assert abs(float(counts[:12000].mean() / counts.mean()) - 1) < 0.05
    few = Sample(1, 500)
    few.update(rows[:300])
    assert torch.equal(few.rows, rows[:300])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_have_one_face_and_do_what_they_say(name):
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(80, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, 12)
    queries = torch.randn(80, 12, generator=generator, dtype=torch.float64) + torch.linspace(-1, 1, 12)
    baseline = BASELINES[name]().fit(gallery, queries)
    g, q = baseline.transform(gallery), baseline.transform_queries(queries)
    assert g.shape == gallery.shape
    assert isinstance(BASELINES[name]().fit(gallery.numpy(), queries.numpy()).transform(gallery.numpy()), np.ndarray)
    apart = (g.mean(0) - q.mean(0)).norm() / (gallery.mean(0) - queries.mean(0)).norm()
    if name == "none":
        assert torch.equal(g, gallery)
    elif name in ("mean_shift", "zscore", "whiten", "coral", "procrustes"):
        assert apart < 1e-12
    elif name in ("projected_shift", "projection"):
        assert apart <= 1
    else:
        assert apart < (0.5 if name != "realign" else 0.8)
        assert_near(g.norm(dim=1), torch.ones(80), 1e-12)
    covariance = torch.cov(g.T)
    if name == "whiten":
        assert_near(covariance, torch.eye(12), 1e-9)
    if name == "coral":
        assert_near(covariance, torch.cov(queries.T), 1e-9)
    if name == "zscore":
        assert_near(g.std(0, correction=0), torch.ones(12), 1e-12)
    if name == "procrustes":
        assert_near(torch.cdist(g, g), torch.cdist(gallery, gallery), 1e-9)
        assert (g - q).norm() < (gallery - gallery.mean(0) - queries + queries.mean(0)).norm()


PAIRS = clusters()
FITTED = MeanShift(n_components=0).fit(*PAIRS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gap_metrics(torch.zeros(3), torch.zeros(3, 2)), ValueError, r"images: expected shape \(N, D\)"),
        (lambda: gap_metrics(torch.ones(3, 2), torch.ones(4, 2)), ValueError, "texts: expected 3 rows as in images"),
        (lambda: gap_metrics(torch.ones(3, 2), torch.ones(3, 5)), ValueError, "texts: expected D = 2 as in images"),
        (lambda: gap_metrics([[1.0]], torch.ones(1, 1)), TypeError, "images: expected a torch.Tensor"),
        (
            lambda: gap_metrics(torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1)),
            ValueError,
            "images: expected finite values, got NaN or infinity, first in row 1",
        ),
        (lambda: MeanShift("1").fit(*PAIRS), TypeError, "alpha: expected a number, got str"),
        (
            lambda: MeanShift(n_components="all").fit(*PAIRS),
            ValueError,
            "n_components: expected one of 'auto', 'exact', got 'all'",
        ),
        (
            lambda: MeanShift(n_components=1.5).fit(*PAIRS),
            ValueError,
            "n_components: expected a finite number > 0 and <= 1",
        ),
        (lambda: MeanShift(n_components=-1).fit(*PAIRS), ValueError, "n_components: expected an integer >= 0, got -1"),
        (
            lambda: MeanShift(moves="both").fit(*PAIRS),
            ValueError,
            "moves: expected one of 'gallery', 'queries', got 'both'",
        ),
        (
            lambda: MeanShift(agreement=2).fit(*PAIRS),
            ValueError,
            "agreement: expected a finite number >= 0 and <= 1, got 2",
        ),
        (lambda: MeanShift().transform(torch.ones(1, 2)), ValueError, "MeanShift: call fit before transform"),
        (lambda: MeanShift().save("x"), ValueError, "MeanShift: call fit before save"),
        (lambda: MeanShift().fit(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "queries: expected D = 3"),
        (lambda: MeanShift().partial_fit(torch.ones(2, 3)).n_components_, ValueError, "expected rows of both sides"),
        (lambda: MeanShift().merge(FITTED), ValueError, "MeanShift: nothing was seen here"),
        (lambda: MeanShift().partial_fit(torch.ones(1, 3)).merge(FITTED), ValueError, "other: expected D = 3"),
        (lambda: MeanShift().fit(*PAIRS).partial_fit(torch.ones(1, 3)), ValueError, "gallery: expected D = 64 as"),
        (lambda: BASELINES["center"]().transform(torch.ones(2, 3)), ValueError, "Center: call fit before transform"),
        (lambda: BASELINES["procrustes"]().fit(*PAIRS), ValueError, "queries: expected 12 rows as in gallery"),
        (lambda: FITTED.transform(torch.ones(2, 3)), ValueError, "gallery: expected D = 64 as fitted"),
        (lambda: FITTED.transform(torch.full((1, 64), math.inf)), ValueError, "gallery: expected finite values"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

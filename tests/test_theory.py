"""The paper's statements (Chowers et al., CVPR 2026) as numbers."""

import itertools

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, contrastive_loss
from gapkern._search import nearest
from gapkern._threads import one_thread
from gapkern.dynamics import descend, isotropic_gaussians, tight_clusters
from gapkern.gap import BASELINES, Projection
from gapkern.robustness import robustness
from gapkern.theory import assess, freeze, leading_gradient, orthogonality, preservation, robustness_curve

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies


def on_sphere(n, dims, radius, seed=0):
    """Two tight clusters on the unit sphere, a right angle apart."""
    x, y = tight_clusters(n, dims, radius, 0.0, seed=seed)
    x[:, 1] += 1
    y[:, 2] += 1
    return (torch.nn.functional.normalize(t, dim=1) for t in (x, y))


def test_theorem_3_1_the_leading_gradient_is_along_the_gap():
    """dL/dy_i ~ (4 / (N tau^2)) [g . (y_i - mu_y)] g, with an error that falls linearly with the clusters' radius."""
    n, dims, tau, gap = 8, 5, 1e-3, 3.0  # ||g||^2 / tau = 9000: what does not shrink with the radius is below 1e-3
    errors = []
    for radius in (1.6e-5, 8e-6, 4e-6, 2e-6):
        x, y = tight_clusters(n, dims, radius, gap)
        y.requires_grad_()
        # The paper's loss is twice the mean of the two directions.
        (gradient,) = torch.autograd.grad(2 * contrastive_loss(x, y, 1 / tau, similarity="sqeuclidean"), y)
        y = y.detach()
        g = y.mean(0) - x.mean(0)
        leading = 4 / (n * tau**2) * ((y - y.mean(0)) @ g)[:, None] * g
        errors.append(float((gradient - leading).norm() / leading.norm()))
    assert errors[-1] < 0.01, errors
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(2.0, rel=0.1), errors


@given(
    n=st.integers(3, 40),
    dims=st.integers(2, 24),
    scale=st.floats(0.5, 500),
    gap=st.floats(0.3, 5),
    similarity=st.sampled_from(["sqeuclidean", "dot"]),
    of=st.sampled_from(["images", "texts"]),
    seed=st.integers(0, 2**31),
)
def test_theorem_3_1_to_first_order_the_gradient_is_the_formula_whatever_the_distance(
    n, dims, scale, gap, similarity, of, seed
):
    radius = 1e-3 / (scale * max(1, gap) + 1)
    errors = []
    for shrink in (1, 10):
        x, y = tight_clusters(n, dims, radius / shrink, gap, seed=seed)
        x, y = x + 0.3, y + 0.3
        errors.append(leading_gradient(x, y, scale, similarity=similarity, of=of).first_order_error)
    assert errors[0] < 0.05, errors
    assert errors[1] < errors[0] / 5 + 1e-7, "the error falls linearly with the radius"


@given(n=st.integers(4, 40), dims=st.integers(2, 16), gap=st.floats(1, 5), seed=st.integers(0, 2**31))
def test_theorem_3_1_slope_tends_to_one_as_clusters_tighten(n, dims, gap, seed):
    scale = 2000 / gap**2
    slopes = []
    for tightness in (0.3, 0.03, 0.003):
        found = leading_gradient(*tight_clusters(n, dims, tightness / (4 * scale * gap), gap, seed=seed), scale)
        slopes.append(abs(found.slope - 1))
    assert found.applies
    assert found.correlation > 0.999
    assert slopes[-1] < 0.01, slopes
    assert slopes[-1] <= slopes[0] + 2 / found.distance, slopes


def test_theorem_3_1_holds_on_the_sphere_and_says_where_it_does_not():
    tight = leading_gradient(*on_sphere(30, 12, 1e-5), 500.0, similarity="dot", sphere=True)
    assert tight.applies
    assert tight.correlation > 0.999
    assert tight.slope == pytest.approx(1, abs=0.01)
    wide = leading_gradient(*on_sphere(30, 12, 0.3), 500.0, similarity="dot", sphere=True)
    assert not wide.applies
    assert wide.correlation < 0.9
    near = leading_gradient(*tight_clusters(30, 12, 1e-6, 0.01), 10.0)
    assert not near.applies
    assert near.relative_error > 0.5
    assert near.first_order_error < 1e-3


@pytest.mark.parametrize("similarity", ["sqeuclidean", "dot"])
@pytest.mark.parametrize("seed", range(5))
def test_theorem_3_2_what_is_felt_along_any_direction_stays_within_its_bound(similarity, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = isotropic_gaussians(24, 5, 2.0, 0.5, seed=seed)
    for squeeze in (1.0, 1e-2, 0.0):
        x[:, 0], y[:, 0] = 1.0 + squeeze * (x[:, 0] - x[:, 0].mean()), 3.0 + squeeze * (y[:, 0] - y[:, 0].mean())
        for u in (torch.eye(5, dtype=torch.float64)[0], torch.randn(5, generator=generator, dtype=torch.float64)):
            found = freeze(x, y, 3.0, similarity=similarity, direction=u)
            for side in ("images", "texts"):
                apart = (getattr(found, side) - getattr(found, f"predicted_{side}")).abs()
                assert bool((apart <= getattr(found, f"bound_{side}") + 1e-12).all())
            assert abs(found.drift) <= found.drift_bound + 1e-12
    # Constant along the gap: the softmax sums explain all of it.
    found = freeze(x, y, 3.0, similarity=similarity, direction=torch.eye(5)[0])
    assert float(found.bound_texts.max()) < 1e-12
    assert float(found.texts.abs().max()) > 1e-3


@pytest.mark.parametrize("n", [8, 20])
def test_theorem_3_2_the_gap_stands_still_once_doubly_stochastic_while_the_loss_falls(n):
    path = descend(*tight_clusters(n, n + 4, 1e-2, 2.0), 2.0, lr=n / 20, steps=3000, record_every=100)
    start = path.frozen(residual=1e-6, change=1e-6)
    assert start is not None
    assert 0 < start <= 2000, "a thousand steps are left to judge by"
    rows = [row for row in path.rows if row["step"] >= start]
    gaps = torch.tensor([row["gap_norm"] for row in rows], dtype=torch.float64)
    losses = [row["loss"] for row in rows]
    assert gaps[0] > 1.9
    assert float((gaps[10] - gaps[0]).abs() / gaps[0]) < 1e-6
    assert losses[-1] < 0.6 * losses[0]
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert max(rows[0]["residual_images"], rows[0]["residual_texts"]) < 1e-6
    found = freeze(path.images, path.texts, path.logit_scale)
    assert abs(found.drift) <= found.drift_bound < 1e-6
    shape = orthogonality(path.texts, path.images)
    assert min(shape.outside_gallery, shape.outside_queries) > 0.9999
    assert shape.holds(1e-3)


def test_theorem_3_2_the_gap_freezes_where_softmaxes_are_doubly_stochastic():
    """Constant along a direction and doubly stochastic: no gradient along it."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.arange(7, dtype=torch.float64) * 2 * torch.pi / 7
    circle = torch.stack([angles.cos(), angles.sin()], 1)  # by symmetry every softmax sum is one
    x = torch.cat([circle, torch.zeros(7, 1, dtype=torch.float64)], 1)
    y = torch.cat([circle, torch.full((7, 1), 0.8, dtype=torch.float64)], 1).requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive_loss(x, y, 2.0, similarity="sqeuclidean"), y)
    assert float(gradient[:, 2].abs().max()) < 1e-12
    assert float(gradient[:, :2].abs().max()) > 1e-3
    # Broken on purpose: without the symmetry the direction of the gap does feel the loss.
    moved = y.detach() + torch.cat([0.3 * torch.randn(7, 2, generator=generator).double(), torch.zeros(7, 1)], 1)
    moved.requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive_loss(x, moved, 2.0, similarity="sqeuclidean"), moved)
    assert float(gradient[:, 2].abs().max()) > 1e-3


def orthogonal_gap(seed, dims=32, gallery=10, queries=60):
    """Assumption 3.3: the gap is orthogonal to the affine hulls of both modalities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(gallery, dims, dtype=torch.float64)
    x[:, : dims // 2] = 0.3 * torch.randn(gallery, dims // 2, generator=generator)
    rows = torch.randint(gallery, (queries,), generator=generator)
    y = x[rows].clone()
    y[:, : dims // 2] += 0.1 * torch.randn(queries, dims // 2, generator=generator)
    y[:, -1] += 1.5
    return x, y


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("variance", [0.02, 0.05, 0.1])
def test_theorem_3_4_robustness_rises_for_every_query_until_the_means_meet(seed, variance):
    gallery, queries = orthogonal_gap(seed)
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    noise = Gaussian(variance, "per_coordinate")
    alphas = torch.linspace(0, 1, 9).tolist()
    survival = torch.stack([robustness(queries, gallery, noise, shift=shift.at(a)).per_query for a in alphas])
    rises = survival.diff(dim=0)
    assert float(rises.min()) > -2e-5, "beyond the error of the integral"
    assert float(survival[-1].mean()) > float(survival[0].mean()) + 1e-3
    beyond = robustness(queries, gallery, noise, shift=shift.at(1.5)).per_query
    assert float((beyond - survival[-1]).max()) < 2e-5


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_theorem_3_4_in_random_orthogonal_cases(cases):
    generator = torch.Generator().manual_seed(4)
    gains = []
    with one_thread() as run:
        for case in range(cases):
            g, q, inner = (
                int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 9), (1, 6), (1, 6))
            )
            dims = inner + int(torch.randint(1, 4, (1,), generator=generator))
            basis = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q
            x = torch.randn(g, inner, generator=generator, dtype=torch.float64) @ basis[:inner]
            y = torch.randn(q, inner, generator=generator, dtype=torch.float64) @ basis[:inner]
            away = torch.randn(dims - inner, generator=generator, dtype=torch.float64) @ basis[inner:]
            # The means differ by a vector that is orthogonal to both hulls.
            y = y - y.mean(0) + x.mean(0) + away * 3 * torch.rand(1, generator=generator, dtype=torch.float64)
            noise = Gaussian(float(10 ** (2 * torch.rand(1, generator=generator) - 1.5)), "per_coordinate")
            curve = run(robustness_curve, y, x, noise, alphas=[0, 0.25, 0.5, 0.75, 1])
            assert curve.worst_fall < 2e-5, f"case {case}"
            assert curve.rising == 1
            assert curve.orthogonality.holds()
            gains.append(curve.robustness[-1] - curve.robustness[0])
    assert min(gains) > -1e-5
    assert np.mean(gains) > 0.02


def test_theorem_3_4_each_query_is_safest_where_the_gallery_meets_it():
    gallery, queries = orthogonal_gap(1)
    queries[:, -1] = torch.linspace(0.5, 2.5, len(queries))  # not constant along the gap: every query has its own peak
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    alphas, noise = torch.linspace(0, 2, 81).tolist(), Gaussian(0.1, "per_coordinate")
    curve = robustness_curve(queries, gallery, noise, alphas=alphas, shift=shift)
    best = torch.tensor(curve.alphas)[curve.per_query.argmax(0)]
    unsure = curve.per_query.amax(0) > 0.999  # flat to the integral's error
    assert unsure.double().mean() < 0.3
    assert float((best - curve.peaks)[~unsure].abs().max()) < 0.06
    assert not curve.orthogonality.holds(1e-3)
    assert curve.worst_fall > 1e-3
    assert curve.worst_fall_to_peak < 2e-5


def test_theorem_3_4_fails_visibly_without_its_assumption():
    gallery, queries = orthogonal_gap(0)
    # A gap within the gallery's hull: towards one of its points.
    queries = queries + 3 * (gallery[0] - gallery.mean(0))
    shift = MeanShift(n_components=0).fit(gallery, queries)
    before = nearest(queries, gallery)
    after = nearest(queries, shift.transform(gallery))
    assert (before != after).double().mean() > 0.2


@pytest.mark.parametrize("seed", range(5))
def test_theorem_3_5_no_neighbour_changes_for_any_orthogonal_shift(seed):
    gallery, queries = orthogonal_gap(seed)
    v = torch.zeros(32, dtype=torch.float64)
    v[16:] = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for size in (0.1, 1.0, 30.0):
        assert torch.equal(nearest(queries, gallery), nearest(queries, gallery + size * v))


def test_why_l2_inner_products_gain_nothing_from_closing_the_gap():
    gallery, queries = (t.float() for t in orthogonal_gap(3))
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for alpha in (0.0, 1.0):
        moved = shift.at(alpha).transform(gallery)
        clean = (queries @ moved.T).argmax(1)
        trials = [
            (queries @ (moved + 0.2 * torch.randn(moved.shape, generator=generator)).T).argmax(1) == clean
            for _ in range(400)
        ]
        kept[alpha] = torch.stack(trials).double().mean().item()
    assert kept[1.0] - kept[0.0] < 0.02
    noise = Gaussian(0.2**2, "per_coordinate")
    gain = robustness(queries, gallery, noise, shift=shift).robustness - robustness(queries, gallery, noise).robustness
    assert gain > 0.05


@given(
    gallery=st.integers(1, 40),
    queries=st.integers(1, 40),
    dims=st.integers(1, 12),
    length=st.floats(0, 10),
    tilt=st.floats(0, 1),
    alpha=st.floats(-3, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_margins_predict_which_neighbours_stay(gallery, queries, dims, length, tilt, alpha, dtype, seed):
    """Never a neighbour that leaves although it was guaranteed or predicted to stay; nearly all that leave foreseen."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, dims + 1, generator=generator).to(dtype) for n in (gallery, queries))
    x[:, -1] = 0
    v = torch.randn(dims + 1, generator=generator, dtype=torch.float64) * tilt
    v[-1] = 1
    v *= length / v.norm()
    found = preservation(y, x, v, alpha=alpha)
    moved = (x.double() + alpha * v).to(dtype)
    same = nearest(y, x) == nearest(y, moved)
    assert not bool((found.kept & ~same).any())
    assert not bool((found.guaranteed & ~found.kept).any())
    if dtype == torch.float64:
        assert torch.equal(found.kept, same)


@pytest.mark.parametrize("name", ["clip", "convirt", "videoclip"])
@pytest.mark.parametrize("turned", [False, True])
def test_margins_are_never_violated_on_real_embeddings(real_data, name, turned):
    queries, gallery = torch.from_numpy(real_data(name)[:: -1 if turned else 1].copy())
    before = nearest(queries, gallery)
    shares = {}
    fitted = {
        components: MeanShift(1.0, components).fit(gallery, queries) for components in (0, 50, 0.9, "auto", "exact")
    }
    for components, alpha in itertools.product(fitted, (0.25, 1.0, 1.5, -1.0)):
        shift = fitted[components].at(alpha)
        found = preservation(queries, gallery, shift)
        same = before == nearest(queries, shift.transform(gallery))
        assert not bool((found.guaranteed & ~same).any()), (components, alpha)
        assert not bool((found.kept & ~same).any()), (components, alpha)
        # What is not predicted to stay goes, but for ties: ConVIRT has reports that occur twice.
        assert float((found.kept != same).double().mean()) < 0.02, (components, alpha)
        shares[components, alpha] = float(found.guaranteed.double().mean())
    assert shares["exact", 1.0] > 0.98
    assert shares[0, 1.0] <= shares[0, 0.25] < shares["exact", 1.0]
    naive = BASELINES["mean_shift"]().fit(gallery, queries)
    found = preservation(queries, gallery, naive.q.mean - naive.g.mean)
    assert not bool((found.kept & (before != nearest(queries, naive.transform(gallery)))).any())


def test_margins_one_pass_predicts_every_alpha():
    x, y = isotropic_gaussians(300, 16, 3.0)
    shift = MeanShift(n_components=4).fit(x, y)
    found = preservation(y, x, shift)
    alphas = [0.0, 0.2, 0.5, 1.0]
    measured = [float((nearest(y, x) == nearest(y, shift.at(a).transform(x))).double().mean()) for a in alphas]
    assert found.share(alphas) == pytest.approx(measured, abs=1e-9)
    assert measured[0] == 1 > measured[-1]


def test_orthogonality_of_known_shapes():
    gallery, queries = orthogonal_gap(0)
    queries = queries - (queries.mean(0) - gallery.mean(0)) * (torch.arange(32) < 16)
    found = orthogonality(queries, gallery)
    assert found.holds(1e-6)
    assert found.gap_norm == pytest.approx(1.5)
    assert (found.rank_gallery, found.rank_queries) == (9, 16)
    tilted = queries.clone()
    tilted[:, 0] += 1.5
    assert not orthogonality(tilted, gallery).holds(0.05)
    # More rows than dimensions: no direction is left outside, but nothing varies along the gap either.
    x, y = isotropic_gaussians(200, 4, 3.0)
    x, y = x - x.mean(0), y - y.mean(0)
    x[:, 0], y[:, 0] = 1e-3 * x[:, 0], 3 + 1e-3 * y[:, 0]
    found = orthogonality(y, x)
    assert found.outside_gallery < 1e-6
    assert found.deviation_gallery < 1e-3
    assert found.holds(1e-3)
    assert not found.holds(1e-4)


def test_assessing_real_embeddings_says_what_applies(real_data):
    images, texts = real_data("clip")
    verdicts = {v.statement: v for v in assess(images, texts)}
    assert list(verdicts) == ["3.1", "3.2", "assumption 3.3", "3.4", "3.5", "projection"]
    assert not verdicts["3.1"].applies
    assert 0.9 < verdicts["3.5"].numbers["guaranteed"] <= verdicts["3.5"].numbers["kept"]
    few = {v.statement: v for v in assess(images[:50], texts[:50], noise=Gaussian(0.04))}["projection"]
    assert few.applies
    numbers = few.numbers
    by_hand = Projection("auto").fit(texts[:50], images[:50])
    offsets = torch.from_numpy(images[:50]).double() - by_hand.transform_queries(torch.from_numpy(images[:50]).double())
    assert numbers["offset"] == pytest.approx(float(offsets.norm(dim=1).mean()), rel=1e-9)
    assert 0 < numbers["offset_after_shift"] < numbers["offset"]
    for metric in ("l2", "ip"):
        none = robustness(images[:50], texts[:50], Gaussian(0.04), metric=metric).robustness
        assert numbers[metric] == pytest.approx(none, abs=1e-6)
        assert numbers[f"{metric}_projection"] > none + 0.03
    assert numbers["l2_projection"] > numbers["l2_shift"] > numbers["l2"]
    exact = MeanShift(n_components="exact").fit(texts, images)
    assert {v.statement: v for v in assess(images, texts, shift=exact)}["3.5"].applies


def test_bad_arguments_are_named():
    x, y = tight_clusters(4, 3, 0.1, 1.0)
    with pytest.raises(ValueError, match="of: expected one of"):
        leading_gradient(x, y, 1.0, of="both")
    with pytest.raises(ValueError, match="logit_scale: expected a finite number > 0, got -1"):
        freeze(x, y, -1.0)
    with pytest.raises(ValueError, match=r"direction: expected shape \(3,\), got \(4,\)"):
        freeze(x, y, 1.0, direction=torch.ones(4))
    with pytest.raises(ValueError, match="direction: expected a length above 0"):
        freeze(x, y, 1.0, direction=torch.zeros(3))
    with pytest.raises(ValueError, match="queries: expected another mean"):
        orthogonality(x, x)
    with pytest.raises(ValueError, match=r"shift: expected a vector of D = 3, got shape \(2,\)"):
        preservation(y, x, torch.ones(2))
    with pytest.raises(ValueError, match="shift: expected normalize=False"):
        preservation(y, x, MeanShift(normalize=True).fit(x, y))
    with pytest.raises(ValueError, match="alphas: expected at least one"):
        robustness_curve(y, x, Gaussian(0.1), alphas=[])
    with pytest.raises(TypeError, match="images: expected float32 or float64"):
        leading_gradient(x.half(), y.half(), 1.0)

"""Embeddings of any magnitude: right, against NumPy's long doubles, or refused in one line."""

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Quantize, gap_metrics
from gapkern._rows import unit
from gapkern._search import nearest
from gapkern.dynamics import evaluate, measure
from gapkern.gap import BASELINES
from gapkern.perturb import perturb as perturbed
from gapkern.robustness import robustness
from gapkern.theory import leading_gradient, orthogonality, preservation

CASES = [
    (torch.float32, 1e20),
    (torch.float32, 1e-20),
    (torch.float32, 1e37),
    (torch.float32, 1e-37),
    (torch.float64, 1e20),
    (torch.float64, 1e-60),
    (torch.float64, 1e100),
    (torch.float64, 1e-100),
]
scales = pytest.mark.parametrize(("dtype", "scale"), CASES)


def pairs(dtype, scale, n=60, dims=12):
    generator = np.random.default_rng(5)
    x = generator.standard_normal((n, dims))
    y = x + 0.3 * generator.standard_normal((n, dims)) + 0.7
    return tuple(torch.from_numpy(scale * v).to(dtype) for v in (x, y))


def wide(x):
    return x.double().numpy().astype(np.longdouble)


def brute(queries, gallery):
    """Squared distances in long double, whose exponents reach 1e4932."""
    return ((wide(queries)[:, None] - wide(gallery)[None]) ** 2).sum(2)


@scales
def test_neighbours(dtype, scale):
    queries, gallery = pairs(dtype, scale)
    assert np.array_equal(nearest(queries, gallery).numpy(), brute(queries, gallery).argmin(1))


def test_neighbours_of_rows_that_differ_only_far_below_their_magnitude():
    generator = np.random.default_rng(1)
    gallery = torch.ones(40, 3)
    gallery[:, 1:] = torch.from_numpy(1e-25 * generator.standard_normal((40, 2))).float()
    queries = gallery.flip(0) + torch.tensor([0.0, 1e-27, 0.0])
    assert np.array_equal(nearest(queries, gallery).numpy(), brute(queries, gallery).argmin(1))


def test_float32_subnormals():
    queries, gallery = pairs(torch.float32, 1e-41)
    assert np.array_equal(nearest(queries, gallery).numpy(), brute(queries, gallery).argmin(1))
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    gap = wide(queries).mean(0) - wide(gallery).mean(0)
    assert np.allclose(shift.gap_vector_.numpy() / 1e-41, (gap / 1e-41).astype(float), rtol=1e-12)


@scales
def test_unit_rows(dtype, scale):
    x, _ = pairs(dtype, scale)
    truth = wide(x) / np.sqrt((wide(x) ** 2).sum(1, keepdims=True))
    error = np.abs(unit(x).double().numpy() - truth).max()
    assert error < 4 * torch.finfo(dtype).eps
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


@scales
def test_the_mean_shift_scales_with_its_rows(dtype, scale):
    queries, gallery = pairs(dtype, scale)
    rows = wide(gallery) - wide(gallery).mean(0)
    gap = wide(queries).mean(0) - wide(gallery).mean(0)
    _, _, directions = np.linalg.svd((rows / scale).astype(float), full_matrices=False)
    kept = directions[:4].astype(np.longdouble)
    for components, expected in ((4, gap - (gap @ kept.T) @ kept), (0, gap)):
        shift = MeanShift(n_components=components).fit(gallery, queries)
        found = shift.shift_vector_.numpy().astype(np.longdouble)
        assert np.abs(found - expected).max() < 1e-9 * np.abs(gap).max()
        assert shift.n_components_ == components
        assert shift.orthogonality_ == pytest.approx(float(np.sqrt((expected**2).sum() / (gap**2).sum())), rel=1e-8)
        moved = shift.transform(gallery)
        truth = (wide(gallery) + found).astype(moved.numpy().dtype)
        assert np.abs(moved.numpy() - truth).max() <= 2 * torch.finfo(dtype).eps * np.abs(truth).max()
    normalized = MeanShift(n_components=4, normalize=True).fit(gallery, queries)
    target = wide(gallery) + normalized.shift_vector_.numpy().astype(np.longdouble)
    target = target / np.sqrt((target**2).sum(1, keepdims=True))
    assert np.abs(normalized.transform(gallery).double().numpy() - target).max() < 4 * torch.finfo(dtype).eps
    # As many neighbours stay as at magnitude 1.
    ones = MeanShift().fit(*(t / scale for t in (gallery, queries)))
    assert MeanShift().fit(gallery, queries).n_components_ == ones.n_components_


@scales
def test_metrics_are_those_of_magnitude_one(dtype, scale):
    x, y = pairs(dtype, scale)
    found = gap_metrics(x, y)
    a, b = wide(x), wide(y)
    assert found["centroid_distance"] == pytest.approx(float(np.sqrt(((b.mean(0) - a.mean(0)) ** 2).sum())), rel=1e-12)
    assert found["mean_pair_distance"] == pytest.approx(float(np.sqrt(((b - a) ** 2).sum(1)).mean()), rel=1e-12)
    u, v = (w / np.sqrt((w**2).sum(1, keepdims=True)) for w in (a, b))
    assert found["cos_paired"] == pytest.approx(float((u * v).sum(1).mean()), rel=1e-12)
    assert found["alignment"] == pytest.approx(float(((u - v) ** 2).sum(1).mean()), rel=1e-12)
    ones = gap_metrics(*((t.double() / scale) for t in (x, y)))
    for name, value in ones.items():
        power = {"centroid_distance": 1, "mean_pair_distance": 1, "frechet": 2}.get(name, 0)
        expected = float(np.longdouble(value) * np.longdouble(scale) ** power)
        assert found[name] == pytest.approx(expected, rel=1e-6), name


@scales
def test_robustness_is_that_of_magnitude_one(dtype, scale):
    queries, gallery = pairs(dtype, scale)
    ones = [t.double() / scale for t in (queries, gallery)]
    variance = 4.0 * scale**2
    if not 0 < variance < float("inf"):
        pytest.skip("the variance is no float64")
    for method in ("exact", "projected"):
        found = robustness(queries, gallery, Gaussian(variance), method=method, trials=4)
        truth = robustness(*ones, Gaussian(4.0), method=method, trials=4)
        assert torch.equal(found.nearest, truth.nearest)
        assert float((found.per_query - truth.per_query).abs().max()) < (1e-4 if method == "exact" else 0.26)
    coarse = robustness(queries, gallery, Quantize(3))
    assert torch.equal(coarse.per_query, robustness(*(t.to(dtype) for t in ones), Quantize(3)).per_query)


@scales
def test_perturbations_scale(dtype, scale):
    x, _ = pairs(dtype, scale)
    noisy = perturbed(x, Gaussian(scale, "per_coordinate"), seed=1) if 1e-30 < scale < 1e30 else None
    if noisy is not None:
        plain = perturbed(torch.zeros_like(x), Gaussian(1.0, "per_coordinate"), seed=1).double()
        truth = x.double() + scale**0.5 * plain
        assert float((noisy.double() - truth).abs().max()) <= 8 * torch.finfo(dtype).eps * float(truth.abs().max())
    cells = wide(perturbed(x, Quantize(4), seed=0))
    low, high = wide(x).min(0), wide(x).max(0)
    assert np.abs(cells - wide(x)).max() <= ((high - low) / 8).max() * (1 + 1e-5)


@scales
def test_baselines_fit_and_move(dtype, scale):
    queries, gallery = pairs(dtype, scale)
    for name, make in BASELINES.items():
        baseline, one = make().fit(gallery, queries), make().fit(gallery.double() / scale, queries.double() / scale)
        found, truth = baseline.transform(gallery), one.transform(gallery.double() / scale)
        free = name in ("linear", "center", "realign", "zscore", "whiten")  # of the rows' magnitude
        error = found.double() / (1.0 if free else scale) - truth
        if name == "realign":  # adds the queries' mean, which is not: what it scales to is another map
            assert bool(torch.isfinite(found).all())
        else:
            assert float(error.abs().max()) < 1e3 * torch.finfo(dtype).eps * float(truth.abs().max()), name


@scales
def test_theory_and_dynamics(dtype, scale):
    x, y = pairs(dtype, scale)
    found, ones = orthogonality(x, y), orthogonality(x.double() / scale, y.double() / scale)
    assert found.gap_norm / scale == pytest.approx(ones.gap_norm, rel=1e-6)
    for name in ("outside_gallery", "variance_along_gallery", "deviation_queries"):
        assert getattr(found, name) == pytest.approx(getattr(ones, name), rel=1e-5, abs=1e-9)
    assert np.array_equal(preservation(x, y, torch.zeros(12)).nearest.numpy(), brute(x, y).argmin(1))
    assert measure(x, y)["gap_norm"] / scale == pytest.approx(measure(x / scale, y / scale)["gap_norm"], rel=1e-5)
    if dtype == torch.float64 and scale < 1:
        assert evaluate(x, y, 1.0).loss == pytest.approx(np.log(60), rel=1e-12)
        term = leading_gradient(x, y, 1.0)
        assert not np.isnan(term.correlation)
        assert not np.isnan(term.slope)
    if dtype == torch.float32 and scale > 1:
        with pytest.raises(ValueError, match="images and texts: expected a loss that is finite in float32, got"):
            evaluate(x, y, 1.0)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_what_no_square_holds_is_refused_in_one_line(scale):
    x, y = pairs(torch.float64, scale)
    calls = [
        lambda: gap_metrics(x, y),
        lambda: MeanShift().fit(y, x),
        lambda: BASELINES["whiten"]().fit(y, x),
        lambda: robustness(x, y, Quantize(4)),
        lambda: orthogonality(x, y),
        lambda: evaluate(x, y, 1.0),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"^(images|queries|gallery): expected a largest magnitude between 1e-140"
        ) as e:
            call()
        assert "\n" not in str(e.value)

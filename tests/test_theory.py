"""The paper's statements (Chowers et al., CVPR 2026) as numbers."""

import itertools

import pytest
import torch

from gapkern import Gaussian, MeanShift, contrastive_loss
from gapkern._nearest import nearest
from gapkern.robustness import robustness


def tight_clusters(n, dims, radius, gap, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = radius * torch.randn(n, dims, generator=generator, dtype=torch.float64)
    y = radius * torch.randn(n, dims, generator=generator, dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    y[:, 0] += gap
    return x, y


def test_theorem_3_1_the_leading_gradient_is_along_the_gap():
    """dL/dy_i ~ (4 / (N tau^2)) [g . (y_i - mu_y)] g, with an error that falls linearly with the clusters' radius."""
    n, dims, tau, gap = 8, 5, 1e-3, 3.0  # ||g||^2 / tau = 9000: what does not shrink with the radius is below 1e-3
    errors = []
    for radius in (8e-6, 4e-6, 2e-6, 1e-6):
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
    shift = MeanShift(components="exact").fit(gallery, queries)
    noise = Gaussian(variance, "per_coordinate")
    alphas = torch.linspace(0, 1, 9).tolist()
    survival = torch.stack([robustness(queries, gallery, noise, shift=shift.at(a)).per_query for a in alphas])
    rises = survival.diff(dim=0)
    assert float(rises.min()) > -2e-5, "beyond the error of the integral"
    assert float(survival[-1].mean()) > float(survival[0].mean()) + 1e-3
    beyond = robustness(queries, gallery, noise, shift=shift.at(1.5)).per_query
    assert float((beyond - survival[-1]).max()) < 2e-5


def test_theorem_3_4_fails_visibly_without_its_assumption():
    gallery, queries = orthogonal_gap(0)
    # A gap within the gallery's hull: towards one of its points.
    queries = queries + 3 * (gallery[0] - gallery.mean(0))
    shift = MeanShift(components=0).fit(gallery, queries)
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
    shift = MeanShift(components="exact").fit(gallery, queries)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for alpha in (0.0, 1.0):
        moved = shift.at(alpha).transform(gallery)
        clean = (queries @ moved.T).argmax(1)
        trials = [(queries @ (moved + 0.2 * torch.randn(moved.shape, generator=generator)).T).argmax(1) == clean
                  for _ in range(400)]  # fmt: skip
        kept[alpha] = torch.stack(trials).double().mean().item()
    assert kept[1.0] - kept[0.0] < 0.02
    noise = Gaussian(0.2**2, "per_coordinate")
    gain = robustness(queries, gallery, noise, shift=shift).robustness - robustness(queries, gallery, noise).robustness
    assert gain > 0.05

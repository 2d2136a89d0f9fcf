"""Operators of robustness: the exact integral against SciPy's, nearest rows against float64, CUDA against the CPU."""

import math
import os

import numpy as np
import pytest
import torch

from gapkern._search import in_tiles, nearest
from gapkern.reference import robustness as reference
from tests import warm
from tests.scenes import cloud


def winning(squared, target, variance, dims):
    operator = torch.ops.gapkern.robustness_exact
    return operator(squared[None], torch.tensor([[target]]), float(variance), dims).item()


@pytest.mark.parametrize("dims", [1, 2, 3, 8, 31, 63, 64, 200, 512, 4096])
def test_exact_is_scipys_integral_over_six_decades_of_variance(dims):
    generator = np.random.default_rng(dims)
    errors = []
    for variance in 10.0 ** np.arange(-6, 1):
        for distance in (0.0, 0.3, 1.0):
            gallery = generator.standard_normal((5, dims)) / math.sqrt(dims)
            query = gallery[0] + distance * math.sqrt(variance) * generator.standard_normal(dims)
            squared = torch.from_numpy(((query - gallery) ** 2).sum(1))
            target = int(squared.argmin())
            expected = reference.winning_probability(squared, target, variance, dims, nodes=201)
            errors.append(abs(winning(squared, target, variance, dims) - expected))
    assert max(errors) < 1e-3
    assert np.mean(errors) < 1e-4


@pytest.mark.parametrize("dims", [64, 300, 2048])
@pytest.mark.parametrize("spread", [0.2, 1, 2.5])
def test_many_rivals_are_summed_over_a_grid(dims, spread):
    """More rivals than the grid has points, spread over some standard deviations of the noise."""
    generator = np.random.default_rng(dims)
    for variance in (1e-4, 1e-2):
        deviation = 2 * math.sqrt(dims + 2 / variance)
        ahead = spread * np.abs(generator.standard_normal(100))
        squared = torch.from_numpy(1.0 + variance * deviation * ahead)
        target = int(squared.argsort()[2])
        expected = reference.winning_probability(squared, target, variance, dims, nodes=61)
        assert winning(squared, target, variance, dims) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert winning(squared.float(), target, variance, dims) == pytest.approx(expected, rel=1e-2, abs=1e-5)


def winning_inner(scores, target, deviation):
    operator = torch.ops.gapkern.robustness_exact_inner
    return operator(scores[None], torch.tensor([[target]]), torch.tensor([deviation], dtype=torch.float64)).item()


@pytest.mark.parametrize("gallery", [2, 3, 31, 64, 200, 5000])
@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0, 20.0])
def test_exact_under_inner_product_is_scipys_integral(gallery, spread):
    generator = np.random.default_rng(gallery)
    # Of a large gallery the definition takes seconds: the deviation, which scales everything, is varied in small ones.
    for deviation in (1e-3, 1.0, 40.0) if gallery < 5000 else (1.0,):
        scores = torch.from_numpy(spread * deviation * generator.standard_normal(gallery))
        for target in (int(scores.argmax()), 0, int(scores.argsort()[gallery // 2])):
            expected = reference.winning_probability_inner(scores, target, deviation)
            assert winning_inner(scores, target, deviation) == pytest.approx(expected, abs=5e-6)
            assert winning_inner(scores.float(), target, deviation) == pytest.approx(expected, abs=1e-5)


def test_chances_under_inner_product_sum_to_one_and_are_shared_by_equals():
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = torch.arange(40).expand(3, -1)
    p = torch.ops.gapkern.robustness_exact_inner(scores, every, torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=2e-5)
    for count in (1, 2, 10, 1000, 20000):
        equal = torch.full((count,), -3.0)
        assert winning_inner(equal, count // 2, 0.7) == pytest.approx(1 / count, rel=2e-3)


_LEADS = """
import torch
from gapkern.reference.robustness import winning_probability_inner
from scipy.special import log_ndtr
import numpy as np

def found(scores, target, deviation=1.0):
    deviations = torch.tensor([deviation], dtype=torch.float64)
    return torch.ops.gapkern.robustness_exact_inner(scores[None], torch.tensor([[target]]), deviations).item()

import gapkern.ops
z = np.linspace(-10, 10, 4001)
density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
worst = 0.0
for rows in (2, 7, 300, 5000, 100_000):
    for lead in np.linspace(-1, 7, 9) + 0.0123:  # all rivals equally far behind, at a place between two points
        scores = torch.zeros(rows, dtype=torch.float64)
        scores[rows // 2] = lead
        expected = (density * np.exp((rows - 1) * log_ndtr(lead + z))).sum()
        worst = max(worst, abs(found(scores, rows // 2) - expected))
generator = np.random.default_rng(0)
for rows in (5, 17, 33, 400):
    for spread in (0.1, 1.0, 4.0):
        scores = torch.from_numpy(spread * generator.standard_normal(rows))
        for target in (int(scores.argmax()), 0, rows - 1):
            worst = max(worst, abs(found(scores, target) - winning_probability_inner(scores, target, 1.0, nodes=801)))
print(worst)
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_bound_under_inner_product_holds_for_every_instruction_set(isa):
    """The contract's 5e-6, where rounding is the same for all rivals and up to its largest gallery."""
    run = warm.run(_LEADS, env={**os.environ, "GAPKERN_ISA": isa})
    assert float(run.stdout) < 5e-6


def test_rows_far_ahead_or_no_numbers_under_inner_product():
    scores = torch.linspace(-30.0, 1.0, 77)
    assert winning_inner(scores, 76, 1e-3) == 1.0
    assert winning_inner(scores, 0, 1.0) == 0.0
    assert winning_inner(scores, 76, 1e-310) == 1.0  # a deviation without an inverse is none
    scores[40] = math.nan
    assert math.isnan(winning_inner(scores, 76, 0.5))


def test_without_noise_the_largest_inner_product_stays():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert [winning_inner(scores, target, 0.0) for target in (0, 1, 2, 3, -1)] == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_exact_under_inner_product_refuses():
    scores, targets = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    deviations = torch.ones(2, dtype=torch.float64)
    operator = torch.ops.gapkern.robustness_exact_inner
    torch.library.opcheck(operator, (scores, targets, deviations))
    for broken, message in (
        ((scores[0], targets, deviations), "targets: expected"),
        ((scores.half(), targets, deviations), "scores: expected float32 or float64"),
        ((scores, targets.int(), deviations), "targets: expected int64"),
        ((scores, targets + 3, deviations), "targets: expected values in"),
        ((scores, targets, deviations.float()), "deviations: expected float64"),
        ((scores, targets, deviations[:1]), "deviations: expected float64"),
        ((scores, targets, -deviations), "deviations: expected numbers >= 0"),
        ((scores, targets, deviations * math.nan), "deviations: expected numbers >= 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*broken)


@pytest.mark.parametrize("dims", [2, 16, 64, 512])
@pytest.mark.parametrize("gallery", [1, 2, 10, 1000, 20000])
def test_equal_rivals_share_the_chance(dims, gallery):
    if dims < 64 and gallery > 1000:
        gallery = 1000
    for squared in (0.0, 1.3):
        p = winning(torch.full((gallery,), squared, dtype=torch.float64), gallery // 2, 0.01, dims)
        assert p == pytest.approx(1 / gallery, rel=2e-3)


def test_the_chances_of_all_rows_add_up_to_one():
    queries, gallery = cloud(dims=64)
    squared = torch.cdist(queries.double(), gallery.double()).square()
    targets = torch.arange(15).expand(40, -1).contiguous()
    for variance in (1e-4, 1e-3, 1e-2):
        total = torch.ops.gapkern.robustness_exact(squared, targets, variance, 64).sum(1)
        assert float((total - 1).abs().max()) < 2e-4


def test_a_target_of_minus_one_has_no_chance():
    squared = torch.rand(3, 4, dtype=torch.float64)
    p = torch.ops.gapkern.robustness_exact(squared, torch.tensor([[0, -1], [1, -1], [-1, 2]]), 0.1, 8)
    assert (p == 0).tolist() == [[False, True], [False, True], [True, False]]


def test_the_exact_operator_keeps_its_contract():
    squared, targets = torch.rand(4, 9, dtype=torch.float64), torch.randint(9, (4, 2))
    torch.library.opcheck(torch.ops.gapkern.robustness_exact, (squared, targets, 0.1, 16))
    for arguments, message in (
        ((squared[0], targets, 0.1, 16), "targets: expected"),
        ((squared.half(), targets, 0.1, 16), "distances: expected float32 or float64"),
        ((squared, targets.int(), 0.1, 16), "targets: expected int64"),
        ((squared, targets, 0.0, 16), "variance: expected a number > 0"),
        ((squared, targets, 0.1, 0), "dims: expected an integer > 0"),
        ((squared, targets + 9, 0.1, 16), "targets: expected values in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gapkern.robustness_exact(*arguments)


def tied(queries, gallery, dims, dtype=torch.float32):
    """Rows that stand in the gallery several times, asked for by every other query; far from the origin."""
    generator = torch.Generator().manual_seed(dims)
    y, x = (torch.randn(n, dims, generator=generator) + 3 for n in (queries, gallery))
    y[::2] = x[torch.randint(gallery, (len(y[::2]),), generator=generator)]
    x[gallery // 2 :] = x[: gallery - gallery // 2].flip(0)
    return y.to(dtype), x.to(dtype)


SEARCHES = [(1, 1, 1), (5, 2, 3), (130, 129, 7), (257, 300, 32), (40, 1000, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SEARCHES)
def test_nearest_rows_and_the_best_two_distances(poisoned, shape, dtype):
    y, x = tied(*shape, dtype)
    row, best, second, slack = torch.ops.gapkern.robustness_nearest(y, x, x.float().mean(0))
    squared, rows = reference.nearest_two(y, x)
    assert float((best - squared[:, 0]).abs().sub(slack).max()) <= 0
    assert torch.equal(second.isinf(), squared[:, 1].isinf())
    assert float((second - squared[:, 1]).nan_to_num(0).abs().sub(slack).max()) <= 0
    apart = squared[:, 1] - squared[:, 0] > slack
    assert torch.equal(row[apart], rows[apart])
    assert torch.equal(in_tiles(y, x), rows)
    assert torch.equal(nearest(y, x), rows)


def test_the_nearest_operator_keeps_its_contract():
    y, x = tied(9, 6, 5)
    operator = torch.ops.gapkern.robustness_nearest
    torch.library.opcheck(operator, (y, x, x.mean(0)))
    for arguments, message in (
        ((y[:, :4], x, x.mean(0)), r"gallery: expected \(G, D\) beside queries"),
        ((y, x.half(), x.mean(0)), "queries and gallery: expected one dtype"),
        ((y.double(), x.double(), x.mean(0)), "queries and gallery: expected one dtype"),
        ((y, x[:0], x.mean(0)), "gallery: expected at least one row"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)
    with pytest.raises(RuntimeError, match="not differentiable"):
        operator(y.requires_grad_(), x, x.mean(0))[1].sum().backward()

"""The laws of scores under Gaussian noise on the gallery: what `robustness` integrates or draws from.

Scores are lower for better rows: squared distances, or negative inner products.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from gapkern._search import cost_rows
from gapkern.ops import robustness as _ops  # noqa: F401 - registers the operators

__all__ = ["Distances", "InnerProducts", "Law"]

_MARGIN = 6.5  # standard deviations by which a row must trail before it is left out: 4e-11
_DROWNED = 1e-4  # of a standard deviation: rounding that moves no chance


class Law(Protocol):
    """How the scores of (Q, D) queries vary when every row of a (G, D) gallery has its own noise."""

    metric: str

    def scores(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Clean scores (n, G) of some queries at a time, and (n,) what rounding may have moved them by."""

    def chances(self, rows: slice, scores: Tensor, targets: Tensor) -> Tensor:
        """(n, T) float64: the chance that each target, a gallery row or -1, has the lowest score of all."""

    def draws(self, rows: slice, scores: Tensor) -> "Draws":
        """What is needed to draw noisy scores of the rows that may win."""


class Draws:
    """Rivals (n, R) of some queries, and noisy scores of them."""

    def __init__(self, rivals: Tensor, means: Tensor, dims: int | None = None) -> None:
        self.rivals, self.means, self.dims = rivals, means, dims

    def draw(self, trials: int, generator: torch.Generator) -> Tensor:
        """(trials, n, R) float64, up to a constant and a factor per query."""
        shape = (trials, *self.means.shape)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=self.means.device).add_(self.means)
        if self.dims is None:
            return drawn
        drawn.square_()
        if self.dims > 1:
            half = torch.full(shape, (self.dims - 1) / 2, dtype=torch.float64, device=drawn.device)
            drawn += 2 * torch._standard_gamma(half, generator=generator)
        return drawn


class Distances:
    """||y - x - e||^2 / v is noncentral chi-square of D degrees of freedom and noncentrality ||y - x||^2 / v.

    Drawn as (||y - x|| / sqrt v + z)^2 + c with z ~ N(0, 1), c ~ chi-square(D - 1): two numbers for a row instead of D.
    """

    metric = "l2"

    def __init__(self, queries: Tensor, gallery: Tensor, variance: float) -> None:
        self.queries, self.gallery, self.variance, self.dims = queries, gallery, variance, gallery.shape[1]

    def scores(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        spread = 2 * self.variance * math.sqrt(self.dims)  # the least deviation between two noisy squared distances
        size = max(float(x.double().square().sum(1).max()) for x in (self.queries, self.gallery))
        drowned = torch.finfo(torch.float32).eps * 2 * size <= _DROWNED * spread
        work = torch.float32 if drowned else torch.float64
        return cost_rows(self.queries, self.gallery, work=work)

    def chances(self, rows: slice, scores: Tensor, targets: Tensor) -> Tensor:
        chances: Tensor = torch.ops.gapkern.robustness_exact(scores, targets, self.variance, self.dims)
        return chances

    def draws(self, rows: slice, scores: Tensor) -> Draws:
        noncentrality = scores.double().clamp_min(0) / self.variance
        best = noncentrality.amin(1, keepdim=True)
        kept = (noncentrality - best).square() <= _MARGIN**2 * 4 * (self.dims + noncentrality + best)
        values, rivals = noncentrality.topk(int(kept.sum(1).max()), dim=1, largest=False)
        return Draws(rivals, values.sqrt(), self.dims)


class InnerProducts:
    """<y, x + e> is normal with mean <y, x> and variance v ||y||^2, independently over the rows."""

    metric = "ip"

    def __init__(self, queries: Tensor, gallery: Tensor, variance: float) -> None:
        self.queries, self.gallery, self.variance = queries, gallery, variance
        self.deviations = math.sqrt(variance) * queries.double().norm(dim=1)

    def scores(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        size = float(self.gallery.double().norm(dim=1).max())
        drowned = torch.finfo(torch.float32).eps * 2 * size <= _DROWNED * math.sqrt(self.variance)
        work = torch.float32 if drowned else torch.float64
        return cost_rows(self.queries, self.gallery, "ip", work=work)

    def chances(self, rows: slice, scores: Tensor, targets: Tensor) -> Tensor:
        chances: Tensor = torch.ops.gapkern.robustness_exact_inner(-scores, targets, self.deviations[rows])
        return chances

    def draws(self, rows: slice, scores: Tensor) -> Draws:
        deviations = self.deviations[rows, None].clamp_min(torch.finfo(torch.float64).tiny)
        means = (scores.double() - scores.amin(1, keepdim=True).double()) / deviations
        kept = means <= _MARGIN * math.sqrt(2)
        values, rivals = means.topk(int(kept.sum(1).max()), dim=1, largest=False)
        return Draws(rivals, values)

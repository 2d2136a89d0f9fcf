"""What a shift does to nearest neighbours: Assumption 3.3, Theorems 3.4 and 3.5, margins where they are not exact."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._compare import same_fields
from gapkern._rows import squarable
from gapkern._search import cost_rows
from gapkern.gap import MeanShift
from gapkern.gap.moments import Moments, hull
from gapkern.perturb import Gaussian, check
from gapkern.robustness import robustness

__all__ = [
    "ALPHAS",
    "Orthogonality",
    "Preservation",
    "RobustnessCurve",
    "orthogonality",
    "preservation",
    "robustness_curve",
]

ALPHAS = tuple(i / 8 for i in range(13))


@dataclass(frozen=True)
class Orthogonality:
    """Assumption 3.3: the gap is orthogonal to the affine hulls of both modalities.

    Attributes:
        gap_norm: ||g||, g = mean(queries) - mean(gallery).
        outside_gallery, outside_queries: share of ||g|| outside the affine hull of one and of the other; 1 where the
            assumption holds. A modality of D + 1 rows or more in general position fills the space, and its share is 0
            however little it varies along g: the deviations below then say more.
        rank_gallery, rank_queries: dimensions of the hulls.
        variance_along_gallery, variance_along_queries: share of the modality's variance along g; 0 where it holds.
        deviation_gallery, deviation_queries: standard deviation along g over ||g||; 0 where it holds.
    """

    gap_norm: float
    outside_gallery: float
    outside_queries: float
    rank_gallery: int
    rank_queries: int
    variance_along_gallery: float
    variance_along_queries: float
    deviation_gallery: float
    deviation_queries: float

    def holds(self, tolerance: float = 1e-6) -> bool:
        """Whether no more than `tolerance` of g lies in either hull, or both vary less than that along it."""
        return min(self.outside_gallery, self.outside_queries) >= math.sqrt(max(0.0, 1 - tolerance**2)) or (
            max(self.deviation_gallery, self.deviation_queries) <= tolerance
        )


@isolated
def orthogonality(queries: Tensor | np.ndarray, gallery: Tensor | np.ndarray) -> Orthogonality:
    """How far Assumption 3.3 is met by queries (Q, D) and a gallery (G, D).

    Raises:
        TypeError: not floating-point tensors or arrays.
        ValueError: shapes that do not match, values that are not finite, or no gap at all.

    Example:
        >>> x = torch.eye(3, 8)
        >>> found = orthogonality(x + torch.tensor([0.0] * 7 + [2.0]), x)
        >>> found.holds(), found.gap_norm, found.rank_gallery
        (True, 2.0, 2)
    """
    queries, gallery = _pair(queries, gallery)
    q, g = Moments.of(queries), Moments.of(gallery)
    gap = q.mean - g.mean
    norm = float(gap.norm())
    if not norm > 0:
        raise ValueError("queries: expected another mean than the gallery's, got a gap of length 0")
    of_q, of_g = hull(q, queries), hull(g, gallery)
    outside = [float((gap - basis @ (basis.T @ gap)).norm()) / norm for basis in (of_g, of_q)]
    along = gap / norm
    variance = [float((x.double() @ along).var(correction=0)) for x in (gallery, queries)]
    share = [v * side.count / (float(side.gram.trace()) or 1.0) for v, side in zip(variance, (g, q), strict=True)]
    return Orthogonality(
        gap_norm=norm,
        outside_gallery=outside[0],
        outside_queries=outside[1],
        rank_gallery=of_g.shape[1],
        rank_queries=of_q.shape[1],
        variance_along_gallery=share[0],
        variance_along_queries=share[1],
        deviation_gallery=math.sqrt(variance[0]) / norm,
        deviation_queries=math.sqrt(variance[1]) / norm,
    )


@dataclass(frozen=True, eq=False)
class Preservation:
    """Which queries keep their nearest neighbour when the gallery moves by alpha v, and up to which alpha.

    Attributes:
        nearest: (Q,) int64, gallery rows without the shift.
        margin: (Q,) float64, d_j^2 - d_*^2 for the second nearest; infinite for a gallery of one.
        bound: (Q,) float64, 2 max_j v . (x_* - x_j): as much as the shift can take off any margin at alpha = 1. Zero
            where v is orthogonal to the gallery's affine hull (Theorem 3.5).
        reach: (Q,) float64, the alpha up to which the neighbour stays, from 0 on: exact but for rounding, by which it
            errs on the small side.
        slack: (Q,) float64, what rounding may take off a margin, up to |alpha| = 1 or the shift's own.
        alpha: of the shift that was given.
    """

    nearest: Tensor = field(repr=False)
    margin: Tensor = field(repr=False)
    bound: Tensor = field(repr=False)
    reach: Tensor = field(repr=False)
    slack: Tensor = field(repr=False)
    alpha: float

    __eq__ = same_fields

    @property
    def guaranteed(self) -> Tensor:
        """(Q,) bool: margin > |alpha| bound; the neighbour stays, whatever the gallery's other rows."""
        return self.margin > abs(self.alpha) * self.bound + self.slack

    @property
    def kept(self) -> Tensor:
        """(Q,) bool: alpha lies within the reach; the neighbour stays. Implied by `guaranteed`."""
        return self.reach >= abs(self.alpha)

    def share(self, alphas: Iterable[float] | None = None) -> list[float]:
        """Share of the queries whose neighbour is predicted to stay at each alpha of the same sign (here: at `alpha`).

        Example:
            >>> gallery = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
            >>> found = preservation(torch.tensor([[0.3, 1.0], [0.4, 1.0]]), gallery, torch.tensor([-0.15, 1.0]))
            >>> found.share([0.5, 1.0, 2.0])
            [1.0, 0.5, 0.0]
        """
        return [float((self.reach >= abs(a)).double().mean()) for a in ([self.alpha] if alphas is None else alphas)]


@isolated
def preservation(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    shift: MeanShift | Tensor | np.ndarray,
    *,
    alpha: float | None = None,
) -> Preservation:
    """Theorem 3.5 for a shift v that is only nearly orthogonal to the gallery: a margin for every query.

    Moving the gallery by alpha v turns d_j^2 - d_*^2 into d_j^2 - d_*^2 + 2 alpha v . (x_j - x_*), so the neighbour
    stays as long as every margin exceeds 2 alpha v . (x_* - x_j). `bound` needs the two nearest and v . x only;
    `reach` takes each gallery row by its own margin.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        shift: a fitted `MeanShift` (without normalize), or v (D,). Moving the queries instead is the same.
        alpha: how much of v; by default the shift's own, or 1.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes that do not match, values that are not finite, a shift that normalises.

    Example:
        >>> gallery = torch.eye(3, 8)
        >>> found = preservation(gallery + 0.1, gallery, torch.tensor([0.0] * 7 + [5.0]))
        >>> found.guaranteed.tolist(), found.reach.tolist()
        ([True, True, True], [inf, inf, inf])
    """
    queries, gallery = _pair(queries, gallery)
    v, of_shift = _vector(shift)
    if v.shape != (gallery.shape[1],):
        raise ValueError(f"shift: expected a vector of D = {gallery.shape[1]}, got shape {tuple(v.shape)}")
    alpha = of_shift if alpha is None else _check.number("alpha", alpha)
    x, y = gallery.double(), queries.double()
    on = (x - x.mean(0)) @ v
    # What is zero but for rounding: v outside a hull, to the last digit.
    noise = 64 * torch.finfo(torch.float64).eps * float(v.norm() * (x - x.mean(0)).norm(dim=1).max())
    direction, most = (-1.0 if alpha < 0 else 1.0), max(1.0, abs(alpha))
    size = x.norm(dim=1).max() + most * v.norm()
    # Moved rows are stored to within eps / 2 of their size, which both distances meet twice over.
    eps = max(torch.finfo(t.dtype).eps for t in (gallery, queries))
    count = len(queries)
    found = torch.zeros(count, dtype=torch.int64)
    margin, reach = (torch.full((count,), math.inf, dtype=torch.float64) for _ in range(2))
    bound, slack = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    for rows, squared, _ in cost_rows(y, x):
        own = squared.argmin(1)
        least = squared.gather(1, own[:, None])
        found[rows] = own
        loses = 2 * direction * (on[own][:, None] - on)
        loses = torch.where(loses > noise, loses, 0.0)
        bound[rows] = loses.amax(1)
        slack[rows] = 4 * eps * (y[rows].norm(dim=1) + size).square() + most * noise
        margins = (squared - least).scatter_(1, own[:, None], math.inf)
        margin[rows] = margins.amin(1)
        room = (margins - slack[rows, None]).clamp_min(0)
        reach[rows] = torch.where(loses > 0, room / loses, torch.where(room > 0, math.inf, 0.0)).amin(1)
    return Preservation(found, margin, bound, reach, slack, alpha)


@dataclass(frozen=True, eq=False)
class RobustnessCurve:
    """Theorem 3.4 as numbers: exact robustness over alpha, query by query.

    Attributes:
        alphas: ascending.
        robustness: mean over queries, one for each alpha.
        per_query: (A, Q) float64.
        worst_fall: the largest fall of any query between neighbouring alphas in [0, 1]; 0 where 3.4 applies, to within
            the integral's 1e-5.
        worst_fall_to_peak: the same, of each query before its own peak. Where the shift is orthogonal to the gallery's
            hull it is 0 whatever the queries' shape: all distances of a query shrink by the same.
        rising: share of the queries that fall nowhere in [0, 1] by more than 2e-5.
        peaks: (Q,) float64, where each query is predicted to be safest: the alpha at which the gallery's mean meets it
            along v; 1 on average, and exactly where the queries are constant along g.
        orthogonality: Assumption 3.3 for these embeddings.
    """

    alphas: list[float]
    robustness: list[float]
    per_query: Tensor = field(repr=False)
    worst_fall: float
    worst_fall_to_peak: float
    rising: float
    peaks: Tensor = field(repr=False)
    orthogonality: Orthogonality

    __eq__ = same_fields

    def to_dict(self) -> dict[str, Any]:
        """Everything but the queries' own curves."""
        return {
            "alphas": self.alphas,
            "robustness": self.robustness,
            "worst_fall": self.worst_fall,
            "worst_fall_to_peak": self.worst_fall_to_peak,
            "rising": self.rising,
            "mean_peak": float(self.peaks.mean()),
            "orthogonality": vars(self.orthogonality),
        }


@isolated
def robustness_curve(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    noise: Gaussian,
    *,
    alphas: Iterable[float] = ALPHAS,
    shift: MeanShift | None = None,
) -> RobustnessCurve:
    """Theorem 3.4: the probability that each query keeps its neighbour under noise, exactly, over alpha.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        noise: Gaussian, on the gallery.
        alphas: strengths of the shift; 0 leaves the gap, 1 closes it.
        shift: a fitted `MeanShift`; by default one with n_components="exact", to which the theorem applies.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: no alphas, noise that is not Gaussian, embeddings as for `robustness`.

    Example:
        >>> gallery = torch.eye(3, 8)
        >>> curve = robustness_curve(gallery + torch.tensor([0.0] * 7 + [2.0]), gallery, Gaussian(2.0), alphas=[0, 1])
        >>> [round(r, 3) for r in curve.robustness], curve.rising, round(float(curve.peaks.mean()), 6)
        ([0.582, 0.756], 1.0, 1.0)
    """
    queries, gallery = _pair(queries, gallery)
    check(noise)
    if not isinstance(noise, Gaussian):
        raise ValueError(f"noise: expected Gaussian, got {type(noise).__name__}; its robustness is no integral")
    alphas = sorted(_check.number("alphas", a) for a in alphas)
    if not alphas:
        raise ValueError("alphas: expected at least one, got none")
    shift = MeanShift(n_components="exact").fit(gallery, queries) if shift is None else shift
    v, _ = _vector(shift)
    results = [robustness(queries, gallery, noise, shift=shift.at(a), method="exact") for a in alphas]
    per_query = torch.stack([r.per_query for r in results])
    peaks = ((queries.double() - gallery.double().mean(0)) @ v) / v.square().sum()
    inside = torch.tensor([0 <= a <= 1 for a in alphas])
    falls = (-per_query[inside].diff(dim=0)).clamp_min(0)
    before = torch.tensor(alphas, dtype=torch.float64)[inside][1:, None] <= peaks
    worst = falls.amax(0) if len(falls) else torch.zeros(len(queries), dtype=torch.float64)
    return RobustnessCurve(
        alphas=alphas,
        robustness=[r.robustness for r in results],
        per_query=per_query,
        worst_fall=float(worst.max()),
        worst_fall_to_peak=float((falls * before).amax()) if len(falls) else 0.0,
        rising=float((worst <= 2e-5).double().mean()),
        peaks=peaks,
        orthogonality=orthogonality(queries, gallery),
    )


def _pair(queries: Any, gallery: Any) -> tuple[Tensor, Tensor]:
    queries, gallery = _check.matrix("queries", queries, rows="Q"), _check.matrix("gallery", gallery, rows="G")
    _check.same_width(gallery=gallery, queries=queries)
    queries, gallery = (
        _check.finite("queries", queries).detach().cpu(),
        _check.finite("gallery", gallery).detach().cpu(),
    )
    return squarable("queries", queries), squarable("gallery", gallery)


def _vector(shift: Any) -> tuple[Tensor, float]:
    """v and alpha."""
    if isinstance(shift, MeanShift):
        if shift.normalize:
            raise ValueError("shift: expected normalize=False, got True: rows that are scaled keep no margins")
        return shift.shift_vector_.double(), shift.alpha
    vector = _check.finite("shift", _check.tensor("shift", shift))
    return vector.detach().cpu().double(), 1.0

"""Which first neighbours an index of codes cannot have changed: certificates from the codes' errors.

A coded index holds z_j in place of x_j; e_j = z_j - x_j. V are the hull's directions, in(u) = V V^T u, out(u) = u -
in(u). By squared distance ||y - z_j||^2 = ||y - x_j||^2 + ||e_j||^2 - 2 <y - x_j, e_j>, by inner product <y, z_j> =
<y, x_j> + <y, e_j>, and by Cauchy and Schwarz inside and outside of the hull each on its own

    |<u, e_j>| <= ||in(u)|| ||in(e_j)|| + ||out(u)|| ||out(e_j)||,    u = y - x_j or y.

A row whose score, at its worst, is still better than all others' at their best stays first. Two numbers a row are all
that is needed of the codes. A projected query has out(y - x_j) = 0, and the second term, most of it, is gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._compare import same_fields
from gapkern._rows import squarable, unit
from gapkern._search import best
from gapkern.gap import Projection

__all__ = ["Certificate", "Certificates", "certify"]

_QUERIES, _ROWS = 1024, 4096  # of a block


@dataclass(frozen=True, eq=False)
class Certificate:
    """What the codes' errors leave of the first neighbours of some queries.

    Attributes:
        certified: (Q,) bool: no code with errors of these norms, inside and outside of the hull, changes the neighbour.
        by_norms: (Q,) bool: the same from the norm of each whole error, ||e_j||. Implies `certified`.
        kept: (Q,) bool: the neighbour is first among the codes too, by all that is known of them. Implied by
            `certified`.
        candidates: (Q,) int64, rows that may be first among the codes, the neighbour included; 1 where certified.
    """

    certified: Tensor = field(repr=False)
    by_norms: Tensor = field(repr=False)
    kept: Tensor = field(repr=False)
    candidates: Tensor = field(repr=False)

    __eq__ = same_fields

    def to_dict(self) -> dict[str, float]:
        """Shares of the queries, and the mean number of candidates."""
        shares = {name: float(getattr(self, name).double().mean()) for name in ("certified", "by_norms", "kept")}
        return {**shares, "candidates": float(self.candidates.double().mean())}


@dataclass(frozen=True, eq=False)
class Certificates:
    """The queries as they are, and projected.

    Attributes:
        nearest: (Q,) int64, each query's exact first row, as it is: what both are compared with.
        before, after: without and with the projection.
    """

    nearest: Tensor = field(repr=False)
    before: Certificate
    after: Certificate

    __eq__ = same_fields

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {"before": self.before.to_dict(), "after": self.after.to_dict()}


@isolated
def certify(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    decoded: Tensor | np.ndarray,
    projection: Projection,
    *,
    centre: Tensor | np.ndarray | None = None,
) -> Certificates:
    """Says of each query whether codes can have changed its first neighbour, as it is and projected.

    With s_j the exact score (lower is nearer: ||y - x_j||^2 + ||e_j||^2, or -<y, x_j>), * the first row, and w_j =
    2 (||in(y - x_j)|| ||in(e_j)|| + ||out(y - x_j)|| ||out(e_j)||), for inner products ||in(y)|| ||in(e_j)|| +
    ||out(y)|| ||out(e_j)||, the query is certified where s_* + w_* < s_j - w_j for all other rows j, by more than
    rounding. It concerns scores alone: rows that a graph or inverted lists never visit are another matter.

    Args:
        queries: (Q, D), as they ask.
        gallery: (G, D), what was indexed.
        decoded: (G, D), what the codes stand for, row by row.
        projection: fitted to the gallery, without `reduce`; its metric is that of the search. For "cosine" the rows of
            the gallery are scaled to unit length, as `decoded` must stand for.
        centre: (D,) of codes whose scores are those of the exact row but for <y - centre, e_j> (RaBitQ, of queries that
            are not quantised): w_j is then of y - centre in place of y - x_j or y, and s_j has no ||e_j||^2.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes that do not match, values that are not finite, a projection that reduces.
        NotFittedError: a projection that is not fitted.

    Example:
        >>> gallery = torch.eye(3, 8)
        >>> queries = gallery + torch.tensor([0.0] * 7 + [5.0])
        >>> found = certify(queries, gallery, gallery + 0.1, Projection("exact").fit(gallery))
        >>> found.before.certified.tolist(), found.after.certified.tolist()
        ([False, False, False], [True, True, True])
    """
    if not isinstance(projection, Projection):
        raise TypeError(f"projection: expected a Projection, got {type(projection).__name__}")
    basis, mean = projection.basis_, projection.mean_
    if projection.reduce:
        raise ValueError("projection: expected one without reduce, got reduce=True: its codes are of other rows")
    given = {"queries": queries, "gallery": gallery, "decoded": decoded}
    y, x, z = (_check.matrix(name, value).detach().cpu() for name, value in given.items())
    for name, rows in zip(given, (y, x, z), strict=True):
        squarable(name, _check.finite(name, rows))
        if rows.shape[1] != len(mean):
            raise ValueError(f"{name}: expected D = {len(mean)} as fitted, got shape {tuple(rows.shape)}")
    _check.same_rows(gallery=x, decoded=z)
    if centre is not None:
        centre = _check.finite("centre", _check.tensor("centre", centre)).detach().cpu().double()
        if centre.shape != mean.shape:
            raise ValueError(f"centre: expected shape ({len(mean)},), got {tuple(centre.shape)}")
    if projection.metric == "cosine":
        x = unit(x.double())
    metric = "l2" if projection.metric == "l2" else "ip"
    eps = max(torch.finfo(t.dtype).eps for t in (y, z))
    y = y.double()
    nearest = best(y, x.double(), metric)
    codes = _Codes(x, z, basis, mean, metric, centre, eps)
    return Certificates(nearest, codes.judge(y, nearest), codes.judge(projection.transform_queries(y), nearest))


@dataclass(frozen=True, eq=False)
class _Codes:
    """Rows and what they became, in blocks of float64 about `mean`."""

    gallery: Tensor
    decoded: Tensor
    basis: Tensor
    mean: Tensor
    metric: str
    centre: Tensor | None
    eps: float

    @cached_property
    def size(self) -> float:
        """The largest norm of a row or of its code."""
        parts = (t for side in (self.gallery, self.decoded) for t in side.split(_ROWS))
        return max(float(rows.double().norm(dim=1).max()) for rows in parts)

    def judge(self, queries: Tensor, nearest: Tensor) -> Certificate:
        count = len(queries)
        certified, by_norms, kept = (torch.zeros(count, dtype=torch.bool) for _ in range(3))
        candidates = torch.zeros(count, dtype=torch.int64)
        for first in range(0, count, _QUERIES):
            some = slice(first, min(count, first + _QUERIES))
            y, own = queries[some], nearest[some]
            split, whole = self._tops(y, own)
            rivals, more = torch.zeros_like(own), torch.zeros_like(own)
            for start, scores, widths, wholes in self._blocks(y):
                others = torch.arange(start, start + scores.shape[1]) != own[:, None]
                rivals += ((scores - widths <= split[:, None]) & others).sum(1)
                more += ((scores - wholes <= whole[:, None]) & others).sum(1)
            certified[some], by_norms[some] = rivals == 0, more == 0
            kept[some], candidates[some] = self._first(y) == own, rivals + 1
        return Certificate(certified, by_norms, kept, candidates)

    def _first(self, queries: Tensor) -> Tensor:
        """The first row by the codes."""
        if self.centre is None:
            return best(queries, self.decoded, self.metric)
        found = torch.zeros(len(queries), dtype=torch.int64)
        least = torch.full((len(queries),), torch.inf, dtype=torch.float64)
        about = queries - self.centre
        for start in range(0, len(self.gallery), _ROWS):
            x, z = (t[start : start + _ROWS].double() for t in (self.gallery, self.decoded))
            scores = -(queries @ x.T) if self.metric == "ip" else _squared(queries - self.mean, x - self.mean)
            values, rows = (scores - self._twice * (about @ (z - x).T)).min(1)
            better = values < least
            least, found = torch.where(better, values, least), torch.where(better, rows + start, found)
        return found

    @property
    def _twice(self) -> float:
        return 2.0 if self.metric == "l2" else 1.0

    def _tops(self, queries: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The score of each query's own row at the worst, by both bounds, with room for rounding."""
        slack = self.eps * (4 + len(self.mean) ** 0.5) * (queries.norm(dim=1) + self.size).square()
        found = torch.zeros(2, len(queries), dtype=torch.float64)
        for start, scores, widths, wholes in self._blocks(queries):
            here = ((own >= start) & (own < start + scores.shape[1])).nonzero()[:, 0]
            at = here, own[here] - start
            found[:, here] = torch.stack([scores[at] + widths[at], scores[at] + wholes[at]])
        return found[0] + slack, found[1] + slack

    def _blocks(self, queries: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of some rows at a time: scores (n, m), and how far errors of the known norms move them, split and whole."""
        middle = self.mean if self.metric == "l2" else torch.zeros_like(self.mean)
        y = queries - middle
        about = queries if self.centre is None else queries - self.centre
        length = about.norm(dim=1, keepdim=True)
        near = (about @ self.basis).norm(dim=1, keepdim=True)
        far = _remainder(length, near)
        for start in range(0, len(self.gallery), _ROWS):
            x, z = (t[start : start + _ROWS].double() - middle for t in (self.gallery, self.decoded))
            error = z - x
            inside, whole = (error @ self.basis).norm(dim=1), error.norm(dim=1)
            outside = _remainder(whole, inside)
            scores = _squared(y, x) if self.metric == "l2" else -(y @ x.T)
            if self.centre is None and self.metric == "l2":
                length = scores.sqrt()
                near = _squared(y @ self.basis, x @ self.basis).sqrt()
                far = _remainder(length, near, y.norm(dim=1, keepdim=True) + x.norm(dim=1))
                scores = scores + whole.square()
            yield start, scores, self._twice * (near * inside + far * outside), self._twice * length * whole


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) squared distances."""
    found: Any = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * (a @ b.T)
    return found.clamp_min(0)  # type: ignore[no-any-return]


def _remainder(whole: Tensor, part: Tensor, size: Tensor | None = None) -> Tensor:
    """sqrt(whole^2 - part^2), no less than it is by rounding."""
    rounding = 64 * torch.finfo(torch.float64).eps * (whole if size is None else size).square()
    return (whole.square() - part.square()).clamp_min(0).add(rounding).sqrt()

"""Distances or inner products, and each query's best row, never Q x G at once."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gapkern._ambient import product
from gapkern._rows import unit

CHUNK = 2**22  # elements of a Q x G block at hand
METRICS = ("l2", "ip", "cosine")
RANGE = 2.0**40  # values up to which, and down to whose inverse, sums of squares are exact enough in float32


def best(queries: Tensor, gallery: Tensor, metric: str = "l2", *, exact: bool = True) -> Tensor:
    """Index (Q,) of the row that each query finds: the nearest ("l2"), or that of the largest inner product ("ip") or
    cosine ("cosine"); ties go to the lowest index. `exact` as for `nearest`.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
        >>> [int(best(torch.tensor([[0.9, 0.1]]), gallery, metric)) for metric in METRICS]
        [0, 1, 0]
    """
    if metric == "l2":
        return nearest(queries, gallery, exact=exact)
    if metric == "cosine":
        gallery = unit(gallery.double()).to(torch.promote_types(gallery.dtype, torch.float32))
    queries, gallery, _ = in_range(queries, gallery, "ip")
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows, scores, slack in inner_products(queries, gallery):
        if exact and len(gallery) > 1:
            found[rows], _ = lowest(scores.neg_(), slack, queries[rows], gallery, inner=True)
        else:
            found[rows] = scores.argmax(1)
    return found


def nearest(queries: Tensor, gallery: Tensor, *, exact: bool = True) -> Tensor:
    """Index of each query's nearest gallery row; ties go to the lowest index.

    Rows whose best candidates are closer than rounding are decided in float64.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        exact: False leaves near-ties to rounding: for galleries with noise, which have no ties.

    Returns:
        (Q,) int64.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.0], [0.0, 0.2]]), torch.eye(2)).tolist()
        [0, 1]
    """
    queries, gallery, _ = in_range(queries, gallery)
    if gallery.is_cuda and gallery.dtype != torch.float64:
        return in_tiles(queries, gallery, exact=exact)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows, squared, slack in distances(queries, gallery):
        if exact and len(gallery) > 1:
            found[rows], _ = lowest(squared, slack, queries[rows], gallery)
        else:
            found[rows] = squared.argmin(1)
    return found


def in_range(queries: Tensor, gallery: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor, float]:
    """Rows whose squares float32 holds: both as they are, or as float64 times powers of two, which round nothing.

    Returns:
        Queries and gallery, by one number for "l2" and each by its own for "ip"; and by what costs grew: squared
        distances or inner products.

    Example:
        >>> queries, gallery, grown = in_range(torch.tensor([[3 * 2.0**70, 4 * 2.0**70]]), torch.zeros(1, 2))
        >>> float((queries - gallery).square().sum() / grown) == 25 * 2.0**140
        True
    """
    largest = [_largest(queries), _largest(gallery)]
    if metric == "l2":
        largest = [max(largest)] * 2
    if all(top == 0 or 1 / RANGE <= top <= RANGE for top in largest):
        return queries, gallery, 1.0
    scales = [math.ldexp(1.0, -min(1000, max(-1000, math.frexp(top)[1]))) for top in largest]
    return queries.double() * scales[0], gallery.double() * scales[1], scales[0] * scales[1]


def _largest(x: Tensor) -> float:
    return max(map(abs, map(float, x.aminmax()))) if x.numel() else 0.0


def in_tiles(queries: Tensor, gallery: Tensor, *, exact: bool = True) -> Tensor:
    """`nearest` by the operator that keeps each query's best two; what it cannot tell apart is decided as there."""
    if queries.dtype != gallery.dtype or gallery.dtype == torch.float64:
        queries, gallery = queries.float(), gallery.float()
    centre = gallery.mean(0, dtype=torch.float64).float()
    found: Tensor
    found, best, second, slack = torch.ops.gapkern.robustness_nearest(queries, gallery, centre)
    close = (second <= best + slack).nonzero()[:, 0] if exact else found[:0]
    if len(close):
        asked = queries[close]
        for rows, squared, room in distances(asked, gallery):
            found[close[rows]], _ = lowest(squared, room, asked[rows], gallery)
    return found


def distances(
    queries: Tensor, gallery: Tensor, work: torch.dtype | None = None, centre: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Squared distances (n, G) of some queries at a time, and (n,) what rounding may have moved them by.

    They are formed about `centre` (D,), by default the gallery's mean, which keeps ||y||^2 + ||x||^2 - 2 <y, x> from
    cancelling, in `work`: by default float64 for a float64 gallery and float32 otherwise. Rows whose squares leave
    float32 take float64 whatever `work` is.
    """
    work = work or (torch.float64 if gallery.dtype == torch.float64 else torch.float32)
    # Any centre serves as long as both sides take the same one.
    centre = gallery.mean(0, dtype=torch.float64) if centre is None else centre
    if work == torch.float32 and not _squares_in_float32(queries, gallery, centre):
        work = torch.float64
    centre = centre.to(work)
    x = gallery.to(work) - centre
    norms = x.square().sum(1, keepdim=True)
    reach = norms.max().sqrt() if len(x) else norms.sum()
    # Two more columns have the product add both squared norms: ||y||^2 1 + 1 ||x||^2 - 2 <y, x>.
    x = torch.cat([-2 * x, norms, torch.ones_like(norms)], 1)
    step = max(1, CHUNK // max(1, len(x)))
    for first in range(0, len(queries), step):
        rows = slice(first, min(len(queries), first + step))
        y = queries[rows].to(work) - centre
        own = y.square().sum(1, keepdim=True)
        squared = product(torch.cat([y, torch.ones_like(own), own], 1), x.T)
        yield rows, squared, 8 * torch.finfo(work).eps * (own[:, 0].sqrt() + reach).square()


def inner_products(
    queries: Tensor, gallery: Tensor, work: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Inner products (n, G) of some queries at a time, and (n,) what rounding may move them by; see `distances`."""
    work = work or (torch.float64 if gallery.dtype == torch.float64 else torch.float32)
    if work == torch.float32 and not _squares_in_float32(queries, gallery):
        work = torch.float64
    x = gallery.to(work)
    reach = x.norm(dim=1).max() if len(x) else x.sum()
    step = max(1, CHUNK // max(1, len(x)))
    for first in range(0, len(queries), step):
        rows = slice(first, min(len(queries), first + step))
        y = queries[rows].to(work)
        yield rows, product(y, x.T), 8 * torch.finfo(work).eps * y.norm(dim=1) * reach


def lowest(
    scores: Tensor, slack: Tensor, queries: Tensor, gallery: Tensor, *, inner: bool = False
) -> tuple[Tensor, Tensor]:
    """Indices of each row's lowest score and of a next one; near-ties, within `slack`, are re-ranked in float64.

    Args:
        scores: (n, G), each query's squared distances up to a constant; or its negative inner products, where `inner`.
        slack: (n,), how far apart two scores must be to be told apart.
        queries: (n, D).
        gallery: (G, D).

    Returns:
        (n,) int64, the lowest index among equals; and (n,) int64, -1 for G = 1.
    """
    if scores.shape[1] == 1:
        return scores.argmin(1), scores.argmin(1) - 1
    values, rows = scores.topk(2, dim=1, largest=False)
    found, limit = rows[:, 0].clone(), (values[:, 0] + slack)[:, None]
    close = (values[:, 1:] <= limit).nonzero()[:, 0]
    for some in close.split(max(1, CHUNK // max(1, scores.shape[1]) // 4)):
        row, column = (scores[some] <= limit[some]).nonzero(as_tuple=True)
        exact = torch.cat([
            -(x * y).sum(1) if inner else (x - y).square().sum(1)
            for x, y in (
                (gallery[c].double(), queries[some[r]].double())
                for r, c in zip(*(t.split(max(1, CHUNK // gallery.shape[1])) for t in (row, column)), strict=True)
            )
        ])  # fmt: skip
        least = exact.new_full((len(some),), torch.inf).scatter_reduce(0, row, exact, "amin")
        equal = exact == least[row]
        found[some] = found.new_full((len(some),), len(gallery)).scatter_reduce(0, row[equal], column[equal], "amin")
    return found, torch.where(rows[:, 0] == found, rows[:, 1], rows[:, 0])


def _squares_in_float32(queries: Tensor, gallery: Tensor, centre: Tensor | None = None) -> bool:
    """Whether squared distances about the centre are normal float32 numbers, but for those that do not matter."""
    largest = 0.0
    for x in (queries, gallery):
        if len(x):
            low, high = x.amin(0).double(), x.amax(0).double()
            middle = 0 if centre is None else centre.double()
            largest = max(largest, float(torch.maximum((low - middle).abs(), (high - middle).abs()).max()))
    return largest == 0 or 1e-15 < largest < 1e15

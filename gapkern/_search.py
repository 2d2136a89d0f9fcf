"""Exact search on any device: costs in blocks, near-ties re-ranked in float64, equal ones by the lowest row or id.

cost(q, g) is ||q - g||^2 for "l2" and -<q, g> for "ip": lower is nearer. Cosine is "ip" of rows of unit length. Work:
2 Q G D; memory: one block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gapkern._ambient import product
from gapkern._rows import unit

CHUNK = 2**22  # elements of a Q x G block at hand
METRICS = ("l2", "ip", "cosine")
QUERY_ROWS, GALLERY_ROWS = 1024, 2048  # of a block: with both factors within a core's reach of the cache
RANGE = 2.0**40  # values up to which, and down to whose inverse, sums of squares are exact enough in float32
# Below, squares are subnormal: rounded to fewer bits, or to 0.
LOST = 2**14 * torch.finfo(torch.float32).tiny
SPARE = 8  # candidates beyond k that are kept for near-ties


# The range: where sums of squares leave float32, rows are scaled by powers of two, or taken in float64.


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
    if all(map(_squarable, largest)):
        return queries, gallery, 1.0
    scales = [math.ldexp(1.0, -min(1000, max(-1000, math.frexp(top)[1]))) for top in largest]
    return queries.double() * scales[0], gallery.double() * scales[1], scales[0] * scales[1]


def _squarable(largest: float) -> bool:
    """Whether float32 holds sums of squares of values up to `largest`, but for those that do not matter."""
    return largest == 0 or 1 / RANGE <= largest <= RANGE


def _largest(x: Tensor, middle: Tensor | None = None) -> float:
    """The largest magnitude of a value, about `middle` (D,) where there is one."""
    if not x.numel():
        return 0.0
    if middle is None:
        return max(map(abs, map(float, x.aminmax())))
    low, high = x.amin(0).double(), x.amax(0).double()
    return float(torch.maximum((low - middle.double()).abs(), (high - middle.double()).abs()).max())


def _precision(work: torch.dtype | None, queries: Tensor, gallery: Tensor, middle: Tensor | None) -> torch.dtype:
    """What costs are formed in: by default float64 for a float64 gallery and float32 otherwise; float64 beyond it."""
    work = work or (torch.float64 if gallery.dtype == torch.float64 else torch.float32)
    fits = work != torch.float32 or _squarable(max(_largest(x, middle) for x in (queries, gallery)))
    return work if fits else torch.float64


# Costs in blocks.


def centre(gallery: Tensor, metric: str) -> Tensor:
    """What both sides are taken relative to (D,): the gallery's mean keeps squared distances from cancelling."""
    if metric == "ip" or not len(gallery):
        return gallery.new_zeros(gallery.shape[1], dtype=torch.float32)
    total = gallery.new_zeros(gallery.shape[1], dtype=torch.float64)
    for rows in gallery.split(max(1, CHUNK // gallery.shape[1])):
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(gallery)).float()


def factors(x: Tensor, middle: Tensor, metric: str, *, side: str) -> tuple[Tensor, Tensor]:
    """Rows whose products with the other side's are costs, and the rows' norms (n,), in the dtype of `middle`.

    Two more columns have the product add both squared norms: <q, -2 g> + 1 ||g||^2 + ||q||^2 1.
    """
    x = x.to(middle.dtype) - middle
    squares = x.square().sum(1, keepdim=True)
    if metric == "ip":
        return (-x if side == "queries" else x), squares[:, 0].sqrt()
    one = torch.ones_like(squares)
    columns = [x, one, squares] if side == "queries" else [-2 * x, squares, one]
    return torch.cat(columns, 1), squares[:, 0].sqrt()


def slack(norms: Tensor, reach: Tensor, metric: str) -> Tensor:
    """How far apart two costs of a row must be to be told apart, given the other side's largest norm."""
    scale = norms * reach if metric == "ip" else (norms + reach).square()
    return 8 * torch.finfo(norms.dtype).eps * scale + LOST


def reach(gallery: Tensor, middle: Tensor) -> Tensor:
    """The largest norm about the centre."""
    parts = gallery.split(max(1, CHUNK // gallery.shape[1]))
    return torch.stack([(rows.to(middle.dtype) - middle).norm(dim=1).max() for rows in parts]).max()


def cost_rows(
    queries: Tensor,
    gallery: Tensor,
    metric: str = "l2",
    *,
    work: torch.dtype | None = None,
    middle: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Costs (n, G) of some queries at a time, and (n,) what rounding may have moved them by.

    Squared distances are formed about `middle` (D,), by default the gallery's mean, which keeps ||q||^2 + ||g||^2 -
    2 <q, g> from cancelling. All is formed in `work`: by default float64 for a float64 gallery and float32 otherwise.
    Rows whose squares leave float32 take float64 whatever `work` is.
    """
    if metric == "ip":
        middle = gallery.new_zeros(gallery.shape[1], dtype=_precision(work, queries, gallery, None))
    else:
        # Any centre serves as long as both sides take the same one.
        middle = gallery.mean(0, dtype=torch.float64) if middle is None else middle
        middle = middle.to(_precision(work, queries, gallery, middle))
    x, norms = factors(gallery, middle, metric, side="gallery")
    limit = norms.max() if len(norms) else norms.sum()
    step = max(1, CHUNK // max(1, len(x)))
    for first in range(0, len(queries), step):
        rows = slice(first, min(len(queries), first + step))
        y, norms = factors(queries[rows], middle, metric, side="queries")
        yield rows, product(y, x.T), slack(norms, limit, metric)


def blocks(queries: Tensor, gallery: Tensor, middle: Tensor, metric: str) -> Iterator[tuple[int, Tensor]]:
    """Costs (n, m) of the queries and the gallery from some row on."""
    q, _ = factors(queries, middle, metric, side="queries")
    step = max(GALLERY_ROWS, CHUNK // max(1, len(q)))
    for start in range(0, len(gallery), step):
        g, _ = factors(gallery[start : start + step], middle, metric, side="gallery")
        yield start, product(q, g.T)


def costs(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor, metric: str) -> Tensor:
    """float64 costs (P,) of the pairs (queries[rows], gallery[columns])."""
    parts = []
    step = max(1, CHUNK // 4 // gallery.shape[1])
    for r, c in zip(rows.split(step), columns.split(step), strict=True):
        q, g = queries[r].double(), gallery[c].double()
        parts.append(-(q * g).sum(1) if metric == "ip" else (q - g).square_().sum(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=queries.device)


# Each query's first row.


def best(queries: Tensor, gallery: Tensor, metric: str = "l2", *, exact: bool = True) -> Tensor:
    """Index (Q,) of the row that each query finds: the nearest ("l2"), or that of the largest inner product ("ip") or
    cosine ("cosine"); ties go to the lowest index.

    Rows whose best candidates are closer than rounding are re-ranked in float64.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        exact: False leaves near-ties to rounding: for galleries with noise, which have no ties.

    Returns:
        (Q,) int64.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
        >>> [int(best(torch.tensor([[0.9, 0.1]]), gallery, metric)) for metric in METRICS]
        [0, 1, 0]
    """
    if metric == "cosine":
        gallery, metric = unit(gallery.double()).to(torch.promote_types(gallery.dtype, torch.float32)), "ip"
    queries, gallery, _ = in_range(queries, gallery, metric)
    if metric == "l2" and has_tiles(gallery):
        return in_tiles(queries, gallery, exact=exact)
    found = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for rows, costs, margin in cost_rows(queries, gallery, metric):
        if exact and len(gallery) > 1:
            found[rows], _ = lowest(costs, margin, queries[rows], gallery, metric)
        else:
            found[rows] = costs.argmin(1)
    return found


def nearest(queries: Tensor, gallery: Tensor, *, exact: bool = True) -> Tensor:
    """`best` by Euclidean distance.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.0], [0.0, 0.2]]), torch.eye(2)).tolist()
        [0, 1]
    """
    return best(queries, gallery, exact=exact)


def has_tiles(gallery: Tensor) -> bool:
    """Whether `nearest` is `in_tiles`."""
    return gallery.is_cuda and gallery.dtype != torch.float64


def in_tiles(queries: Tensor, gallery: Tensor, *, exact: bool = True) -> Tensor:
    """`nearest` by the operator that keeps each query's best two; near-ties are re-ranked as there."""
    if queries.dtype != gallery.dtype or gallery.dtype == torch.float64:
        queries, gallery = queries.float(), gallery.float()
    middle = gallery.mean(0, dtype=torch.float64).float()
    found: Tensor
    found, least, second, margin = torch.ops.gapkern.robustness_nearest(queries, gallery, middle)
    close = (second <= least + margin).nonzero()[:, 0] if exact else found[:0]
    if len(close):
        asked = queries[close]
        for rows, squared, margin in cost_rows(asked, gallery):
            found[close[rows]], _ = lowest(squared, margin, asked[rows], gallery)
    return found


def lowest(
    values: Tensor, margin: Tensor, queries: Tensor, gallery: Tensor, metric: str = "l2"
) -> tuple[Tensor, Tensor]:
    """Indices of each row's lowest cost and of a next one; near-ties, within `margin`, are re-ranked in float64.

    Args:
        values: (n, G), each query's costs, up to a constant.
        margin: (n,), how far apart two costs must be to be told apart.
        queries: (n, D).
        gallery: (G, D).

    Returns:
        (n,) int64, the lowest index among equals; and (n,) int64, -1 for G = 1.
    """
    if values.shape[1] == 1:
        return values.argmin(1), values.argmin(1) - 1
    least, rows = values.topk(2, dim=1, largest=False)
    found, limit = rows[:, 0].clone(), (least[:, 0] + margin)[:, None]
    close = (least[:, 1:] <= limit).nonzero()[:, 0]
    for some in close.split(max(1, CHUNK // max(1, values.shape[1]) // 4)):
        row, column = (values[some] <= limit[some]).nonzero(as_tuple=True)
        exact = costs(queries, gallery, some[row], column, metric)
        first = exact.new_full((len(some),), torch.inf).scatter_reduce(0, row, exact, "amin")
        equal = exact == first[row]
        found[some] = found.new_full((len(some),), len(gallery)).scatter_reduce(0, row[equal], column[equal], "amin")
    return found, torch.where(rows[:, 0] == found, rows[:, 1], rows[:, 0])


# The k first rows.


def search(
    queries: Tensor, gallery: Tensor, k: int, *, metric: str = "l2", ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest gallery rows: costs float64 (Q, k) ascending, and rows int64 (Q, k); k <= G.

    Args:
        ids: (G,) int64; of equal rows the one with the lowest goes first (default: the lowest row).

    Example:
        >>> search(torch.tensor([[0.9, 0.0]]), torch.eye(2)[[0, 1, 0]], 2)[1].tolist()
        [[0, 2]]
    """
    queries, gallery, grown = in_range(queries, gallery, metric)
    found_costs = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    middle = centre(gallery, metric)
    limit = reach(gallery, middle)
    count = min(len(gallery), k + SPARE)
    for first in range(0, len(queries), QUERY_ROWS):
        q = queries[first : first + QUERY_ROWS]
        values = torch.full((len(q), 0), torch.inf, device=q.device)
        rows = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for start, block in blocks(q, gallery, middle, metric):
            v, r = block.topk(min(count, block.shape[1]), dim=1, largest=False)
            values, order = torch.cat([values, v], 1).topk(min(count, values.shape[1] + v.shape[1]), 1, largest=False)
            rows = torch.cat([rows, r + start], 1).gather(1, order)
        margin = slack((q.to(middle.dtype) - middle).norm(dim=1), limit, metric)
        some = slice(first, first + len(q))
        found_costs[some], found[some] = settle(q, gallery, values, rows, margin, k, metric, ids, middle)
    return found_costs / grown, found


def settle(
    queries: Tensor,
    gallery: Tensor,
    values: Tensor,
    rows: Tensor,
    margin: Tensor,
    k: int,
    metric: str,
    ids: Tensor | None = None,
    middle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first k of each query's candidates, near-ties re-ranked in float64 and equal ones by the lowest id.

    Args:
        values: (n, c) float32 costs, ascending; k <= c <= G.
        rows: (n, c) gallery rows.
        margin: (n,), how far apart two costs must be to be told apart.
    """
    count = values.shape[1]
    best, found = values[:, :k].double(), rows[:, :k].clone()
    # k + 1 candidates tell whether the k-th is safe; a tie that reaches beyond the last needs a look at all rows.
    near = (values[:, 1 : k + 1] - values[:, :k][:, : count - 1] <= margin[:, None]).any(1)
    beyond = near & (values[:, -1] - values[:, k - 1] <= margin) if count < len(gallery) else torch.zeros_like(near)
    close = (near & ~beyond).nonzero()[:, 0]
    for some in close.split(max(1, CHUNK // count)):
        exact = costs(queries, gallery, some.repeat_interleave(count), rows[some].flatten(), metric).view(-1, count)
        names = rows[some] if ids is None else ids[rows[some]]
        order = names.argsort(1)
        order = order.gather(1, exact.gather(1, order).argsort(dim=1, stable=True))[:, :k]
        best[some], found[some] = exact.gather(1, order), rows[some].gather(1, order)
    unsure = beyond.nonzero()[:, 0]
    if len(unsure):
        middle = centre(gallery, metric) if middle is None else middle
        for some in unsure.split(max(1, CHUNK // len(gallery))):
            bound = values[some, k - 1] + margin[some]
            pairs = [
                torch.stack([r, c + start])
                for start, block in blocks(queries[some], gallery, middle, metric)
                for r, c in [(block <= bound[:, None]).nonzero(as_tuple=True)]
            ]
            r, c = torch.cat(pairs, 1)
            exact = costs(queries, gallery, some[r], c, metric)
            order = (c if ids is None else ids[c]).argsort()
            order = order[exact[order].argsort(stable=True)]
            order = order[r[order].argsort(stable=True)]
            starts = torch.searchsorted(r[order].contiguous(), torch.arange(len(some), device=r.device))
            first = order[starts[:, None] + torch.arange(k, device=r.device)]
            best[some], found[some] = exact[first], c[first]
    return best, found

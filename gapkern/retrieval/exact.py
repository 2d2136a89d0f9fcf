"""Exact search on any device: costs in float32 blocks, near-ties decided in float64, equal ones by the lowest id.

cost(q, g) is ||q - g||^2 for "l2" and -<q, g> for "ip": lower is nearer. Work: 2 Q G D; memory: one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gapkern._ambient import product
from gapkern._nearest import CHUNK, in_range

QUERY_ROWS, GALLERY_ROWS = 1024, 2048  # of a block: with both factors within a core's reach of the cache
# Below, squares are subnormal: rounded to fewer bits, or to 0.
LOST = 2**14 * torch.finfo(torch.float32).tiny
SPARE = 8  # candidates beyond k that are kept for near-ties


def centre(gallery: Tensor, metric: str) -> Tensor:
    """What both sides are taken relative to (D,): the gallery's mean keeps squared distances from cancelling."""
    if metric == "ip" or not len(gallery):
        return gallery.new_zeros(gallery.shape[1], dtype=torch.float32)
    total = gallery.new_zeros(gallery.shape[1], dtype=torch.float64)
    for rows in gallery.split(max(1, CHUNK // gallery.shape[1])):
        total += rows.sum(0, dtype=torch.float64)
    return (total / len(gallery)).float()


def factors(x: Tensor, middle: Tensor, metric: str, *, side: str) -> tuple[Tensor, Tensor]:
    """Float32 rows whose products with the other side's are costs, and the rows' norms (n,).

    Two more columns have the product add both squared norms: -2 <q, g> + ||q||^2 1 + 1 ||g||^2.
    """
    x = x.float() - middle
    squares = x.square().sum(1, keepdim=True)
    if metric == "ip":
        return (-x if side == "queries" else x), squares[:, 0].sqrt()
    one = torch.ones_like(squares)
    columns = [-2 * x, squares, one] if side == "queries" else [x, one, squares]
    return torch.cat(columns, 1), squares[:, 0].sqrt()


def slack(norms: Tensor, reach: Tensor, metric: str) -> Tensor:
    """How far apart two float32 costs of a row must be to be told apart, given the other side's largest norm."""
    scale = norms * reach if metric == "ip" else (norms + reach).square()
    return 8 * torch.finfo(torch.float32).eps * scale + LOST


def costs(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor, metric: str) -> Tensor:
    """float64 costs (P,) of the pairs (queries[rows], gallery[columns])."""
    parts = []
    step = max(1, CHUNK // 4 // gallery.shape[1])
    for r, c in zip(rows.split(step), columns.split(step), strict=True):
        q, g = queries[r].double(), gallery[c].double()
        parts.append(-(q * g).sum(1) if metric == "ip" else (q - g).square_().sum(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=queries.device)


def reach(gallery: Tensor, middle: Tensor) -> Tensor:
    """The largest norm about the centre."""
    parts = gallery.split(max(1, CHUNK // gallery.shape[1]))
    return torch.stack([(rows.float() - middle).norm(dim=1).max() for rows in parts]).max()


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
        margin = slack((q.float() - middle).norm(dim=1), limit, metric)
        some = slice(first, first + len(q))
        found_costs[some], found[some] = settle(q, gallery, values, rows, margin, k, metric, ids, middle)
    return found_costs / grown, found


def blocks(queries: Tensor, gallery: Tensor, middle: Tensor, metric: str) -> Iterator[tuple[int, Tensor]]:
    """float32 costs (n, m) of the queries and the gallery from some row on."""
    q, _ = factors(queries, middle, metric, side="queries")
    step = max(GALLERY_ROWS, CHUNK // max(1, len(q)))
    for start in range(0, len(gallery), step):
        g, _ = factors(gallery[start : start + step], middle, metric, side="gallery")
        yield start, product(q, g.T)


def settle(
    queries: Tensor, gallery: Tensor, values: Tensor, rows: Tensor, margin: Tensor, k: int, metric: str,
    ids: Tensor | None = None, middle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first k of each query's candidates, near-ties decided in float64 and equal ones by the lowest id.

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
        exact = costs(
            queries, gallery, some.repeat_interleave(count), rows[some].flatten(), metric
        ).view(-1, count)  # fmt: skip
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

"""Recall@k of both directions from one pass over the distances, never Q x G at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _search
from gapkern._ambient import isolated, product

GROUP = 32  # costs whose least one is compared first
QUERIES_AT_HAND = 2**14


@isolated
def recall(
    queries: Any,
    gallery: Any,
    positives: Any,
    ks: Sequence[int] = (1, 5, 10),
    index: Any = None,
    *,
    metric: str = "l2",
    names: tuple[str, str | None] = ("image_retrieval", "text_retrieval"),
) -> dict[str, float]:
    """Share of queries with a positive among their k nearest gallery rows, and the same the other way round.

    A hit as in CLIP_benchmark: any positive in the top k. Of equally near rows the lowest comes first. Exact; work
    2 Q G D for both directions together, memory linear in Q + G.

    Args:
        queries: (Q, D), for image retrieval the texts.
        gallery: (G, D), the images.
        positives: each query's gallery rows: integers (Q,); (Q, P) with -1 where there are fewer; or Q sequences.
        ks: the k of recall@k.
        index: a `GapIndex` of the gallery to search instead, as it is (quantised, shifted, with its ids as the
            positives); then only queries -> gallery is measured.
        metric: "l2" or "ip"; the index's own where there is one.
        names: of the two directions; None leaves the second out. Gallery rows that are nobody's positive ask nothing.

    Returns:
        {"image_retrieval_recall@1": ..., ..., "text_retrieval_recall@1": ...}.

    Raises:
        TypeError: no floating-point embeddings, no integers.
        ValueError: mismatched shapes, NaN or infinity, a query without positives, a positive that is no gallery row.

    Example:
        >>> images = torch.eye(3)
        >>> texts = images.repeat_interleave(2, 0) + 0.1
        >>> recall(texts, images, [0, 0, 1, 1, 2, 1], ks=(1,))
        {'image_retrieval_recall@1': 0.83..., 'text_retrieval_recall@1': 1.0}
    """
    queries = _check.matrix("queries", queries, rows="Q").detach()
    ks = [_check.integer("ks", k, low=1) for k in ks]
    if not ks:
        raise ValueError("ks: expected at least one k, got none")
    if index is not None:
        asking, wanted = pairs(positives, len(queries), None)
        hits = _index_hits(queries, asking, wanted, max(ks), index)
        return {f"{names[0]}_recall@{k}": float((hits < k).double().mean()) for k in ks}
    gallery = _check.matrix("gallery", gallery, rows="G").detach()
    _check.same_width(queries=queries, gallery=gallery)
    _check.same_device(queries=queries, gallery=gallery)
    _check.choice("metric", metric, ("l2", "ip"))
    for name, rows in (("queries", queries), ("gallery", gallery)):
        _finite(name, rows)
    asking, wanted = (t.to(queries.device) for t in pairs(positives, len(queries), len(gallery)))
    ranks = ranks_of_positives(queries, gallery, asking, wanted, max(ks), metric, both=names[1] is not None)
    return {
        f"{name}_recall@{k}": float((rank < k).double().mean())
        for name, rank in zip(names, ranks, strict=True)
        if name is not None
        for k in ks
    }


def pairs(positives: Any, count: int, rows: int | None) -> tuple[Tensor, Tensor]:
    """Positives as pairs (P,) of query and gallery row, ordered and without repeats.

    Example:
        >>> pairs([[2, 0], [1]], 2, 3)
        (tensor([0, 0, 1]), tensor([0, 2, 1]))
    """
    if isinstance(positives, Tensor):
        positives = positives.detach().cpu().numpy()
    ragged = not isinstance(positives, np.ndarray) and any(isinstance(p, Sequence | np.ndarray) for p in positives)
    if len(positives) != count:
        raise ValueError(f"positives: expected one entry for each of {count} queries, got {len(positives)}")
    if ragged:
        asking = np.repeat(np.arange(count), [len(p) for p in positives])
        wanted = np.concatenate([np.asarray(p) if len(p) else np.empty(0, np.int64) for p in positives])
    else:
        table = np.asarray(positives)
        if table.ndim not in (1, 2):
            raise ValueError(f"positives: expected shape (Q,) or (Q, P), got {table.shape}")
        table = table.reshape(count, -1)
        asking, wanted = np.repeat(np.arange(count), table.shape[1]), table.reshape(-1)
        if np.issubdtype(wanted.dtype, np.integer) and np.asarray(positives).ndim == 2:
            asking, wanted = asking[wanted != -1], wanted[wanted != -1]
    if not np.issubdtype(wanted.dtype, np.integer):
        raise TypeError(f"positives: expected integers, got {wanted.dtype}")
    wrong = np.flatnonzero((wanted < 0) | (wanted >= (np.inf if rows is None else rows)))
    if len(wrong):
        what = "ids of the index" if rows is None else f"gallery rows in [0, {rows})"
        raise ValueError(f"positives: expected {what}, got {wanted[wrong[0]]} for query {asking[wrong[0]]}")
    lonely = np.flatnonzero(np.bincount(asking, minlength=count) == 0)
    if len(lonely):
        raise ValueError(f"positives: expected at least one for every query, got none for query {lonely[0]}")
    both = np.unique(np.stack([asking.astype(np.int64), wanted.astype(np.int64)], 1), axis=0)
    return torch.from_numpy(both[:, 0].copy()), torch.from_numpy(both[:, 1].copy())


def _finite(name: str, x: Tensor) -> None:
    step = max(1, _search.CHUNK // x.shape[1])
    for first in range(0, len(x), step):
        _check.finite(name, x[first : first + step], first)


def _index_hits(queries: Tensor, asking: Tensor, wanted: Tensor, k: int, index: Any) -> Tensor:
    """Place of each query's first positive among the k found, k where there is none."""
    parts = []
    for first in range(0, len(queries), QUERIES_AT_HAND):
        ids = torch.as_tensor(index.search(queries[first : first + QUERIES_AT_HAND], k)[1]).cpu()
        parts.append(places(ids, first, asking, wanted))
    return torch.cat(parts)


def places(ids: Tensor, first: int, asking: Tensor, wanted: Tensor) -> Tensor:
    """Place of each query's first positive among the ids (n, k) found for the queries from `first` on; k for none.

    Example:
        >>> places(torch.tensor([[5, 3], [3, 5]]), 0, *pairs([3, 4], 2, None)).tolist()
        [1, 2]
    """
    low, high = int(wanted.min()), int(wanted.max())
    width = high - low + 1
    keys = asking * width + (wanted - low)
    mine = torch.arange(first, first + len(ids))[:, None] * width + (ids - low)
    mine = mine.where((ids >= low) & (ids <= high), -1).contiguous()
    hit = keys[torch.searchsorted(keys, mine).clamp_max(len(keys) - 1)] == mine
    return torch.where(hit.any(1), hit.int().argmax(1), ids.shape[1])


def ranks_of_positives(
    queries: Tensor,
    gallery: Tensor,
    asking: Tensor,
    wanted: Tensor,
    limit: int,
    metric: str = "l2",
    *,
    both: bool = True,
) -> tuple[Tensor, Tensor]:
    """How many rivals come before the best positive, counted up to at least `limit`.

    Returns:
        For each query (Q,), and for each gallery row that is somebody's positive, in their order: int64.
    """
    queries, gallery, _ = _search.in_range(queries, gallery, metric)
    cost = _search.costs(queries, gallery, asking, wanted, metric)
    ours = _Side(cost, asking, wanted, len(queries), limit)
    theirs = _Side(cost, wanted, asking, len(gallery) if both else 0, limit)
    middle = _search.centre(gallery, metric)
    far_q, far_g = _search.reach(queries, middle), _search.reach(gallery, middle)
    products = torch.empty(_search.QUERY_ROWS * _search.GALLERY_ROWS, dtype=torch.float32, device=queries.device)
    for first in range(0, len(queries), QUERIES_AT_HAND):
        q, norms = _search.factors(queries[first : first + QUERIES_AT_HAND], middle, metric, side="queries")
        ours.bounds(slice(first, first + len(q)), _search.slack(norms, far_g, metric))
        for start in range(0, len(gallery), _search.GALLERY_ROWS):
            g, norms = _search.factors(gallery[start : start + _search.GALLERY_ROWS], middle, metric, side="gallery")
            theirs.bounds(slice(start, start + len(g)) if both else slice(0), _search.slack(norms, far_q, metric))
            for at in range(0, len(q), _search.QUERY_ROWS):
                rows = q[at : at + _search.QUERY_ROWS]
                block = product(rows, g.T, out=products[: len(rows) * len(g)].view(len(rows), len(g)))
                ours.count(block, first + at, start, queries, gallery, metric)
                if both:
                    theirs.count(block.T, start, first + at, gallery, queries, metric)
    return ours.before, theirs.before[theirs.asks]


class _Side:
    """One direction's best positives and what came before them so far."""

    def __init__(self, cost: Tensor, asking: Tensor, wanted: Tensor, count: int, limit: int):
        self.limit = limit
        self.before = torch.zeros(count, dtype=torch.int64, device=cost.device)
        self.least = cost.new_full((count,), -torch.inf)
        self.best = torch.zeros_like(self.before)
        if count:
            self.least.fill_(torch.inf).scatter_reduce_(0, asking, cost, "amin")
            equal = cost == self.least[asking]
            self.best.fill_(torch.iinfo(torch.int64).max).scatter_reduce_(0, asking[equal], wanted[equal], "amin")
        self.asks = torch.isfinite(self.least)
        self.least[~self.asks] = -torch.inf
        self.low, self.high = self.least.float(), self.least.float()

    def bounds(self, rows: slice, margin: Tensor) -> None:
        """Costs below `low` surely come first, those above `high` surely do not."""
        if len(self.least[rows]):
            self.low[rows] = (self.least[rows] - margin).float()
            self.high[rows] = (self.least[rows] + margin).float()
            self.high[rows][self.before[rows] >= self.limit] = -torch.inf

    def count(self, block: Tensor, first: int, start: int, asking: Tensor, rivals: Tensor, metric: str) -> None:
        """Counts a block (n, m) of costs of the rows from `first` on with the rivals from `start` on."""
        n, m = block.shape
        rows = slice(first, first + n)
        low, high, before = self.low[rows], self.high[rows], self.before[rows]
        # A group's least cost stands for the group: few groups hold a rival that matters. Each group takes every
        # (m / GROUP)-th rival, which makes the minimum one pass over whole lines.
        groups = m // GROUP
        grouped = block[:, : groups * GROUP].unflatten(1, (GROUP, groups)) if groups else None
        if grouped is not None:
            # Over the other dimension in its own layout: as a transposed view it would take 40 times as long.
            straight = block.stride(1) == 1
            least = grouped.amin(1) if straight else grouped.movedim(0, 2).amin(0).T
            certain = (least < low[:, None]).sum(1)
            high[before + certain >= self.limit] = -torch.inf
            before += certain.where(high == -torch.inf, 0)
            row, group = (least <= high[:, None]).nonzero(as_tuple=True)
            for r, c in zip(row.split(_search.CHUNK // GROUP), group.split(_search.CHUNK // GROUP), strict=True):
                columns = c[:, None] + groups * torch.arange(GROUP, device=c.device)
                self._decide(
                    grouped[r, :, c], r[:, None].expand_as(columns), columns, first, start, asking, rivals, metric
                )
        if groups * GROUP < m:
            rest = block[:, groups * GROUP :]
            row = (rest.amin(1) <= high).nonzero()[:, 0]
            columns = torch.arange(groups * GROUP, m, device=row.device).expand(len(row), -1)
            self._decide(rest[row], row[:, None].expand_as(columns), columns, first, start, asking, rivals, metric)

    def _decide(
        self,
        cost: Tensor,
        row: Tensor,
        column: Tensor,
        first: int,
        start: int,
        asking: Tensor,
        rivals: Tensor,
        metric: str,
    ) -> None:
        row = row + first
        certain = cost < self.low[row]
        self.before.index_add_(0, row[:, 0], certain.sum(1))
        unsure = (cost <= self.high[row]) & ~certain & (column + start != self.best[row])
        row, column = row[unsure], column[unsure] + start
        if len(row):
            true = _search.costs(asking, rivals, row, column, metric)
            first_one = (true < self.least[row]) | ((true == self.least[row]) & (column < self.best[row]))
            self.before.index_add_(0, row, first_one.long())

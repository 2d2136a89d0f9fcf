"""Search in one gallery of several modalities: NDCG, recall by modality, and how often the wrong one comes first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable, unit
from gapkern._search import METRICS, cost_rows, search
from gapkern.gap.mixed import MixedShift, modalities

__all__ = ["MixedOutcome", "OfModality", "mixed_retrieval"]


@dataclass(frozen=True)
class OfModality:
    """What one modality's rows meet with.

    Attributes:
        rows: share of the gallery.  first: share of the queries that find a row of it first.
        queries: how many have a right row of it.
        recall: {k: share of these with such a row among their k first}.
        outranked: share of these for which a wrong row of another modality lies before the best of such rows.
    """

    rows: float
    first: float
    queries: int
    recall: dict[int, float]
    outranked: float


@dataclass(frozen=True)
class MixedOutcome:
    """A mixed gallery's search.

    Attributes:
        ndcg: mean NDCG at `depth` (Jarvelin and Kekalainen, 2002): sum 1 / log2(rank + 1) of the right rows found, over
            that of as many as there are, up to `depth`, in the first places.
        recall: {k: share of the queries with a right row of any modality among their k first}.
        outranked: share of the queries for which a wrong row of another modality lies before their best right row.
        bias: half the sum over modalities of |first - rows|: 0 where first places go by the modalities' shares of the
            gallery, near 1 where one modality takes them all from a large gallery of the others.
        of: by modality.
    """

    ndcg: float
    depth: int
    recall: dict[int, float]
    outranked: float
    bias: float
    of: dict[str, OfModality]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ndcg@10, recall@1, ..., and the same by modality."""
        return {
            f"ndcg@{self.depth}": self.ndcg,
            **{f"recall@{k}": value for k, value in self.recall.items()},
            "outranked": self.outranked,
            "bias": self.bias,
            "modalities": {
                name: {
                    "rows": one.rows,
                    "first": one.first,
                    "queries": one.queries,
                    **{f"recall@{k}": value for k, value in one.recall.items()},
                    "outranked": one.outranked,
                }
                for name, one in self.of.items()
            },
        }


@isolated
def mixed_retrieval(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    modality: Any,
    labels: Any,
    gallery_labels: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    depth: int = 10,
    metric: str = "cosine",
    shift: MixedShift | None = None,
) -> MixedOutcome:
    """Measures the search in a gallery of several modalities, as it is or with each one's gap closed.

    The published script takes NDCG's ideal from the rows that were found, by which a query with two right rows and one
    found counts as perfect; here it is that of all right rows.

    Args:
        queries: (Q, D).
        gallery: (G, D), rows of all modalities.
        modality: a name for each gallery row, such as "image", "text" and "fused".
        labels: (Q,) integers, what each query is about.
        gallery_labels: (G,) integers; a row is right for a query of the same label.
        ks: of recall@k.  depth: of NDCG.
        metric: "cosine", "ip" or "l2".
        shift: a fitted `MixedShift`, by which both sides are moved first.

    Raises:
        TypeError, ValueError: embeddings, names or labels that do not match; a query without a right row.

    Example:
        >>> gallery = torch.eye(4)
        >>> names = ["image", "image", "text", "text"]
        >>> found = mixed_retrieval(gallery[[2, 1]] + gallery[0] / 5, gallery, names, [0, 1], [0, 1, 0, 1], ks=(1,))
        >>> found.recall, found.of["text"].recall, found.of["text"].outranked
        ({1: 1.0}, {1: 0.5}, 0.5)
    """
    y = squarable("queries", _check.finite("queries", _check.matrix("queries", queries, rows="Q"))).detach().cpu()
    x = squarable("gallery", _check.finite("gallery", _check.matrix("gallery", gallery, rows="G"))).detach().cpu()
    _check.same_width(queries=y, gallery=x)
    _check.choice("metric", metric, METRICS)
    names = modalities("modality", modality, len(x))
    asked, held = _labels("labels", labels, len(y)), _labels("gallery_labels", gallery_labels, len(x))
    ks = sorted({_check.integer("ks", k, low=1) for k in ks})
    depth = _check.integer("depth", depth, low=1)
    if not ks:
        raise ValueError("ks: expected at least one k, got none")
    counts = torch.from_numpy(np.bincount(np.searchsorted(kinds := np.unique(held), held), minlength=len(kinds)))
    place = torch.from_numpy(np.searchsorted(kinds, asked)).clamp_max(len(kinds) - 1)
    lonely = (torch.from_numpy(kinds)[place] != torch.from_numpy(asked)).nonzero()[:, 0]
    if len(lonely):
        raise ValueError(f"labels: expected a gallery row of every query's label, got none for query {int(lonely[0])}")
    if shift is not None:
        if not isinstance(shift, MixedShift):
            raise TypeError(f"shift: expected a MixedShift, got {type(shift).__name__}")
        x, y = shift.transform(x, names.tolist()), shift.transform_queries(y)
    if metric == "cosine":
        x, y = (unit(t.to(torch.promote_types(t.dtype, torch.float32))) for t in (x, y))
    by = "l2" if metric == "l2" else "ip"
    wanted, own = torch.from_numpy(asked), torch.from_numpy(held)
    _, found = search(y, x, min(len(x), max(*ks, depth)), metric=by)
    right = own[found] == wanted[:, None]
    discount = 1 / torch.arange(2, depth + 2, dtype=torch.float64).log2()
    gain = (right[:, :depth] * discount[: right[:, :depth].shape[1]]).sum(1)
    ideal = discount.cumsum(0)[counts[place].clamp_max(depth) - 1]
    kinds_of = sorted(set(names.tolist()))
    codes = torch.from_numpy(np.searchsorted(np.array(kinds_of), names))
    best, worst = _bests(y, x, by, codes, len(kinds_of), wanted, own)
    of = {}
    for number, name in enumerate(kinds_of):
        has = best[:, number] < torch.inf
        hits = right & (codes[found] == number)
        before = _others(worst, number) < best[:, number]
        of[name] = OfModality(
            rows=float((codes == number).double().mean()),
            first=float((codes[found[:, 0]] == number).double().mean()),
            queries=int(has.sum()),
            recall={k: _share(hits[:, :k].any(1)[has]) for k in ks},
            outranked=_share(before[has]),
        )
    rows = torch.arange(len(y))
    of_best = best.argmin(1)
    rivals = torch.stack([_others(worst, number) for number in range(len(kinds_of))], 1)
    return MixedOutcome(
        ndcg=float((gain / ideal).mean()),
        depth=depth,
        recall={k: _share(right[:, :k].any(1)) for k in ks},
        outranked=_share(rivals[rows, of_best] < best[rows, of_best]),
        bias=sum(abs(one.first - one.rows) for one in of.values()) / 2,
        of=of,
    )


def _bests(
    queries: Tensor, gallery: Tensor, metric: str, codes: Tensor, kinds: int, wanted: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """The least cost of each query's right rows and of its wrong rows, by modality: (Q, kinds) float64 each."""
    best, worst = (torch.full((len(queries), kinds), torch.inf, dtype=torch.float64) for _ in range(2))
    for rows, costs, _ in cost_rows(queries, gallery, metric, work=torch.float64):
        right = wanted[rows, None] == own
        for number in range(kinds):
            here = codes == number
            best[rows, number] = costs.masked_fill(~(right & here), torch.inf).amin(1)
            worst[rows, number] = costs.masked_fill(right | ~here, torch.inf).amin(1)
    return best, worst


def _others(worst: Tensor, number: int) -> Tensor:
    """The least cost of a wrong row of another modality."""
    rest = [i for i in range(worst.shape[1]) if i != number]
    return worst[:, rest].amin(1) if rest else torch.full_like(worst[:, 0], torch.inf)


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if len(which) else float("nan")


def _labels(name: str, value: Any, rows: int) -> np.ndarray:
    found = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if not np.issubdtype(found.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {found.dtype}")
    if found.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {found.shape}")
    return found.astype(np.int64)

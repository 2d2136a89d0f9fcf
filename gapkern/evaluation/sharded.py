"""What the tasks do with rows spread over ranks: lengths, the mean shift, perturbations and the nearest rows.

Whatever the number of ranks: shares are consecutive rows, noise depends on an element's place alone, counts are summed
as integers, and near-ties are decided in float64 from the rows themselves. So results are the same to the last bit.
"""

import torch
from torch import Tensor

from gapkern._rows import unit
from gapkern._search import costs, search
from gapkern.gap import MeanShift
from gapkern.perturb import Perturbation, Quantize, Replace
from gapkern.ranks import Ranks, Rows

__all__ = ["compared", "fit", "normalized", "perturbed", "topk"]


def normalized(rows: Rows) -> Rows:
    """Float32 rows of length one: what was stored in half precision is off by more than neighbours are apart."""
    x = rows.values
    return rows.of(unit(x if x.dtype == torch.float64 else x.float()).float())


def fit(n_components: str | int | float, gallery: Rows, queries: Rows, ranks: Ranks) -> MeanShift:
    """The mean shift of rows on all ranks, the same to the bit for any number of them; memory: one batch."""
    shift = MeanShift(n_components=n_components)
    for batch in ranks.batches(gallery):
        shift.partial_fit(gallery=batch)
    for batch in ranks.batches(queries):
        shift.partial_fit(queries=batch)
    return shift


def perturbed(rows: Rows, perturbation: Perturbation | None, seed: int, ranks: Ranks) -> Rows:
    """What `perturb` makes of the whole matrix, of which every rank does its rows."""
    if perturbation is None:
        return rows
    x = rows.values
    for stage, own in perturbation.steps(seed):
        if isinstance(stage, Replace):
            raise ValueError(
                "perturbation: expected noise or quantisation, got a Replace; evaluate that gallery itself"
            )
        if isinstance(stage, Quantize):
            x = stage.within(x, *ranks.extremes(x))  # the cells are the whole gallery's
        else:
            x = stage.apply(x, own, 0, rows.first)
    return rows.of(x)


def compared(gallery: Rows, metric: str) -> tuple[Rows, str]:
    """What a metric's costs are of, and by which of the two: for "cosine" rows of length one, by "ip"."""
    if metric != "cosine":
        return gallery, metric
    return gallery.of(unit(gallery.values).to(gallery.values.dtype)), "ip"


def topk(queries: Tensor, gallery: Rows, k: int, ranks: Ranks, metric: str = "l2") -> Tensor:
    """The k nearest rows of the whole gallery for this rank's queries: int64 (q, min(k, G)), equal ones by lowest row.

    Every rank's share of the gallery is searched in turn and merged into the best so far: never Q x G, and never the
    whole gallery on one rank.
    """
    gallery, metric = compared(gallery, metric)
    best = queries.new_empty(len(queries), 0, dtype=torch.float64)
    found = queries.new_empty(len(queries), 0, dtype=torch.int64)
    for first, rows in ranks.each(gallery):
        _, near = search(queries, rows, min(k, len(rows)), metric=metric)
        if len(rows) == gallery.total:
            return near
        asking = torch.arange(len(queries), device=near.device).repeat_interleave(near.shape[1])
        cost = costs(queries, rows, asking, near.flatten(), metric).view_as(near)
        # Earlier ranks hold lower rows: a stable sort leaves the lowest of equal ones in front.
        best, order = torch.cat([best, cost], 1).sort(dim=1, stable=True)
        found = torch.cat([found, near + first], 1).gather(1, order)[:, :k]
        best = best[:, :k]
    return found

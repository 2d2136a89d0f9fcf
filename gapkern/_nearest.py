"""Euclidean nearest neighbours, exact up to float64 and never Q x G at once."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24


def nearest(queries: Tensor, gallery: Tensor, *, centre: Tensor | None = None) -> Tensor:
    """Index of each query's nearest gallery row; ties go to the lowest index.

    Distances are formed about `centre` (default: the gallery's mean) in float32, which keeps
    ||x||^2 - 2 <y, x> from cancelling; rows whose two best candidates are closer than rounding are decided in float64.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        centre: (D,).

    Returns:
        (Q,) int64.

    Example:
        >>> nearest(torch.tensor([[0.9, 0.0], [0.0, 0.2]]), torch.eye(2)).tolist()
        [0, 1]
    """
    work = torch.float64 if gallery.dtype == torch.float64 else torch.float32
    centre = gallery.double().mean(0) if centre is None else centre.double()
    x = (gallery.double() - centre).to(work)
    norms = x.double().square().sum(1)
    largest = norms.max().sqrt() if len(x) else norms.sum()
    found = torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[0]))
    for i in range(0, queries.shape[0], step):
        rows = slice(i, min(queries.shape[0], i + step))
        y = (queries[rows].double() - centre).to(work)
        scores = torch.addmm(norms.to(work)[None], y, x.T, alpha=-2)
        if x.shape[0] == 1:
            found[rows] = 0
            continue
        best = scores.topk(2, dim=1, largest=False)
        found[rows] = best.indices[:, 0]
        # Rounding of the products and of the norms, with room: 8 eps (||y|| + ||x||) ||x||.
        slack = 8 * torch.finfo(work).eps * (y.norm(dim=1) + largest.to(work)) * largest.to(work)
        close = (best.values[:, 1] - best.values[:, 0] <= slack).nonzero()[:, 0]
        for r in close.tolist():
            candidates = (scores[r] <= best.values[r, 0] + slack[r]).nonzero()[:, 0]
            exact = (gallery[candidates].double() - queries[i + r].double()).square().sum(1)
            found[i + r] = candidates[int(exact.argmin())]
    return found

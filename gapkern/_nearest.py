"""Euclidean nearest neighbours, exact up to float64 and never Q x G at once."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24


def nearest(queries: Tensor, gallery: Tensor, *, exact: bool = True) -> Tensor:
    """Index of each query's nearest gallery row; ties go to the lowest index.

    Distances are formed about the gallery's mean in float32, which keeps ||x||^2 - 2 <y, x> from cancelling; rows whose
    two best candidates are closer than rounding are decided in float64.

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
    work = torch.float64 if gallery.dtype == torch.float64 else torch.float32
    # Any centre serves as long as both sides take the same one.
    centre = gallery.mean(0, dtype=torch.float64).to(work)
    x = gallery.to(work) - centre
    norms = x.square().sum(1, dtype=torch.float64)
    largest = norms.max().sqrt().to(work) if len(x) else norms.sum().to(work)
    found = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
    step = max(1, CHUNK_ELEMENTS // max(1, x.shape[0]))
    for i in range(0, queries.shape[0], step):
        rows = slice(i, min(queries.shape[0], i + step))
        y = queries[rows].to(work) - centre
        scores = torch.addmm(norms.to(work)[None], y, x.T, alpha=-2)
        if not exact or x.shape[0] == 1:
            found[rows] = scores.argmin(1)
            continue
        # Rounding of the products and of the norms, with room: 8 eps (||y|| + ||x||) ||x||.
        slack = 8 * torch.finfo(work).eps * (y.norm(dim=1) + largest) * largest
        found[rows] = lowest(scores, slack, queries[rows], gallery)
    return found


def lowest(scores: Tensor, slack: Tensor, queries: Tensor, gallery: Tensor) -> Tensor:
    """Index of each row's lowest score; candidates within `slack` of it are decided by their distance in float64.

    Args:
        scores: (n, G), each query's squared distances up to a constant.
        slack: (n,), how far apart two scores must be to be told apart.
        queries: (n, D).
        gallery: (G, D).

    Returns:
        (n,) int64; the lowest index among equals.
    """
    best, found = scores.min(1)
    limit = (best + slack)[:, None]
    close = ((scores <= limit).sum(1) > 1).nonzero()[:, 0]
    for r in close.tolist():
        candidates = (scores[r] <= limit[r]).nonzero()[:, 0]
        squared = (gallery[candidates].double() - queries[r].double()).square().sum(1)
        found[r] = candidates[int(squared.argmin())]
    return found

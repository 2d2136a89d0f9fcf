"""Galleries that span few of the dimensions, and their rows in the order that a query has by definition."""

import torch

METRICS = {"l2": "l2", "ip": "ip", "cosine": "ip"}  # of a projection, and of the index that it is for


def pairs(rows=40, dims=64, queries=80, seed=0, spread=1.0):
    """A gallery that spans few of the dimensions, rows of different lengths; queries a gap and an offset away."""
    generator = torch.Generator().manual_seed(seed)
    gallery = torch.randn(rows, dims, generator=generator) * (0.5 + torch.rand(rows, 1, generator=generator))
    gallery *= spread
    near = torch.randint(rows, (queries,), generator=generator)
    own = torch.randn(queries, dims, generator=generator)
    return gallery, gallery[near] + 0.7 * own + torch.linspace(-1, 2, dims), near


def order(queries, gallery, metric):
    """All rows of each query, best first, by definition in float64."""
    y, x = queries.double(), gallery.double()
    if metric == "l2":
        return (y[:, None] - x).square().sum(2).argsort(dim=1, stable=True)
    x = x / x.norm(dim=1, keepdim=True) if metric == "cosine" else x
    return (-(y @ x.T)).argsort(dim=1, stable=True)

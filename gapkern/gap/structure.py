"""The gap beyond its means: whether clusters follow the modality, which dimensions tell it, how many are in use.

All in float64, with memory bounded by a sample of the rows where neighbours or clusters are sought.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable, unit
from gapkern._search import in_range, nearest, search
from gapkern.gap.moments import Moments, principal

__all__ = ["STRUCTURES", "clustering_scores", "fisher_scores", "gap_structure", "intrinsic_dimension"]

STRUCTURES = ("clustering", "fisher", "dimension")
ROWS = 2**14  # of a side that are looked at
RESTARTS, ITERATIONS = 4, 100


def _sides(images: Any, texts: Any) -> tuple[Tensor, Tensor]:
    found = {"images": _check.matrix("images", images), "texts": _check.matrix("texts", texts)}
    _check.same_width(**found)
    x, t = (squarable(name, _check.finite(name, rows)).detach().cpu() for name, rows in found.items())
    return x, t


def _drawn(x: Tensor, rows: int, seed: int) -> Tensor:
    """Up to `rows` row numbers, in order, by the seed."""
    if len(x) <= rows:
        return torch.arange(len(x))
    return torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows].sort().values


def _kmeans(x: Tensor, clusters: int, seed: int) -> Tensor:
    """(N,) int64: the best of some runs of Lloyd's iteration from k-means++ (Arthur and Vassilvitskii, 2007)."""
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(x), dtype=torch.int64), math.inf
    for _ in range(RESTARTS):
        first = int(torch.randint(len(x), (1,), generator=generator))
        centres, apart = x[first : first + 1], torch.full((len(x),), torch.inf, dtype=torch.float64)
        for _ in range(clusters - 1):
            apart = torch.minimum(apart, (x - centres[-1]).square().sum(1))
            if not float(apart.sum()) > 0:
                break
            chosen = torch.multinomial(apart / apart.sum(), 1, generator=generator)
            centres = torch.cat([centres, x[chosen]])
        own = nearest(x, centres)
        for _ in range(ITERATIONS):
            sums = torch.zeros_like(centres).index_add_(0, own, x)
            counts = torch.bincount(own, minlength=len(centres))[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
            before, own = own, nearest(x, centres)
            if torch.equal(before, own):
                break
        inertia = float((x - centres[own]).square().sum())
        if inertia < least:
            best, least = own, inertia
    return best


def _agreement(found: Tensor, true: Tensor) -> dict[str, float]:
    table = torch.zeros(int(found.max()) + 1, int(true.max()) + 1, dtype=torch.float64)
    table.index_put_((found, true), torch.ones(len(found), dtype=torch.float64), accumulate=True)
    n, rows, columns = table.sum(), table.sum(1), table.sum(0)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    def entropy(counts: Tensor) -> float:
        p = counts[counts > 0] / n
        return float(-(p * p.log()).sum())

    expected, most = pairs(rows) * pairs(columns) / max(pairs(n), 1.0), (pairs(rows) + pairs(columns)) / 2
    of_found, of_true, both = entropy(rows), entropy(columns), entropy(table)
    shared = max(0.0, of_found + of_true - both)
    homogeneity, completeness = (shared / h if h > 0 else 1.0 for h in (of_true, of_found))
    total = homogeneity + completeness
    return {
        "ari": (pairs(table) - expected) / (most - expected) if most != expected else 1.0,
        "nmi": 2 * shared / (of_found + of_true) if of_found + of_true > 0 else 1.0,
        "homogeneity": homogeneity,
        "completeness": completeness,
        "v_measure": 2 * homogeneity * completeness / total if total > 0 else 0.0,
    }


@isolated
def clustering_scores(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    labels: Any = None,
    *,
    clusters: int | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> dict[str, float]:
    """Do the clusters of both modalities together follow the modality, or what the rows are of?

    k-means of the pooled unit vectors, against the modality: 1 where each modality is a cluster of its own, 0 where
    clusters do not tell them apart. With labels, against those: there 1 is good (Grassucci et al., ICLR 2026, arXiv
    2601.18525).

    Args:
        images: (N, D).  texts: (M, D).
        labels: (N,) integers, what images and texts are of; row i of both is a pair, and N = M.
        clusters: k; by default 2, or as many as there are labels.
        seed: of the draws of k-means++ and of the rows.
        rows: of each side that are clustered, drawn evenly.

    Returns:
        ari: adjusted Rand index (Hubert and Arabie, 1985).  nmi: mutual information over the mean of both entropies.
        homogeneity, completeness, v_measure (Rosenberg and Hirschberg, 2007); v_measure is nmi, by another way.

    Raises:
        TypeError, ValueError: embeddings, labels or numbers that are not as said.

    Example:
        >>> x = torch.eye(8)
        >>> {name: round(value, 6) for name, value in clustering_scores(x, x - 5).items()}["ari"]
        1.0
    """
    x, t = _sides(images, texts)
    rows, seed = _check.integer("rows", rows, low=2), _check.integer("seed", seed, low=0)
    chosen = _drawn(x, rows, seed), _drawn(t, rows, seed)
    true = torch.cat([torch.zeros(len(chosen[0]), dtype=torch.int64), torch.ones(len(chosen[1]), dtype=torch.int64)])
    if labels is not None:
        _check.same_rows(images=x, texts=t)
        found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if not np.issubdtype(found.dtype, np.integer):
            raise TypeError(f"labels: expected integers, got {found.dtype}")
        if found.shape != (len(x),):
            raise ValueError(f"labels: expected shape ({len(x)},), got {found.shape}")
        numbers = torch.from_numpy(np.unique(found, return_inverse=True)[1].astype(np.int64))
        true = torch.cat([numbers[c] for c in chosen])
    clusters = int(true.max()) + 1 if clusters is None else _check.integer("clusters", clusters, low=1)
    pooled = torch.cat([unit(side[c].double()) for side, c in zip((x, t), chosen, strict=True)])
    return _agreement(_kmeans(pooled, min(clusters, len(pooled)), seed), true)


@isolated
def fisher_scores(images: Tensor | np.ndarray, texts: Tensor | np.ndarray) -> Tensor:
    """How well each dimension tells the modalities apart, (D,) float64.

    F_d = sum_m n_m (mu_md - mu_d)^2 / sum_m n_m var_md over both modalities m (Duda, Hart and Stork, 2001, section
    3.8; Gu, Li and Han, 2011). Few dimensions drive the gap (Schrodi et al., arXiv 2404.07983). A dimension that is
    constant in both is infinite where they differ, and 0 elsewhere.

    Args:
        images: (N, D).  texts: (M, D).

    Raises:
        TypeError, ValueError: not floating-point matrices of one width, or not finite.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
        >>> fisher_scores(x, x + torch.tensor([4.0, 0.0])).tolist()
        [4.0, 0.0]
    """
    between, within = _scatter(*_sides(images, texts))
    never = torch.where(between > 0, torch.inf, 0.0)
    return torch.where(within > 0, between / torch.where(within > 0, within, 1.0), never)


def _scatter(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of each dimension: sum_m n_m (mu_m - mu)^2, and sum_m n_m var_m."""
    a, b = Moments.of(x), Moments.of(t)
    apart = (a.mean - b.mean).square()
    return apart * (a.count * b.count / (a.count + b.count)), a.gram.diagonal() + b.gram.diagonal()


@isolated
def intrinsic_dimension(x: Tensor | np.ndarray, method: str = "two_nn", *, seed: int = 0, rows: int = ROWS) -> float:
    """How many dimensions embeddings are spread over; nan where too few rows differ.

    Args:
        x: (N, D).
        method: "two_nn", (n - 1) / sum log(r2 / r1) with r1, r2 the distances to the two nearest rows (Facco et al.,
            2017; in the likelihood's form, without its bias, by Denti et al., 2022): local, along a curved sheet.
            "participation", (sum lambda)^2 / sum lambda^2 over the covariance's eigenvalues (Gao et al., 2017): global.
        seed, rows: for "two_nn", of the rows that are drawn where there are more.

    Raises:
        TypeError, ValueError: no floating-point matrix, not finite, another method.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> plane = torch.randn(2000, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
        >>> 1.8 < intrinsic_dimension(plane) < 2.2, 1 < intrinsic_dimension(plane, "participation") <= 2
        (True, True)
    """
    _check.choice("method", method, ("two_nn", "participation"))
    matrix = squarable("x", _check.finite("x", _check.matrix("x", x))).detach().cpu()
    seed, rows = _check.integer("seed", seed, low=0), _check.integer("rows", rows, low=3)
    if method == "participation":
        values = principal(Moments.of(matrix).gram)[0]
        values = values / values[0] if float(values[0]) > 0 else values
        squares = float(values.square().sum())
        return float(values.sum()) ** 2 / squares if squares > 0 else math.nan
    some = matrix[_drawn(matrix, rows, seed)]
    if len(some) < 3:
        return math.nan
    some = in_range(some, some)[0].double()
    distinct = torch.unique(some, dim=0)
    if len(distinct) < 3:
        return math.nan
    _, found = search(some, distinct, 3)  # the nearest is the row itself
    first, second = ((some - distinct[found[:, i]]).norm(dim=1) for i in (1, 2))
    ratios = (second / first).log()
    ratios = ratios[torch.isfinite(ratios)]
    total = float(ratios.sum())
    return (len(ratios) - 1) / total if total > 0 else math.nan


@isolated
def gap_structure(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    which: Iterable[str] = STRUCTURES,
    *,
    labels: Any = None,
    seed: int = 0,
) -> dict[str, float]:
    """The measures of this module by name, to stand beside those of `gap_metrics`.

    Args:
        images: (N, D).  texts: (M, D).
        which: of "clustering", "fisher" and "dimension".
        labels: of `clustering_scores`.
        seed: of what is drawn.

    Returns:
        "clustering": cluster_ari, cluster_nmi, cluster_homogeneity, cluster_completeness, cluster_v_measure.
        "fisher": fisher_ratio, tr S_between / tr S_within; fisher_largest, of one dimension; fisher_dimensions, the
        fewest dimensions with half of tr S_between. "dimension": two_nn_* and participation_* of each modality.

    Raises:
        TypeError, ValueError: embeddings or labels that are not as said, another name.

    Example:
        >>> x = torch.eye(8) + torch.tensor([1.0] + [0.0] * 7)
        >>> gap_structure(x, -x, ["fisher"])["fisher_dimensions"]
        1.0
    """
    x, t = _sides(images, texts)
    found: dict[str, float] = {}
    for name in which:
        _check.choice("which", name, STRUCTURES)
        if name == "clustering":
            scores = clustering_scores(x, t, labels, seed=seed)
            found |= {f"cluster_{score}": value for score, value in scores.items()}
        elif name == "fisher":
            between, within = _scatter(x, t)
            shares = between.sort(descending=True).values.cumsum(0) / between.sum().clamp_min(1e-300)
            found |= {
                "fisher_ratio": float(between.sum() / within.sum()) if float(within.sum()) > 0 else math.nan,
                "fisher_largest": float(fisher_scores(x, t).max()),
                "fisher_dimensions": float((shares < 0.5).sum() + 1),
            }
        else:
            for method in ("two_nn", "participation"):
                for side, rows in (("images", x), ("texts", t)):
                    found[f"{method}_{side}"] = intrinsic_dimension(rows, method, seed=seed)
    return found

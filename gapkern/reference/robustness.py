"""Robustness as the paper defines it (Eq. 10): draw noise, search, compare. Brute force, one trial at a time."""

from typing import Any

import torch
from torch import Tensor


def stays_nearest(
    queries: Tensor, gallery: Tensor, targets: Tensor, variance: float, trials: int, generator: torch.Generator
) -> Tensor:
    """Share of trials in which targets[i] is query i's nearest row of gallery + noise, (Q,) float64.

    `variance` is of each coordinate; every trial draws new noise for every gallery point.
    """
    wins = torch.zeros(len(queries), dtype=torch.float64)
    for _ in range(trials):
        noise = torch.randn(gallery.shape, generator=generator, dtype=gallery.dtype)
        wins += torch.cdist(queries, gallery + variance**0.5 * noise).argmin(1) == targets
    return wins / trials


def nearest_two(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (Q, 2) float64 of the nearest gallery row and the next, and (Q,) int64 which is nearest.

    The next is infinitely far for G = 1; of rows equally near the first is taken.

    Example:
        >>> nearest_two(torch.tensor([[1.0]]), torch.tensor([[3.0], [0.0], [2.0]]))
        (tensor([[1., 1.]], dtype=torch.float64), tensor([1]))
    """
    squared = torch.stack([(gallery.double() - y).square().sum(1) for y in queries.double()])
    values = torch.nn.functional.pad(squared, (0, 1), value=torch.inf).sort(dim=1, stable=True)
    return values.values[:, :2], values.indices[:, 0]


def winning_probability(squared: Tensor, target: int, variance: float, dims: int, nodes: int = 2001) -> float:
    """The same probability for one query by quadrature over SciPy's noncentral chi-square law.

    `squared` (G,) float64 holds the query's squared distances to the gallery. The rule is the trapezoid's in the
    target's normal score.
    """
    import numpy as np
    from scipy.stats import chi2, ncx2, norm

    lam = (squared.double() / variance).numpy()
    law = [ncx2(dims, v) if v > 0 else chi2(dims) for v in lam]

    def survival(j: int, x: Any) -> Any:
        try:
            return law[j].sf(x)
        except OverflowError:  # SciPy's, far below the mean, where the answer is one
            return np.array([survival(j, v) for v in x]) if np.ndim(x) else 1.0

    z = np.linspace(-8.0, 8.0, nodes)
    q = np.where(z < 0, law[target].ppf(norm.cdf(z)), law[target].isf(norm.sf(z)))
    product = norm.pdf(z)
    product /= product.sum()
    for j in range(len(lam)):
        # SciPy overflows far from the target, where the answer is one.
        far = lam[j] - lam[target] > 10 * (4 * (dims + lam[j] + lam[target])) ** 0.5
        if j != target and not far:
            product = product * survival(j, q)
    return float(product.sum())


def winning_probability_inner(scores: Tensor, target: int, deviation: float, nodes: int = 4001) -> float:
    """The probability that `target` has the largest of (G,) inner products, each with its own normal noise, by SciPy.

    The trapezoid rule in the target's normal score, in float64.
    """
    import numpy as np
    from scipy.special import log_ndtr

    lead = ((scores[target] - scores).double() / deviation).numpy()
    lead = np.delete(lead, target)
    z = np.linspace(-10.0, 10.0, nodes)
    density = np.exp(-(z**2) / 2)
    logs = sum((log_ndtr(part[:, None] + z).sum(0) for part in np.array_split(lead, len(lead) // 1000 + 1)), 0.0 * z)
    return float((density * np.exp(logs)).sum() / density.sum())

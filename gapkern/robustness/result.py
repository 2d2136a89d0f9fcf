"""What `robustness` returns: four numbers that belong together, how sure they are, and which neighbours change."""

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from torch import Tensor

from gapkern import _check
from gapkern._compare import same_fields

__all__ = ["RobustnessResult"]


@dataclass(frozen=True, eq=False)
class RobustnessResult:
    """Four numbers that belong together, and how they were found.

    Attributes:
        robustness: share of queries whose nearest neighbour is the same with and without the perturbation.
        agreement: the same against the nearest neighbour without perturbation and without shift. Robustness alone can
            mislead: a coarse shift may raise it while neighbours become others.
        accuracy: share of queries whose nearest neighbour is right, under the perturbation; NaN without labels.
        clean_accuracy: the same without the perturbation (with the shift).
        gini: how unevenly the queries' nearest neighbours spread over the gallery's rows, or over classes where
            gallery_labels are given: 0 evenly, towards 1 all on few.
        stderr: Monte-Carlo standard error of `robustness`. Trials share their noise among queries, so it is taken over
            trials; 0 where nothing is drawn, NaN for a single trial.
        per_query: (Q,) float64, each query's robustness.
        nearest: (Q,) int64, each query's nearest gallery row without the perturbation.
        rivals: (Q,) int64, the row that takes its place most easily: the second nearest for "exact"; otherwise one that
            was drawn in its place (the one drawn there in most flips, if there is one). -1 where there is none.
        method: "exact", "projected" or "sample"; "none drawn" for what is not random.
        trials: galleries drawn; 0 for "exact".
        seconds: wall-clock time; two results are equal whatever they took.
    """

    robustness: float
    agreement: float
    accuracy: float
    clean_accuracy: float
    gini: float
    stderr: float
    per_query: Tensor = field(repr=False)
    nearest: Tensor = field(repr=False)
    rivals: Tensor = field(repr=False)
    method: str
    trials: int
    seconds: float = field(compare=False)

    __eq__ = same_fields

    def summary(self) -> dict[str, Any]:
        """Everything that is a plain number or word."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bounds of `robustness` for more queries like these: the spread of the queries, and of the draws.

        Example:
            >>> import torch
            >>> from gapkern import Gaussian
            >>> from gapkern.robustness import robustness
            >>> result = robustness(torch.eye(3)[[0, 0, 1, 2]] * 0.9, torch.eye(3), Gaussian(0.5))
            >>> low, high = result.interval()
            >>> low <= result.robustness <= high
            True
        """
        confidence = _check.number("confidence", confidence, low=0, high=0.9999, exclusive=True)
        if len(self.per_query) < 2:
            return 0.0, 1.0
        drawn = 0.0 if math.isnan(self.stderr) else self.stderr
        spread = math.sqrt(float(self.per_query.var()) / len(self.per_query) + drawn**2)
        reach = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
        return max(0.0, self.robustness - reach), min(1.0, self.robustness + reach)

    def flips(self, least: float = 0.5) -> list[dict[str, Any]]:
        """Queries that change their neighbour with probability `least` or more, the likeliest first.

        Returns:
            Dictionaries of query, nearest (its row without the perturbation), rival (see `rivals`) and probability.

        Example:
            >>> import torch
            >>> from gapkern import Quantize
            >>> from gapkern.robustness import robustness
            >>> gallery = torch.tensor([[0.0], [0.45], [1.0]])
            >>> robustness(torch.tensor([[0.3], [0.1]]), gallery, Quantize(2)).flips()
            [{'query': 0, 'nearest': 1, 'rival': 0, 'probability': 1.0}]
        """
        least = _check.number("least", least, low=0, high=1)
        chance = 1 - self.per_query
        order = chance.argsort(descending=True, stable=True)
        chosen = order[(chance[order] >= least) & (self.rivals[order] >= 0) & (chance[order] > 0)]
        return [
            {"query": q, "nearest": int(self.nearest[q]), "rival": int(self.rivals[q]), "probability": float(chance[q])}
            for q in chosen.tolist()
        ]

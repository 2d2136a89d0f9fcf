"""What tasks are measured under, the shift, the perturbations and the seeds, and what comes out of each combination."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gapkern import _check
from gapkern.evaluation.sharded import fit
from gapkern.gap import MeanShift, Projection, transforms
from gapkern.perturb import Perturbation, check
from gapkern.ranks import Ranks, Rows

__all__ = ["DEFAULTS", "Measured", "Metrics", "Outcome", "Settings"]

Metrics = dict[str, float]
Measured = tuple[Metrics, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """One setting's numbers.

    Attributes:
        transform: {"name": "none"}, or what was shifted and by how much.
        perturbation: None, or `Perturbation.describe()` and the seeds.
        metrics: means over seeds.
        per_seed: the metrics of each seed, where more than one was drawn.
        details: what does not fit into a table: each template's accuracy.
    """

    transform: dict[str, Any]
    perturbation: dict[str, Any] | None
    metrics: Metrics
    per_seed: list[Metrics] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What each task is measured under.

    Args:
        shift: None; a fitted `MeanShift` or `Projection` (its gallery: the texts); or components to fit a shift with
            here, such as "auto" or "exact". Everything is measured without it too, and by a projection's metric.
        perturbations: of the gallery; everything is measured without any too.
        seeds: of random perturbations, whose metrics are averaged.
        label: what a record calls the shift.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
    """

    shift: MeanShift | Projection | str | int | float | None = None
    perturbations: Sequence[Perturbation] = ()
    seeds: Sequence[int] = (0,)
    label: str | None = None

    def __post_init__(self) -> None:
        for perturbation in self.perturbations:
            check(perturbation)
        if not self.seeds:
            raise ValueError("seeds: expected at least one, got none")
        for seed in self.seeds:
            _check.integer("seeds", seed, low=0, high=2**63 - 1)
        if isinstance(self.shift, MeanShift | Projection):
            transforms.check("shift", self.shift)
        elif self.shift is not None:
            MeanShift(n_components=self.shift).check_parameters()  # says what is wrong with them

    @property
    def metric(self) -> str:
        """What is nearest: by "l2" unless a projection is of another metric."""
        return str(self.shift.metric) if isinstance(self.shift, Projection) else "l2"

    def fitted(self, gallery: Rows, queries: Rows, ranks: Ranks) -> MeanShift | Projection:
        if isinstance(self.shift, MeanShift | Projection):
            return self.shift
        assert self.shift is not None
        return fit(self.shift, gallery, queries, ranks)

    def describe(self, shifts: dict[str, Any]) -> dict[str, Any]:
        """What a record says of the shifts, by direction."""
        if not shifts:
            return {"name": "none"} | ({} if self.metric == "l2" else {"metric": self.metric})
        if isinstance(self.shift, Projection):
            return {
                **transforms.facts(self.shift),
                "shift": self.label or "file",
                "offset": self.shift.offset_,
                "agreement": self.shift.agreement_,
            }
        facts = [
            {
                "components": s.n_components_,
                "orthogonality": s.orthogonality_,
                "agreement": s.agreement_,
                "gap_norm": float(s.gap_vector_.norm()),
            }
            for s in shifts.values()
        ]
        first = next(iter(shifts.values()))
        label = self.label or ("file" if isinstance(self.shift, MeanShift) else str(self.shift))
        head = {
            "name": "mean_shift",
            "shift": label,
            "alpha": first.alpha,
            "moves": first.moves,
            "normalize": first.normalize,
        }
        return head | (facts[0] if len(facts) == 1 else dict(zip(shifts, facts, strict=True)))

    def outcomes(self, shifts: dict[str, Any], measure: Callable[..., Measured]) -> list[Outcome]:
        """`measure(shifts, perturbation, seed)` for every setting, without shift first."""
        result = []
        for current in [{}, shifts] if shifts else [{}]:
            for perturbation in (None, *self.perturbations):
                random = perturbation is not None and perturbation.random
                seeds = list(self.seeds) if random else [self.seeds[0]]
                measured = [measure(current, perturbation, seed) for seed in seeds]
                each = [metrics for metrics, _ in measured]
                described = None
                if perturbation is not None:
                    described = perturbation.describe() | ({"seeds": seeds} if random else {})
                means = {key: math.fsum(m[key] for m in each) / len(each) for key in each[0]}
                per_seed = each if len(each) > 1 else []
                result.append(Outcome(self.describe(current), described, means, per_seed, measured[0][1]))
        return result


DEFAULTS = Settings()

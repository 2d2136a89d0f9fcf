"""Robustness over shift strengths and perturbations: the paper's Figures 8 to 10 as a table and a plot."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _progress, files
from gapkern._ambient import isolated
from gapkern.gap import MeanShift, Projection, transforms
from gapkern.perturb import Perturbation, check, title
from gapkern.robustness.estimators import robustness
from gapkern.robustness.journal import Journal

__all__ = ["COLUMNS", "SweepResult", "best_alpha", "sweep"]

COLUMNS = (
    "alpha",
    "perturbation",
    "variance",
    "scale",
    "bins",
    "range",
    "label",
    "stages",
    "robustness",
    "robustness_low",
    "robustness_high",
    "agreement",
    "accuracy",
    "clean_accuracy",
    "gini",
    "stderr",
    "method",
    "trials",
    "seconds",
)


@dataclass
class SweepResult:
    """One row for each alpha and perturbation.

    Attributes:
        rows: dictionaries with the keys of `COLUMNS`; None where one does not apply. robustness_low and
            robustness_high bound its 95 % interval.
        shift: the fitted `MeanShift` whose alpha was swept, or the `Projection`.
    """

    rows: list[dict[str, Any]]
    shift: MeanShift | Projection = field(repr=False)

    def series(self, value: str = "robustness") -> dict[str, tuple[list[float], list[float]]]:
        """For each perturbation, by its title: the alphas and the values there."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows:
            alphas, values = found.setdefault(title(row), ([], []))
            alphas.append(row["alpha"])
            values.append(row[value])
        return found

    def best(self, value: str = "robustness") -> dict[str, float]:
        """For each perturbation, by its title: the alpha with the largest value."""
        return {name: alphas[int(np.argmax(values))] for name, (alphas, values) in self.series(value).items()}

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with the columns of `COLUMNS`."""
        pandas = _check.extra("pandas", "pandas", "tables")
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The rows as JSON; written to `path` too where one is given."""
        if path is not None:
            files.write_json(path, self.rows)
        return json.dumps(files.plain(self.rows), indent=2)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the rows as a table."""
        return files.write(path, lambda temporary: self.to_dataframe().to_csv(temporary, index=False))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure: robustness, agreement and, where labels were given, accuracy over alpha. Written to `path` too."""
        from gapkern import figures

        figure = figures.sweep(self)
        if path is not None:
            files.write(path, lambda temporary: figure.savefig(temporary, dpi=150))
        return figure


@isolated
def sweep(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    alphas: Iterable[float],
    perturbations: Perturbation | Iterable[Perturbation],
    labels: Any = None,
    *,
    gallery_labels: Any = None,
    shift: MeanShift | Projection | None = None,
    metric: str = "l2",
    on: str = "gallery",
    when: str = "after",
    method: str = "auto",
    trials: int = 100,
    seed: int = 0,
    progress: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> SweepResult:
    """`robustness` for every alpha and perturbation; all draws share their noise over alphas.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        alphas: strengths of the shift; 0 leaves the gap, 1 closes it. Of a projection: 0, without it, and 1, with it.
        perturbations: one or several.
        labels, gallery_labels, metric, on, when, method, trials, seed: as for `robustness`.
        shift: a fitted `MeanShift` or `Projection`; by default a shift is fitted here, with n_components="auto".
        progress: say on stderr what is done: a bar on a terminal, elsewhere a line every half minute.
        journal: a file that keeps each row as it is done. A later call with the same arguments takes up from there;
            remove the file once the result is kept elsewhere.

    Raises:
        TypeError, ValueError: as `robustness`.

    Example:
        >>> import torch
        >>> from gapkern import Gaussian
        >>> gallery = torch.eye(3, 8)
        >>> queries = gallery + torch.tensor([0.0] * 7 + [2.0])
        >>> result = sweep(queries, gallery, [0.0, 1.0], Gaussian(2.0), labels=[0, 1, 2])
        >>> [round(row["robustness"], 3) for row in result.rows]
        [0.582, 0.756]
    """
    alphas = [_check.number("alphas", alpha) for alpha in alphas]
    if isinstance(perturbations, Perturbation):
        perturbations = [perturbations]
    perturbations = [check(p) for p in perturbations]
    if not alphas or not perturbations:
        raise ValueError(
            f"alphas and perturbations: expected at least one each, got {len(alphas)} and {len(perturbations)}"
        )
    if shift is None:
        shift = MeanShift().fit(gallery, queries)
    transforms.check("shift", shift)
    transforms.fits_metric("shift", shift, metric)
    if isinstance(shift, Projection) and not set(alphas) <= {0.0, 1.0}:
        raise ValueError(f"alphas: expected 0, without, or 1, with a projection, got {alphas}")
    options: dict[str, Any] = {"on": on, "when": when, "method": method, "trials": trials, "seed": seed}
    options |= {} if metric == "l2" else {"metric": metric}
    done = None
    if journal is not None:
        whole = _check.matrix("gallery", gallery)
        others = [base for base in (p.base(whole) for p in perturbations) if base is not whole]
        arrays = (queries, whole, labels, gallery_labels, *others)
        facts = [None if x is None else files.fingerprint(torch.as_tensor(x)) for x in arrays]
        moved = {name: value for name, value in transforms.facts(shift).items() if name != "alpha"}
        done = Journal(journal, {"arrays": facts, "moves": moved, **options})
    cases = [(alpha, perturbation) for alpha in alphas for perturbation in perturbations]
    rows: list[dict[str, Any]] = []
    with _progress.shown({"sweep": "sweep"}, {"sweep": "cases"}, wanted=progress) as step:
        for alpha, perturbation in cases:
            step("sweep", len(rows), len(cases))
            key = [alpha, perturbation.describe()]
            row = None if done is None else done.get(key)
            if row is None:
                result = robustness(
                    queries,
                    gallery,
                    perturbation,
                    labels=labels,
                    gallery_labels=gallery_labels,
                    shift=_at(shift, alpha),
                    **options,
                )
                low, high = result.interval()
                bounds = {"robustness_low": low, "robustness_high": high}
                known = {"alpha": alpha, **perturbation.describe(), **result.summary(), **bounds}
                row = {name: _absent(known.get(name)) for name in COLUMNS}
                if done is not None:
                    done.add(key, row)
            rows.append(row)
        step("sweep", len(rows), len(cases))
    return SweepResult(rows, shift)


@isolated
def best_alpha(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    perturbation: Perturbation,
    *,
    shift: MeanShift,
    low: float = 0.0,
    high: float = 1.5,
    tolerance: float = 0.01,
    value: str = "robustness",
    **options: Any,
) -> float:
    """The alpha in [low, high] at which `robustness` gives the largest `value`, to within `tolerance`.

    By golden-section search: the value must rise to one peak and fall, as Theorem 3.4 has it for an orthogonal gap.

    Args:
        queries, gallery, perturbation: as for `robustness`.
        shift: a fitted `MeanShift`; its own alpha does not matter.
        value: "robustness", "agreement" or "accuracy".
        options: labels, method, trials, seed, ... for `robustness`.

    Example:
        >>> import torch
        >>> from gapkern import Gaussian
        >>> gallery = torch.eye(3, 8)
        >>> queries = gallery + torch.tensor([0.0] * 7 + [2.0])
        >>> shift = MeanShift(n_components="exact").fit(gallery, queries)
        >>> round(best_alpha(queries, gallery, Gaussian(2.0), shift=shift), 1)
        1.0
    """
    _check.choice("value", value, ("robustness", "agreement", "accuracy"))
    low, high = _check.number("low", low), _check.number("high", high)
    tolerance = _check.number("tolerance", tolerance, low=0, exclusive=True)
    if not low < high:
        raise ValueError(f"high: expected a number above low = {low:g}, got {high:g}")

    def at(alpha: float) -> float:
        result = robustness(queries, gallery, perturbation, shift=shift.at(alpha), **options)
        return float(getattr(result, value))

    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = at(left), at(right)
    while high - low > tolerance:
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = at(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = at(left)
    return (low + high) / 2


def _at(shift: MeanShift | Projection, alpha: float) -> MeanShift | Projection | None:
    if isinstance(shift, MeanShift):
        return shift.at(alpha)
    return shift if alpha else None


def _absent(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value

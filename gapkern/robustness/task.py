"""What `robustness` measures: checked embeddings after the shift, and the perturbation of one side."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._rows import squarable
from gapkern._search import METRICS, best
from gapkern.gap import MeanShift, Projection
from gapkern.perturb import Gaussian, Perturbation, Uniform, check

__all__ = ["Setting", "Task", "gini"]


@dataclass(frozen=True, eq=False)
class Setting:
    """What `robustness` measures under, by the names of its arguments; checked.

    Raises:
        TypeError, ValueError: as `robustness`.
    """

    perturbation: Perturbation
    labels: Any = None
    gallery_labels: Any = None
    shift: MeanShift | Projection | None = None
    metric: str = "l2"
    on: str = "gallery"
    when: str = "after"

    def __post_init__(self) -> None:
        check(self.perturbation)
        _check.choice("on", self.on, ("gallery", "queries"))
        _check.choice("when", self.when, ("after", "before"))
        _check.choice("metric", self.metric, METRICS)
        if self.shift is not None and not isinstance(self.shift, MeanShift | Projection):
            raise TypeError(f"shift: expected a MeanShift or a Projection, got {type(self.shift).__name__}")

    @property
    def rescaled(self) -> bool:
        """Whether noise is scaled with its row, by the shift or by cosine: then it follows another law."""
        if self.when == "before" and isinstance(self.shift, MeanShift) and self.shift.moves == "gallery":
            return self.metric == "cosine" or self.shift.normalize
        return self.metric == "cosine"

    @property
    def integrable(self) -> bool:
        """Whether winning probabilities are integrals: of Gaussian noise on the gallery."""
        return isinstance(self.perturbation, Gaussian) and self.on == "gallery" and not self.rescaled


@dataclass(eq=False)
class Task:
    """Queries and a gallery after the shift, and what counts as staying, agreeing and being right.

    Attributes:
        queries, gallery: (Q, D) and (G, D), shifted.
        start: what the perturbation falls on: shifted rows, or unshifted ones where it comes before the shift.
        stays: (Q,) nearest row of the shifted gallery, -1 until it is searched.
        agrees: (Q,) nearest row without shift; the same tensor as `stays` where there is none.
        labels: (Q,) class of each query, or None.
        classes: (G,) class of each gallery row.
        rivals: (Q,) see `RobustnessResult`.
    """

    queries: Tensor
    gallery: Tensor
    start: Tensor
    setting: Setting
    stays: Tensor
    agrees: Tensor
    labels: Tensor | None
    classes: Tensor
    rivals: Tensor

    @staticmethod
    def of(queries: Tensor | np.ndarray, gallery: Tensor | np.ndarray, setting: Setting) -> "Task":
        """Checks everything and applies the shift; where there is one, the neighbours without it are searched.

        Raises:
            TypeError, ValueError: as `robustness`.
        """
        y, x = _check.matrix("queries", queries, rows="Q"), _check.matrix("gallery", gallery, rows="G")
        _check.same_width(gallery=x, queries=y)
        # Elsewhere than on CUDA float64 may be missing.
        device = x.device if x.is_cuda else torch.device("cpu")
        y = squarable("queries", _check.finite("queries", y)).detach().to(device)
        x = squarable("gallery", _check.finite("gallery", x)).detach().to(device)
        base = setting.perturbation.base(x if setting.on == "gallery" else y)
        if setting.on == "queries" and base is not y:
            raise ValueError("on: expected 'gallery' for Replace, got 'queries'")
        targets, classes = _classes(setting.labels, setting.gallery_labels, len(y), len(x), device)
        shift = setting.shift
        moved_queries, moved = (y, x) if shift is None else (shift.transform_queries(y), shift.transform(x))
        if shift is not None and setting.when == "after":
            base = shift.transform(base) if setting.on == "gallery" else shift.transform_queries(base)
        none = torch.full((len(y),), -1, device=device)
        stays = none.clone()
        return Task(
            queries=moved_queries,
            gallery=moved,
            start=base.to(torch.float64 if x.dtype == torch.float64 else torch.float32),
            setting=setting,
            stays=stays,
            agrees=stays if shift is None else best(y, x, setting.metric),
            labels=targets,
            classes=classes,
            rivals=none,
        )

    def search(self) -> None:
        """Finds the neighbours after the shift; an estimator that has all distances at hand finds them itself."""
        self.stays[:] = best(self.queries, self.gallery, self.setting.metric)

    def perturbed(self, seed: int, trial: int) -> tuple[Tensor, Tensor]:
        """Queries and gallery of one trial."""
        noisy, shift = self._noisy(seed, trial), self.setting.shift
        if shift is not None and self.setting.when == "before" and not self._fused:
            noisy = shift.transform(noisy) if self.setting.on == "gallery" else shift.transform_queries(noisy)
        work = self.start.dtype
        return (self.queries.to(work), noisy) if self.setting.on == "gallery" else (noisy, self.gallery.to(work))

    @property
    def noisy_dims(self) -> int:
        """Dimensions of the rows that the perturbation falls on, among which a total variance is divided."""
        return self.start.shape[1]

    @property
    def _fused(self) -> bool:
        """Whether noise and the shift after it are one pass over the rows."""
        moves = isinstance(self.setting.shift, MeanShift) and self.setting.shift.moves == self.setting.on
        return moves and self.setting.when == "before" and isinstance(self.setting.perturbation, Gaussian | Uniform)

    def _noisy(self, seed: int, trial: int) -> Tensor:
        perturbation, start, shift = self.setting.perturbation, self.start, self.setting.shift
        if not self._fused:
            return perturbation.apply(start, seed, trial)
        assert isinstance(shift, MeanShift)
        assert isinstance(perturbation, Gaussian | Uniform)
        by = (shift.alpha if self.setting.on == "gallery" else -shift.alpha) * shift.shift_vector_
        std = perturbation.per_coordinate(start.shape[1]) ** 0.5
        noisy: Tensor = torch.ops.gapkern.perturb_noisy_gallery(
            start, by.to(start.device), perturbation.name, std, seed, trial, 0, bool(shift.normalize), self.setting.when
        )
        return noisy

    def right(self, rows: Tensor, first: int) -> Tensor | None:
        """Whether gallery rows (..., n) are right for queries first .. first + n - 1."""
        if self.labels is None:
            return None
        return self.classes[rows] == self.labels[first : first + rows.shape[-1]]


def gini(found: Tensor, classes: Tensor) -> float:
    """How unevenly the classes found (Q,) spread over those that occur in `classes` (G,): 0 evenly, towards 1 on few.

    Example:
        >>> gini(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1])), gini(torch.tensor([0, 1]), torch.tensor([0, 1]))
        (0.5, 0.0)
    """
    counts = torch.bincount(found, minlength=int(classes.max()) + 1).double()
    counts = counts[torch.unique(classes)].sort().values
    n = len(counts)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=counts.device)
    return float((2 * ranks - n - 1) @ counts / (n * counts.sum())) if n > 1 else 0.0


def _classes(
    labels: Any, gallery_labels: Any, queries: int, rows: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """(Q,) classes of the queries, and (G,) of the gallery's rows: their numbers, or numbers of what was given."""
    classes = torch.arange(rows, device=device)
    if labels is None:
        if gallery_labels is not None:
            raise ValueError("gallery_labels: expected labels beside them, got none")
        return None, classes
    labels = _labels("labels", labels, queries, "query")
    if gallery_labels is None:
        if not bool(((labels >= 0) & (labels < rows)).all()):
            raise ValueError(
                f"labels: expected gallery rows in [0, {rows}), got values from {int(labels.min())} "
                f"to {int(labels.max())}; give gallery_labels where labels are classes"
            )
        return labels.to(device), classes
    given = _labels("gallery_labels", gallery_labels, rows, "gallery row")
    _, inverse = torch.unique(torch.cat([given, labels]).to(device), return_inverse=True)
    return inverse[rows:], inverse[:rows]


def _labels(name: str, labels: Any, count: int, what: str) -> Tensor:
    labels = torch.as_tensor(labels).cpu()
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), one per {what}, got {tuple(labels.shape)}")
    found: Tensor = labels.long()
    return found

"""Ways to close or reshape the gap that were published elsewhere, under one face, to be compared with.

`BASELINES[name]().fit(gallery, queries)`, then `.transform(gallery)` and `.transform_queries(queries)`. N normalises to
unit L2 length.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable, unit, with_float64
from gapkern.gap.estimator import Estimator, NotFittedError
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.moments import Moments, principal
from gapkern.gap.projection import Projection

__all__ = [
    "BASELINES",
    "Baseline",
    "Center",
    "Coral",
    "Linear",
    "NaiveShift",
    "NoChange",
    "Procrustes",
    "Realign",
    "Whiten",
    "ZScore",
]


def _power(gram: Tensor, count: int, exponent: float) -> Tensor:
    """Covariance to a power on its range; directions without variance stay out."""
    values, vectors = principal(gram / max(count - 1, 1))
    kept = values > values[0] * 1e-10
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


class Baseline(Estimator):
    """What all baselines share. Subclasses map float64 rows in `_gallery` and `_queries`."""

    paired = False
    _seen: tuple[Moments, Moments] | None = None

    @isolated
    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray) -> "Baseline":
        """Learns from a gallery (G, D) and queries (Q, D). Returns self.

        Raises:
            TypeError, ValueError: a parameter of a wrong type or out of range; mismatched widths, values that are not
                finite, or rows that are not pairs where they must be.
        """
        self.check_parameters()
        rows, others = _check.matrix("gallery", gallery, rows="G"), _check.matrix("queries", queries, rows="Q")
        rows, others = (
            squarable(name, _check.finite(name, with_float64(x))).detach()
            for name, x in (("gallery", rows), ("queries", others))
        )
        _check.same_width(gallery=rows, queries=others)
        if self.paired:
            _check.same_rows(gallery=rows, queries=others)
        self._seen = Moments.of(rows), Moments.of(others)
        self._fit(rows.double().cpu(), others.double().cpu())
        return self

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        pass

    @property
    def g(self) -> Moments:
        """The gallery's moments."""
        return self._fitted()[0]

    @property
    def q(self) -> Moments:
        """The queries' moments."""
        return self._fitted()[1]

    @property
    def n_features_in_(self) -> int:
        """D."""
        return len(self.g.mean)

    def _fitted(self) -> tuple[Moments, Moments]:
        if self._seen is None:
            raise NotFittedError(f"{type(self).__name__}: call fit before transform")
        return self._seen

    def __sklearn_is_fitted__(self) -> bool:
        return self._seen is not None

    def _gallery(self, x: Tensor) -> Tensor:
        return x

    def _queries(self, x: Tensor) -> Tensor:
        return x

    def _apply(self, name: str, x: Any, function: Callable[[Tensor], Tensor]) -> Any:
        dims = len(self._fitted()[0].mean)
        self.check_parameters()
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != dims:
            raise ValueError(f"{name}: expected D = {dims} as fitted, got shape {tuple(matrix.shape)}")
        moved = function(squarable(name, matrix).cpu().double()).to(matrix.dtype).to(matrix.device)
        return moved.numpy() if isinstance(x, np.ndarray) else moved

    def transform(self, gallery: Any) -> Any:
        """The gallery's rows, mapped; shape, dtype and kind of the input."""
        return self._apply("gallery", gallery, self._gallery)

    def transform_queries(self, queries: Any) -> Any:
        """The queries' rows, mapped."""
        return self._apply("queries", queries, self._queries)


class NoChange(Baseline):
    """Both sides as they are."""


class NaiveShift(Baseline):
    """gallery + alpha g, the whole gap, unprojected."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def check_parameters(self) -> "NaiveShift":
        """Raises what `fit` would raise of the parameters. Returns self."""
        _check.number("alpha", self.alpha)
        return self

    def _gallery(self, x: Tensor) -> Tensor:
        return x + self.alpha * (self.q.mean - self.g.mean)


class Linear(Baseline):
    """N(gallery + a g), N(queries - a g): both sides half way (Liang et al., 2022)."""

    def __init__(self, a: float = 0.5) -> None:
        self.a = a

    def check_parameters(self) -> "Linear":
        """Raises what `fit` would raise of the parameters. Returns self."""
        _check.number("a", self.a)
        return self

    def _gallery(self, x: Tensor) -> Tensor:
        return unit(x + self.a * (self.q.mean - self.g.mean))

    def _queries(self, x: Tensor) -> Tensor:
        return unit(x - self.a * (self.q.mean - self.g.mean))


class Center(Baseline):
    """N(x - mean) on each side."""

    def _gallery(self, x: Tensor) -> Tensor:
        return unit(x - self.g.mean)

    def _queries(self, x: Tensor) -> Tensor:
        return unit(x - self.q.mean)


class Realign(Baseline):
    """The gallery with the queries' spread and mean: t' = N((t - mu_g) s + mu_q), then N(t' - mean t' + mu_q)."""

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        spread = self.q.gram.trace() / self.q.count, self.g.gram.trace() / self.g.count
        self.s = float((spread[0] / spread[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        self.mean = self._first(gallery).mean(0)

    def _first(self, x: Tensor) -> Tensor:
        return unit((x - self.g.mean) * self.s + self.q.mean)

    def _gallery(self, x: Tensor) -> Tensor:
        return unit(self._first(x) - self.mean + self.q.mean)


class ZScore(Baseline):
    """(x - mean) / standard deviation, coordinate by coordinate, on each side."""

    def _scaled(self, x: Tensor, seen: Moments) -> Tensor:
        std = (seen.gram.diagonal() / seen.count).sqrt()
        return (x - seen.mean) / torch.where(std > 0, std, torch.ones_like(std))

    def _gallery(self, x: Tensor) -> Tensor:
        return self._scaled(x, self.g)

    def _queries(self, x: Tensor) -> Tensor:
        return self._scaled(x, self.q)


class Whiten(Baseline):
    """Sigma^(-1/2) (x - mean) on each side, on the range of its covariance."""

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        self.roots = _power(self.g.gram, self.g.count, -0.5), _power(self.q.gram, self.q.count, -0.5)

    def _gallery(self, x: Tensor) -> Tensor:
        return (x - self.g.mean) @ self.roots[0]

    def _queries(self, x: Tensor) -> Tensor:
        return (x - self.q.mean) @ self.roots[1]


class Coral(Baseline):
    """The gallery whitened, then coloured as the queries are: mu_q + (x - mu_g) Sigma_g^(-1/2) Sigma_q^(1/2)."""

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        self.map = _power(self.g.gram, self.g.count, -0.5) @ _power(self.q.gram, self.q.count, 0.5)

    def _gallery(self, x: Tensor) -> Tensor:
        return (x - self.g.mean) @ self.map + self.q.mean


class Procrustes(Baseline):
    """The rotation that brings each gallery row nearest its query, about the means. Rows must be pairs."""

    paired = True

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        u, _, v = torch.linalg.svd((gallery - self.g.mean).T @ (queries - self.q.mean))
        self.rotation: Tensor = u @ v

    def _gallery(self, x: Tensor) -> Tensor:
        return (x - self.g.mean) @ self.rotation + self.q.mean


BASELINES: dict[str, Any] = {
    "none": NoChange,
    "mean_shift": NaiveShift,
    "projected_shift": MeanShift,
    "projection": Projection,
    "linear": Linear,
    "center": Center,
    "realign": Realign,
    "zscore": ZScore,
    "whiten": Whiten,
    "coral": Coral,
    "procrustes": Procrustes,
}

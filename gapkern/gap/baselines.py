"""Ways to close or reshape the gap that were published elsewhere, under one face, to be compared with.

`BASELINES[name]().fit(gallery, queries)`, then `.transform(gallery)` and `.transform_queries(queries)`. N normalises to
unit L2 length.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.moments import Moments, principal


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _power(gram: Tensor, count: int, exponent: float) -> Tensor:
    """Covariance to a power on its range; directions without variance stay out."""
    values, vectors = principal(gram / max(count - 1, 1))
    kept = values > values[0] * 1e-10
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


class Baseline:
    """What all baselines share. Subclasses map float64 rows in `_gallery` and `_queries`."""

    paired = False

    @isolated
    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray) -> "Baseline":
        """Learns from a gallery (G, D) and queries (Q, D). Returns self.

        Raises:
            ValueError: mismatched widths, values that are not finite, or rows that are not pairs where they must be.
        """
        gallery = _check.finite("gallery", _check.matrix("gallery", gallery, rows="G")).detach()
        queries = _check.finite("queries", _check.matrix("queries", queries, rows="Q")).detach()
        _check.same_width(gallery=gallery, queries=queries)
        if self.paired:
            _check.same_rows(gallery=gallery, queries=queries)
        self.g, self.q = Moments.of(gallery), Moments.of(queries)
        self._fit(gallery.double(), queries.double())
        return self

    def _fit(self, gallery: Tensor, queries: Tensor) -> None:
        pass

    def _gallery(self, x: Tensor) -> Tensor:
        return x

    def _queries(self, x: Tensor) -> Tensor:
        return x

    def _apply(self, name: str, x: Any, function) -> Any:
        if not hasattr(self, "g"):
            raise ValueError(f"{type(self).__name__}: call fit before transform")
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != len(self.g.mean):
            raise ValueError(f"{name}: expected D = {len(self.g.mean)} as fitted, got shape {tuple(matrix.shape)}")
        moved = function(matrix.double()).to(matrix.dtype)
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

    def __init__(self, alpha: float = 1.0):
        self.alpha = _check.number("alpha", alpha)

    def _gallery(self, x):
        return x + self.alpha * (self.q.mean - self.g.mean)


class Linear(Baseline):
    """N(gallery + a g), N(queries - a g): both sides half way (Liang et al., 2022)."""

    def __init__(self, a: float = 0.5):
        self.a = _check.number("a", a)

    def _gallery(self, x):
        return _unit(x + self.a * (self.q.mean - self.g.mean))

    def _queries(self, x):
        return _unit(x - self.a * (self.q.mean - self.g.mean))


class Center(Baseline):
    """N(x - mean) on each side."""

    def _gallery(self, x):
        return _unit(x - self.g.mean)

    def _queries(self, x):
        return _unit(x - self.q.mean)


class Realign(Baseline):
    """The gallery with the queries' spread and mean: t' = N((t - mu_g) s + mu_q), then N(t' - mean t' + mu_q)."""

    def _fit(self, gallery, queries):
        spread = self.q.gram.trace() / self.q.count, self.g.gram.trace() / self.g.count
        self.s = float((spread[0] / spread[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        self.mean = self._first(gallery).mean(0)

    def _first(self, x):
        return _unit((x - self.g.mean) * self.s + self.q.mean)

    def _gallery(self, x):
        return _unit(self._first(x) - self.mean + self.q.mean)


class ZScore(Baseline):
    """(x - mean) / standard deviation, coordinate by coordinate, on each side."""

    def _scaled(self, x, seen):
        std = (seen.gram.diagonal() / seen.count).sqrt()
        return (x - seen.mean) / torch.where(std > 0, std, 1.0)

    def _gallery(self, x):
        return self._scaled(x, self.g)

    def _queries(self, x):
        return self._scaled(x, self.q)


class Whiten(Baseline):
    """Sigma^(-1/2) (x - mean) on each side, on the range of its covariance."""

    def _fit(self, gallery, queries):
        self.roots = _power(self.g.gram, self.g.count, -0.5), _power(self.q.gram, self.q.count, -0.5)

    def _gallery(self, x):
        return (x - self.g.mean) @ self.roots[0]

    def _queries(self, x):
        return (x - self.q.mean) @ self.roots[1]


class Coral(Baseline):
    """The gallery whitened, then coloured as the queries are: mu_q + (x - mu_g) Sigma_g^(-1/2) Sigma_q^(1/2)."""

    def _fit(self, gallery, queries):
        self.map = _power(self.g.gram, self.g.count, -0.5) @ _power(self.q.gram, self.q.count, 0.5)

    def _gallery(self, x):
        return (x - self.g.mean) @ self.map + self.q.mean


class Procrustes(Baseline):
    """The rotation that brings each gallery row nearest its query, about the means. Rows must be pairs."""

    paired = True

    def _fit(self, gallery, queries):
        u, _, v = torch.linalg.svd((gallery - self.g.mean).T @ (queries - self.q.mean))
        self.rotation = u @ v

    def _gallery(self, x):
        return (x - self.g.mean) @ self.rotation + self.q.mean


BASELINES: dict[str, Any] = {
    "none": NoChange,
    "mean_shift": NaiveShift,
    "projected_shift": MeanShift,
    "linear": Linear,
    "center": Center,
    "realign": Realign,
    "zscore": ZScore,
    "whiten": Whiten,
    "coral": Coral,
    "procrustes": Procrustes,
}

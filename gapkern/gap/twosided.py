"""What estimators over two modalities share: both sides seen by batches and ranks, a fit worked out when asked."""

import numbers
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable
from gapkern.gap.estimator import Estimator, NotFittedError
from gapkern.gap.moments import Moments, Sample, batches, hull
from gapkern.gap.together import gather

__all__ = ["Side", "TwoSided", "components_of_variance", "fewest", "wanted_components"]

SAMPLE = 2**14  # rows of each side by which neighbours are judged
F = TypeVar("F", bound="Found")
_T = TypeVar("_T", bound="TwoSided[Any]")


@dataclass(frozen=True, eq=False)
class Side:
    """What was seen of one modality: its moments, and some of its rows. Never changed in place."""

    moments: Moments
    sample: Sample

    @staticmethod
    def none(dims: int) -> "Side":
        return Side(Moments.none(dims), Sample(dims, SAMPLE))

    @property
    def dims(self) -> int:
        return len(self.moments.mean)

    def with_rows(self, name: str, x: Tensor | None) -> "Side":
        if x is None:
            return self
        moments, sample = self.moments.copy(), self.sample.copy()
        done = 0
        for rows in batches(x.detach()):
            rows = squarable(name, _check.finite(name, rows, done))
            moments.update(rows)
            sample.update(rows)
            done += len(rows)
        return Side(moments, sample)

    def with_side(self, other: "Side") -> "Side":
        moments, sample = self.moments.copy(), self.sample.copy()
        moments.merge(other.moments)
        sample.merge(other.sample)
        return Side(moments, sample)

    def hull(self) -> Tensor:
        """Orthonormal basis (D, rank) of the affine hull's directions."""
        return hull(self.moments, self.sample.rows)


class Found(Protocol):
    """What every fit has found: the width D, the k in use, and the share of neighbours kept."""

    @property
    def dims(self) -> int: ...
    @property
    def n_components(self) -> int: ...
    @property
    def agreement(self) -> float: ...


class TwoSided(Estimator, Generic[F]):
    """An estimator of a gallery (G, D) and queries (Q, D). Subclasses define `_work_out` and the parameters."""

    n_components: Any
    agreement: Any
    model: str | None

    _noun: str
    _sides: tuple[Side, Side] | None = None  # what was seen; None for what was loaded
    _found: F | None = None  # worked out when it is first asked for
    _asked: tuple[Any, ...] | None = None  # the parameters that a fit depends on, as they were when fitting

    @abstractmethod
    def _work_out(self, gallery: Side, queries: Side, *asked: Any) -> F:
        """The fit to what was seen, by the parameters `_request` gave."""

    def _request(self) -> tuple[Any, ...]:
        """The parameters that a fit depends on."""
        return wanted_components(self.n_components), _check.number("agreement", self.agreement, low=0, high=1)

    def _prepared(self, name: str, x: Tensor) -> Tensor:
        """Rows as they are learned from."""
        return x

    def _sufficient(self, gallery: Side, queries: Side) -> bool:
        return bool(gallery.moments.count and queries.moments.count)

    def _check_shared(self) -> None:
        wanted_components(self.n_components)
        _check.number("agreement", self.agreement, low=0, high=1)
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model: expected a name or None, got {type(self.model).__name__}")

    @isolated
    def partial_fit(
        self: _T, gallery: Tensor | np.ndarray | None = None, queries: Tensor | np.ndarray | None = None
    ) -> _T:
        """Learns from a batch of either side, or of both, on top of what was seen before. Returns self.

        A batch that is refused leaves the fit as it was.

        Example:
            >>> from gapkern import MeanShift
            >>> gallery, queries = torch.eye(4, 6), torch.eye(4, 6) + 1
            >>> whole = MeanShift(n_components=2).fit(gallery, queries)
            >>> parts = MeanShift(n_components=2).partial_fit(gallery[:1]).partial_fit(gallery[1:], queries)
            >>> torch.allclose(whole.shift_vector_, parts.shift_vector_)
            True
        """
        self.check_parameters()
        given = {"gallery": gallery, "queries": queries}
        batches = {name: _check.matrix(name, x, empty=True) for name, x in given.items() if x is not None}
        if not batches:
            return self
        if self._sides is None:
            if self._found is not None:
                raise ValueError(self._loaded())
            width = next(iter(batches.values())).shape[1]
            sides = Side.none(width), Side.none(width)
        else:
            sides = self._sides
        for name, x in batches.items():
            if x.shape[1] != sides[0].dims:
                raise ValueError(f"{name}: expected D = {sides[0].dims} as before, got {tuple(x.shape)}")
        return self._learn(*sides, batches.get("gallery"), batches.get("queries"))

    def _learn(self: _T, gallery: Side, queries: Side, rows: Tensor | None, others: Tensor | None) -> _T:
        rows, others = (
            None if x is None else self._prepared(name, x) for name, x in (("gallery", rows), ("queries", others))
        )
        return self._take(gallery.with_rows("gallery", rows), queries.with_rows("queries", others))

    def _take(self: _T, gallery: Side, queries: Side) -> _T:
        """Fits to what was seen of both sides, once the fit is asked for."""
        self._sides, self._found, self._asked = (gallery, queries), None, self._request()
        return self

    @isolated
    def merge(self: _T, other: _T) -> _T:
        """Adds what another of its kind, fitted elsewhere on other rows, has seen. Returns self."""
        if not isinstance(other, type(self)):
            raise TypeError(f"other: expected a {type(self).__name__}, got {type(other).__name__}")
        mine, theirs = self._seen(), other._seen()
        if mine[0].dims != theirs[0].dims:
            raise ValueError(f"other: expected D = {mine[0].dims}, got a {self._noun} of D = {theirs[0].dims}")
        return self._take(mine[0].with_side(theirs[0]), mine[1].with_side(theirs[1]))

    @isolated
    def all_reduce(self: _T, group: Any = None) -> _T:
        """Adds what every rank of a torch.distributed group has seen; the same result on every rank. Returns self.

        Raises:
            ValueError: a rank has seen nothing, or rows of another width; on every rank, naming that rank.
        """
        first, *rest = gather(self._seen, group)
        for rank, sides in enumerate(rest, 1):
            if sides[0].dims != first[0].dims:
                raise ValueError(f"rank {rank}: expected D = {first[0].dims} as on rank 0, got {sides[0].dims}")
        gallery, queries = first
        for more_gallery, more_queries in rest:
            gallery, queries = gallery.with_side(more_gallery), queries.with_side(more_queries)
        return self._take(gallery, queries)

    def _loaded(self) -> str:
        return f"{type(self).__name__}: a loaded {self._noun} can be applied but not added to; fit one anew"

    def _seen(self) -> tuple[Side, Side]:
        if self._sides is None:
            raise NotFittedError(
                self._loaded() if self._found is not None else f"{type(self).__name__}: nothing was seen here; call fit"
            )
        return self._sides

    @property
    def is_fitted(self) -> bool:
        """Whether enough was seen to be used, or a fit was loaded."""
        return self._found is not None or (self._sides is not None and self._sufficient(*self._sides))

    def __sklearn_is_fitted__(self) -> bool:
        return self.is_fitted

    def _fit(self, use: str = "use") -> F:
        """The fit, worked out when it is first asked for from all that was seen."""
        if self._found is None:
            name = type(self).__name__
            if self._sides is None:
                raise NotFittedError(f"{name}: call fit before {use}")
            if not self.is_fitted:
                raise NotFittedError(f"{name}: expected rows of both sides before use, got none of one")
            assert self._asked is not None
            self._found = isolated(self._work_out)(*self._sides, *self._asked)
        return self._found

    @property
    def n_components_(self) -> int:
        """The k in use."""
        return int(self._fit().n_components)

    @property
    def n_features_in_(self) -> int:
        """D."""
        return int(self._fit().dims)

    @property
    def n_features_out_(self) -> int:
        """The width of what is transformed."""
        return self.n_features_in_

    @property
    def agreement_(self) -> float:
        """Share of the fitted queries' first neighbours that stay (of a mean shift: at alpha = 1)."""
        return float(self._fit().agreement)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Up to 16384 gallery rows and query rows, drawn evenly from all that were seen."""
        gallery, queries = self._seen()
        return gallery.sample.rows, queries.sample.rows

    def _checked(self, name: str, x: Any, dims: int, model: str | None) -> Tensor:
        """`x` as a finite matrix of the fitted width, of the fitted model."""
        if None not in (model, self.model) and model != self.model:
            raise ValueError(f"model: expected embeddings of {self.model}, as fitted, got {model}")
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != dims:
            raise ValueError(f"{name}: expected D = {dims} as fitted, got shape {tuple(matrix.shape)}")
        return matrix


def wanted_components(n_components: Any) -> int | float | str:
    """The checked argument, as a plain int, float or str."""
    if isinstance(n_components, str):
        return str(_check.choice("n_components", n_components, ("auto", "exact")))
    if isinstance(n_components, numbers.Real) and not isinstance(n_components, numbers.Integral):
        return _check.number("n_components", n_components, low=0, high=1, exclusive=True)
    return _check.integer("n_components", n_components, low=0)


def components_of_variance(values: Tensor, share: float) -> int:
    """How many of the descending eigenvalues add up to that share of them all."""
    shares = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return int((shares < share).sum()) + 1


def fewest(keeps: Any, most: int) -> int:
    """The least k in [0, most] with keeps(k), by bisection; `most` where none below it has."""
    low, high = 0, most
    if keeps(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high

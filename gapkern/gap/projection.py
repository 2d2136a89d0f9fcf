"""Projecting the queries on the gallery's hull: each query's own offset is removed, and no row of the gallery changes.

Let mu be a point of the gallery's affine hull and V an orthonormal basis of its directions. For every row x of it
||y - x||^2 = ||y - y'||^2 + ||y' - x||^2 with y' = mu + V V^T (y - mu), and <y, x> - <V V^T y, x> = <y - V V^T y, mu>:
the same for all rows, so that no neighbour changes at any k, ties included. Independent isotropic noise of variance v
on the rows varies their distances by 4 v ||y' - x||^2 + 2 v^2 D and their inner products by v ||y'||^2. All maps of the
queries that keep the differences of scores agree in V V^T y and differ in what they add outside; this one adds
nothing. The mean shift (Chowers et al., CVPR 2026, Section 4) is the best translation common to all queries.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import unit, with_float64
from gapkern._search import METRICS, best, search
from gapkern.gap import saved
from gapkern.gap.moments import batches, numerical_rank, principal
from gapkern.gap.twosided import Side, TwoSided, components_of_variance, fewest, wanted_components

__all__ = ["Projection"]

_X = TypeVar("_X", Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class Fit:
    """mu (D,) and V (D, k) in float64; mean distance of the queries to the hull before; share of neighbours kept."""

    mean: Tensor
    basis: Tensor
    offset: float
    agreement: float

    @property
    def dims(self) -> int:
        return len(self.mean)

    @property
    def n_components(self) -> int:
        return self.basis.shape[1]


class Projection(TwoSided[Fit]):
    """Moves every query to the nearest point of the gallery's affine hull, or of its first k principal directions.

    y' = mu + V V^T (y - mu) for L2, y' = V V^T y for inner products. At "exact" every neighbour stays, at any k, while
    noise, quantisation and compression of the gallery change fewer of them; the gallery, and an index that exists, stay
    as they are. It takes the mean shift further: that removes the offset common to all queries, this each one's own.

    Args:
        n_components: k: an int; a fraction of the gallery's variance in (0, 1); "exact", its whole hull; or "auto", the
            fewest for which the fitted queries keep at least `agreement` of their first `neighbours`. A gallery of more
            rows than dimensions has the whole space as its hull, and then only k < D does anything.
        metric: what the gallery is searched by: "l2", "ip" (largest inner product) or "cosine", for which the hull is
            that of the rows scaled to unit length.
        agreement: for n_components="auto".
        reduce: rotate both sides into k dimensions instead: `transform` gives V^T (x - mu) or V^T x, (G, k), and
            `transform_queries` the same of queries. The answers are those of the full width from an index k / D the
            size. Cosine is then searched as "ip", since the rows are scaled before they are rotated.
        model: what made the embeddings, kept with the projection; `transform(..., model=)` then refuses another's.
        centred: for inner products and cosine, y' = mu + V V^T (y - mu) there too: the point nearest to the gallery's
            mean that keeps the order. For codes of rows about their mean (RaBitQ), whose scores err by <y' - mu, e>
            where others err by <y', e>. Not with `reduce`.
        neighbours: for n_components="auto", how many of a query's first rows `agreement` is about. With 1, the default,
            no other row is protected: what is searched for ten wants 10.

    Attributes:
        mean_ (D,): mu.  basis_ (D, k): V.  n_components_: the k in use.  n_features_in_: D.
        offset_: mean distance of the fitted queries to the hull, which is removed; nan where none were given.
        agreement_: share of the fitted queries' first `neighbours` that stay. Beyond 16384 rows a side, it and "auto"
            go by that many drawn evenly from all.

    Raises:
        TypeError: in fitting, an argument of a wrong type.
        ValueError: in fitting, an argument out of range; embeddings of mismatched widths, or not finite.
        NotFittedError: a ValueError and an AttributeError, of what was used before it was fitted.

    Example:
        >>> gallery = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> queries = torch.tensor([[2.0, 0.9, 0.3], [-1.0, 0.1, 0.5]])
        >>> projection = Projection(n_components="exact").fit(gallery, queries)
        >>> [[round(v, 6) for v in row] for row in projection.transform_queries(queries).tolist()]
        [[0.0, 0.8, 0.2], [0.0, 0.3, 0.7]]
    """

    _noun = "projection"

    def __init__(
        self,
        n_components: int | float | str = "auto",
        metric: str = "l2",
        agreement: float = 0.99,
        reduce: bool = False,
        model: str | None = None,
        centred: bool = False,
        neighbours: int = 1,
    ) -> None:
        self.n_components = n_components
        self.metric = metric
        self.agreement = agreement
        self.reduce = reduce
        self.model = model
        self.centred = centred
        self.neighbours = neighbours

    def check_parameters(self) -> "Projection":
        """Raises what `fit` would raise of the parameters. Returns self."""
        self._check_shared()
        _check.choice("metric", self.metric, METRICS)
        if not isinstance(self.reduce, bool | np.bool_):
            raise TypeError(f"reduce: expected True or False, got {type(self.reduce).__name__}")
        if not isinstance(self.centred, bool | np.bool_):
            raise TypeError(f"centred: expected True or False, got {type(self.centred).__name__}")
        if self.centred and self.reduce:
            raise ValueError("centred: expected False with reduce=True, which leaves nothing outside of the hull")
        _check.integer("neighbours", self.neighbours, low=1)
        return self

    @isolated
    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray | None = None) -> "Projection":
        """Learns the hull of a gallery (G, D); queries (Q, D) choose k at "auto" and are measured. Returns self."""
        self.check_parameters()
        rows = _check.matrix("gallery", gallery, rows="G")
        others = None if queries is None else _check.matrix("queries", queries, rows="Q")
        if others is not None:
            _check.same_width(gallery=rows, queries=others)
        elif self.n_components == "auto":
            raise ValueError("queries: expected (Q, D) for n_components='auto', got none")
        return self._learn(Side.none(rows.shape[1]), Side.none(rows.shape[1]), rows, others)

    def _request(self) -> tuple[Any, ...]:
        return *super()._request(), str(self.metric), bool(self.centred), int(self.neighbours)

    def _prepared(self, name: str, x: Tensor) -> Tensor:
        if self.metric != "cosine" or name != "gallery":
            return x
        return unit(x.to(torch.promote_types(x.dtype, torch.float32)))

    def _sufficient(self, gallery: Side, queries: Side) -> bool:
        assert self._asked is not None
        return bool(gallery.moments.count and (queries.moments.count or self._asked[0] != "auto"))

    def _work_out(self, gallery: Side, queries: Side, *asked: Any) -> Fit:
        return _fit(gallery, queries, *asked)

    @property
    def mean_(self) -> Tensor:
        """(D,) float64: mu, the gallery's mean."""
        return self._fit().mean

    @property
    def basis_(self) -> Tensor:
        """(D, k) float64: V, orthonormal columns."""
        return self._fit().basis

    @property
    def n_features_out_(self) -> int:
        """The width of what is transformed: D, or k where `reduce`."""
        return self.n_components_ if self.reduce else self.n_features_in_

    @property
    def offset_(self) -> float:
        """Mean distance of the fitted queries to the hull."""
        return self._fit().offset

    def transform(self, gallery: _X, *, model: str | None = None) -> _X:
        """The gallery as it is; (G, k) in the input's dtype where `reduce`."""
        self.check_parameters()
        fit = self._fit("transform")
        matrix = self._checked("gallery", gallery, len(fit.mean), model)
        if not self.reduce:
            return gallery
        rows = unit(matrix.double()).to(matrix.device) if self.metric == "cosine" else matrix
        return _like(gallery, _mapped(rows, fit, self.metric, True, matrix.dtype))

    def transform_queries(self, queries: _X, *, model: str | None = None) -> _X:
        """The queries (Q, D) on the hull, formed in float64; dtype and kind of the input; (Q, k) where `reduce`."""
        self.check_parameters()
        fit = self._fit("transform_queries")
        matrix = self._checked("queries", queries, len(fit.mean), model)
        return _like(queries, _mapped(matrix, fit, self._map, bool(self.reduce), matrix.dtype))

    @property
    def _map(self) -> str:
        """The metric whose map the queries take."""
        return "l2" if self.centred else self.metric

    @isolated
    def offsets(self, queries: Tensor | np.ndarray, *, model: str | None = None) -> Tensor:
        """(Q,) float64: each query's own distance to the hull, which projecting removes; on the CPU.

        By inner product and cosine too it is the part of y - mu outside of V, which changes no order.

        Example:
            >>> gallery = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
            >>> Projection("exact").fit(gallery).offsets(torch.tensor([[2.0, 0.5, 0.5], [3.0, 0.2, 0.8]])).tolist()
            [2.0, 3.0]
        """
        self.check_parameters()
        fit = self._fit("offsets")
        y = self._checked("queries", queries, len(fit.mean), model)
        return _offsets(y, fit)

    def about_mean(self) -> "Projection":
        """The same hull with `centred=True`, for codes of rows about their mean; itself by L2, or where it reduces.

        `agreement_` is that of the fit. On the whole hull ("exact") both keep every neighbour.

        Example:
            >>> gallery = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
            >>> projection = Projection("exact", "ip").fit(gallery).about_mean()
            >>> [round(v, 6) for v in projection.transform_queries(torch.tensor([[2.0, 0.9, 0.3]]))[0].tolist()]
            [0.0, 0.8, 0.2]
        """
        self.check_parameters()
        fit = self._fit("about_mean")
        if self.metric == "l2" or self.reduce or self.centred:
            return self
        other = Projection(**{**self.get_params(), "centred": True})
        other._found, other._asked = fit, self._asked
        return other

    def save(self, path: str | os.PathLike[str], *, made_from: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file; a file of that name is replaced only once the new one is complete.

        Args:
            made_from: what the file says of the embeddings that the projection was fitted to: plain data.
        """
        self.check_parameters()
        fit = self._fit("save")
        facts: dict[str, Any] = {
            "n_components": wanted_components(self.n_components),
            "metric": str(self.metric),
            "agreement": float(self.agreement),
            "reduce": bool(self.reduce),
            "model": None if self.model is None else str(self.model),
            "centred": bool(self.centred),
            "neighbours": int(self.neighbours),
            "offset_": fit.offset,
            "agreement_": fit.agreement,
        }
        saved.write(path, "Projection", facts, {"mean": fit.mean, "basis": fit.basis}, made_from)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Projection":
        """Reads what `save` wrote. It can be applied; what it was fitted to is not stored.

        Raises:
            ValueError: not a file of this format or of this version.
        """
        facts, tensors = saved.read(path, "Projection")
        with saved.blame(path):
            names = ("n_components", "metric", "agreement", "reduce", "model")
            parameters = {name: facts[name] for name in names} | {"centred": facts.get("centred", False)}
            parameters["neighbours"] = facts.get("neighbours", 1)
            projection = Projection(**parameters).check_parameters()
            mean, basis = (_check.finite(name, tensors[name]) for name in ("mean", "basis"))
            if basis.dim() != 2 or mean.shape != basis.shape[:1] or {mean.dtype, basis.dtype} != {torch.float64}:
                raise ValueError(f"basis: expected float64 (D, k), got {tuple(basis.shape)} of {basis.dtype}")
            if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-9):
                raise ValueError("basis: expected orthonormal columns")
            projection._found = Fit(mean, basis, float(facts["offset_"]), float(facts["agreement_"]))
        return projection


def _fit(
    gallery: Side,
    queries: Side,
    wanted: int | float | str,
    agreement: float,
    metric: str,
    centred: bool,
    neighbours: int,
) -> Fit:
    mean = gallery.moments.mean
    if not queries.moments.count:
        return Fit(mean, _basis(gallery, wanted, agreement, None), torch.nan, torch.nan)
    y = queries.sample.rows
    keeps = _keeper(gallery.sample.rows, y, metric, centred, neighbours)
    found = Fit(mean, _basis(gallery, wanted, agreement, keeps), 0.0, 0.0)
    return Fit(mean, found.basis, float(_offsets(y, found).mean()), keeps(found))


def _basis(gallery: Side, wanted: int | float | str, agreement: float, keeps: Callable[[Fit], float] | None) -> Tensor:
    """V."""
    if wanted == "exact":
        return gallery.hull()
    values, vectors = principal(gallery.moments.gram)
    rank = numerical_rank(values)
    if isinstance(wanted, str):
        assert keeps is not None
        mean = gallery.moments.mean
        k = fewest(lambda k: keeps(Fit(mean, vectors[:, :k], 0, 0)) >= agreement, rank)
    elif isinstance(wanted, float):
        k = min(rank, components_of_variance(values, wanted))
    else:
        k = min(rank, wanted)
    return gallery.hull() if k == rank else vectors[:, :k].contiguous()


def _keeper(gallery: Tensor, queries: Tensor, metric: str, centred: bool, neighbours: int) -> Callable[[Fit], float]:
    """The share of the queries' best rows of the gallery that are among the best after a projection."""
    by = "l2" if metric == "l2" else "ip"  # the rows of a cosine have unit length here
    mapped = "l2" if centred else metric
    count = min(neighbours, len(gallery))

    def first(y: Tensor) -> Tensor:
        return best(y, gallery, by)[:, None] if count == 1 else search(y, gallery, count, metric=by)[1]

    before = first(queries)

    def keeps(fit: Fit) -> float:
        if fit.basis.shape[1]:
            after = first(_mapped(queries, fit, mapped, False, torch.float64))
        elif mapped == "l2":
            after = first(fit.mean[None]).expand(len(queries), -1)
        else:
            after = torch.arange(count).expand(len(queries), -1)  # every score is 0
        return float(sum((after == column[:, None]).any(1).double().mean() for column in before.T) / count)

    return keeps


def _offsets(x: Tensor, fit: Fit) -> Tensor:
    """(n,) float64: distances to the hull."""
    parts = [rows.cpu().double() - _mapped(rows.cpu(), fit, "l2", False, torch.float64) for rows in batches(x.detach())]
    return torch.cat([part.norm(dim=1) for part in parts]) if parts else torch.empty(0, dtype=torch.float64)


def _mapped(x: Tensor, fit: Fit, metric: str, reduce: bool, dtype: torch.dtype) -> Tensor:
    """The rows of x on the hull, formed in float64."""
    basis, width = fit.basis, fit.basis.shape[1] if reduce else fit.basis.shape[0]
    mapped = torch.empty(len(x), width, dtype=dtype, device=x.device)
    done = 0
    for rows in batches(x):
        y = with_float64(rows).double()
        mean, v = fit.mean.to(y.device), basis.to(y.device)
        inside = (y - mean if metric == "l2" else y) @ v
        if not reduce:
            inside = mean + inside @ v.T if metric == "l2" else inside @ v.T
        mapped[done : done + len(rows)] = inside.to(dtype)
        done += len(rows)
    return mapped


def _like(given: _X, rows: Tensor) -> _X:
    return rows.numpy() if isinstance(given, np.ndarray) else rows

"""The mean shift of Chowers et al. (CVPR 2026), Section 4: closes the modality gap in place."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._compare import same_fields
from gapkern._rows import unit, with_float64
from gapkern._search import nearest
from gapkern.gap import saved
from gapkern.gap.moments import numerical_rank, principal
from gapkern.gap.twosided import Side, TwoSided, components_of_variance, fewest, wanted_components

__all__ = ["MeanShift"]

_X = TypeVar("_X", Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit found: g and g' (D,) in float64, the k in use, ||g'|| / ||g||, and the share of neighbours kept."""

    gap_vector: Tensor
    shift_vector: Tensor
    n_components: int
    orthogonality: float
    agreement: float

    __eq__ = same_fields

    @property
    def dims(self) -> int:
        return len(self.shift_vector)


class MeanShift(TwoSided[Fit]):
    """Closes the modality gap by moving one modality along the gap, outside the gallery's principal subspace (Eq. 11).

    g = mean(queries) - mean(gallery), V the gallery's first k principal directions, g' = g - V V^T g;
    `transform(gallery)` returns gallery + alpha g'. Where V spans the whole affine hull of the gallery no nearest
    neighbour changes (Theorem 3.5), while noise on the gallery changes fewer of them (Theorem 3.4).

    An estimator as scikit-learn has them: `get_params`, `set_params` and `sklearn.base.clone` work, and the parameters
    are checked by `fit`. It has nothing to do with scikit-learn's class of that name, which finds clusters.

    Args:
        alpha: 0 leaves the gap, 1 closes what lies outside V, more overshoots.
        n_components: k: an int; a fraction of the gallery's variance in (0, 1); "exact", its whole hull; or "auto", the
            largest closure for which at least `agreement` of the fitted queries keep their nearest neighbour.
        moves: "gallery", or "queries" to move the queries by -alpha g' instead: the same distances, no re-indexing.
        normalize: L2-normalise what was moved. Outside the theorem, so off by default.
        agreement: for n_components="auto".
        model: what made the embeddings, kept with the shift; `transform(..., model=)` then refuses another's.

    Attributes:
        gap_vector_ (D,): g.  shift_vector_ (D,): g'.  n_components_: the k in use.  n_features_in_: D.
        orthogonality_: ||g'|| / ||g||, the share of the gap that is closed at alpha = 1.
        agreement_: share of the fitted queries whose nearest neighbour is the same at alpha = 1. Beyond 16384 rows a
            side, it and "auto" go by that many drawn evenly from all.

    Raises:
        TypeError: in fitting, an argument of a wrong type.
        ValueError: in fitting, an argument out of range; embeddings of mismatched widths, or not finite.
        NotFittedError: a ValueError and an AttributeError, of what was used before it was fitted.

    Example:
        >>> gallery = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> queries = gallery + torch.tensor([2.0, 0.0, 0.0])
        >>> shift = MeanShift(n_components="exact").fit(gallery, queries)
        >>> [round(v, 6) for v in shift.transform(gallery)[0].tolist()]
        [2.0, 1.0, 0.0]
    """

    _noun = "shift"

    def __init__(
        self,
        alpha: float = 1.0,
        n_components: int | float | str = "auto",
        moves: str = "gallery",
        normalize: bool = False,
        agreement: float = 0.99,
        model: str | None = None,
    ) -> None:
        self.alpha = alpha
        self.n_components = n_components
        self.moves = moves
        self.normalize = normalize
        self.agreement = agreement
        self.model = model

    def check_parameters(self) -> "MeanShift":
        """Raises what `fit` would raise of the parameters. Returns self."""
        self._check_shared()
        _check.number("alpha", self.alpha)
        _check.choice("moves", self.moves, ("gallery", "queries"))
        if not isinstance(self.normalize, bool | np.bool_):
            raise TypeError(f"normalize: expected True or False, got {type(self.normalize).__name__}")
        return self

    @isolated
    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray) -> "MeanShift":
        """Learns g and g' from a gallery (G, D) and queries (Q, D). Returns self."""
        self.check_parameters()
        gallery, queries = _check.matrix("gallery", gallery, rows="G"), _check.matrix("queries", queries, rows="Q")
        _check.same_width(gallery=gallery, queries=queries)
        return self._learn(Side.none(gallery.shape[1]), Side.none(gallery.shape[1]), gallery, queries)

    def _work_out(self, gallery: Side, queries: Side, *asked: Any) -> Fit:
        return _fit(gallery, queries, *asked)

    @property
    def gap_vector_(self) -> Tensor:
        """(D,) float64: g."""
        return self._fit().gap_vector

    @property
    def shift_vector_(self) -> Tensor:
        """(D,) float64: g'."""
        return self._fit().shift_vector

    @property
    def orthogonality_(self) -> float:
        """||g'|| / ||g||."""
        return self._fit().orthogonality

    def _apply(self, name: str, x: _X, sign: float, model: str | None) -> _X:
        self.check_parameters()
        vector = self._fit("transform").shift_vector
        matrix = self._checked(name, x, len(vector), model)
        if self.moves != name or (self.alpha == 0 and not self.normalize):
            return x
        moved = _moved(matrix, sign * float(self.alpha) * vector, bool(self.normalize))
        return moved.numpy() if isinstance(x, np.ndarray) else moved

    def transform(self, gallery: _X, *, model: str | None = None) -> _X:
        """gallery + alpha g' (unchanged where moves="queries"); shape, dtype and kind of the input."""
        return self._apply("gallery", gallery, 1.0, model)

    def transform_queries(self, queries: _X, *, model: str | None = None) -> _X:
        """queries - alpha g' where moves="queries", otherwise unchanged."""
        return self._apply("queries", queries, -1.0, model)

    def at(self, alpha: float) -> "MeanShift":
        """The same fit with another alpha."""
        found = self._fit("at")
        other = MeanShift(**{**self.get_params(), "alpha": _check.number("alpha", alpha)})
        other._sides, other._found, other._asked = self._sides, found, self._asked
        return other

    def save(self, path: str | os.PathLike[str], *, made_from: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file; a file of that name is replaced only once the new one is complete.

        Args:
            made_from: what the file says of the embeddings that the shift was fitted to: plain data.
        """
        self.check_parameters()
        found = self._fit("save")
        facts: dict[str, Any] = {
            "alpha": float(self.alpha),
            "components": wanted_components(self.n_components),
            "moves": str(self.moves),
            "normalize": bool(self.normalize),
            "agreement": float(self.agreement),
            "model": None if self.model is None else str(self.model),
            "components_": found.n_components,
            "orthogonality_": found.orthogonality,
            "agreement_": found.agreement,
        }
        saved.write(
            path, "MeanShift", facts, {"gap_vector": found.gap_vector, "shift_vector": found.shift_vector}, made_from
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "MeanShift":
        """Reads what `save` wrote. The shift can be applied; what it was fitted to is not stored.

        Raises:
            ValueError: not a file of this format or of this version.
        """
        facts, tensors = saved.read(path, "MeanShift")
        with saved.blame(path):
            names = ("alpha", "components", "moves", "normalize", "agreement", "model")
            shift = MeanShift(*(facts[name] for name in names)).check_parameters()
            gap, vector = (_check.finite(name, tensors[name]) for name in ("gap_vector", "shift_vector"))
            if gap.dim() != 1 or gap.shape != vector.shape or {gap.dtype, vector.dtype} != {torch.float64}:
                raise ValueError(
                    f"shift_vector: expected two float64 vectors, got {tuple(gap.shape)} and "
                    f"{tuple(vector.shape)} of {vector.dtype}"
                )
            shares = (float(facts[name]) for name in ("orthogonality_", "agreement_"))
            shift._found = Fit(gap, vector, _check.integer("components_", facts["components_"], low=0), *shares)
        return shift


def _fit(gallery: Side, queries: Side, wanted: int | float | str, agreement: float) -> Fit:
    gap = queries.moments.mean - gallery.moments.mean
    k, vector = _choose(wanted, agreement, gap, gallery, queries)
    orthogonality = float(vector.norm() / gap.norm()) if gap.norm() > 0 else math.nan
    before = nearest(queries.sample.rows, gallery.sample.rows)
    after = nearest(queries.sample.rows, _moved(gallery.sample.rows, vector))
    return Fit(gap, vector, k, orthogonality, float((before == after).double().mean()))


def _choose(
    wanted: int | float | str, agreement: float, gap: Tensor, gallery: Side, queries: Side
) -> tuple[int, Tensor]:
    """k and g'."""
    if wanted == "exact":
        return _outside(gap, gallery.hull())
    values, vectors = principal(gallery.moments.gram)
    rank = numerical_rank(values)
    if isinstance(wanted, str):
        k = _largest_closure(gap, gallery.sample.rows, queries.sample.rows, vectors, rank, agreement)
    elif isinstance(wanted, float):
        k = min(rank, components_of_variance(values, wanted))
    else:
        k = min(rank, wanted)
    return _outside(gap, gallery.hull() if k == rank else vectors[:, :k])


def _largest_closure(
    gap: Tensor, gallery: Tensor, queries: Tensor, vectors: Tensor, rank: int, agreement: float
) -> int:
    """The smallest k whose shift keeps the nearest neighbours of at least `agreement` of the queries."""
    before = nearest(queries, gallery)

    def keeps(k: int) -> bool:
        after = nearest(queries, _moved(gallery, _outside(gap, vectors[:, :k])[1]))
        return float((before == after).double().mean()) >= agreement

    return fewest(keeps, rank)


def _outside(gap: Tensor, basis: Tensor) -> tuple[int, Tensor]:
    """The number of columns of `basis`, and the part of the gap outside its span."""
    outside = gap - basis @ (basis.T @ gap)
    # Once more: what rounding left inside would move neighbours.
    return basis.shape[1], outside - basis @ (basis.T @ outside)


def _moved(x: Tensor, shift: Tensor, normalize: bool = False) -> Tensor:
    rows = with_float64(x)
    moved: Tensor = torch.ops.gapkern.meanshift_apply(rows, shift.to(rows.device), normalize)
    if normalize and len(rows):
        # The operator takes lengths below 1e-12 for it, as PyTorch does, and squares leave float64 beyond 1e154.
        odd = (moved.detach().double().norm(dim=1) - 1).abs() > 0.1
        if bool(odd.any()):
            exact = unit(rows.double() + shift.to(rows.device)).to(moved.dtype)
            moved = torch.where(odd[:, None], exact, moved)
    return moved.to(x.device)

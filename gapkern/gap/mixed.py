"""One gallery of several modalities: the gap of each to the queries closed on its own.

A query prefers the rows of its own modality, and fused rows lie between: what is nearest says which modality a row is
of before it says what it shows. `means` is GR-CLIP (Li et al., arXiv 2507.19054): N(N(x) - mean of its modality),
N(N(y) - mean of the queries), N scaling to unit length; a fused document w N(text) + (1 - w) N(image) loses the same
combination of the two means. `shift` moves every modality by its own mean shift (Chowers et al., CVPR 2026, Eq. 11):
within a modality no neighbour changes, while all modalities come as near to the queries as that allows.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable, unit
from gapkern.gap import saved
from gapkern.gap.estimator import Estimator, NotFittedError
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.moments import batches
from gapkern.gap.twosided import Side, wanted_components

__all__ = ["FUSED", "MixedShift", "fuse", "modalities"]

FUSED = "fused"
METHODS = ("means", "shift")


def modalities(name: str, value: Any, rows: int) -> np.ndarray:
    """The modality of each row (G,), as an array of str.

    Raises:
        TypeError: not names.
        ValueError: not one for each row.

    Example:
        >>> modalities("modality", ["text", "image"], 2).tolist()
        ['text', 'image']
    """
    if isinstance(value, str):
        value = [value] * rows
    if not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{name}: expected a name for each row, got {type(value).__name__}")
    found = np.asarray(value)
    if found.size and found.dtype.kind != "U":
        raise TypeError(f"{name}: expected names, got {found.dtype}")
    if found.shape != (rows,):
        raise ValueError(f"{name}: expected {rows} names, one for each row, got shape {found.shape}")
    return found


@isolated
def fuse(texts: Tensor | np.ndarray, images: Tensor | np.ndarray, weight: float = 0.5) -> Any:
    """Fused documents (N, D): weight N(text) + (1 - weight) N(image), as published before means are taken off.

    Args:
        texts, images: (N, D), row by row of one document.
        weight: of the text, in [0, 1].

    Returns:
        In the dtype and kind of `texts`; not of unit length.

    Raises:
        TypeError, ValueError: not matrices of one shape, not finite, a weight out of range.

    Example:
        >>> fuse(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])).tolist()
        [[0.5, 0.5]]
    """
    sides = {"texts": _check.matrix("texts", texts), "images": _check.matrix("images", images)}
    _check.same_width(**sides)
    _check.same_rows(**sides)
    weight = _check.number("weight", weight, low=0, high=1)
    t, i = (unit(_check.finite(name, x).double()) for name, x in sides.items())
    both = (weight * t + (1 - weight) * i).to(sides["texts"].dtype)
    return both.numpy() if isinstance(texts, np.ndarray) else both


class MixedShift(Estimator):
    """Closes the gap of every modality of a mixed gallery to the queries.

    Args:
        method: "means", N(N(x) - mu_m) for rows of modality m and N(N(y) - mu_q) for queries: GR-CLIP, to be searched
            by cosine or L2. "shift", x + g'_m, the mean shift of each modality by itself, queries as they are: for L2.
        weight: of the texts in fused documents, which `fuse` makes: rows of modality "fused" get weight mu_text +
            (1 - weight) mu_image, or the same of the shifts.
        n_components: of "shift", as for `MeanShift`.
        model: what made the embeddings; `transform(..., model=)` then refuses another's.

    Attributes:
        modalities_: names, sorted.  means_: {name: (D,) float64}, mean of the modality's rows, of unit length for
            "means".  query_mean_ (D,).  shifts_: {name: (D,) float64}, what is added to rows before they are scaled.
        n_features_in_: D.

    Raises:
        TypeError, ValueError: in fitting, a parameter or rows that are not as said.
        NotFittedError: what was used before it was fitted.

    Example:
        >>> gallery = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> shift = MixedShift().fit(gallery, gallery[:2], ["image", "image", "text", "text"])
        >>> moved = shift.transform(gallery, ["image", "image", "text", "text"])
        >>> [[round(v, 6) + 0.0 for v in row] for row in moved.tolist()]
        [[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]]
    """

    def __init__(
        self,
        method: str = "means",
        weight: float = 0.5,
        n_components: int | float | str = "exact",
        model: str | None = None,
    ) -> None:
        self.method = method
        self.weight = weight
        self.n_components = n_components
        self.model = model

    _rows: dict[str, Side] | None = None
    _asking: Side | None = None
    _found: tuple[dict[str, Tensor], dict[str, Tensor], Tensor] | None = None  # means, shifts, the queries' mean

    def check_parameters(self) -> "MixedShift":
        """Raises what `fit` would raise of the parameters. Returns self."""
        _check.choice("method", self.method, METHODS)
        _check.number("weight", self.weight, low=0, high=1)
        wanted_components(self.n_components)
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model: expected a name or None, got {type(self.model).__name__}")
        return self

    @isolated
    def fit(self, gallery: Any, queries: Any, modality: Any) -> "MixedShift":
        """Learns from a gallery (G, D), queries (Q, D) and the modality of each gallery row, a name. Returns self.

        Fused rows teach nothing: theirs follows from the means of "text" and "image". Calibration rows other than those
        that are searched will do, as published.
        """
        self._rows = self._asking = self._found = None
        return self.partial_fit(gallery, queries, modality)

    @isolated
    def partial_fit(self, gallery: Any = None, queries: Any = None, modality: Any = None) -> "MixedShift":
        """Learns from a batch of either side on top of what was seen before. Returns self."""
        self.check_parameters()
        given = {"gallery": gallery, "queries": queries}
        sides = {name: _check.matrix(name, x, empty=True).detach() for name, x in given.items() if x is not None}
        if not sides:
            return self
        if self._asking is None and self._found is not None:
            raise ValueError("MixedShift: a loaded one can be applied but not added to; fit one anew")
        dims = self._asking.dims if self._asking is not None else next(iter(sides.values())).shape[1]
        for name, x in sides.items():
            if x.shape[1] != dims:
                raise ValueError(f"{name}: expected D = {dims}, got shape {tuple(x.shape)}")
        rows, asking = dict(self._rows or {}), self._asking or Side.none(dims)
        if "gallery" in sides:
            names = modalities("modality", modality, len(sides["gallery"]))
            for name in np.unique(names).tolist():
                if name != FUSED:
                    chosen = sides["gallery"][torch.from_numpy(names == name)]
                    seen = rows.get(name, Side.none(dims))
                    rows[name] = seen.with_rows("gallery", self._prepared("gallery", chosen))
        if "queries" in sides:
            asking = asking.with_rows("queries", self._prepared("queries", sides["queries"]))
        self._rows, self._asking, self._found = rows, asking, None
        return self

    def _prepared(self, name: str, x: Tensor) -> Tensor:
        x = squarable(name, _check.finite(name, x))
        return unit(x.to(torch.promote_types(x.dtype, torch.float32))) if self.method == "means" else x

    @isolated
    def merge(self, other: "MixedShift") -> "MixedShift":
        """Adds what another of the same method, fitted elsewhere on other rows, has seen. Returns self."""
        if not isinstance(other, MixedShift):
            raise TypeError(f"other: expected a MixedShift, got {type(other).__name__}")
        if None in (self._asking, other._asking) or self._rows is None or other._rows is None:
            raise NotFittedError("MixedShift: nothing was seen here; call fit")
        assert self._asking is not None
        assert other._asking is not None
        if other.method != self.method or other._asking.dims != self._asking.dims:
            raise ValueError(
                f"other: expected method={self.method!r} and D = {self._asking.dims}, got {other.method!r} and "
                f"{other._asking.dims}"
            )
        rows = dict(self._rows)
        for name, side in other._rows.items():
            rows[name] = rows[name].with_side(side) if name in rows else side
        self._rows, self._asking, self._found = rows, self._asking.with_side(other._asking), None
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether queries and gallery rows were seen, or a fit was loaded."""
        return self._found is not None or (
            bool(self._rows) and self._asking is not None and self._asking.moments.count > 0
        )

    def __sklearn_is_fitted__(self) -> bool:
        return self.is_fitted

    def _fit(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        if self._found is None:
            if not self.is_fitted:
                raise NotFittedError("MixedShift: call fit before use, with rows of both sides")
            assert self._rows is not None
            assert self._asking is not None
            self._found = isolated(self._work_out)(self._rows, self._asking)
        return self._found

    def _work_out(self, rows: dict[str, Side], asking: Side) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        means = {name: side.moments.mean for name, side in sorted(rows.items())}
        if self.method == "means":
            return means, {name: -mean for name, mean in means.items()}, asking.moments.mean
        shifts = {
            name: MeanShift(n_components=self.n_components)._take(side, asking).shift_vector_
            for name, side in sorted(rows.items())
        }
        return means, shifts, asking.moments.mean

    @property
    def modalities_(self) -> list[str]:
        """Names, sorted."""
        return list(self._fit()[0])

    @property
    def means_(self) -> dict[str, Tensor]:
        """{name: (D,) float64}."""
        return dict(self._fit()[0])

    @property
    def shifts_(self) -> dict[str, Tensor]:
        """{name: (D,) float64}: what is added to the rows of a modality."""
        return dict(self._fit()[1])

    @property
    def query_mean_(self) -> Tensor:
        """(D,) float64."""
        return self._fit()[2]

    @property
    def n_features_in_(self) -> int:
        """D."""
        return len(self._fit()[2])

    def _added(self, name: str) -> Tensor:
        shifts = self._fit()[1]
        if name == FUSED and FUSED not in shifts:
            missing = [part for part in ("text", "image") if part not in shifts]
            if missing:
                raise ValueError(f"modality: expected 'text' and 'image' in the fit for 'fused', got no {missing[0]!r}")
            return float(self.weight) * shifts["text"] + (1 - float(self.weight)) * shifts["image"]
        if name not in shifts:
            raise ValueError(f"modality: expected one of {', '.join([*shifts, FUSED])}, got {name!r}")
        return shifts[name]

    def _checked(self, name: str, x: Any, model: str | None) -> Tensor:
        self.check_parameters()
        if None not in (model, self.model) and model != self.model:
            raise ValueError(f"model: expected embeddings of {self.model}, as fitted, got {model}")
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != self.n_features_in_:
            raise ValueError(f"{name}: expected D = {self.n_features_in_} as fitted, got shape {tuple(matrix.shape)}")
        return matrix

    def _moved(self, x: Tensor, added: Tensor, scaled: bool) -> Tensor:
        """The rows plus `added`, formed in float64; for "means" between two scalings, the first one where `scaled`."""
        moved = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        done = 0
        for rows in batches(x):
            y = rows.detach().cpu().double()
            y = (unit(y) if scaled else y) + added
            moved[done : done + len(rows)] = unit(y) if self.method == "means" else y
            done += len(rows)
        return moved

    @isolated
    def transform(self, gallery: Any, modality: Any, *, model: str | None = None) -> Any:
        """The rows (G, D), each by its modality: one name for all, or one each; shape, dtype and kind of the input."""
        matrix = self._checked("gallery", gallery, model)
        names = modalities("modality", modality, len(matrix))
        added = {name: self._added(name) for name in np.unique(names).tolist()}
        moved = torch.empty_like(matrix)
        for name, vector in added.items():
            chosen = torch.from_numpy(names == name).to(matrix.device)
            # Fused rows are as `fuse` made them: no unit vectors.
            moved[chosen] = self._moved(matrix[chosen], vector, self.method == "means" and name != FUSED)
        return moved.numpy() if isinstance(gallery, np.ndarray) else moved

    @isolated
    def transform_queries(self, queries: Any, *, model: str | None = None) -> Any:
        """N(N(y) - mu_q) for "means"; for "shift" the queries as they are."""
        matrix = self._checked("queries", queries, model)
        if self.method == "shift":
            return queries
        moved = self._moved(matrix, -self.query_mean_, True)
        return moved.numpy() if isinstance(queries, np.ndarray) else moved

    def save(self, path: str | os.PathLike[str], *, made_from: Mapping[str, Any] | None = None) -> None:
        """Writes a safetensors file; a file of that name is replaced only once the new one is complete.

        Args:
            made_from: what the file says of the embeddings that this was fitted to: plain data.
        """
        self.check_parameters()
        means, shifts, asking = self._fit()
        facts: dict[str, Any] = {
            "method": str(self.method),
            "weight": float(self.weight),
            "n_components": wanted_components(self.n_components),
            "model": None if self.model is None else str(self.model),
            "modalities": list(means),
        }
        tensors = {f"mean.{name}": t for name, t in means.items()} | {f"shift.{name}": t for name, t in shifts.items()}
        saved.write(path, "MixedShift", facts, {"query_mean": asking, **tensors}, made_from)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "MixedShift":
        """Reads what `save` wrote. It can be applied; what it was fitted to is not stored.

        Raises:
            ValueError: not a file of this format or of this version.
        """
        facts, tensors = saved.read(path, "MixedShift")
        with saved.blame(path):
            names = ("method", "weight", "n_components", "model")
            shift = MixedShift(*(facts[name] for name in names)).check_parameters()
            asking = tensors["query_mean"]
            parts = [{name: tensors[f"{kind}.{name}"] for name in facts["modalities"]} for kind in ("mean", "shift")]
            for vector in (asking, *parts[0].values(), *parts[1].values()):
                _check.finite("means", vector)
                if vector.shape != asking.shape or vector.dim() != 1 or vector.dtype != torch.float64:
                    raise ValueError(f"means: expected float64 vectors of one width, got {tuple(vector.shape)}")
            shift._found = parts[0], parts[1], asking
        return shift

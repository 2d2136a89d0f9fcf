"""The mean shift of Chowers et al. (CVPR 2026), Section 4: closes the modality gap in place."""

import ast
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _formats, files
from gapkern._nearest import nearest
from gapkern.gap.moments import Moments, Sample, batches, hull, numerical_rank, principal

FORMAT_VERSION = 1
SAMPLE = 2**14  # rows of each side by which neighbours are judged


class MeanShift:
    """Closes the modality gap by moving one modality along the gap, outside the gallery's principal subspace (Eq. 11).

    g = mean(queries) - mean(gallery), V the gallery's first k principal directions, g' = g - V V^T g;
    `transform(gallery)` returns gallery + alpha g'. Where V spans the whole affine hull of the gallery no nearest
    neighbour changes (Theorem 3.5), while noise on the gallery changes fewer of them (Theorem 3.4).

    Args:
        alpha: 0 leaves the gap, 1 closes what lies outside V, more overshoots.
        components: k: an int; a fraction of the gallery's variance in (0, 1); "exact", its whole hull; or "auto", the
            largest closure for which at least `agreement` of the fitted queries keep their nearest neighbour.
        moves: "gallery", or "queries" to move the queries by -alpha g' instead: the same distances, no re-indexing.
        normalize: L2-normalise what was moved. Outside the theorem, so off by default.
        agreement: for components="auto".
        model: what made the embeddings, kept with the shift; `transform(..., model=)` then refuses another's.

    Attributes:
        gap_vector_ (D,): g.  shift_vector_ (D,): g'.  components_: the k in use.
        orthogonality_: ||g'|| / ||g||, the share of the gap that is closed at alpha = 1.
        agreement_: share of the fitted queries whose nearest neighbour is the same at alpha = 1. Beyond 16384 rows a
            side, it and "auto" go by that many drawn evenly from all.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of range; embeddings of mismatched widths, or not finite.

    Example:
        >>> gallery = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> queries = gallery + torch.tensor([2.0, 0.0, 0.0])
        >>> shift = MeanShift(components="exact").fit(gallery, queries)
        >>> [round(v, 6) for v in shift.transform(gallery)[0].tolist()]
        [2.0, 1.0, 0.0]
    """

    gap_vector_: Tensor
    shift_vector_: Tensor
    components_: int
    orthogonality_: float
    agreement_: float

    def __init__(
        self,
        alpha: float = 1.0,
        components: int | float | str = "auto",
        moves: str = "gallery",
        normalize: bool = False,
        agreement: float = 0.99,
        model: str | None = None,
    ):
        self.alpha = _check.number("alpha", alpha)
        if isinstance(components, str):
            _check.choice("components", components, ("auto", "exact"))
        elif isinstance(components, float):
            _check.number("components", components, low=0, high=1, exclusive=True)
        else:
            _check.integer("components", components, low=0)
        self.components = components
        self.moves = _check.choice("moves", moves, ("gallery", "queries"))
        self.normalize = bool(normalize)
        self.agreement = _check.number("agreement", agreement, low=0, high=1)
        self.model = model

    def __repr__(self) -> str:
        return (
            f"MeanShift(alpha={self.alpha:g}, components={self.components!r}, moves={self.moves!r}, "
            f"normalize={self.normalize}, agreement={self.agreement:g})"
        )

    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray) -> "MeanShift":
        """Learns g and g' from a gallery (G, D) and queries (Q, D). Returns self."""
        gallery, queries = _check.matrix("gallery", gallery, rows="G"), _check.matrix("queries", queries, rows="Q")
        _check.same_width(gallery=gallery, queries=queries)
        self._sides = _Side(gallery.shape[1]), _Side(gallery.shape[1])
        return self.partial_fit(gallery, queries)

    def partial_fit(
        self, gallery: Tensor | np.ndarray | None = None, queries: Tensor | np.ndarray | None = None
    ) -> "MeanShift":
        """Learns from a batch of either side, or of both, on top of what was seen before. Returns self.

        Example:
            >>> gallery, queries = torch.eye(4, 6), torch.eye(4, 6) + 1
            >>> whole = MeanShift(components=2).fit(gallery, queries)
            >>> parts = MeanShift(components=2).partial_fit(gallery[:1]).partial_fit(gallery[1:], queries)
            >>> torch.allclose(whole.shift_vector_, parts.shift_vector_)
            True
        """
        for name, batch in (("gallery", gallery), ("queries", queries)):
            if batch is None:
                continue
            batch = _check.matrix(name, batch, empty=True).detach()
            if not hasattr(self, "_sides"):
                self._sides = _Side(batch.shape[1]), _Side(batch.shape[1])
            side = self._sides[name == "queries"]
            if batch.shape[1] != len(side.moments.mean):
                raise ValueError(f"{name}: expected D = {len(side.moments.mean)} as before, got {tuple(batch.shape)}")
            side.update(name, batch)
        self._forget()
        return self

    def merge(self, other: "MeanShift") -> "MeanShift":
        """Adds what another shift, fitted elsewhere on other rows, has seen. Returns self."""
        for mine, theirs in zip(self._seen(), other._seen(), strict=True):
            if len(mine.moments.mean) != len(theirs.moments.mean):
                raise ValueError(
                    f"other: expected D = {len(mine.moments.mean)}, got a shift of D = {len(theirs.moments.mean)}"
                )
            mine.merge(theirs)
        self._forget()
        return self

    def all_reduce(self, group: Any = None) -> "MeanShift":
        """Adds what every rank of a torch.distributed group has seen; the same result on every rank. Returns self."""
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, self._seen(), group=group)
        first, *rest = everyone
        for sides in rest:
            for mine, theirs in zip(first, sides, strict=True):
                mine.merge(theirs)
        self._sides = first
        self._forget()
        return self

    def _seen(self) -> "tuple[_Side, _Side]":
        if not hasattr(self, "_sides"):
            raise ValueError("MeanShift: nothing was seen here; a loaded shift can be applied but not added to")
        return self._sides

    def _forget(self) -> None:
        for name in MeanShift.__annotations__:
            vars(self).pop(name, None)

    def __getattr__(self, name: str) -> Any:
        """Attributes are worked out when they are first asked for, from all that was seen."""
        if name in MeanShift.__annotations__ and "_sides" in vars(self):
            gallery, queries = self._sides
            if not gallery.moments.count or not queries.moments.count:
                raise ValueError("MeanShift: expected rows of both sides before use, got none of one")
            self._finish(gallery, queries)
            return vars(self)[name]
        raise AttributeError(f"MeanShift has no attribute {name!r}; fitted ones are there after fit")

    def _finish(self, gallery: "_Side", queries: "_Side") -> None:
        gap = self.gap_vector_ = queries.moments.mean - gallery.moments.mean
        self.components_, self.shift_vector_ = self._choose(gap, gallery, queries)
        self.orthogonality_ = float(self.shift_vector_.norm() / gap.norm()) if gap.norm() > 0 else math.nan
        before = nearest(queries.sample.rows, gallery.sample.rows)
        after = nearest(queries.sample.rows, _moved(gallery.sample.rows, self.shift_vector_))
        self.agreement_ = float((before == after).double().mean())

    def _choose(self, gap: Tensor, gallery: "_Side", queries: "_Side") -> tuple[int, Tensor]:
        """k and g'."""
        if self.components == "exact":
            return _outside(gap, gallery.hull())
        values, vectors = principal(gallery.moments.gram)
        rank = numerical_rank(values)
        if self.components == "auto":
            k = self._largest_closure(gap, gallery.sample.rows, queries.sample.rows, vectors, rank)
        elif isinstance(self.components, float):
            share = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
            k = min(rank, int((share < self.components).sum()) + 1)
        else:
            k = min(rank, int(self.components))
        return _outside(gap, gallery.hull() if k == rank else vectors[:, :k])

    def _largest_closure(self, gap: Tensor, gallery: Tensor, queries: Tensor, vectors: Tensor, rank: int) -> int:
        """The smallest k whose shift keeps the nearest neighbours of at least `agreement` of the queries."""
        before = nearest(queries, gallery)

        def keeps(k: int) -> bool:
            after = nearest(queries, _moved(gallery, _outside(gap, vectors[:, :k])[1]))
            return float((before == after).double().mean()) >= self.agreement

        low, high = 0, rank
        if keeps(0):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high

    def _fitted(self) -> bool:
        return "_sides" in vars(self) or "shift_vector_" in vars(self)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Up to 16384 gallery rows and query rows, drawn evenly from all that were seen."""
        gallery, queries = self._seen()
        return gallery.sample.rows, queries.sample.rows

    def _apply(self, name: str, x: Any, alpha: float, model: str | None) -> Any:
        if not self._fitted():
            raise ValueError("MeanShift: call fit before transform")
        if None not in (model, self.model) and model != self.model:
            raise ValueError(f"model: expected embeddings of {self.model}, as fitted, got {model}")
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != len(self.shift_vector_):
            raise ValueError(
                f"{name}: expected D = {len(self.shift_vector_)} as fitted, got shape {tuple(matrix.shape)}"
            )
        if self.moves != name or (alpha == 0 and not self.normalize):
            return x
        moved = _moved(matrix, alpha * self.shift_vector_, self.normalize)
        return moved.numpy() if isinstance(x, np.ndarray) else moved

    def transform(self, gallery: Any, *, model: str | None = None) -> Any:
        """gallery + alpha g' (unchanged where moves="queries"); shape, dtype and kind of the input."""
        return self._apply("gallery", gallery, self.alpha, model)

    def transform_queries(self, queries: Any, *, model: str | None = None) -> Any:
        """queries - alpha g' where moves="queries", otherwise unchanged."""
        return self._apply("queries", queries, -self.alpha, model)

    def at(self, alpha: float) -> "MeanShift":
        """The same fit with another alpha."""
        self.shift_vector_  # noqa: B018 - worked out once for all
        other = MeanShift(alpha, self.components, self.moves, self.normalize, self.agreement, self.model)
        for name in MeanShift.__annotations__:
            setattr(other, name, getattr(self, name))
        return other

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; a file of that name is replaced only once the new one is complete."""
        from safetensors.torch import save_file

        if not self._fitted():
            raise ValueError("MeanShift: call fit before save")
        metadata = {
            "format": "gapkern.MeanShift",
            "version": str(FORMAT_VERSION),
            "alpha": repr(self.alpha),
            "components": repr(self.components),
            "moves": self.moves,
            "normalize": repr(self.normalize),
            "agreement": repr(self.agreement),
            "model": repr(self.model),
            "components_": repr(self.components_),
            "orthogonality_": repr(self.orthogonality_),
            "agreement_": repr(self.agreement_),
        }
        tensors = {"gap_vector": self.gap_vector_.contiguous(), "shift_vector": self.shift_vector_.contiguous()}
        files.write(path, lambda temporary: save_file(tensors, temporary, metadata))

    @staticmethod
    def load(path: str | os.PathLike) -> "MeanShift":
        """Reads what `save` wrote.

        Raises:
            ValueError: not a file of this format or of this version.
        """
        from safetensors import SafetensorError, safe_open

        _formats.opened(Path(path), "path")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, *_formats.UNREADABLE) as error:
            raise ValueError(f"path: expected a safetensors file, got {path} ({_formats.reason(error)})") from None
        if metadata.get("format") != "gapkern.MeanShift" or metadata.get("version") != str(FORMAT_VERSION):
            raise ValueError(
                f"path: expected a gapkern.MeanShift file of version {FORMAT_VERSION}, got {path} with "
                f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            )
        try:
            return MeanShift._restored(metadata, tensors)
        except _formats.UNREADABLE as error:
            raise ValueError(
                f"path: expected the fields of a gapkern.MeanShift in {path}, got {type(error).__name__}: "
                f"{_formats.reason(error)}"
            ) from None

    @staticmethod
    def _restored(metadata: dict[str, str], tensors: dict[str, Tensor]) -> "MeanShift":
        def value(name: str) -> Any:
            return ast.literal_eval(metadata[name])

        shift = MeanShift(
            value("alpha"), value("components"), metadata["moves"], value("normalize"), value("agreement"),
            value("model"),
        )  # fmt: skip
        if not isinstance(shift.model, str | None):
            raise ValueError(f"model: expected a name, got {shift.model!r}")
        for name in ("gap_vector", "shift_vector"):
            vector = _check.finite(name, _check.tensor(name, tensors[name]))
            if vector.dim() != 1 or vector.shape != tensors["gap_vector"].shape or not len(vector):
                raise ValueError(f"{name}: expected shape (D,), got {tuple(vector.shape)}")
            setattr(shift, f"{name}_", vector)
        shift.components_ = _check.integer("components_", value("components_"), low=0)
        shift.agreement_ = value("agreement_")
        shift.orthogonality_ = float(metadata["orthogonality_"])
        return shift


class _Side:
    """What was seen of one modality: its moments, and some of its rows."""

    def __init__(self, dims: int):
        self.moments, self.sample = Moments.none(dims), Sample(dims, SAMPLE)

    def update(self, name: str, x: Tensor) -> None:
        first = 0
        for rows in batches(x):
            self.moments.update(_check.finite(name, rows, first))
            self.sample.update(rows)
            first += len(rows)

    def merge(self, other: "_Side") -> None:
        self.moments.merge(other.moments)
        self.sample.merge(other.sample)

    def hull(self) -> Tensor:
        return hull(self.moments, self.sample.rows)


def _outside(gap: Tensor, basis: Tensor) -> tuple[int, Tensor]:
    """The number of columns of `basis`, and the part of the gap outside its span."""
    outside = gap - basis @ (basis.T @ gap)
    # Once more: what rounding left inside would move neighbours.
    return basis.shape[1], outside - basis @ (basis.T @ outside)


def _moved(x: Tensor, shift: Tensor, normalize: bool = False) -> Tensor:
    return torch.ops.gapkern.meanshift_apply(x, shift.to(x.device), normalize)

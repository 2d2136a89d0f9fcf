"""The modality gap: measured, and closed by the mean shift of Chowers et al. (CVPR 2026), Section 4."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, files
from gapkern._nearest import nearest
from gapkern.ops import meanshift as _ops  # noqa: F401 - registers the operators

FORMAT_VERSION = 1
_ROWS = 8192


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=1)


def _chunks(x: Tensor):
    return (x[i : i + _ROWS] for i in range(0, x.shape[0], _ROWS))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and centred Gram matrix sum_i (x_i - mu)(x_i - mu)^T (D, D) of the rows of x (N, D), in float64.

    Example:
        >>> mean, gram = moments(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        >>> mean.tolist(), gram.tolist()
        ([1.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    mean = torch.ops.gapkern.meanshift_sum(x) / len(x)
    return mean, torch.ops.gapkern.meanshift_gram(x, mean)


def _off_diagonal_cosine(unit: Tensor) -> float:
    n = len(unit)
    if n < 2:
        return math.nan
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def _uniformity(unit: Tensor) -> float:
    """log E exp(-2 ||u - v||^2) over distinct pairs, in tiles."""
    n = len(unit)
    if n < 2:
        return math.nan
    total = sum(float(torch.exp(4 * (a @ b.T) - 4).sum()) for a in _chunks(unit) for b in _chunks(unit))
    return math.log((total - float(torch.exp(4 * unit.square().sum(1) - 4).sum())) / (n * (n - 1)))


def _effective_rank(gram: Tensor) -> float:
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _frechet(gap: Tensor, a: Tensor, b: Tensor) -> float:
    root = _square_root(a)
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return float(gap.square().sum() + a.trace() + b.trace() - 2 * cross)


def _variance_along(direction: Tensor, gram: Tensor) -> float:
    norm = direction.norm()
    total = gram.trace()
    if not norm > 0 or not total > 0:
        return math.nan
    unit = direction / norm
    return float(unit @ gram @ unit / total)


def _linear_separability(images: Tensor, texts: Tensor) -> float:
    """Held-out accuracy of a ridge classifier between the modalities: fitted on even rows, judged on odd ones."""
    if len(images) < 4 or len(texts) < 4:
        return math.nan
    fit = torch.cat([images[::2], texts[::2]]).double()
    sign = torch.cat([torch.ones(len(images[::2])), -torch.ones(len(texts[::2]))]).double()
    mean, gram = moments(fit)
    ridge = 1e-3 * gram.trace() / len(gram) + torch.finfo(torch.float64).tiny
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), (fit - mean).T @ sign)
    threshold = (fit[sign > 0].mean(0) + fit[sign < 0].mean(0)) / 2 @ weights
    right = (images[1::2].double() @ weights > threshold).sum() + (texts[1::2].double() @ weights <= threshold).sum()
    return float(right) / (len(images[1::2]) + len(texts[1::2]))


def _doubly_stochastic_residual(images: Tensor, texts: Tensor, logit_scale: float) -> float:
    """max |sum_k Qx(k, i) - 1| over texts i: how far the row softmax is from doubly stochastic."""
    scale = torch.tensor(logit_scale, dtype=torch.float64)
    sums = torch.zeros(len(texts), dtype=torch.float64)
    for rows in _chunks(images):
        sums += torch.softmax(scale * (rows @ texts.T), dim=1).sum(0)
    return float((sums * len(texts) / len(images) - 1).abs().max())


def gap_metrics(
    images: Tensor | np.ndarray, texts: Tensor | np.ndarray, *, logit_scale: float = 100.0
) -> dict[str, float]:
    """How large the modality gap is and what shape it has; all in float64, none with N x N memory.

    Args:
        images: (N, D), row i paired with row i of `texts`.
        texts: (N, D).
        logit_scale: of the softmax in `doubly_stochastic_residual`.

    Returns:
        As stored: `centroid_distance` ||mu_x - mu_t||, `mean_pair_distance` E||x_i - t_i||, `frechet` distance of the
        two Gaussians, `effective_rank_*` exp(entropy of the normalised singular values) of each centred modality,
        `orthogonality` ||g'|| / ||g|| with g' the gap outside the texts' affine hull, `variance_along_gap_*` the share
        of each modality's variance along g, `linear_separability` held-out accuracy of a linear probe.
        On L2-normalised rows: `cos_paired`, `cos_unpaired`, `cos_within_images`, `cos_within_texts` mean cosines, `rmg`
        the relative modality gap d_pair / (d_pair + (d_images + d_texts) / 2) with d = (1 - cos) / 2, `alignment`
        E||x_i - t_i||^2, `uniformity_*` log E exp(-2 ||u - v||^2), `doubly_stochastic_residual` max |S_i - 1|.

    Raises:
        TypeError: not floating-point tensors or arrays.
        ValueError: not (N, D) and (N, D), or not finite.

    Example:
        >>> images = torch.eye(8) + torch.tensor([1.0] + [0.0] * 7)
        >>> texts = torch.eye(8) - torch.tensor([1.0] + [0.0] * 7)
        >>> round(gap_metrics(images, texts)["centroid_distance"], 6)
        2.0
    """
    images, texts = _check.matrix("images", images), _check.matrix("texts", texts)
    _check.same_width(images=images, texts=texts)
    _check.same_rows(images=images, texts=texts)
    images, texts = _check.finite("images", images).detach().cpu(), _check.finite("texts", texts).detach().cpu()
    n = len(images)
    mean_x, gram_x = moments(images)
    mean_t, gram_t = moments(texts)
    gap = mean_t - mean_x
    x, t = _unit(images), _unit(texts)
    paired = float((x * t).sum(1).mean())
    within_x, within_t = _off_diagonal_cosine(x), _off_diagonal_cosine(t)
    unpaired = float((x.sum(0) @ t.sum(0) - (x * t).sum()) / (n * (n - 1))) if n > 1 else math.nan
    distance = [(1 - c) / 2 for c in (paired, within_x, within_t)]
    basis = hull(texts, gram_t)
    outside = gap - basis @ (basis.T @ gap)
    norm = float(gap.norm())
    return {
        "centroid_distance": norm,
        "mean_pair_distance": float((images.double() - texts.double()).norm(dim=1).mean()),
        "rmg": distance[0] / (distance[0] + (distance[1] + distance[2]) / 2) if n > 1 else math.nan,
        "cos_paired": paired,
        "cos_unpaired": unpaired,
        "cos_within_images": within_x,
        "cos_within_texts": within_t,
        "alignment": float((x - t).square().sum(1).mean()),
        "uniformity_images": _uniformity(x),
        "uniformity_texts": _uniformity(t),
        "frechet": _frechet(gap, gram_x / max(n - 1, 1), gram_t / max(n - 1, 1)),
        "effective_rank_images": _effective_rank(gram_x) if n > 1 else math.nan,
        "effective_rank_texts": _effective_rank(gram_t) if n > 1 else math.nan,
        "orthogonality": float(outside.norm()) / norm if norm > 0 else math.nan,
        "variance_along_gap_images": _variance_along(gap, gram_x),
        "variance_along_gap_texts": _variance_along(gap, gram_t),
        "linear_separability": _linear_separability(images, texts),
        "doubly_stochastic_residual": _doubly_stochastic_residual(x, t, logit_scale),
    }


def hull(x: Tensor, gram: Tensor) -> Tensor:
    """Orthonormal basis (D, rank) of the directions in which the rows of x differ, in float64.

    Few rows: singular vectors of the centred rows, which resolve directions of relative size 1e-12; many rows: their
    Gram matrix, which resolves 1e-7, finer than float32 data can say.
    """
    if len(x) <= x.shape[1]:
        centred = x.double() - x.double().mean(0)
        _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
        rank = int((singular > singular[0] * 1e-12 * max(x.shape)).sum()) if len(singular) else 0
        return vectors[:rank].T
    values, vectors = principal(gram)
    return vectors[:, : numerical_rank(values)]


def principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def numerical_rank(values: Tensor) -> int:
    return int((values > values[0] * 1e-14 * len(values)).sum()) if values[0] > 0 else 0


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

    Attributes:
        gap_vector_ (D,): g.  shift_vector_ (D,): g'.  components_: the k in use.
        orthogonality_: ||g'|| / ||g||, the share of the gap that is closed at alpha = 1.
        agreement_: share of the fitted queries whose nearest neighbour is the same at alpha = 1.

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

    def __init__(
        self,
        alpha: float = 1.0,
        components: int | float | str = "auto",
        moves: str = "gallery",
        normalize: bool = False,
        agreement: float = 0.99,
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

    def __repr__(self) -> str:
        return (
            f"MeanShift(alpha={self.alpha:g}, components={self.components!r}, moves={self.moves!r}, "
            f"normalize={self.normalize}, agreement={self.agreement:g})"
        )

    def fit(self, gallery: Tensor | np.ndarray, queries: Tensor | np.ndarray) -> "MeanShift":
        """Learns g and g' from a gallery (G, D) and queries (Q, D). Returns self."""
        gallery, queries = _check.matrix("gallery", gallery, rows="G"), _check.matrix("queries", queries, rows="Q")
        _check.same_width(gallery=gallery, queries=queries)
        gallery, queries = (
            _check.finite("gallery", gallery).detach().cpu(),
            _check.finite("queries", queries).detach().cpu(),
        )
        mean, gram = moments(gallery)
        self.gap_vector_ = queries.double().mean(0) - mean
        if self.components == "exact":
            basis = hull(gallery, gram)
        else:
            values, vectors = principal(gram)
            rank = numerical_rank(values)
            if isinstance(self.components, str):
                k = self._largest_closure(gallery, queries, vectors, rank)
            elif isinstance(self.components, float):
                share = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
                k = min(rank, int((share < self.components).sum()) + 1)
            else:
                k = min(rank, self.components)
            basis = hull(gallery, gram) if k == rank else vectors[:, :k]
        self._set(basis)
        before = nearest(queries, gallery)
        after = nearest(queries, self._moved(gallery, 1.0))
        self.agreement_ = float((before == after).double().mean())
        return self

    def _set(self, basis: Tensor) -> None:
        self.components_ = basis.shape[1]
        gap = self.gap_vector_
        inside = basis @ (basis.T @ gap)
        outside = gap - inside
        outside = outside - basis @ (basis.T @ outside)  # once more: what rounding left inside would move neighbours
        self.shift_vector_ = outside
        self.orthogonality_ = float(outside.norm() / gap.norm()) if gap.norm() > 0 else math.nan

    def _largest_closure(self, gallery: Tensor, queries: Tensor, vectors: Tensor, rank: int) -> int:
        """The smallest k whose shift keeps the nearest neighbours of at least `agreement` of the queries."""
        before = nearest(queries, gallery)

        def keeps(k: int) -> bool:
            basis = vectors[:, :k]
            shift = self.gap_vector_ - basis @ (basis.T @ self.gap_vector_)
            after = nearest(queries, (gallery.double() + shift).to(gallery.dtype))
            return float((before == after).double().mean()) >= self.agreement

        low, high = 0, rank
        if keeps(0):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high

    def _moved(self, x: Tensor, alpha: float) -> Tensor:
        return torch.ops.gapkern.meanshift_apply(x, alpha * self.shift_vector_.to(x.device), self.normalize)

    def _apply(self, name: str, x: Any, alpha: float) -> Any:
        if not hasattr(self, "shift_vector_"):
            raise ValueError("MeanShift: call fit before transform")
        matrix = _check.finite(name, _check.matrix(name, x, empty=True))
        if matrix.shape[1] != len(self.shift_vector_):
            raise ValueError(
                f"{name}: expected D = {len(self.shift_vector_)} as fitted, got shape {tuple(matrix.shape)}"
            )
        if alpha == 0 and not self.normalize:
            return x
        moved = self._moved(matrix, alpha)
        return moved.numpy() if isinstance(x, np.ndarray) else moved

    def transform(self, gallery: Any) -> Any:
        """gallery + alpha g' (unchanged where moves="queries"); shape, dtype and kind of the input."""
        return self._apply("gallery", gallery, self.alpha if self.moves == "gallery" else 0.0)

    def transform_queries(self, queries: Any) -> Any:
        """queries - alpha g' where moves="queries", otherwise unchanged."""
        return self._apply("queries", queries, -self.alpha if self.moves == "queries" else 0.0)

    def at(self, alpha: float) -> "MeanShift":
        """The same fit with another alpha."""
        other = MeanShift(alpha, self.components, self.moves, self.normalize, self.agreement)
        fitted = {name: value for name, value in vars(self).items() if name.endswith("_")}
        vars(other).update(fitted)
        return other

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; a file of that name is replaced only once the new one is complete."""
        from safetensors.torch import save_file

        if not hasattr(self, "shift_vector_"):
            raise ValueError("MeanShift: call fit before save")
        metadata = {
            "format": "gapkern.MeanShift",
            "version": str(FORMAT_VERSION),
            "alpha": repr(self.alpha),
            "components": repr(self.components),
            "moves": self.moves,
            "normalize": repr(self.normalize),
            "agreement": repr(self.agreement),
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
        import ast

        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ValueError(f"path: expected a file, got {path}, which does not exist") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: expected a safetensors file, got {path} ({error})") from None
        if metadata.get("format") != "gapkern.MeanShift" or metadata.get("version") != str(FORMAT_VERSION):
            raise ValueError(
                f"path: expected a gapkern.MeanShift file of version {FORMAT_VERSION}, got {path} with "
                f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            )
        value: Callable[[str], Any] = lambda name: ast.literal_eval(metadata[name])  # noqa: E731
        shift = MeanShift(
            value("alpha"), value("components"), metadata["moves"], value("normalize"), value("agreement")
        )
        shift.gap_vector_, shift.shift_vector_ = tensors["gap_vector"], tensors["shift_vector"]
        shift.components_, shift.agreement_ = value("components_"), value("agreement_")
        shift.orthogonality_ = float(metadata["orthogonality_"])
        return shift

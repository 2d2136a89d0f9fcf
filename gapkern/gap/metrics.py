"""Every published measure of the modality gap, with one definition each."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._rows import squarable, unit
from gapkern.gap.moments import Moments, hull

__all__ = ["gap_metrics"]

_ROWS = 8192


def _scaled(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both in float64 by a power of two, and that power, where fourth powers of their values might leave float64."""
    largest = max(float(x.abs().max()) for x in (images, texts))
    if largest == 0 or 1e-30 < largest < 1e30:
        return images, texts, 1.0
    power = 2.0 ** math.frexp(largest)[1]
    return images.double() / power, texts.double() / power, power


def _chunks(x: Tensor) -> Iterator[Tensor]:
    return (x[i : i + _ROWS] for i in range(0, x.shape[0], _ROWS))


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
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


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
    seen = Moments.of(fit)
    mean, gram = seen.mean, seen.gram
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


@isolated
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
    logit_scale = _check.number("logit_scale", logit_scale)
    images = squarable("images", _check.finite("images", images)).detach().cpu()
    texts = squarable("texts", _check.finite("texts", texts)).detach().cpu()
    images, texts, power = _scaled(images, texts)
    n = len(images)
    seen_x, seen_t = Moments.of(images), Moments.of(texts)
    gram_x, gram_t = seen_x.gram, seen_t.gram
    gap = seen_t.mean - seen_x.mean
    x, t = unit(images.double()), unit(texts.double())
    paired = float((x * t).sum(1).mean())
    within_x, within_t = _off_diagonal_cosine(x), _off_diagonal_cosine(t)
    unpaired = float((x.sum(0) @ t.sum(0) - (x * t).sum()) / (n * (n - 1))) if n > 1 else math.nan
    distance = [(1 - c) / 2 for c in (paired, within_x, within_t)]
    basis = hull(seen_t, texts)
    outside = gap - basis @ (basis.T @ gap)
    norm = float(gap.norm())
    return {
        "centroid_distance": norm * power,
        "mean_pair_distance": float((images.double() - texts.double()).norm(dim=1).mean()) * power,
        "rmg": distance[0] / (distance[0] + (distance[1] + distance[2]) / 2) if n > 1 else math.nan,
        "cos_paired": paired,
        "cos_unpaired": unpaired,
        "cos_within_images": within_x,
        "cos_within_texts": within_t,
        "alignment": float((x - t).square().sum(1).mean()),
        "uniformity_images": _uniformity(x),
        "uniformity_texts": _uniformity(t),
        "frechet": _frechet(gap, gram_x / max(n - 1, 1), gram_t / max(n - 1, 1)) * power * power,
        "effective_rank_images": _effective_rank(gram_x) if n > 1 else math.nan,
        "effective_rank_texts": _effective_rank(gram_t) if n > 1 else math.nan,
        "orthogonality": float(outside.norm()) / norm if norm > 0 else math.nan,
        "variance_along_gap_images": _variance_along(gap, gram_x),
        "variance_along_gap_texts": _variance_along(gap, gram_t),
        "linear_separability": _linear_separability(images, texts),
        "doubly_stochastic_residual": _doubly_stochastic_residual(x, t, logit_scale),
    }

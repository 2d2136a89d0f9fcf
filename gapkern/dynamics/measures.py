"""The contrastive loss at a point, with its gradients and softmax sums, and the numbers a trajectory records.

Memory grows linearly in N: the softmax sums are read off the fused loss's gradient. A column that is c in the images
and 0 in the texts changes no softmax, and the gradient of the texts' column is what Theorem 3.2 says it is:
proportional to c (S_i^y - 1).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._compare import same_fields
from gapkern._rows import squarable, with_float64
from gapkern.gap.moments import Moments, principal
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.losses.steps import work_bytes
from gapkern.ops.contrastive import lse_pair

__all__ = ["Evaluation", "evaluate", "evaluate_unchecked", "measure", "pair_losses", "pairs", "spearman"]

HELD = 0.999  # share of the variance that the principal directions of `orthogonality` hold


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The contrastive loss of N pairs at a point.

    Attributes:
        loss: `contrastive_loss`, the mean of both directions; the paper's Eq. 6 is twice that.
        images, texts: (N, D), the loss's gradients.
        logit_scale: the loss's derivative by s.
        sums_images: (N,) float64, S_i^x, the mass that image i receives from all texts' softmaxes.
        sums_texts: (N,) float64, S_i^y = sum_k Qx(k, i), the mass that text i receives from all images'.
    """

    loss: float
    images: Tensor
    texts: Tensor
    logit_scale: float
    sums_images: Tensor
    sums_texts: Tensor

    __eq__ = same_fields

    @property
    def residual_images(self) -> float:
        """max |S_i^x - 1|: how far the texts' softmaxes are from doubly stochastic."""
        return float((self.sums_images - 1).abs().max())

    @property
    def residual_texts(self) -> float:
        """max |S_i^y - 1|."""
        return float((self.sums_texts - 1).abs().max())


@isolated
def evaluate(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    logit_scale: Tensor | float,
    *,
    similarity: str = "sqeuclidean",
) -> Evaluation:
    """Loss, gradients and softmax sums of N pairs, in one forward and backward pass of the fused loss.

    Args:
        images: (N, D) float32 or float64, row i paired with row i of `texts`.
        texts: (N, D), the same dtype.
        logit_scale: s = 1 / tau, above 0.
        similarity: "sqeuclidean" for S = -s ||x_i - y_j||^2, or "dot" for s <x_i, y_j>.

    Raises:
        TypeError: not floating-point tensors or arrays, or of half precision.
        ValueError: shapes that do not match, values that are not finite, a scale that is not above 0.

    Example:
        >>> at = evaluate(torch.eye(3).double(), torch.eye(3).double(), 1.0)
        >>> round(at.loss, 4), [round(s, 6) for s in at.sums_texts.tolist()]
        (0.2395, [1.0, 1.0, 1.0])
    """
    images, texts = pairs(images, texts)
    scale = scalar("logit_scale", logit_scale, images).detach().double()
    if not 0 < float(scale) < math.inf:
        raise ValueError(f"logit_scale: expected a finite number > 0, got {float(scale):g}")
    check_pairs(images, texts, scale)
    _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
    at = evaluate_unchecked(images, texts, scale, similarity)
    if not math.isfinite(at.loss):
        raise ValueError(
            f"images and texts: expected a loss that is finite in {str(images.dtype)[6:]}, got {at.loss} of magnitudes "
            f"up to {float(images.abs().max()):g} and {float(texts.abs().max()):g}"
        )
    return at


def evaluate_unchecked(images: Tensor, texts: Tensor, scale: Tensor, similarity: str) -> Evaluation:
    """`evaluate` of what is known to be sound; scale float64, 0-d."""
    n, dims = images.shape
    # Small beside the rest, so that squared distances keep their digits.
    c = max(float(texts.abs().max()) * 2**-10, 2**-60)
    ones, zeros = images.new_full((n, 1), c), images.new_zeros(n, 1)
    x = torch.cat([images, ones, zeros], 1).requires_grad_()
    y = torch.cat([texts, zeros, ones], 1).requires_grad_()
    s = scale.detach().requires_grad_()
    with torch.enable_grad():
        loss = pair_losses(x, y, s, similarity).mean()
        of_x, of_y, of_scale = torch.autograd.grad(loss, (x, y, s))
    # d loss / d y[i, dims] = (k s c / 2N) sum_k (Qx(k, i) + Qy(i, k) - 2 [k = i]), and sum_k Qy(i, k) = 1.
    factor = 2 * n / (float(scale) * c * (2 if similarity == "sqeuclidean" else 1))
    return Evaluation(
        loss=float(loss.detach().to(images.dtype)),
        images=of_x[:, :dims],
        texts=of_y[:, :dims],
        logit_scale=float(of_scale),
        sums_images=1 + factor * of_x[:, dims + 1].double(),
        sums_texts=1 + factor * of_y[:, dims].double(),
    )


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor, similarity: str) -> Tensor:
    """(N,) float64: each pair's loss, float32 products in full precision whatever the program allows its own."""
    row, col, positive = lse_pair(
        images,
        texts,
        scale,
        similarity=similarity,
        label_offset=0,
        precision="highest",
        work_bytes=work_bytes("auto"),
    )
    return (row + col) / 2 - positive


def pairs(images: Any, texts: Any) -> tuple[Tensor, Tensor]:
    """N pairs of one dtype, float32 or float64, checked and without gradients."""
    images, texts = _check.matrix("images", images), _check.matrix("texts", texts)
    _check.same_width(images=images, texts=texts)
    _check.same_rows(images=images, texts=texts)
    for name, x in (("images", images), ("texts", texts)):
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
        squarable(name, _check.finite(name, x))
    if images.dtype != texts.dtype:
        raise TypeError(f"texts: expected {images.dtype} as in images, got {texts.dtype}")
    return with_float64(images.detach()), with_float64(texts.detach())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties share their mean rank. NaN where one side is constant.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 2.0, 1.0]))
        -1.0
    """
    a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = (ends - (counts - 1).double() / 2)[inverse]
    return ranks


@isolated
def measure(images: Tensor, texts: Tensor, at: Evaluation | None = None) -> dict[str, float]:
    """The geometry of N pairs, in float64: how far apart, how spread, how aligned.

    Args:
        images: (N, D).
        texts: (N, D), paired by row.
        at: what `evaluate` gave there; adds its loss, residuals and the correlation of S_i^y with distance.

    Returns:
        With g = mean(texts) - mean(images): `gap_norm` ||g||; `variance_along_*`, the mean squared deviation from the
        modality's mean along g, and `variance_across_*`, across it; `relative_alignment`
        2 sum a_i . b_i / (sum ||a_i||^2 + sum ||b_i||^2) of the centred rows a and b, 1 where the texts are the images
        moved by g; `orthogonality` ||g'|| / ||g||, g' the part of g outside the principal directions that hold 99.9 %
        of the variance within the modalities. With `at`: `loss`, `residual_images`, `residual_texts` and
        `sum_distance_correlation`, the rank correlation of S_i^y with the distance of text i from the images' mean.

    Example:
        >>> x = torch.eye(3, 4)
        >>> found = measure(x, x + torch.tensor([0.0, 0.0, 0.0, 2.0]))
        >>> [round(found[k], 6) for k in ("gap_norm", "relative_alignment", "orthogonality", "variance_along_texts")]
        [2.0, 1.0, 1.0, 0.0]
    """
    images, texts = pairs(images, texts)
    seen = {"images": Moments.of(images), "texts": Moments.of(texts)}
    n = len(images)
    gap = seen["texts"].mean - seen["images"].mean
    norm = float(gap.norm())
    along = gap / norm if norm > 0 else torch.zeros_like(gap)
    found: dict[str, float] = {} if at is None else {"loss": at.loss}
    found["gap_norm"] = norm
    spread = {name: float(side.gram.trace()) / n for name, side in seen.items()}
    for name, x in (("images", images), ("texts", texts)):
        # Not from the Gram matrix, in which what is small beside the rest has no digits.
        moved = x.double() @ along
        found[f"variance_along_{name}"] = float(moved.var(correction=0))
        found[f"variance_across_{name}"] = max(0.0, spread[name] - found[f"variance_along_{name}"])
    # sum ||a - b||^2 = sum ||a||^2 + sum ||b||^2 - 2 sum a . b
    apart = sum(
        float(((y.double() - x.double()) - gap).square().sum())
        for x, y in zip(images.split(8192), texts.split(8192), strict=True)
    )
    total = n * (spread["images"] + spread["texts"])
    found["relative_alignment"] = 1 - apart / total if total > 0 else 1.0
    values, vectors = principal(seen["images"].gram + seen["texts"].gram)
    held = values.cumsum(0) - values < HELD * values.sum()
    basis = vectors[:, held]
    found["orthogonality"] = float((gap - basis @ (basis.T @ gap)).norm()) / norm if norm > 0 else float("nan")
    if at is not None:
        distance = (texts.double() - seen["images"].mean).norm(dim=1)
        found |= {
            "residual_images": at.residual_images,
            "residual_texts": at.residual_texts,
            "sum_distance_correlation": spearman(at.sums_texts, distance),
        }
    return found

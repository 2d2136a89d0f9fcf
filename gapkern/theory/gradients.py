"""What the gap feels of the loss: the leading gradient (Theorem 3.1) and when it vanishes (Theorem 3.2).

All gradients are of the paper's Eq. 6, twice `contrastive_loss`. With W = Qx + Qy - 2 I, dL/dS = W / N, and for the
squared Euclidean similarity dL/dy_j = (2 s / N) sum_i W_ij (x_i - y_j). Both theorems are this sum: expanded about the
means (3.1), and taken along a direction in which the x_i do not differ, where sum_i W_ij = S_j^y - 1 is left (3.2).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._compare import same_fields
from gapkern.dynamics.measures import evaluate, pair_losses, pairs
from gapkern.losses.inputs import scalar

__all__ = ["FAR", "TIGHT", "Freeze", "LeadingGradient", "freeze", "leading_gradient"]

TIGHT, FAR = 0.1, 10.0  # below and above which an expansion's next term is a tenth of it


@dataclass(frozen=True, eq=False)
class LeadingGradient:
    """Theorem 3.1 against the gradient as it is.

    Attributes:
        measured: (N, D), the gradient of Eq. 6 on each row.
        predicted: (N, D), the theorem's leading term.
        first_order: (N, D), all terms of first order in the clusters' radius: also the pull of each row's partner,
            which the theorem leaves out because it is smaller by the factor `distance`.
        slope: of `measured` over `predicted`, least squares over all entries.
        correlation: of their entries.
        relative_error, first_order_error: ||measured - predicted|| / ||measured||, and with first_order.
        tightness: what the softmaxes' exponents vary by within a cluster, at most; small where the clusters are tight.
        distance: s ||g||^2 (dot: s ||mu||^2 / 2, mu the other modality's mean); large where they are far apart.
        applies: tightness below 0.1 and distance above 10.
    """

    measured: Tensor = field(repr=False)
    predicted: Tensor = field(repr=False)
    first_order: Tensor = field(repr=False)
    slope: float
    correlation: float
    relative_error: float
    first_order_error: float
    tightness: float
    distance: float

    __eq__ = same_fields

    @property
    def applies(self) -> bool:
        return self.tightness < TIGHT and self.distance > FAR


@isolated
def leading_gradient(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    logit_scale: float,
    *,
    similarity: str = "sqeuclidean",
    sphere: bool = False,
    of: str = "texts",
) -> LeadingGradient:
    """Theorem 3.1: in tight clusters far apart the gradient on y_i is (4 s^2 / N) [g . (y_i - mu_y)] g.

    To first order in the radius it is (4 s / N) (s [g . (y_i - mu_y)] g - (x_i - mu_x)); for the dot similarity
    (s / N) (s [mu_x . (y_i - mu_y)] mu_x - 2 (x_i - mu_x)), on the sphere its tangential part. The images' follows by
    exchanging the two.

    Args:
        images: (N, D) float32 or float64, row i paired with row i of `texts`.
        texts: (N, D), the same dtype.
        logit_scale: s = 1 / tau.
        similarity: "sqeuclidean" or "dot".
        sphere: compare the tangential parts: what descent on the unit sphere follows.
        of: "texts" or "images", whose gradient.

    Raises:
        TypeError, ValueError: as `gapkern.dynamics.evaluate`.

    Example:
        >>> from gapkern.dynamics import tight_clusters
        >>> found = leading_gradient(*tight_clusters(8, 5, radius=1e-6, gap=3.0), logit_scale=1000.0)
        >>> found.applies, round(found.slope, 2), found.correlation > 0.999
        (True, 1.0, True)
    """
    _check.choice("of", of, ("texts", "images"))
    x, y = pairs(images, texts)
    at = evaluate(x, y, logit_scale, similarity=similarity)
    measured = 2 * (at.texts if of == "texts" else at.images).double()
    other, own = (x.double(), y.double()) if of == "texts" else (y.double(), x.double())
    n, s = len(own), float(logit_scale)
    a, b = other - other.mean(0), own - own.mean(0)
    if similarity == "sqeuclidean":
        towards, factor, pull = own.mean(0) - other.mean(0), 4 * s * s / n, 4 * s / n
        distance = s * float(towards.square().sum())
    else:
        towards, factor, pull = other.mean(0), s * s / n, 2 * s / n
        distance = s * float(towards.square().sum()) / 2
    predicted = factor * (b @ towards)[:, None] * towards
    first_order = predicted - pull * a
    if sphere:
        predicted, first_order, measured = (
            v - (v * own).sum(1, keepdim=True) * own for v in (predicted, first_order, measured)
        )
    varies = (
        torch.cat(
            [
                a @ (own.mean(0) if similarity == "dot" else 2 * towards),
                b @ (other.mean(0) if similarity == "dot" else 2 * towards),
            ]
        )
        .abs()
        .max()
    )
    # In units of the largest entry: squares of what is the third power of small embeddings leave float64.
    top = float(torch.stack([v.abs().max() for v in (predicted, measured, first_order)]).max()) or 1.0
    p, m, f = predicted / top, measured / top, first_order / top
    deviation_p, deviation_m, size = p.ravel() - p.mean(), m.ravel() - m.mean(), m.norm()
    return LeadingGradient(
        measured=measured,
        predicted=predicted,
        first_order=first_order,
        slope=float((p * m).sum() / p.square().sum()),
        correlation=float(deviation_p @ deviation_m / (deviation_p.norm() * deviation_m.norm())),
        relative_error=float((m - p).norm() / size),
        first_order_error=float((m - f).norm() / size),
        tightness=s * float(varies),
        distance=distance,
    )


@dataclass(frozen=True, eq=False)
class Freeze:
    """Theorem 3.2 against the gradient as it is: along a unit direction u, by default the gap's.

    Attributes:
        direction: (D,), u.
        images, texts: (N,), u . dL/dx_i and u . dL/dy_i as measured.
        predicted_images, predicted_texts: (N,), the part that S_i - 1 explains; zero where S_i = 1.
        bound_images, bound_texts: (N,), how far the measured can be from the predicted, because the other modality
            is not constant along u; zero where it is.
        residual_images, residual_texts: max |S_i - 1|.
        deviation_images, deviation_texts: max |u . (x_i - mean)| / ||g||: how far from constant along u.
        drift: relative change of u . g in a unit of descent time on Eq. 6.
        drift_bound: what 3.2 guarantees of |drift|, from the predictions and their bounds.
    """

    direction: Tensor = field(repr=False)
    images: Tensor = field(repr=False)
    texts: Tensor = field(repr=False)
    predicted_images: Tensor = field(repr=False)
    predicted_texts: Tensor = field(repr=False)
    bound_images: Tensor = field(repr=False)
    bound_texts: Tensor = field(repr=False)
    residual_images: float
    residual_texts: float
    deviation_images: float
    deviation_texts: float
    drift: float
    drift_bound: float

    __eq__ = same_fields

    def holds(self, tolerance: float = 1e-6) -> bool:
        """Whether both conditions hold to within `tolerance`: doubly stochastic, and constant along u."""
        return max(self.residual_images, self.residual_texts, self.deviation_images, self.deviation_texts) <= tolerance


@isolated
def freeze(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    logit_scale: float,
    *,
    similarity: str = "sqeuclidean",
    direction: Tensor | np.ndarray | None = None,
) -> Freeze:
    """Theorem 3.2: a gap along which both modalities are constant feels nothing of doubly stochastic softmaxes.

    What it feels otherwise, exactly: u . dL/dy_j = -(2 s / N) [u . (y_j - mu_x)] (S_j^y - 1) plus a remainder of at
    most (2 s / N) max_i |u . (x_i - mu_x)| sum_i |W_ij|, with sum_i |W_ij| <= S_j^y + 3 - 4 exp(-loss_j).

    Args:
        images: (N, D) float32 or float64, row i paired with row i of `texts`.
        texts: (N, D), the same dtype.
        logit_scale: s = 1 / tau.
        similarity: "sqeuclidean" or "dot".
        direction: (D,); by default the gap's.

    Raises:
        TypeError, ValueError: as `gapkern.dynamics.evaluate`; a direction or a gap of length 0.

    Example:
        >>> h = 0.75**0.5
        >>> images = torch.tensor([[1.0, 0.0, 0.0], [-0.5, h, 0.0], [-0.5, -h, 0.0]], dtype=torch.float64)
        >>> texts = images + torch.tensor([0.0, 0.0, 0.8], dtype=torch.float64)
        >>> found = freeze(images, texts, 2.0)
        >>> found.holds(1e-9), bool(found.texts.abs().max() < 1e-12)
        (True, True)
    """
    x, y = pairs(images, texts)
    at = evaluate(x, y, logit_scale, similarity=similarity)
    x64, y64 = x.double(), y.double()
    gap = y64.mean(0) - x64.mean(0)
    if direction is None:
        u, name = gap, "gap"
    else:
        u, name = _check.tensor("direction", direction).double(), "direction"
        if u.shape != gap.shape:
            raise ValueError(f"direction: expected shape ({len(gap)},), got {tuple(u.shape)}")
    if not float(u.norm()) > 0:
        raise ValueError(f"{name}: expected a length above 0, got {float(u.norm()):g}")
    u = u / u.norm()
    losses = pair_losses(x, y, scalar("logit_scale", logit_scale, x), similarity)
    on_x, on_y, s = x64 @ u, y64 @ u, float(logit_scale)
    of_x = _along(at.images.double() @ u, at.sums_images, on_x, on_y, losses, s, similarity)
    of_y = _along(at.texts.double() @ u, at.sums_texts, on_y, on_x, losses, s, similarity)
    size = float(gap @ u)
    moves = float(of_x[0].mean() - of_y[0].mean())
    # Both means are over N rows; the two sums of S_i - 1 are zero, so most of each prediction cancels in its mean.
    most = sum(abs(float(predicted.mean())) + float(bound.mean()) for _, predicted, bound in (of_x, of_y))
    return Freeze(
        u,
        of_x[0],
        of_y[0],
        of_x[1],
        of_y[1],
        of_x[2],
        of_y[2],
        residual_images=at.residual_images,
        residual_texts=at.residual_texts,
        deviation_images=_deviation(on_x, gap),
        deviation_texts=_deviation(on_y, gap),
        drift=moves / size if size else float("nan"),
        drift_bound=most / abs(size) if size else float("nan"),
    )


def _along(
    measured: Tensor, sums: Tensor, own: Tensor, other: Tensor, losses: Tensor, s: float, similarity: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Along u: the gradient as measured, as predicted, and a bound of the difference; own and other (N,) lie on u."""
    n = len(own)
    centre, varies = other.mean(), (other - other.mean()).abs().max()
    # dL/dy_j . u = (k s / N) sum_i W_ij (u . x_i - [k = 2] u . y_j)
    k, lever = (2, centre - own) if similarity == "sqeuclidean" else (1, centre)
    weight = sums + 3 - 4 * (-losses).exp()
    return 2 * measured, k * s / n * lever * (sums - 1), k * s / n * varies * weight


def _deviation(on: Tensor, gap: Tensor) -> float:
    norm = float(gap.norm())
    return float((on - on.mean()).abs().max()) / norm if norm > 0 else float("nan")

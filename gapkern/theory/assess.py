"""All theorems at once for a model's embeddings, in sentences with their numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern.gap import MeanShift
from gapkern.perturb import Gaussian
from gapkern.theory.gradients import freeze, leading_gradient
from gapkern.theory.neighbours import orthogonality, preservation, robustness_curve


@dataclass(frozen=True)
class Verdict:
    """What one statement of the paper says about these embeddings.

    Attributes:
        statement: "3.1" ... "3.5", or "assumption 3.3".
        applies: whether its assumptions are met.
        sentence: in words, with the numbers that decide.
        numbers: all that was measured.
    """

    statement: str
    applies: bool
    sentence: str
    numbers: dict[str, float]


@isolated
def assess(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    logit_scale: float = 100.0,
    *,
    similarity: str = "dot",
    gallery: str = "texts",
    shift: MeanShift | None = None,
    noise: Gaussian | None = None,
    tolerance: float = 0.01,
) -> list[Verdict]:
    """Does the paper's guarantee apply to these embeddings, and how tightly?

    Args:
        images: (N, D), row i paired with row i of `texts`.
        texts: (N, D).
        logit_scale: of the model's softmax; CLIP's is 100.
        similarity: of its loss, "dot" or "sqeuclidean".
        gallery: which modality is searched, "texts" or "images".
        shift: a fitted `MeanShift` of that gallery; by default n_components="auto".
        noise: for 3.4; by default the paper's Gaussian(0.022).
        tolerance: how far from exact an assumption may be to count as met.

    Raises:
        TypeError, ValueError: as the functions of `gapkern.theory`.

    Example:
        >>> import torch
        >>> x = torch.eye(4, 8)
        >>> y = x + torch.tensor([0.0] * 7 + [2.0])
        >>> for verdict in assess(x, y, 1.0, similarity="sqeuclidean"):
        ...     print(verdict.statement, verdict.applies)
        3.1 False
        3.2 True
        assumption 3.3 True
        3.4 True
        3.5 True
    """
    _check.choice("gallery", gallery, ("texts", "images"))
    tolerance = _check.number("tolerance", tolerance, low=0)
    x, y = (_check.matrix(name, value).double() for name, value in (("images", images), ("texts", texts)))
    rows, queries = (texts, images) if gallery == "texts" else (images, texts)
    shift = MeanShift().fit(rows, queries) if shift is None else shift
    first = leading_gradient(x, y, logit_scale, similarity=similarity)
    still = freeze(x, y, logit_scale, similarity=similarity)
    third = orthogonality(queries, rows)
    curve = robustness_curve(queries, rows, noise or Gaussian(0.022), shift=shift)
    kept = preservation(queries, rows, shift)
    at = {a: r for a, r in zip(curve.alphas, curve.robustness, strict=True) if a in (0.0, 1.0)}
    guaranteed, share, most = float(kept.guaranteed.double().mean()), kept.share()[0], float(kept.bound.max())
    return [
        Verdict(
            "3.1",
            first.applies,
            f"Within a modality the softmaxes' exponents vary by up to {first.tightness:.3g} (tight: below 0.1) across "
            f"a gap of {first.distance:.3g} in their units (far: above 10). The leading term explains the texts' "
            f"gradient with correlation {first.correlation:.3f} and slope {first.slope:.3g}.",
            _numbers(first),
        ),
        Verdict(
            "3.2",
            still.holds(tolerance),
            f"The softmax sums are within {max(still.residual_images, still.residual_texts):.3g} of 1 and the "
            f"modalities within {max(still.deviation_images, still.deviation_texts):.3g} ||g|| of constant along the "
            f"gap; the gap's relative change per unit of descent time is {still.drift:.3g}, at most "
            f"{still.drift_bound:.3g}.",
            _numbers(still),
        ),
        Verdict(
            "assumption 3.3",
            third.holds(tolerance),
            f"{third.outside_gallery:.1%} of the gap lies outside the gallery's hull and {third.outside_queries:.1%} "
            f"outside the queries'; along it they deviate by {third.deviation_gallery:.3g} and "
            f"{third.deviation_queries:.3g} ||g||.",
            vars(third),
        ),
        Verdict(
            "3.4",
            third.holds(tolerance),
            f"Closing what this shift closes takes exact robustness from {at[0.0]:.3f} to {at[1.0]:.3f}; "
            f"{curve.rising:.1%} of the queries never fall on the way, the worst fall in one step is "
            f"{curve.worst_fall:.2g}.",
            {"open": at[0.0], "closed": at[1.0], "rising": curve.rising, "worst_fall": curve.worst_fall},
        ),
        Verdict(
            "3.5",
            guaranteed == 1 or most == 0,
            f"At alpha = {kept.alpha:g} the margins guarantee the nearest neighbour of {guaranteed:.1%} of the queries "
            f"and predict that of {share:.1%} to stay; the shift takes at most {most:.3g} off a margin.",
            {"guaranteed": guaranteed, "kept": share, "most": most, "orthogonality": shift.orthogonality_},
        ),
    ]


def _numbers(found: Any) -> dict[str, float]:
    return {name: value for name, value in vars(found).items() if isinstance(value, float)}

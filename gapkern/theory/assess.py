"""All theorems at once for a model's embeddings, and what projecting adds, in sentences with their numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern.gap import MeanShift, Projection
from gapkern.perturb import Gaussian
from gapkern.robustness import robustness
from gapkern.theory.gradients import freeze, leading_gradient
from gapkern.theory.neighbours import orthogonality, preservation, robustness_curve

__all__ = ["Verdict", "assess"]


@dataclass(frozen=True)
class Verdict:
    """What one statement says about these embeddings.

    Attributes:
        statement: "3.1" ... "3.5" of the paper, "assumption 3.3", or "projection".
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
        noise: for 3.4 and the projection; by default the paper's Gaussian(0.022).
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
        projection True
    """
    _check.choice("gallery", gallery, ("texts", "images"))
    tolerance = _check.number("tolerance", tolerance, low=0)
    x, y = (_check.matrix(name, value).double() for name, value in (("images", images), ("texts", texts)))
    rows, queries = (texts, images) if gallery == "texts" else (images, texts)
    shift = MeanShift().fit(rows, queries) if shift is None else shift
    first = leading_gradient(x, y, logit_scale, similarity=similarity)
    still = freeze(x, y, logit_scale, similarity=similarity)
    third = orthogonality(queries, rows)
    noise = noise or Gaussian(0.022)
    curve = robustness_curve(queries, rows, noise, shift=shift)
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
        _projected(queries, rows, shift, noise, at, tolerance),
    ]


def _projected(
    queries: Any, rows: Any, shift: MeanShift, noise: Gaussian, at: dict[float, float], tolerance: float
) -> Verdict:
    """What each query's own offset is, and what removing it buys beyond the shift."""
    by = {metric: Projection("auto", metric).fit(rows, queries) for metric in ("l2", "ip")}
    offsets = by["l2"].offsets(queries)
    moved = shift.at(1.0)
    left = Projection(by["l2"].n_components_, "l2").fit(moved.transform(rows)).offsets(moved.transform_queries(queries))
    projected = {m: robustness(queries, rows, noise, metric=m, shift=p, method="exact") for m, p in by.items()}
    none = robustness(queries, rows, noise, metric="ip", method="exact")
    numbers = {
        "offset": float(offsets.mean()),
        "least_offset": float(offsets.min()),
        "largest_offset": float(offsets.max()),
        "offset_after_shift": float(left.mean()),
        "components_l2": float(by["l2"].n_components_),
        "components_ip": float(by["ip"].n_components_),
        "kept_l2": by["l2"].agreement_,
        "kept_ip": by["ip"].agreement_,
        "l2": at[0.0],
        "l2_shift": at[1.0],
        "l2_projection": projected["l2"].robustness,
        "ip": none.robustness,
        "ip_projection": projected["ip"].robustness,
    }
    return Verdict(
        "projection",
        min(numbers["kept_l2"], numbers["kept_ip"]) >= 1 - tolerance and numbers["offset"] > 0,
        f"A query lies {numbers['offset']:.3g} outside of the gallery's first {by['l2'].n_components_} directions "
        f"({numbers['least_offset']:.3g} to {numbers['largest_offset']:.3g}); the shift leaves "
        f"{numbers['offset_after_shift']:.3g} of it, projecting the queries nothing, and {numbers['kept_l2']:.1%} keep "
        f"their neighbour. Exact robustness by L2: {at[0.0]:.3f} as they are, {at[1.0]:.3f} with the shift, "
        f"{numbers['l2_projection']:.3f} projected; by inner product {numbers['ip']:.3f} and "
        f"{numbers['ip_projection']:.3f} ({numbers['kept_ip']:.1%} kept).",
        numbers,
    )


def _numbers(found: Any) -> dict[str, float]:
    return {name: value for name, value in vars(found).items() if isinstance(value, float)}

"""What moves one side of embeddings, a mean shift or a projection: read from either's file, and told apart."""

import math
import os
from typing import Any

import torch
from torch import Tensor

from gapkern import files
from gapkern.gap import saved
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.projection import Projection

__all__ = ["Transform", "check", "closed", "facts", "fits_metric", "load"]

Transform = MeanShift | Projection


def load(path: str | os.PathLike[str]) -> Transform:
    """The shift or the projection of a file.

    Raises:
        ValueError: neither's file.
    """
    if saved.kind(path) == "Projection":
        return Projection.load(path)
    return MeanShift.load(path)


def check(name: str, value: Any) -> Transform | None:
    """`value`, fitted, or None.

    Raises:
        TypeError: something else.
        NotFittedError: it is not fitted.
    """
    if value is None:
        return None
    if not isinstance(value, MeanShift | Projection):
        raise TypeError(f"{name}: expected a MeanShift or a Projection, got {type(value).__name__}")
    if not value.is_fitted:
        raise ValueError(f"{name}: expected a fitted {type(value).__name__}, got {value!r}")
    return value


def fits_metric(name: str, value: Transform | None, metric: str) -> None:
    """Raises ValueError where a projection was fitted for another metric; one for "cosine" serves "ip" too."""
    if isinstance(value, Projection) and value.metric != metric and (value.metric, metric) != ("cosine", "ip"):
        raise ValueError(f"{name}: expected a projection of metric={metric!r}, got one of metric={value.metric!r}")


def facts(value: Transform) -> dict[str, Any]:
    """What identifies it, as JSON: the hash of its tensors and its settings."""
    if isinstance(value, MeanShift):
        return {
            "name": "mean_shift",
            "shift": files.fingerprint(value.shift_vector_),
            "alpha": value.alpha,
            "normalize": value.normalize,
            "moves": value.moves,
        }
    hull: Tensor = torch.cat([value.mean_[:, None], value.basis_], 1)
    return {
        "name": "projection",
        "projection": files.fingerprint(hull),
        "components": value.n_components_,
        "metric": str(value.metric),
        "reduce": bool(value.reduce),
        **({"centred": True} if value.centred else {}),
    }


def closed(value: Transform, queries: Tensor) -> float:
    """The share of the gap between the means that it closes: that part of the gap which lies outside of its hull."""
    if isinstance(value, MeanShift):
        return value.orthogonality_
    gap = queries.mean(0, dtype=torch.float64).cpu() - value.mean_
    outside = gap - value.basis_ @ (value.basis_.T @ gap)
    return float(outside.norm() / gap.norm()) if gap.norm() > 0 else math.nan

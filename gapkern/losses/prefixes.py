"""Losses of several prefixes from one pass over the logits: their products grow from prefix to prefix."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern.losses import pairs
from gapkern.losses.functional import contrastive_loss
from gapkern.losses.info_nce import info_nce_loss
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.losses.spread import block_bytes
from gapkern.losses.steps import ALL_BYTES, without_gradient, work_bytes
from gapkern.ops import contrastive
from gapkern.ops.precision import matmul_precision

EPS = 1e-12  # torch.nn.functional.normalize's
DIRECTIONS = (("q-d",), ("d-q",), ("q-d", "d-q"), ("d-q", "q-d"))
# Of each loss, the arguments that one pass serves. All others must be as by default.
SERVED: dict[Callable[..., Tensor], set[str]] = {
    contrastive_loss: {"images", "texts", "logit_scale", "logit_bias", "memory", "reduction", "weights"},
    info_nce_loss: {"queries", "documents", "logit_scale", "directions", "partition", "reduction", "weights"},
}
PARAMETERS = {loss: inspect.signature(loss).parameters.values() for loss in SERVED}
DEFAULTS = {loss: {p.name: p.default for p in of} for loss, of in PARAMETERS.items()}
BY_POSITION = {loss: [p.name for p in of if p.kind is not p.KEYWORD_ONLY] for loss, of in PARAMETERS.items()}


def together(
    loss: Callable[..., Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
    normalize: bool,
    arguments: Sequence[Any],
    options: dict[str, Any],
) -> Tensor | None:
    """The weighted sum of the loss over prefixes; None where the loss, its options or the device has no one pass."""
    if isinstance(loss, functools.partial) and not loss.args:
        return together(loss.func, dims, weights, normalize, arguments, {**loss.keywords, **options})
    given = _served(loss, arguments, options)
    if given is None:
        return None
    weight_of: dict[int, float] = {}
    for width, weight in zip(dims, weights, strict=True):
        weight_of[width] = weight_of.get(width, 0.0) + weight
    widths = sorted(weight_of)
    first, second = list(given)[:2]
    x, y = given[first], given[second]
    if len(widths) < 2 or not all(isinstance(t, Tensor) and t.device.type == "cpu" and t.dim() == 2 for t in (x, y)):
        return None
    if x.shape != y.shape or widths[-1] > x.shape[1]:
        return None
    x, y, scale = check_pairs(x, y, given["logit_scale"], (first, second, "logit_scale"))
    row_weights = pairs.check_weights(given["weights"], x)
    bias = None if given.get("logit_bias") is None else scalar("logit_bias", given["logit_bias"], x)
    kept = work_bytes(given["memory"]) if "memory" in given else block_bytes(x, len(y))
    x_cut, y_cut = x[:, : widths[-1]], y[:, : widths[-1]]
    row, col, positive = contrastive.prefix_lse(
        x_cut,
        y_cut,
        scale,
        _factors(x_cut, widths, normalize),
        _factors(y_cut, widths, normalize),
        widths,
        precision=matmul_precision("cpu"),
        work_bytes=min(kept * len(widths), ALL_BYTES) if torch.is_grad_enabled() else 0,
    )
    losses = _losses(row, col, positive, given)
    per_prefix = torch.tensor([weight_of[width] for width in widths], dtype=torch.float64)
    total = without_gradient((losses * per_prefix[:, None]).sum(0), bias)
    return pairs.Batch(None, "auto").reduce(total, row_weights, given["reduction"], x)


def _served(loss: Any, arguments: Sequence[Any], options: dict[str, Any]) -> dict[str, Any] | None:
    """The loss's arguments by name, where one pass serves them."""
    if not any(loss is served for served in SERVED) or len(arguments) > len(BY_POSITION[loss]):
        return None
    defaults = DEFAULTS[loss]
    given = {**dict(zip(BY_POSITION[loss], arguments, strict=False)), **options}
    if len(given) < len(arguments) + len(options) or not given.keys() <= defaults.keys():
        return None
    given = {**defaults, **given}
    if any(value is inspect.Parameter.empty for value in given.values()):
        return None
    if any(not _same(given[name], value) for name, value in defaults.items() if name not in SERVED[loss]):
        return None
    known = given["reduction"] in pairs.REDUCTIONS and given.get("partition", "joint") in ("joint", "separate")
    directions = given.get("directions", ("q-d", "d-q"))
    if not known or not isinstance(directions, (str, list, tuple)):
        return None
    given["directions"] = (directions,) if isinstance(directions, str) else tuple(directions)
    return given if given["directions"] in DIRECTIONS else None


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (str, int, float)) and bool(value == default))


def _factors(x: Tensor, widths: Sequence[int], normalize: bool) -> Tensor:
    """What makes each prefix a unit vector, (P, N) float64."""
    if not normalize:
        return torch.ones(len(widths), len(x), dtype=torch.float64)
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    ends = zip([0, *widths], widths, strict=False)
    segments = torch.stack([squares[:, begin:end].sum(1, dtype=torch.float64) for begin, end in ends])
    return segments.cumsum(0).clamp_min(EPS**2).rsqrt()


def _losses(row: Tensor, col: Tensor, positive: Tensor, given: dict[str, Any]) -> Tensor:
    """(P, N)."""
    of_rows, of_columns = row - positive, col - positive
    if len(given["directions"]) == 1:
        return of_rows if given["directions"] == ("q-d",) else of_columns
    joint = given.get("partition") == "joint"
    return torch.logaddexp(of_rows, of_columns) if joint else (of_rows + of_columns) / 2

"""`torch.ops.gapkern.robustness_*`: winning probabilities and nearest rows (csrc/robustness/robustness.h)."""

import torch
from torch import Tensor

from gapkern._search import cost_rows
from gapkern.ops import derivatives


@torch.library.register_fake("gapkern::robustness_exact")
def _(distances, targets, variance, dims):
    return distances.new_empty(targets.shape, dtype=torch.float64)


@torch.library.register_fake("gapkern::robustness_exact_inner")
def _(scores, targets, deviations):
    return scores.new_empty(targets.shape, dtype=torch.float64)


@torch.library.register_fake("gapkern::robustness_nearest")
def _(queries, gallery, centre):
    row = queries.new_empty((queries.shape[0],), dtype=torch.int64)
    return row, *(centre.new_empty((queries.shape[0],)) for _ in range(3))


def _on_the_cpu(distances, targets, variance, dims):
    """For devices without a kernel of ours: the distances travel, their integrals are evaluated here."""
    result = torch.ops.gapkern.robustness_exact(distances.cpu(), targets.cpu(), variance, dims)
    return result.to(distances.device)


def _inner_on_the_cpu(scores, targets, deviations):
    result = torch.ops.gapkern.robustness_exact_inner(scores.cpu(), targets.cpu(), deviations.cpu())
    return result.to(scores.device)


def _nearest(queries: Tensor, gallery: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For devices without a kernel of ours: a library product, and its rows' least two."""
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise RuntimeError("gallery: expected (G, D) beside queries (Q, D)")
    if queries.dtype != gallery.dtype or queries.dtype == torch.float64:
        raise RuntimeError("queries and gallery: expected one dtype, float32, bfloat16 or float16")
    if not len(gallery):
        raise RuntimeError("gallery: expected at least one row")
    row = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    best, second, slack = centre.new_full((3, len(queries)), torch.inf).unbind()
    for rows, squared, room in cost_rows(queries, gallery, middle=centre):
        least = squared.topk(min(2, len(gallery)), dim=1, largest=False).values
        # argmin: which of two equal values topk returns first is not promised.
        row[rows], best[rows], slack[rows] = squared.argmin(1), least[:, 0], room
        if len(gallery) > 1:
            second[rows] = least[:, 1]
    return row, best.clone(), second.clone(), slack.clone()


_CONSTANT = "gapkern: robustness_exact, robustness_exact_inner and robustness_nearest are not differentiable"


def _refuse(ctx, *grads):
    raise RuntimeError(_CONSTANT)


def _refuse_jvp(inputs, tangents):
    raise RuntimeError(_CONSTANT)


def _save_nearest(ctx, inputs, output):
    ctx.mark_non_differentiable(output[0])


derivatives.register("robustness_exact", _refuse, jvp=_refuse_jvp)
derivatives.register("robustness_exact_inner", _refuse, jvp=_refuse_jvp)
derivatives.register("robustness_nearest", _refuse, save=_save_nearest, jvp=_refuse_jvp)
_library = torch.library.Library("gapkern", "IMPL")
_library.impl("robustness_exact", _on_the_cpu, "CompositeExplicitAutograd")
_library.impl("robustness_exact_inner", _inner_on_the_cpu, "CompositeExplicitAutograd")
_library.impl("robustness_nearest", _nearest, "CompositeExplicitAutograd")

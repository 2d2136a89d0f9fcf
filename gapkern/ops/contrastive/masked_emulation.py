"""The `contrastive_sm90_masked_*` operators in PyTorch's operations: what their CUDA kernels compute, on any device.

Kernels: csrc/contrastive/sm90_masked.cuh. Conventions are those of emulation.py; control = {k, -c, the least k <x, y>
there can be}. Records of rows and columns are (n, 2) or (n, 4) float32: the bits of an int32, equal for pairs of equal
ids; the limit of <x, y>, or a weight of the sigmoid loss; the weights of negatives and of positives. Columns' end with
whole tiles. Labels are where column = row + label_offset, any number.
"""

import math

import torch
from torch import Tensor

from gapkern.ops.contrastive import emulation
from gapkern.ops.contrastive.emulation import _LN2, _SMALLEST_NORMAL
from gapkern.ops.contrastive.lifted import FLOOR
from gapkern.ops.contrastive.sm90 import row_pitch


def _classes(
    t: Tensor, row_marks: Tensor, col_marks: Tensor, label_offset: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of t (n, M) are negatives, positives and labels, none where that is None."""
    rows, columns = row_marks, col_marks[: t.shape[1]]
    positive = rows[:, :1].view(torch.int32) == columns[:, 0].view(torch.int32)
    negative = ~(positive | (t > rows[:, 1:2]) | (t > columns[:, 1]))
    label = torch.zeros_like(positive)
    if label_offset is not None and -len(t) < label_offset < t.shape[1]:
        label.diagonal(label_offset).fill_(True)
    return negative & ~label, positive & ~label, label


def sums(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (3,)
    condition: Tensor,  # (1,): sums are zero where it is; or empty
    row_marks: Tensor,  # (n, 2)
    col_marks: Tensor,  # (M rounded up to WIDTH, 2)
    label_offset: int,
    positive: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of the exponentials by class in float64, negatives and, where asked for, positives: rows' and columns'."""
    t = images.float() @ texts.float().T
    e = torch.exp2(control[0] * t + control[1])
    e = torch.where(e < _SMALLEST_NORMAL, 0, e)
    if condition.numel():
        e = torch.where(condition == 0, 0, e)
    classes = _classes(t, row_marks, col_marks, label_offset)[: 1 + positive]
    terms = [torch.where(of_class, e, 0) for of_class in classes]
    rows, columns = (torch.stack([v.sum(dim, dtype=torch.float64) for v in terms]) for dim in (1, 0))
    return rows, columns


def merge(
    row_sums: Tensor,  # (classes, N) float64
    col_sums: Tensor,  # (classes, M) float64
    control: Tensor,  # (3,)
    row_lse: Tensor,  # (classes, N) float64, +inf where it is pending
    col_lse: Tensor,  # (classes, M) float64
) -> tuple[Tensor, Tensor]:
    """Replaces what is pending by a pass's log-sum-exps where they are complete: -inf of nothing.

    Returns (1,) whether any is pending, and the control of the next pass.
    """
    flushes = ~(control[2] + control[1] >= -125)
    condition = torch.zeros_like(control[:1])
    for found, lse, terms in ((row_sums, row_lse, col_sums.shape[1]), (col_sums, col_lse, row_sums.shape[1])):
        complete = (~flushes | (found >= terms * 2.0**FLOOR)) & (found < 2.0**127) | (
            found.isnan() & ~control[1].isnan()
        )
        value = torch.where(complete, _LN2 * (found.log2() - control[1].double()), math.inf)
        lse.copy_(torch.where(lse == math.inf, value, lse))
        condition = torch.maximum(condition, (lse == math.inf).any().to(condition.dtype))
    raised = math.floor(228 - math.log2(max(row_sums.shape[1], col_sums.shape[1])))
    return condition, torch.stack([control[0], control[1] + raised, control[2]])


def repair(
    images: Tensor,  # (N, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (3,)
    row_marks: Tensor,  # (N, 2)
    col_marks: Tensor,  # (M rounded up to WIDTH, 2)
    label_offset: int,
    row_lse: Tensor,  # (classes, N) float64, +inf where it is pending
    col_lse: Tensor,  # (classes, M) float64
) -> None:
    """Replaces what is pending by float32 log-sum-exps."""
    t = images.float() @ texts.float().T
    classes = _classes(t, row_marks, col_marks, label_offset)
    logits = control[0] * _LN2 * t
    for k in range(len(row_lse)):
        of_class = logits.masked_fill(~classes[k], -math.inf)
        for lse, dim in ((row_lse[k], 1), (col_lse[k], 0)):
            lse.copy_(torch.where(lse == math.inf, of_class.logsumexp(dim).double(), lse))


def gradient(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    control: Tensor,  # (3,)
    row_marks: Tensor,  # (n, 4)
    col_marks: Tensor,  # (M rounded up to WIDTH, 4)
    grad_label: Tensor,  # (n,) float64
    label_offset: int,
) -> Tensor:
    """dS (n, pitch) in the embeddings' dtype: e (row_weight + col_weight) of the pair's class, grad_label at labels."""
    t, m = images.float() @ texts.float().T, texts.shape[0]
    negative, positive, label = _classes(t, row_marks, col_marks, label_offset)
    ds = images.new_full((images.shape[0], row_pitch(m)), math.nan)
    e = torch.exp2(control[0] * t + control[1])
    terms = [emulation.weighted(t, e, control, row_marks[:, k, None], col_marks[:m, k]) for k in (2, 3)]
    found = torch.where(negative, terms[0], 0) + torch.where(positive, terms[1], 0)
    ds[:, :m] = torch.where(label, grad_label[:, None].to(found.dtype), found)
    return ds


def sigmoid(
    images: Tensor,  # (n, D)
    texts: Tensor,  # (M, D)
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_marks: Tensor,  # (n, 2)
    col_marks: Tensor,  # (M rounded up to WIDTH, 2)
    soft_targets: bool,
) -> tuple[Tensor, Tensor]:
    """As `contrastive_sm90_sigmoid`: z = 1 of equal ids, with the sum of the marks as the weight, or the target."""
    t, m = images.float() @ texts.float().T, texts.shape[0]
    positive = row_marks[:, :1].view(torch.int32) == col_marks[:m, 0].view(torch.int32)
    weight = torch.where(positive, row_marks[:, 1:2] + col_marks[:m, 1], 1)
    rest = (1 - weight) * soft_targets
    z = positive.to(t.dtype).mul_(2).sub_(1)
    s = z * (logit_scale.reshape(()).float() * t + logit_bias.reshape(()).float())
    ds = rest - z * (weight + rest) * torch.sigmoid(-s)
    values = (rest * s - (weight + rest) * torch.nn.functional.logsigmoid(s), ds, ds * t)
    rounded = images.new_full((images.shape[0], row_pitch(m)), math.nan)
    rounded[:, :m] = ds
    return torch.stack([v.sum(1, dtype=torch.float64) for v in values]), rounded


STEPS = {
    "contrastive_sm90_masked_sums": sums,
    "contrastive_sm90_masked_merge": merge,
    "contrastive_sm90_masked_repair": repair,
    "contrastive_sm90_masked_gradient": gradient,
    "contrastive_sm90_masked_sigmoid": sigmoid,
}

_library = torch.library.Library("gapkern", "IMPL")
for _name, _step in STEPS.items():
    _library.impl(_name, _step, "CompositeExplicitAutograd")

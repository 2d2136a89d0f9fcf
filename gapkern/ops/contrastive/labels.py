"""The labels' part of the softmax losses, composed in float64 from log-sum-exps over all the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gapkern.ops.contrastive.arguments import LseBackwardArguments

_LN2 = math.log(2.0)


def with_labels(
    row: Tensor,  # (N,) float64, over all but the label; -inf where there is no other
    col: Tensor,  # (M,) float64
    label_t: Tensor,  # (N,) float64: S / logit_scale at the labels
    logit_scale: Tensor,  # one element
    label_offset: int,
) -> tuple[Tensor, ...]:
    """The results of `contrastive_lse` but `kept`.

    What a row's or a column's others add to its label, log2 (1 + sum e^(S - S_label)), is formed before the label's
    logit is added: a small loss keeps its digits, and that of a single pair is zero.
    """
    own = slice(label_offset, label_offset + len(row))
    positive = label_t * logit_scale.reshape(()).double()
    added, col_added = (torch.logaddexp(lse - positive, torch.zeros_like(lse)) for lse in (row, col[own]))
    col_stats = torch.stack([torch.zeros_like(col), col / _LN2])
    col_stats[:, own] = torch.stack([label_t, col_added / _LN2])
    col = col.clone()
    col[own] = positive + col_added
    return positive + added, col, positive, torch.stack([label_t, added / _LN2, label_t]), col_stats


def _others(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor]:
    """1 - p, what all but the label have of the softmax over its row and its column: (N,) each, in full precision."""
    own = slice(arguments.label_offset, arguments.label_offset + len(arguments.grad_row))
    row_stats, col_stats = arguments.row_stats, arguments.col_stats[:, own]
    scale, label_t = arguments.logit_scale.reshape(()).double(), row_stats[2]
    row, col = (-torch.expm1(scale * (label_t - s[0]) - _LN2 * s[1]) for s in (row_stats, col_stats))
    return row, col


def gradient(arguments: LseBackwardArguments) -> Tensor:
    """dS at the labels, g_row p + g_col q + g_positive: the gradients' sum, often zero, less the others' part."""
    own = slice(arguments.label_offset, arguments.label_offset + len(arguments.grad_row))
    of_row, of_col, row, col = arguments.grad_row, arguments.grad_col[own], *_others(arguments)
    return (of_row + of_col + arguments.grad_positive) - of_row * row - of_col * col


def loss_scale(arguments: LseBackwardArguments, dtype: torch.dtype) -> Tensor:
    """The factor of dS, 0-d float64, where dS is rounded to `dtype`.

    Gradients of 1/N underflow in float16, and those of a small loss sooner. Loss scaling: a power of two brings the
    largest bound of dS to at most 2^13, and the products with dS are divided by it.
    """
    if dtype != torch.float16:
        return loss_scale_of((arguments.grad_row,), dtype)
    of_col = arguments.grad_col.clone()
    row, col = _others(arguments)
    of_col[arguments.label_offset :][: len(col)] *= col
    return loss_scale_of((arguments.grad_row * row, of_col, gradient(arguments)), dtype)


def loss_scale_of(bounds: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The same from the bounds of dS, float64, of which some may have no elements."""
    if dtype != torch.float16:
        return torch.ones((), dtype=torch.float64, device=bounds[0].device)
    largest = torch.stack([g.abs().amax() for g in bounds if g.numel()]).amax().double()
    return torch.exp2(13 - torch.log2(largest).ceil().nan_to_num(0, 0, 0).clamp(min=-100))


def lse2(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor]:
    """Rows' and columns' log-sum-exps in units of log 2, float64."""
    k = arguments.logit_scale.reshape(()).double() / _LN2
    row, col = (stats[1] + k * stats[0] for stats in (arguments.row_stats, arguments.col_stats))
    return row, col

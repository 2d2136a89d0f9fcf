"""The steps over classes of pairs between library products, for a chunk of rows, in PyTorch's operations.

On CUDA each of `STEPS` is a kernel (csrc/contrastive/classes.cuh). Log-sum-exps and their gradients are (C, n) and
(C, M), of negatives, then of positives where equal ids are those; tensors without elements are absent.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gapkern.ops.contrastive.chunked import _labels, _logits

_LN2 = math.log(2.0)


class ChunkClasses(NamedTuple):
    """What decides the classes of a chunk's pairs, in the order of the schemas (csrc/library.cpp)."""

    row_ids: Tensor  # (n,) int64, or (0,)
    col_ids: Tensor  # (M,)
    row_limit: Tensor  # (n,) of t, or (0,)
    col_limit: Tensor  # (M,), or (0,)
    guide: Tensor  # (n, M) products of the guide's embeddings, or (0, 0)
    guide_row_limit: Tensor  # (n,) of those, or (0,)
    guide_col_limit: Tensor  # (M,), or (0,)
    label_offset: int  # the label of the chunk's row 0; far outside where there are none
    positive: bool  # pairs of equal ids are positives, otherwise left out

    def of(self, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which pairs of t (n, M) are no negatives, and which are positives; None: none."""
        positive, other = None, None

        def also(mask: Tensor | None, found: Tensor) -> Tensor:
            return found if mask is None else mask.logical_or_(found)

        for matrix, row_limit, col_limit in (
            (t, self.row_limit, self.col_limit),
            (self.guide, self.guide_row_limit, self.guide_col_limit),
        ):
            if row_limit.numel():
                other = also(other, matrix > row_limit[:, None].to(matrix.dtype))
            if col_limit.numel():
                other = also(other, matrix > col_limit.to(matrix.dtype))
        if self.row_ids.numel():
            same = self.row_ids[:, None] == self.col_ids
            other = also(other, same)
            positive = same.clone() if self.positive else None
        if not -t.shape[0] < self.label_offset < t.shape[1]:
            return other, positive
        other = torch.zeros_like(t, dtype=torch.bool) if other is None else other
        _labels(other, self.label_offset).fill_(True)
        if positive is not None:
            _labels(positive, self.label_offset).fill_(False)
        return other, positive


def similarities(products: Tensor, row_norms: Tensor, col_norms: Tensor) -> Tensor:
    """t: distances that rounding makes negative are zero."""
    t = _logits(products, row_norms, col_norms)
    return t.clamp_(max=0) if row_norms.numel() else t


def _masked_chunk_lse(products, row_norms, col_norms, logit_scale, *rest):
    """Log-sum-exps over the rows and over the columns of a chunk, by class, in float64."""
    classes = ChunkClasses(*rest)
    t = similarities(products, row_norms, col_norms)
    other, positive = classes.of(t)
    s = t * logit_scale.reshape(()).to(t.dtype)
    found = [s if other is None else s.masked_fill(other, -math.inf)]
    if positive is not None:
        found.append(s.masked_fill(~positive, -math.inf))
    row, col = (torch.stack([v.logsumexp(dim).double() for v in found]) for dim in (1, 0))
    return row, col


def _masked_chunk_gradient(products, row_norms, col_norms, logit_scale, *rest):
    """dS by the class of its pair, g_label at the label, and its sums; log-sum-exps in units of log 2."""
    classes = ChunkClasses(*rest[:9])
    row_lse2, col_lse2, grad_row, grad_col, grad_label, like = rest[9:]
    t = similarities(products, row_norms, col_norms)
    other, positive = classes.of(t)
    s = t * logit_scale.reshape(()).to(t.dtype)

    def of_class(c: int) -> Tensor:
        # Where a sum is empty this is no number, and none of its pairs are of the class: they are masked.
        row, col = (_LN2 * lse[c].double() for lse in (row_lse2, col_lse2))
        found = (s - row.to(t.dtype)[:, None]).exp_().mul_(grad_row[c].to(t.dtype)[:, None])
        found += (s - col.to(t.dtype)).exp_().mul_(grad_col[c].to(t.dtype))
        return found

    ds = of_class(0)
    if other is not None:
        ds.masked_fill_(other, 0)
    if positive is not None:
        ds += of_class(1).masked_fill_(~positive, 0)
    if grad_label.numel():
        labels = _labels(ds, classes.label_offset)
        labels[:] = grad_label[max(0, -classes.label_offset) :][: len(labels)]
    sums = (ds.sum(1)[None], ds.sum(0)[None]) if row_norms.numel() else (ds[:0, 0].clone(), ds[:0, 0].clone())
    of_scale, of_all = (torch.sum(v, dtype=torch.float64).reshape(1) for v in (ds * t, ds))
    return ds.to(like.dtype, copy=True), of_scale, of_all, *sums


def _masked_chunk_sigmoid(
    products, logit_scale, logit_bias, row_ids, col_ids, row_weights, col_weights, soft_targets, like
):
    """The sigmoid loss of a chunk, dS = -w z sigmoid(-z S), and the sums of dS t and of dS."""
    scale, bias, row_weights, col_weights = (
        v.to(products.dtype) for v in (logit_scale.reshape(()), logit_bias.reshape(()), row_weights, col_weights)
    )
    positive = row_ids[:, None] == col_ids
    z = positive.to(products.dtype).mul_(2).sub_(1)
    a = torch.where(positive, row_weights[:, None] + col_weights, 1.0)
    s = z * (products * scale + bias)
    ds = torch.sigmoid(-s).mul_(z).neg_()
    losses = torch.nn.functional.logsigmoid(s).neg_()
    if soft_targets:
        # a softplus(-S) + (1 - a) softplus(S) = softplus(-S) + (1 - a) S, without cancellation where a = 1.
        rest = 1 - a
        losses += rest * s
        ds += rest
    else:
        losses *= a
        ds *= a
    loss, of_scale, of_bias = (torch.sum(v, dtype=torch.float64).reshape(1) for v in (losses, ds * products, ds))
    return loss, ds.to(like.dtype, copy=True), of_scale, of_bias


STEPS = {
    "contrastive_masked_chunk_lse": _masked_chunk_lse,
    "contrastive_masked_chunk_gradient": _masked_chunk_gradient,
    "contrastive_masked_chunk_sigmoid": _masked_chunk_sigmoid,
}

_library = torch.library.Library("gapkern", "IMPL")
for _name, _step in STEPS.items():
    _library.impl(_name, _step, "CompositeExplicitAutograd")

"""The operators over classes of pairs in chunks of rows, between library matrix products: CUDA and other devices.

Contract: `masked` and `masked_sigmoid`. Memory is linear in N + M, and a chunk of logits in several copies.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gapkern.ops.contrastive.arguments import MaskedArguments, MaskedBackwardArguments
from gapkern.ops.contrastive.chunked import _Gradients, _Logits
from gapkern.ops.products import matmul

CHUNK_ELEMENTS = 2**20  # logits at a time, in several copies: 4 MiB each in float32
CUDA_CHUNK_ELEMENTS = 2**25


class Masks:
    """Classes of a chunk's pairs."""

    def __init__(self, arguments: MaskedArguments, work: torch.dtype):
        self.arguments, self.work = arguments, work
        self.guided = bool(arguments.guide_x.numel())

    def labels(self, matrix: Tensor, first: int) -> Tensor:
        """A view of a chunk's labels, as many as it holds; `first` is the chunk's first row."""
        offset = first + self.arguments.label_offset
        if self.arguments.label != "none" and -matrix.shape[0] < offset < matrix.shape[1]:
            return matrix.diagonal(offset)
        return matrix[:0, 0]

    def rows_with_labels(self, rows: slice) -> slice:
        """Those of `rows`, as `labels` has them."""
        offset, m = self.arguments.label_offset, self.arguments.y.shape[0]
        if self.arguments.label == "none":
            return slice(0, 0)
        first = min(max(rows.start, -offset), rows.stop)
        return slice(first, max(first, min(rows.stop, m - offset)))

    def __call__(self, t: Tensor, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Which pairs of t (n, M) are no negatives, and which are positives; None: none."""
        a = self.arguments
        positive, other = None, None

        def also(mask: Tensor | None, found: Tensor) -> Tensor:
            return found if mask is None else mask.logical_or_(found)

        for matrix, row_limit, col_limit in (
            (t, a.row_limit, a.col_limit),
            (None, a.guide_row_limit, a.guide_col_limit),
        ):
            if not (row_limit.numel() or col_limit.numel()):
                continue
            if matrix is None:
                matrix = matmul(a.guide_x[rows].to(self.work), a.guide_y.to(self.work).T, self.work)
            if row_limit.numel():
                other = also(other, matrix > row_limit[rows, None].to(self.work))
            if col_limit.numel():
                other = also(other, matrix > col_limit.to(self.work))
        if a.row_ids.numel():
            same = a.row_ids[rows, None] == a.col_ids
            other = also(other, same)
            positive = same.clone() if a.equal == "positive" else None
        if a.label != "none":
            if other is None:
                other = torch.zeros_like(t, dtype=torch.bool)
            self.labels(other, rows.start).fill_(True)
            if positive is not None:
                self.labels(positive, rows.start).fill_(False)
        return other, positive


def _logits_of(x: Tensor, y: Tensor, similarity: str) -> _Logits:
    logits = _Logits(x, y, similarity)
    logits.step = max(1, (CUDA_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // y.shape[0])
    return logits


def _similarities(logits: _Logits, rows: slice) -> Tensor:
    products = logits.products(rows)
    if not logits.euclidean:
        return products
    row_norms, col_norms = logits.norms(rows)
    return products.mul_(2).sub_(row_norms[:, None]).sub_(col_norms).clamp_(max=0)


def masked_lse(arguments: MaskedArguments) -> tuple[Tensor, ...]:
    """The results of `contrastive_masked_lse`; nothing is kept."""
    logits = _logits_of(arguments.x, arguments.y, arguments.similarity)
    masks = Masks(arguments, logits.dtype)
    n, m = arguments.counts()
    scale = arguments.logit_scale.reshape(())
    empty = torch.full((n + m,), -math.inf, dtype=torch.float64, device=arguments.x.device)
    row_negative, col_negative = (part.clone() for part in empty.split([n, m]))
    row_positive, col_positive = (part.clone() for part in empty.split([n, m]))
    label_t = empty[:n].clone() if arguments.label == "counted" else empty[:0].clone()
    for rows in logits.chunks():
        t = _similarities(logits, rows)
        other, positive = masks(t, rows)
        if label_t.numel():
            label_t[masks.rows_with_labels(rows)] = masks.labels(t, rows.start).double()
        s = t.mul_(scale.to(t.dtype))
        if positive is not None:
            apart = s.masked_fill(~positive, -math.inf)
            row_positive[rows] = apart.logsumexp(1).double()
            col_positive = torch.logaddexp(col_positive, apart.logsumexp(0).double())
        if other is not None:
            s.masked_fill_(other, -math.inf)
        row_negative[rows] = s.logsumexp(1).double()
        col_negative = torch.logaddexp(col_negative, s.logsumexp(0).double())
    there = label_t > -math.inf  # a negative scale leaves a missing label at -inf
    label_logit = torch.where(there, label_t * scale.double(), label_t)
    none = empty[:0].clone()
    return row_negative, col_negative, row_positive, col_positive, label_logit, none, none.clone(), none.clone()


def _weights(s: Tensor, lse: Tensor, gradient: Tensor) -> Tensor:
    """g e^(s - lse). Where a sum is empty it is no number, and none of its pairs are of the class: they are masked."""
    return (s - lse.to(s.dtype)).exp_().mul_(gradient.to(s.dtype))


def masked_lse_backward(given: MaskedBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_lse`."""
    grads, lses, arguments, needs = given.grads, given.lses, given.pairs, given.needs
    logits = _logits_of(arguments.x, arguments.y, arguments.similarity)
    masks = Masks(arguments, logits.dtype)
    low = arguments.x.dtype if not logits.euclidean else logits.dtype
    loss_scale = torch.ones((), dtype=torch.float64, device=arguments.x.device)
    if low == torch.float16:  # gradients of 1/N underflow
        largest = torch.stack([g.abs().amax() for g in grads if g.numel()]).amax()
        loss_scale = torch.exp2(13 - torch.log2(largest.double()).ceil().nan_to_num(0, 0, 0))
    gradients = _Gradients(logits, needs, loss_scale)
    row_negative, col_negative, row_positive, col_positive, at_label = (g.double() * loss_scale for g in grads)
    scale = arguments.logit_scale.reshape(()).to(logits.dtype)
    for rows in logits.chunks():
        t = _similarities(logits, rows)
        other, positive = masks(t, rows)
        s = t * scale
        ds = _weights(s, lses[0][rows, None], row_negative[rows, None])
        ds += _weights(s, lses[1], col_negative)
        if other is not None:
            ds.masked_fill_(other, 0)
        if positive is not None:
            of_positives = _weights(s, lses[2][rows, None], row_positive[rows, None])
            of_positives += _weights(s, lses[3], col_positive)
            ds += of_positives.masked_fill_(~positive, 0)
        if at_label.numel():
            masks.labels(ds, rows.start).copy_(at_label[masks.rows_with_labels(rows)])
        sums = (ds.sum(1)[None], ds.sum(0)[None]) if logits.euclidean else (ds[:0, 0], ds[:0, 0])
        of_scale = torch.sum(t.mul_(ds), dtype=torch.float64).reshape(1)
        gradients.add(rows, ds.to(low), of_scale, *sums)
    dx, dy, of_scale = gradients.finish(scale)
    of_scale = of_scale.reshape(1).clone() if needs[2] else of_scale.new_empty(0)
    return dx.to(arguments.x.dtype), dy.to(arguments.y.dtype), of_scale.to(arguments.logit_scale.dtype)


def masked_sigmoid(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weights: Tensor,
    col_weights: Tensor,
    soft_targets: bool,
    precision: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.masked_sigmoid_sum`."""
    logits = _logits_of(x, y, "dot")
    gradients = _Gradients(logits, needs)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_bias = torch.zeros_like(loss)
    scale, bias = (v.reshape(()).to(logits.dtype) for v in (logit_scale, logit_bias))
    row_weights, col_weights = (w.to(logits.dtype) for w in (row_weights, col_weights))
    none = x.new_empty(0, dtype=logits.dtype)
    for rows in logits.chunks():
        t = logits.products(rows)
        positive = row_ids[rows, None] == col_ids
        z = positive.to(t.dtype).mul_(2).sub_(1)
        a = torch.where(positive, row_weights[rows, None] + col_weights, 1.0)
        s = z * (t * scale + bias)
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
        loss += torch.sum(losses, dtype=torch.float64)
        grad_bias += ds.sum(dtype=torch.float64)
        of_scale = torch.sum(ds * t, dtype=torch.float64).reshape(1)
        gradients.add(rows, ds.to(x.dtype), of_scale, none, none)
    dx, dy, of_scale = gradients.finish(scale)
    return loss, dx, dy, of_scale.clone(), grad_bias

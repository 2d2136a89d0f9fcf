"""The operators over classes of pairs in chunks of rows, between library matrix products: CUDA and other devices.

Contract: `masked` and `masked_sigmoid`. What lies between the products is `masked_steps`. Memory is linear in N + M.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gapkern.ops.contrastive import labels
from gapkern.ops.contrastive.arguments import MaskedArguments, MaskedBackwardArguments, MaskedSigmoidArguments
from gapkern.ops.contrastive.chunked import _Gradients, _labels, _Logits
from gapkern.ops.contrastive.masked_steps import ChunkClasses
from gapkern.ops.products import matmul

CHUNK_ELEMENTS = 2**20  # logits at a time where steps make several copies: 4 MiB each in float32
_LN2 = math.log(2.0)
_NOWHERE = -(2**40)  # a label's column where no pair is a label


def rows_with_labels(arguments: MaskedArguments, rows: slice) -> slice:
    """Those of `rows`."""
    if arguments.label == "none":
        return slice(0, 0)
    offset = arguments.label_offset
    first = min(max(rows.start, -offset), rows.stop)
    return slice(first, max(first, min(rows.stop, arguments.y.shape[0] - offset)))


def classes_of(arguments: MaskedArguments, rows: slice, work: torch.dtype) -> ChunkClasses:
    """Of a chunk of rows; the guide's products are formed in `work`."""
    a = arguments
    guide = a.guide_row_limit.new_empty(0, 0)
    if a.guide_row_limit.numel() or a.guide_col_limit.numel():
        guide = matmul(a.guide_x[rows].to(work), a.guide_y.to(work).T, work)
    return ChunkClasses(
        row_ids=a.row_ids[rows],
        col_ids=a.col_ids,
        row_limit=a.row_limit[rows],
        col_limit=a.col_limit,
        guide=guide,
        guide_row_limit=a.guide_row_limit[rows],
        guide_col_limit=a.guide_col_limit,
        label_offset=_NOWHERE if a.label == "none" else rows.start + a.label_offset,
        positive=a.equal == "positive" and a.row_ids.numel() > 0,
    )


def _logits_of(x: Tensor, y: Tensor, similarity: str, matrices: int = 1) -> _Logits:
    """`matrices` of a chunk's size are formed at once."""
    logits = _Logits(x, y, similarity)
    logits.step = max(1, logits.step // matrices if x.is_cuda else CHUNK_ELEMENTS // y.shape[0])
    return logits


class _Chunks:
    """The chunks of a problem, and the labels' t, where they are counted, met on the way."""

    def __init__(self, arguments: MaskedArguments):
        self.arguments = arguments
        a, guided = arguments, bool(arguments.guide_x.numel())
        self.logits = _logits_of(a.x, a.y, a.similarity, 1 + guided)
        count = a.x.shape[0] if a.label == "counted" else 0
        self.label_t = torch.full((count,), -math.inf, dtype=torch.float64, device=a.x.device)

    def __iter__(self) -> Iterator[tuple[slice, tuple]]:
        """Rows and the arguments of their steps: products, norms, logit_scale and classes."""
        for rows in self.logits.chunks():
            products, norms = self.logits.products(rows), self.logits.norms(rows)
            classes = classes_of(self.arguments, rows, self.logits.dtype)
            if len(self.label_t):
                self._read_labels(rows, products, norms)
            yield rows, (products, *norms, self.arguments.logit_scale, *classes)

    def _read_labels(self, rows: slice, products: Tensor, norms: tuple[Tensor, Tensor]) -> None:
        own, offset = rows_with_labels(self.arguments, rows), self.arguments.label_offset
        t = _labels(products, rows.start + offset)
        if self.logits.euclidean:
            of_rows = norms[0][own.start - rows.start : own.stop - rows.start]
            t = (2 * t - of_rows - norms[1][own.start + offset : own.stop + offset]).clamp_(max=0)
        self.label_t[own] = t.double()


def masked_lse(arguments: MaskedArguments) -> tuple[Tensor, ...]:
    """The results of `contrastive_masked_lse`; nothing is kept."""
    chunks = _Chunks(arguments)
    n, m = arguments.counts()
    row, col = (chunks.label_t.new_full((2, count), -math.inf) for count in (n, m))
    for rows, chunk in chunks:
        row_lse, col_lse = torch.ops.gapkern.contrastive_masked_chunk_lse(*chunk)
        row[: len(row_lse), rows] = row_lse
        col[: len(col_lse)] = torch.logaddexp(col[: len(col_lse)], col_lse)
    label_t = chunks.label_t
    there = label_t > -math.inf  # a negative scale leaves a missing label at -inf
    label_logit = torch.where(there, label_t * arguments.logit_scale.reshape(()).double(), label_t)
    none = label_t[:0]
    classes = row[0], col[0], row[1], col[1], label_logit
    return *(v.clone() for v in classes), none.clone(), none.clone(), none.clone()


def _exact_sum(given: MaskedBackwardArguments, label_t: Tensor, factor: Tensor) -> Tensor:
    """The sum of dS, 0-d: that of the incoming gradients of sums that are not empty, times `factor`."""
    classes = zip(given.grads[:4], given.lses, strict=True)
    parts = [g.double().masked_fill(lse == -math.inf, 0).sum() for g, lse in classes]
    at_label = given.grads[4].double().masked_fill(label_t == -math.inf, 0).sum()
    return factor * (torch.stack(parts).sum() + at_label)


def masked_lse_backward(given: MaskedBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_lse`."""
    grads, lses, arguments, needs = given.grads, given.lses, given.pairs, given.needs
    chunks = _Chunks(arguments)
    logits = chunks.logits
    low = logits.images if not logits.euclidean else logits.image_norms  # whose dtype dS has
    loss_scale = labels.loss_scale_of(grads, low.dtype)
    gradients = _Gradients(logits, needs, loss_scale)
    of_row, of_col = (torch.stack(pair).double() * loss_scale for pair in (grads[:4:2], grads[1:4:2]))
    row_lse2, col_lse2 = (torch.stack(pair).double() / _LN2 for pair in (lses[::2], lses[1::2]))
    at_label = grads[4].double() * loss_scale
    of_all = torch.zeros_like(loss_scale)
    for rows, chunk in chunks:
        classes = 2 if chunk[-1] else 1
        weights = row_lse2[:classes, rows], col_lse2[:classes], of_row[:classes, rows], of_col[:classes]
        ds, of_scale, all_of_chunk, *sums = torch.ops.gapkern.contrastive_masked_chunk_gradient(
            *chunk, *weights, at_label[rows], low
        )
        of_all += all_of_chunk.sum()
        gradients.add(rows, ds, of_scale, *sums)
    label_t = chunks.label_t
    if len(label_t):
        # Around a label that outweighs all others dS is a difference of large numbers: what its sum has too much of is
        # taken off at the labels' mean.
        mean_t = label_t.masked_fill(label_t == -math.inf, 0).mean()
        gradients.of_scale -= mean_t * (of_all - _exact_sum(given, label_t, loss_scale))
    dx, dy, of_scale = gradients.finish(arguments.logit_scale.reshape(()))
    of_scale = of_scale.reshape(1).clone() if needs[2] else of_scale.new_empty(0)
    return dx.to(arguments.x.dtype), dy.to(arguments.y.dtype), of_scale.to(arguments.logit_scale.dtype)


def masked_sigmoid(arguments: MaskedSigmoidArguments) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.masked_sigmoid_sum`."""
    a = arguments
    logits = _logits_of(a.x, a.y, "dot")
    gradients = _Gradients(logits, a.needs)
    loss = torch.zeros((), dtype=torch.float64, device=a.x.device)
    grad_bias = torch.zeros_like(loss)
    none = logits.image_norms
    for rows in logits.chunks():
        ids, weights = (a.row_ids[rows], a.col_ids), (a.row_weights[rows], a.col_weights)
        losses, ds, of_scale, of_bias = torch.ops.gapkern.contrastive_masked_chunk_sigmoid(
            logits.products(rows), a.logit_scale, a.logit_bias, *ids, *weights, a.soft_targets, a.x
        )
        loss += losses.sum()
        grad_bias += of_bias.sum()
        gradients.add(rows, ds, of_scale, none, none)
    dx, dy, of_scale = gradients.finish(a.logit_scale.reshape(()))
    return loss, dx, dy, of_scale.clone(), grad_bias

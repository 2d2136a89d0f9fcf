"""The contrastive operators in chunks of rows from PyTorch's own operations: every device without kernels of ours.

Same schemas and contract as csrc/contrastive/contrastive.h, memory linear in N + M; what is lost against a fused kernel
is speed alone, as each chunk of logits passes through memory several times.
"""

import math

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # logits at hand: 64 MiB in float32

_LN2 = math.log(2.0)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b with the result, not just the accumulation, in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _Rows:
    """The logits of a few rows at a time; t = S / logit_scale."""

    def __init__(self, images: Tensor, texts: Tensor, similarity: str):
        self.images, self.texts = images, texts
        self.euclidean = similarity == "sqeuclidean"
        self.dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.step = max(1, CHUNK_ELEMENTS // texts.shape[0])
        if self.euclidean:
            centre = texts.to(self.dtype).mean(0)
            self.images, self.texts = images.to(self.dtype) - centre, texts.to(self.dtype) - centre
            self.image_norms, self.text_norms = self.images.square().sum(1), self.texts.square().sum(1)

    def chunks(self):
        n = self.images.shape[0]
        return (slice(i, min(n, i + self.step)) for i in range(0, n, self.step))

    def t(self, rows: slice) -> Tensor:
        products = _product(self.images[rows], self.texts.T, self.dtype)
        if not self.euclidean:
            return products
        return 2 * products - self.image_norms[rows, None] - self.text_norms[None]


class _Gradients:
    """Accumulates dX, dY and d logit_scale from chunks of dS."""

    def __init__(self, logits: _Rows, needs):
        self.logits, self.needs = logits, needs
        x, y, dtype = logits.images, logits.texts, logits.dtype
        self.dx = torch.zeros(x.shape if needs[0] else (0,), dtype=dtype, device=x.device)
        self.dy = torch.zeros(y.shape if needs[1] else (0,), dtype=dtype, device=x.device)
        self.scale = torch.zeros((), dtype=torch.float64, device=x.device)
        self.row_sums = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        self.column_sums = torch.zeros(y.shape[0], dtype=dtype, device=x.device)

    def add(self, rows: slice, ds: Tensor, t: Tensor) -> None:
        x, y, dtype = self.logits.images, self.logits.texts, self.logits.dtype
        self.scale += torch.sum(ds * t, dtype=torch.float64)
        if self.logits.euclidean:
            self.row_sums[rows] = ds.sum(1)
            self.column_sums += ds.sum(0)
        ds = ds.to(x.dtype)
        if self.needs[0]:
            self.dx[rows] = _product(ds, y, dtype)
        if self.needs[1]:
            self.dy += _product(ds.T, x[rows], dtype)

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale.to(self.logits.dtype)
        if self.logits.euclidean:
            scale = 2 * scale
            if self.needs[0]:
                self.dx -= self.row_sums[:, None] * self.logits.images
            if self.needs[1]:
                self.dy -= self.column_sums[:, None] * self.logits.texts
        return self.dx * scale, self.dy * scale


def contrastive_lse(images, texts, logit_scale, similarity, label_offset, precision, work_bytes):
    """See `gapkern.ops.contrastive.lse_pair`."""
    logits = _Rows(images, texts, similarity)
    n, m = images.shape[0], texts.shape[0]
    scale = logit_scale.reshape(()).to(logits.dtype)
    kept = images.new_empty((min(n, max(work_bytes, 0) // (m * logits.dtype.itemsize)), m), dtype=logits.dtype)
    row = torch.empty(n, dtype=torch.float64, device=images.device)
    col = torch.full((m,), -math.inf, dtype=torch.float64, device=images.device)
    positive = torch.empty_like(row)
    for rows in logits.chunks():
        t = logits.t(rows)
        kept[rows.start : rows.stop] = t[: max(0, kept.shape[0] - rows.start)]
        s = t * scale
        row[rows] = s.logsumexp(1).double()
        col = torch.logaddexp(col, s.logsumexp(0).double())
        positive[rows] = s.diagonal(rows.start + label_offset)[: s.shape[0]].double()
    stats = [torch.stack([torch.zeros_like(lse), lse / _LN2]) for lse in (row, col)]
    return row, col, positive, *stats, kept


def contrastive_lse_backward(
    grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats, col_stats, kept, similarity, label_offset,
    precision, needs,
):  # fmt: skip
    """Gradients of `contrastive_lse`."""
    logits = _Rows(images, texts, similarity)
    scale = logit_scale.reshape(()).to(logits.dtype)
    row, col = ((scale.double() * stats[0] + _LN2 * stats[1]).to(logits.dtype) for stats in (row_stats, col_stats))
    grad_row, grad_col, grad_positive = (g.to(logits.dtype) for g in (grad_row, grad_col, grad_positive))
    gradients = _Gradients(logits, needs)
    for rows in logits.chunks():
        t = kept[rows] if rows.stop <= kept.shape[0] else logits.t(rows)
        s = t * scale
        ds = (s - row[rows, None]).exp_().mul_(grad_row[rows, None])
        ds += (s - col).exp_().mul_(grad_col)
        ds.diagonal(rows.start + label_offset)[: ds.shape[0]] += grad_positive[rows]
        gradients.add(rows, ds, t)
    dx, dy = gradients.finish(scale)
    ds = gradients.scale.reshape(1) if needs[2] else gradients.scale.new_empty(0)
    return dx.to(images.dtype), dy.to(texts.dtype), ds.to(logit_scale.dtype)


def sigmoid_loss(images, texts, logit_scale, logit_bias, label_offset, precision, needs):
    """See `gapkern.ops.contrastive.sigmoid_sum`."""
    logits = _Rows(images, texts, "dot")
    scale, bias = (v.reshape(()).to(logits.dtype) for v in (logit_scale, logit_bias))
    gradients = _Gradients(logits, needs)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    grad_bias = torch.zeros_like(loss)
    columns = torch.arange(texts.shape[0], device=images.device)
    for rows in logits.chunks():
        t = logits.t(rows)
        labels = torch.arange(rows.start, rows.stop, device=images.device) + label_offset
        z = torch.where(columns == labels[:, None], 1.0, -1.0).to(logits.dtype)
        s = z * (t * scale + bias)
        loss -= torch.nn.functional.logsigmoid(s).sum(dtype=torch.float64)
        ds = -z * torch.sigmoid(-s)
        grad_bias += ds.sum(dtype=torch.float64)
        gradients.add(rows, ds, t)
    dx, dy = gradients.finish(scale)
    return loss, dx, dy, gradients.scale.clone(), grad_bias

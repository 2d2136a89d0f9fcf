"""The contrastive operators in chunks of rows of the logits, between library matrix products: CUDA and other devices.

Same schemas and contract as csrc/contrastive/contrastive.h, memory linear in N + M. What lies between the products is
three operators, `contrastive_chunk_*`: a kernel each on CUDA (csrc/contrastive/kernels.cuh), PyTorch's operations here.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gapkern.ops.contrastive import labels
from gapkern.ops.contrastive.arguments import LseBackwardArguments
from gapkern.ops.products import add_matmul, matmul, write_matmul

CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MiB in float32
CUDA_CHUNK_ELEMENTS = 2**26  # enough rows that the products fill a large GPU

_LN2 = math.log(2.0)


class _Logits:
    """Products <x, y> of a chunk of rows, and the squared norms that turn them into squared distances."""

    def __init__(self, images: Tensor, texts: Tensor, similarity: str):
        self.images, self.texts = images, texts
        self.euclidean = similarity == "sqeuclidean"
        self.dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        elements = CUDA_CHUNK_ELEMENTS if images.is_cuda else CHUNK_ELEMENTS
        self.step = max(1, elements // texts.shape[0])
        self.image_norms = self.text_norms = images.new_empty(0, dtype=self.dtype)
        if self.euclidean:
            centre = texts.to(self.dtype).mean(0)
            self.images, self.texts = images.to(self.dtype) - centre, texts.to(self.dtype) - centre
            self.image_norms, self.text_norms = self.images.square().sum(1), self.texts.square().sum(1)

    def chunks(self) -> Iterator[slice]:
        n = self.images.shape[0]
        return (slice(i, min(n, i + self.step)) for i in range(0, n, self.step))

    def products(self, rows: slice) -> Tensor:
        return matmul(self.images[rows], self.texts.T, self.dtype)

    def norms(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.image_norms[rows], self.text_norms


class _Gradients:
    """Accumulates dX, dY and d logit_scale from chunks of dS, which come multiplied by `loss_scale`."""

    def __init__(self, logits: _Logits, needs: Sequence[bool], loss_scale: Tensor | None = None):
        self.logits, self.needs = logits, needs
        x, y, dtype = logits.images, logits.texts, logits.dtype
        self.dx = torch.zeros(x.shape if needs[0] else (0,), dtype=dtype, device=x.device)
        self.dy = torch.zeros(y.shape if needs[1] else (0,), dtype=dtype, device=x.device)
        self.of_scale = torch.zeros((), dtype=torch.float64, device=x.device)
        self.row_sums = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
        self.column_sums = torch.zeros(y.shape[0], dtype=dtype, device=x.device)
        one = torch.ones((), dtype=dtype, device=x.device)
        self.loss_scale = one if loss_scale is None else loss_scale.to(dtype)

    def add(self, rows: slice, ds: Tensor, of_scale: Tensor, row_sums: Tensor, col_sums: Tensor) -> None:
        """ds (n, M); the others are partial sums, to be added over their first dimension."""
        x, y = self.logits.images, self.logits.texts
        self.of_scale += of_scale.sum()
        if self.logits.euclidean:
            self.row_sums[rows] = row_sums.sum(0)
            self.column_sums += col_sums.sum(0)
        if self.needs[0]:
            write_matmul(self.dx[rows], ds, y)
        if self.needs[1]:
            add_matmul(self.dy, ds.T, x[rows])

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = scale.to(self.logits.dtype)
        if self.logits.euclidean:
            scale = 2 * scale
            if self.needs[0]:
                self.dx -= self.row_sums[:, None] * self.logits.images
            if self.needs[1]:
                self.dy -= self.column_sums[:, None] * self.logits.texts
        scale = scale / self.loss_scale
        return self.dx.mul_(scale), self.dy.mul_(scale), self.of_scale / self.loss_scale


def contrastive_lse(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    similarity: str,
    label_offset: int,
    precision: str,
    work_bytes: int,
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.lse_pair`."""
    logits = _Logits(images, texts, similarity)
    n, m = images.shape[0], texts.shape[0]
    kept = images.new_empty((min(n, max(work_bytes, 0) // (m * logits.dtype.itemsize)), m), dtype=logits.dtype)
    row = torch.empty(n, dtype=torch.float64, device=images.device)
    col = torch.full((m,), -math.inf, dtype=torch.float64, device=images.device)
    label_t = torch.empty_like(row)
    for rows in logits.chunks():
        products, norms = logits.products(rows), logits.norms(rows)
        kept[rows.start : rows.stop] = products[: max(0, kept.shape[0] - rows.start)]
        row[rows], col_lse = torch.ops.gapkern.contrastive_chunk_lse(
            products, *norms, logit_scale, rows.start + label_offset
        )
        col = torch.logaddexp(col, col_lse)
        at_label = products.diagonal(rows.start + label_offset)[: products.shape[0]].double()
        if logits.euclidean:
            at_label = 2 * at_label - norms[0] - norms[1][rows.start + label_offset :][: len(at_label)]
        label_t[rows] = at_label
    return *labels.with_labels(row, col, label_t, logit_scale, label_offset), kept


def contrastive_lse_backward(arguments: LseBackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrastive_lse`."""
    images, texts, logit_scale, kept = arguments.images, arguments.texts, arguments.logit_scale, arguments.kept
    logits = _Logits(images, texts, arguments.similarity)
    gradients = _Gradients(logits, arguments.needs, labels.loss_scale(arguments, logits.images.dtype))
    arguments = arguments.scaled(gradients.loss_scale)
    grad_label = labels.gradient(arguments)
    row_lse2, col_lse2 = labels.lse2(arguments)
    for rows in logits.chunks():
        products = kept[rows] if rows.stop <= kept.shape[0] else logits.products(rows)
        ds, *sums = torch.ops.gapkern.contrastive_chunk_gradient(
            products,
            *logits.norms(rows),
            logit_scale,
            row_lse2[rows],
            col_lse2,
            arguments.grad_row[rows],
            arguments.grad_col,
            grad_label[rows],
            rows.start + arguments.label_offset,
            logits.images,
        )
        gradients.add(rows, ds, *sums)
    dx, dy, of_scale = gradients.finish(logit_scale.reshape(()))
    of_scale = of_scale.reshape(1) if arguments.needs[2] else of_scale.new_empty(0)
    return dx.to(images.dtype), dy.to(texts.dtype), of_scale.to(logit_scale.dtype)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    label_offset: int,
    precision: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """See `gapkern.ops.contrastive.sigmoid_sum`."""
    logits = _Logits(images, texts, "dot")
    gradients = _Gradients(logits, needs)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    grad_bias = torch.zeros_like(loss)
    none = logits.image_norms
    for rows in logits.chunks():
        losses, ds, of_scale, of_bias = torch.ops.gapkern.contrastive_chunk_sigmoid(
            logits.products(rows), logit_scale, logit_bias, rows.start + label_offset, images
        )
        loss += losses.sum()
        grad_bias += of_bias.sum()
        gradients.add(rows, ds, of_scale, none, none)
    dx, dy, of_scale = gradients.finish(logit_scale.reshape(()))
    return loss, dx, dy, of_scale.clone(), grad_bias


def _logits(products: Tensor, row_norms: Tensor, col_norms: Tensor) -> Tensor:
    return products if not row_norms.numel() else 2 * products - row_norms[:, None] - col_norms


def _labels(matrix: Tensor, label_offset: int) -> Tensor:
    """The entries of a chunk at its rows' labels, as many as it holds."""
    if -matrix.shape[0] < label_offset < matrix.shape[1]:
        return matrix.diagonal(label_offset)
    return matrix[:0, 0]


def _chunk_lse(products, row_norms, col_norms, logit_scale, label_offset):
    """Log-sum-exps over the rows and over the columns of a chunk, all but the labels, in float64."""
    s = _logits(products, row_norms, col_norms) * logit_scale.reshape(()).to(products.dtype)
    _labels(s, label_offset).fill_(-math.inf)
    return s.logsumexp(1).double(), s.logsumexp(0).double()


def _chunk_gradient(
    products, row_norms, col_norms, logit_scale, row_lse2, col_lse2, grad_row, grad_col, grad_label, label_offset, like
):
    """dS = g_row e^(S - row_lse) + g_col e^(S - col_lse), but g_label at the label; log-sum-exps in units of log 2."""
    t = _logits(products, row_norms, col_norms)
    s = t * logit_scale.reshape(()).to(t.dtype)
    row, col = (_LN2 * lse.to(torch.float64) for lse in (row_lse2, col_lse2))
    grad_row, grad_col, grad_label = (g.to(t.dtype) for g in (grad_row, grad_col, grad_label))
    ds = (s - row.to(t.dtype)[:, None]).exp_().mul_(grad_row[:, None])
    ds += (s - col.to(t.dtype)).exp_().mul_(grad_col)
    labels = _labels(ds, label_offset)
    labels[:] = grad_label[max(0, -label_offset) :][: len(labels)]
    sums = (ds.sum(1)[None], ds.sum(0)[None]) if row_norms.numel() else (ds[:0, 0], ds[:0, 0])
    return ds.to(like.dtype, copy=True), torch.sum(ds * t, dtype=torch.float64).reshape(1), *(v.clone() for v in sums)


def _chunk_sigmoid(products, logit_scale, logit_bias, label_offset, like):
    """The sigmoid loss of a chunk, dS = -z sigmoid(-z S), and the sums of dS t and of dS."""
    scale, bias = (v.reshape(()).to(products.dtype) for v in (logit_scale, logit_bias))
    rows, columns = (torch.arange(n, device=products.device) for n in products.shape)
    z = torch.where(columns == rows[:, None] + label_offset, 1.0, -1.0).to(products.dtype)
    s = z * (products * scale + bias)
    ds = -z * torch.sigmoid(-s)
    loss = -torch.nn.functional.logsigmoid(s).sum(dtype=torch.float64)
    sums = (torch.sum(v, dtype=torch.float64).reshape(1) for v in (ds * products, ds))
    return loss.reshape(1), ds.to(like.dtype, copy=True), *sums


STEPS = {
    "contrastive_chunk_lse": _chunk_lse,
    "contrastive_chunk_gradient": _chunk_gradient,
    "contrastive_chunk_sigmoid": _chunk_sigmoid,
}

_library = torch.library.Library("gapkern", "IMPL")
for _name, _step in STEPS.items():
    _library.impl(_name, _step, "CompositeExplicitAutograd")

"""Forward-mode derivatives of the contrastive operators, in chunks of rows and operations that can be differentiated.

With t = <x, y>, or -||x - y||^2, and S = s t: dS = ds t + s dt; a log-sum-exp's tangent is the softmax's mean of dS.
"""

import torch
from torch import Tensor

from gapkern.ops.contrastive.chunked import CHUNK_ELEMENTS


class _Logits:
    """S and dS of a few rows at a time."""

    def __init__(self, inputs, tangents, similarity: str):
        images = inputs[0]
        self.work = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.x, self.y, self.s = (t.to(self.work) for t in inputs[:3])
        self.dx, self.dy, self.ds = (None if t is None else t.to(self.work) for t in tangents[:3])
        self.s = self.s.reshape(())
        self.ds = None if self.ds is None else self.ds.reshape(())
        self.euclidean = similarity == "sqeuclidean"

    def chunks(self) -> list[slice]:
        wide = len(self.y) * (self.x.shape[1] if self.euclidean else 1)
        step = max(1, CHUNK_ELEMENTS // wide)
        return [slice(i, min(len(self.x), i + step)) for i in range(0, len(self.x), step)]

    def products(self, rows: slice) -> Tensor:
        if self.euclidean:
            return -(self.x[rows, None] - self.y).square().sum(2)
        return self.x[rows] @ self.y.T

    def of(self, rows: slice) -> Tensor:
        return self.s * self.products(rows)

    def tangent(self, rows: slice) -> Tensor:
        t = self.products(rows)
        total = torch.zeros_like(t) if self.ds is None else self.ds * t
        if self.euclidean:
            apart = self.x[rows, None] - self.y
            if self.dx is not None:
                total = total - 2 * self.s * (apart * self.dx[rows, None]).sum(2)
            if self.dy is not None:
                total = total + 2 * self.s * (apart * self.dy).sum(2)
            return total
        if self.dx is not None:
            total = total + self.s * (self.dx[rows] @ self.y.T)
        if self.dy is not None:
            total = total + self.s * (self.x[rows] @ self.dy.T)
        return total


def log_sum_exps(inputs, tangents) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of row_lse (N,), col_lse (M,) and positive (N,), in float64."""
    similarity, label_offset = inputs[3], inputs[4]
    logits = _Logits(inputs, tangents, similarity)
    column = torch.stack([logits.of(rows).double().logsumexp(0) for rows in logits.chunks()]).logsumexp(0)
    of_rows, of_labels, of_columns = [], [], torch.zeros_like(column)
    for rows in logits.chunks():
        s, ds = logits.of(rows).double(), logits.tangent(rows).double()
        of_rows.append((s.softmax(1) * ds).sum(1))
        of_columns = of_columns + ((s - column).exp() * ds).sum(0)
        of_labels.append(ds.diagonal(rows.start + label_offset)[: len(s)])
    return torch.cat(of_rows), of_columns, torch.cat(of_labels)


def sigmoid(inputs, tangents) -> Tensor:
    """The tangent of the summed sigmoid loss, 0-d float64."""
    logits = _Logits(inputs, tangents, "dot")
    bias, label_offset = inputs[3].reshape(()).to(logits.work), inputs[4]
    of_bias = None if tangents[3] is None else tangents[3].reshape(()).to(logits.work)
    columns = torch.arange(len(logits.y), device=bias.device)
    total = torch.zeros((), dtype=torch.float64, device=bias.device)
    for rows in logits.chunks():
        labels = torch.arange(rows.start + label_offset, rows.stop + label_offset, device=bias.device)
        negative = torch.where(columns == labels[:, None], -1, 1).to(logits.work)
        ds = logits.tangent(rows) if of_bias is None else logits.tangent(rows) + of_bias
        total = total + (negative * torch.sigmoid(negative * (logits.of(rows) + bias)) * ds).sum(dtype=torch.float64)
    return total

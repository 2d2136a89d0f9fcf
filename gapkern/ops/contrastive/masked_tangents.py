"""Forward-mode derivatives of the operators over classes of pairs, as those of `tangents`."""

import math

import torch
from torch import Tensor

from gapkern.ops.contrastive.arguments import MaskedArguments
from gapkern.ops.contrastive.chunked import _labels
from gapkern.ops.contrastive.masked_chunked import classes_of, rows_with_labels
from gapkern.ops.contrastive.tangents import _Logits


def masked_lse(inputs, tangents) -> tuple[Tensor | None, ...]:
    """Tangents of the operator's results, in float64; None for what is kept."""
    arguments = MaskedArguments(*inputs)
    logits = _Logits(inputs, tangents, arguments.similarity)
    chunks = logits.chunks()

    def classes(rows):
        s = logits.of(rows).double()
        other, positive = classes_of(arguments, rows, logits.work).of(logits.products(rows).detach())
        negative = torch.ones_like(s, dtype=torch.bool) if other is None else ~other
        return s, negative, torch.zeros_like(negative) if positive is None else positive

    def lse(s, mask, dim):
        return s.masked_fill(~mask, -math.inf).logsumexp(dim)

    columns = []
    for of_class in (1, 2):
        parts = [lse(found[0], found[of_class], 0) for found in map(classes, chunks)]
        columns.append(torch.stack(parts).logsumexp(0))
    rows_of: tuple[list[Tensor], list[Tensor]] = ([], [])
    columns_of, labels_of = [torch.zeros_like(c) for c in columns], []
    for rows in chunks:
        s, *of_classes = classes(rows)
        ds = logits.tangent(rows).double()
        for k, mask in enumerate(of_classes):
            for dim, total in ((1, lse(s, mask, 1)[:, None]), (0, columns[k])):
                total = total.masked_fill(total == -math.inf, 0)
                part = ((s - total).masked_fill(~mask, -math.inf).exp() * ds).sum(dim)
                if dim:
                    rows_of[k].append(part)
                else:
                    columns_of[k] = columns_of[k] + part
        if arguments.label == "counted":
            own = rows_with_labels(arguments, rows)
            padding = (own.start - rows.start, rows.stop - own.stop)
            at_labels = _labels(ds, rows.start + arguments.label_offset)
            labels_of.append(torch.nn.functional.pad(at_labels, padding))
    label = torch.cat(labels_of) if labels_of else rows_of[0][0][:0]
    return torch.cat(rows_of[0]), columns_of[0], torch.cat(rows_of[1]), columns_of[1], label, None, None, None


def masked_sigmoid(inputs, tangents) -> Tensor:
    """The tangent of the summed sigmoid loss, 0-d float64."""
    logits = _Logits(inputs, tangents, "dot")
    bias, row_ids, col_ids, row_weights, col_weights = inputs[3:8]
    bias, row_weights, col_weights = (t.to(logits.work) for t in (bias.reshape(()), row_weights, col_weights))
    of_bias = 0 if tangents[3] is None else tangents[3].reshape(()).to(logits.work)
    total = torch.zeros((), dtype=torch.float64, device=bias.device)
    for rows in logits.chunks():
        positive = row_ids[rows, None] == col_ids
        a = torch.where(positive, row_weights[rows, None] + col_weights, 0)
        b = torch.where(positive, 1 - a if inputs[8] else 0, 1)
        s = logits.of(rows) + bias
        gradient = b * torch.sigmoid(s) - a * torch.sigmoid(-s)
        total = total + (gradient * (logits.tangent(rows) + of_bias)).sum(dtype=torch.float64)
    return total

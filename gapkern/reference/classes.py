"""The operators over classes of pairs as their definitions read, with all logits and masks in memory."""

import torch
from torch import Tensor

INF = float("inf")


def similarities(x: Tensor, y: Tensor, similarity: str = "dot") -> Tensor:
    """t (N, M): <x, y>, or -||x - y||^2.

    Example:
        >>> similarities(torch.eye(2), torch.eye(2), "sqeuclidean").tolist()
        [[-0.0, -2.0], [-2.0, -0.0]]
    """
    return x @ y.T if similarity == "dot" else -(x[:, None] - y[None]).square().sum(2)


def lse(s: Tensor, mask: Tensor, dim: int) -> Tensor:
    """logsumexp over the pairs of a mask; -inf where there are none, without a gradient."""
    there = mask.any(dim, keepdim=True)
    found = torch.where(mask, s, torch.full_like(s, -INF)).masked_fill(~there, 0).logsumexp(dim)
    return torch.where(there.squeeze(dim), found, torch.full_like(found, -INF))


def masked_lse(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal: str = "left_out",
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    guide_x: Tensor | None = None,
    guide_y: Tensor | None = None,
    guide_row_limit: Tensor | None = None,
    guide_col_limit: Tensor | None = None,
    similarity: str = "dot",
    label_offset: int = 0,
    label: str = "counted",
) -> tuple[Tensor, ...]:
    """Row and column log-sum-exps over negatives, the same over positives, and the labels' logits.

    Example:
        >>> row, *_ = masked_lse(torch.eye(2), torch.eye(2), 1.0)
        >>> row.tolist()
        [0.0, 0.0]
    """
    t = similarities(x, y, similarity)
    rows, columns = (torch.arange(n, device=t.device) for n in t.shape)
    labels = columns == rows[:, None] + label_offset
    if label == "none":
        labels = torch.zeros_like(labels)
    left_out = torch.zeros_like(labels)
    if row_limit is not None:
        left_out = left_out | (t > row_limit[:, None])
    if col_limit is not None:
        left_out = left_out | (t > col_limit)
    if guide_x is not None:
        assert guide_y is not None
        u = guide_x @ guide_y.T
        if guide_row_limit is not None:
            left_out = left_out | (u > guide_row_limit[:, None])
        if guide_col_limit is not None:
            left_out = left_out | (u > guide_col_limit)
    positive = torch.zeros_like(labels)
    if row_ids is not None:
        same = row_ids[:, None] == col_ids
        if equal == "positive":
            positive = same & ~labels
        else:
            left_out = left_out | same
    negative = ~labels & ~positive & ~left_out
    s = logit_scale * t
    found = [lse(s, mask, dim) for mask in (negative, positive) for dim in (1, 0)]
    counted = lse(s, labels, 1) if label == "counted" else s.new_empty(0)
    return *found, counted


def class_sums(
    x: Tensor,
    y: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    *,
    similarity: str = "dot",
    label_offset: int = 0,
    labelled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rows' and columns' sums of t over the pairs of equal ids, where `labelled` without the labels.

    Example:
        >>> row, column = class_sums(torch.eye(2), torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> row.tolist(), column.tolist()
        ([0.0, 0.0], [0.0, 0.0])
    """
    equal = row_ids[:, None] == col_ids
    if labelled:
        rows, columns = (torch.arange(n, device=x.device) for n in equal.shape)
        equal = equal & (columns != rows[:, None] + label_offset)
    t = torch.where(equal, similarities(x, y, similarity), 0)
    return t.sum(1), t.sum(0)


def masked_sigmoid_sum(
    x: Tensor,
    y: Tensor,
    s: Tensor | float,
    bias: Tensor | float,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weights: Tensor,
    col_weights: Tensor,
    *,
    soft_targets: bool = False,
) -> Tensor:
    """sum_ij a_ij softplus(-S_ij) + b_ij softplus(S_ij); of equal ids a are weights, or with soft_targets targets.

    Example:
        >>> x, ids, half = torch.eye(2), torch.arange(2), torch.full((2,), 0.5)
        >>> round(float(masked_sigmoid_sum(x, x, 10.0, -10.0, ids, ids, half, half)), 4)
        1.3864
    """
    logits = s * (x @ y.T) + bias
    right = row_ids[:, None] == col_ids
    a = torch.where(right, (row_weights[:, None] + col_weights).to(logits.dtype), 1)
    losses = -torch.nn.functional.logsigmoid(torch.where(right, logits, -logits))
    # b = 1 - a: a softplus(-S) + b softplus(S) = softplus(-S) + b S
    return (losses + (1 - a) * logits).sum() if soft_targets else (a * losses).sum()

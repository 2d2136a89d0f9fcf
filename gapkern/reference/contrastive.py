"""The contrastive losses as their definitions read, with all N x M logits in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


def logits(images: Tensor, texts: Tensor, logit_scale: Tensor | float, similarity: str = "dot") -> Tensor:
    """S (N, M): s <x_i, y_j>, or -s ||x_i - y_j||^2.

    Example:
        >>> logits(torch.eye(2), torch.eye(2), 3.0, "sqeuclidean").tolist()
        [[-0.0, -6.0], [-6.0, -0.0]]
    """
    if similarity == "dot":
        return logit_scale * (images @ texts.T)
    return -logit_scale * (images[:, None] - texts[None]).square().sum(2)


def lse_pair(
    images: Tensor, texts: Tensor, logit_scale: Tensor | float, similarity: str = "dot", label_offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column log-sum-exps (N,), (M,) of the logits, and the logits of the labels (N,)."""
    s = logits(images, texts, logit_scale, similarity)
    return s.logsumexp(1), s.logsumexp(0), s.diagonal(label_offset)[: s.shape[0]]


def prefix_lse(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    row_factors: Tensor,
    col_factors: Tensor,
    dims: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`lse_pair` of each prefix of the embeddings, whose rows are multiplied by its factors.

    Example:
        >>> ones = torch.ones(2, 3)
        >>> row, _, _ = prefix_lse(torch.eye(3), torch.eye(3), torch.tensor(2.0), ones, ones, (2, 3))
        >>> row.shape
        torch.Size([2, 3])
    """
    found = []
    for width, of_rows, of_columns in zip(dims, row_factors, col_factors, strict=True):
        x, y = (t[:, :width] * f[:, None].to(t.dtype) for t, f in ((images, of_rows), (texts, of_columns)))
        found.append(lse_pair(x, y, logit_scale))
    row, col, positive = (torch.stack(same) for same in zip(*found, strict=True))
    return row, col, positive


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    similarity: str = "dot",
    reduction: str = "mean",
) -> Tensor:
    """Half of Eq. 6 per pair: the mean of the two directions' cross-entropies.

    Example:
        >>> round(float(contrastive_loss(torch.eye(2), torch.eye(2), 1.0)), 4)
        0.3133
    """
    s = logits(images, texts, logit_scale, similarity)
    if logit_bias is not None:
        s = s + logit_bias
    labels = torch.arange(len(s), device=s.device)
    losses = (
        torch.nn.functional.cross_entropy(s, labels, reduction="none")
        + torch.nn.functional.cross_entropy(s.T, labels, reduction="none")
    ) / 2
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def sigmoid_sum(
    images: Tensor, texts: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float, label_offset: int = 0
) -> Tensor:
    """Sum over all pairs of softplus(-z (S + bias)), z = +1 for the labels and -1 elsewhere."""
    s = logits(images, texts, logit_scale) + logit_bias
    rows = torch.arange(s.shape[0], device=s.device)[:, None]
    z = torch.where(torch.arange(s.shape[1], device=s.device) == rows + label_offset, 1.0, -1.0).to(s.dtype)
    # Not softplus, which PyTorch cuts off at 20.
    return -torch.nn.functional.logsigmoid(z * s).sum()

"""The arguments of the log-sum-exps' operators, by name, in the order of their schemas (csrc/library.cpp)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LseBackwardArguments(NamedTuple):
    """Of `contrastive_lse_backward`."""

    grad_row: Tensor  # (N,) float64
    grad_col: Tensor  # (M,) float64
    grad_positive: Tensor  # (N,) float64
    images: Tensor  # (N, D)
    texts: Tensor  # (M, D)
    logit_scale: Tensor  # one element
    row_stats: Tensor  # (3, N) float64, of the forward pass
    col_stats: Tensor  # (2, M) float64, of the forward pass
    kept: Tensor  # (rows, M) logits or exponentials of the first rows, of the forward pass
    similarity: str
    label_offset: int
    precision: str
    needs: Sequence[bool]  # gradients to form: of images, texts, logit_scale

    def scaled(self, factor: Tensor) -> "LseBackwardArguments":
        """With the three incoming gradients multiplied by `factor`, in float64."""
        row, col, positive = (g.double() * factor for g in (self.grad_row, self.grad_col, self.grad_positive))
        return self._replace(grad_row=row, grad_col=col, grad_positive=positive)


class MaskedArguments(NamedTuple):
    """Of `contrastive_masked_lse`; an absent tensor has no elements."""

    x: Tensor  # (N, D)
    y: Tensor  # (M, D)
    logit_scale: Tensor  # one element
    row_ids: Tensor  # (N,) int64, or (0,)
    col_ids: Tensor  # (M,) int64, or (0,)
    row_limit: Tensor  # (N,) of t, or (0,)
    col_limit: Tensor  # (M,), or (0,)
    guide_x: Tensor  # (N, G), or (0, 0)
    guide_y: Tensor  # (M, G), or (0, 0)
    guide_row_limit: Tensor  # (N,) of u, or (0,)
    guide_col_limit: Tensor  # (M,), or (0,)
    similarity: str
    label_offset: int
    label: str  # "counted", "left_out" or "none"
    equal: str  # "positive" or "left_out"
    precision: str
    work_bytes: int = 0

    def counts(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]


class MaskedSigmoidArguments(NamedTuple):
    """Of `contrastive_masked_sigmoid`."""

    x: Tensor  # (N, D)
    y: Tensor  # (M, D)
    logit_scale: Tensor  # one element
    logit_bias: Tensor  # one element
    row_ids: Tensor  # (N,) int64
    col_ids: Tensor  # (M,) int64
    row_weights: Tensor  # (N,) float64
    col_weights: Tensor  # (M,) float64
    soft_targets: bool
    precision: str
    needs: Sequence[bool]  # gradients to form: of x, y


class MaskedBackwardArguments(NamedTuple):
    """Of `contrastive_masked_lse_backward`. `grads` and `lses` by class: row and column of the negatives, of the
    positives; then, of `grads`, the labels."""

    grads: tuple[Tensor, ...]  # float64 (N,), (M,), (N,), (M,), (N,) or (0,)
    lses: tuple[Tensor, ...]  # float64 (N,), (M,), (N,), (M,)
    saved: tuple[Tensor, ...]  # row_stats, col_stats, kept of the forward pass
    pairs: MaskedArguments
    needs: Sequence[bool]  # gradients to form: of x, y, logit_scale

    @classmethod
    def of(cls, *inputs) -> "MaskedBackwardArguments":
        """From the operator's arguments."""
        return cls(inputs[:5], inputs[5:9], inputs[9:12], MaskedArguments(*inputs[12:-1]), inputs[-1])


def absent(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands for a vector, for ids and for a matrix that are not given."""
    none = x.detach().new_empty(0)
    return none, none.to(torch.int64), none.reshape(0, 0)


def given(value: Tensor | None, absent: Tensor) -> Tensor:
    return absent if value is None else value.detach()

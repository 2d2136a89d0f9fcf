"""The arguments of `torch.ops.gapkern.contrastive_lse_backward`, by name."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LseBackwardArguments(NamedTuple):
    """In the order of the schema (csrc/library.cpp)."""

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

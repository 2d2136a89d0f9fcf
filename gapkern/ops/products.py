"""Matrix products of half-precision operands with wider results."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b with the result, not just the accumulation, in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)

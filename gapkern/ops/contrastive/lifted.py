"""Squared Euclidean similarity as a product of longer rows, for kernels that have products alone.

-||x - y||^2 / 2 = <x', y'> with x' = [x, p, 1] and y' = [y, -1, -q], where p and q are half the squared norms, each as
three bfloat16 numbers whose sum has float32's 24 bits. The products with their gradients have the sums of dS over rows
and columns in the places of those ones.
"""

import math

import torch
from torch import Tensor

TERMS = 3
COLUMNS = 8  # 2 TERMS, and zeros up to a multiple of 16 bytes
CEILING, FLOOR = 110, -102  # kCeiling, kFloor of csrc/contrastive/sm90_parts.cuh
_LABEL_ROWS = 8192  # differences at a time: 24 MiB at 768 dims


def _half_squared_norms(x: Tensor) -> Tensor:
    """(N, TERMS) in the dtype of x."""
    rest = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square_().mul_(0.5)
    terms = []
    for _ in range(TERMS):
        terms.append(rest.to(x.dtype))
        rest = rest - terms[-1].double()
    return torch.stack(terms, 1)


def operands(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x' (N, D + COLUMNS) and y' (M, D + COLUMNS) of bfloat16 embeddings."""
    sides = []
    for side, rows in enumerate((x, y)):
        terms = _half_squared_norms(rows)
        ones = torch.ones_like(terms)
        zeros = rows.new_zeros(len(rows), COLUMNS - 2 * TERMS)
        sides.append(torch.cat([rows, *((-ones, -terms) if side else (terms, ones)), zeros], 1))
    return sides[0], sides[1]


def control(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """What `contrastive_sm90_shift` gives, of logits 2 logit_scale <x', y'>: (2,) float32, k and -c.

    No exponent is above 0 but by rounding, so that c may be negative: as far as needed to keep the smallest exponential
    of the largest distance, and so far that no sum overflows. Negative scales have exponents from 0 up.
    """
    k = logit_scale.reshape(()).float() * (2 / math.log(2))
    farthest = sum(torch.linalg.vector_norm(v, dim=1, dtype=torch.float32).amax() for v in (x, y)) ** 2 / 2
    bound = k.abs() * farthest * 1.001
    spare = CEILING - math.log2(max(len(x), len(y)))
    up = (bound + FLOOR).ceil().clamp(0, math.floor(spare))
    down = (bound - spare).ceil().clamp(min=0)
    return torch.stack([k, torch.where(k < 0, -down, up)])


def labels(x: Tensor, y: Tensor, label_offset: int) -> Tensor:
    """-||x_i - y_(i + label_offset)||^2 for every row: (N,) float64, of differences."""
    own = y[label_offset : label_offset + len(x)]
    parts = zip(x.split(_LABEL_ROWS), own.split(_LABEL_ROWS), strict=True)
    return torch.cat([(a.float() - b.float()).square_().sum(1, dtype=torch.float64).neg_() for a, b in parts])


def gradients(x: Tensor, y: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j dS_ij (y_j - x_i) and sum_i dS_ij (x_i - y_j) of dS y' and dS^T x', either of which may be empty."""
    d = x.shape[1]
    if dx.numel():
        dx = torch.addcmul(dx[:, :d], x.float(), dx[:, d, None])
    if dy.numel():
        dy = torch.addcmul(dy[:, :d], y.float(), dy[:, d + TERMS, None], value=-1)
    return dx, dy

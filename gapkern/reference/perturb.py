"""Philox4x32-10 and what is drawn from it, in whole-tensor steps of plain PyTorch."""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011): counter (..., 4) int64 words to (..., 4) int64 words.

    Example:
        >>> [hex(v) for v in philox(torch.zeros(4, dtype=torch.int64), (0, 0)).tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # The high word from 16-bit halves: the whole product would not fit int64.
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        total = (low >> 16) + high
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], -1)


def words(rows: int, columns: int, seed: int, trial: int, first_row: int = 0) -> Tensor:
    """(rows, columns, 4) int64: the words of the Philox blocks of a matrix, one block per four columns."""
    blocks = (columns + 3) // 4
    row = torch.arange(first_row, first_row + rows)[:, None].expand(rows, blocks)
    block = torch.arange(blocks)[None].expand(rows, blocks)
    counter = torch.stack([block, row & _WORD, row >> 32, torch.full_like(row, trial)], -1)
    return philox(counter, (seed & _WORD, (seed >> 32) & _WORD))


def bits(rows: int, columns: int, seed: int, trial: int, first_row: int = 0) -> Tensor:
    """(rows, columns) int32."""
    stream = words(rows, columns, seed, trial, first_row).flatten(1)[:, :columns]
    return torch.where(stream >= 2**31, stream - 2**32, stream).to(torch.int32)


def noise(rows: int, columns: int, law: str, seed: int, trial: int, first_row: int = 0) -> Tensor:
    """(rows, columns) float64 of mean zero and unit variance: Box and Muller's normals, or uniform."""
    w = words(rows, columns, seed, trial, first_row).double()
    if law == "uniform":
        signed = torch.where(w >= 2.0**31, w - 2.0**32, w)
        return (math.sqrt(3.0) * (signed + 0.5) / 2.0**31).flatten(1)[:, :columns]
    u, angle = w[..., 0::2], 2 * math.pi * w[..., 1::2] / 2.0**32
    radius = (-2 * (((u / 2).floor() + 0.5) / 2.0**31).log()).sqrt()
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return z.flatten(1)[:, :columns]


def quantize(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Each coordinate at the centre of its cell among `bins` equal cells of [low, high], in x's dtype.

    Example:
        >>> quantize(torch.tensor([[0.0, 0.3, 9.0]]), torch.tensor([0.0]), torch.tensor([1.0]), 4).tolist()
        [[0.125, 0.375, 0.875]]
    """
    work = torch.promote_types(x.dtype, torch.float32)
    value, low, high = x.to(work), low.to(work), high.to(work)
    width = (high - low) / bins
    cell = ((value - low) / width).clamp(0, bins - 1).trunc()
    return torch.where(width > 0, low + (cell + 0.5) * width, value).to(x.dtype)

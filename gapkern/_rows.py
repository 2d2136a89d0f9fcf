"""Rows of any magnitude: unit vectors where squares would leave their dtype; and devices without float64."""

import torch
from torch import Tensor

LEAST, MOST = 1e-140, 1e140  # between which sums of float64 squares, and their ratios to rounding, are numbers


def squarable(name: str, x: Tensor) -> Tensor:
    """`x`, whose squares float64 can add up; float32 and half precision always are.

    Raises:
        ValueError: the largest magnitude of a float64 matrix is above 1e140, or below 1e-140 and not 0.
    """
    if x.dtype == torch.float64 and x.numel():
        largest = float(x.detach().abs().amax())
        if largest > MOST or 0 < largest < LEAST:
            raise ValueError(
                f"{name}: expected a largest magnitude between {LEAST:g} and {MOST:g}, whose square is a float64, got "
                f"{largest:g}"
            )
    return x


def unit(x: Tensor) -> Tensor:
    """Rows (..., D) scaled to length 1 in their own dtype, however long or short they are; zero rows stay zero.

    Example:
        >>> unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    # By the power of two of the largest magnitude, which changes no digit; twice, as 2^150 is no float32.
    exponent = torch.frexp(x.detach().abs().amax(-1, keepdim=True)).exponent
    half = exponent // 2
    scaled = torch.ldexp(torch.ldexp(x, -half), half - exponent)
    norm = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, torch.ones_like(norm))


def with_float64(x: Tensor) -> Tensor:
    """`x` where float64 is: on its own device, or on the CPU (Apple's GPUs have none)."""
    return x if x.device.type in ("cpu", "cuda") else x.cpu()

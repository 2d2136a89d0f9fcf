"""The mean shift as its definition reads (Chowers et al., CVPR 2026, Eq. 11)."""

import torch
from torch import Tensor


def column_sum(x: Tensor) -> Tensor:
    """(D,) float64."""
    return x.double().sum(0)


def gram(x: Tensor, mean: Tensor) -> Tensor:
    """sum_i (x_i - mean)(x_i - mean)^T, (D, D) float64."""
    centred = x.double() - mean.double()
    return centred.T @ centred


def apply(x: Tensor, shift: Tensor, normalize: bool = False) -> Tensor:
    """x_i + shift, optionally L2-normalised, in x's dtype."""
    moved = x.double() + shift.double()
    return (torch.nn.functional.normalize(moved, dim=1) if normalize else moved).to(x.dtype)


def shift_vector(gallery: Tensor, queries: Tensor, components: int) -> Tensor:
    """g' = g - V V^T g with V the gallery's first `components` principal directions, (D,) float64.

    Example:
        >>> gallery = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> shift_vector(gallery, gallery + 1, components=1).tolist()
        [1.0, 0.0]
    """
    gallery, queries = gallery.double(), queries.double()
    gap = queries.mean(0) - gallery.mean(0)
    _, _, rows = torch.linalg.svd(gallery - gallery.mean(0), full_matrices=True)
    basis = rows[:components]
    return gap - basis.T @ (basis @ gap)

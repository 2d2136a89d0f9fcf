"""Sums over rows of equal ids, of which no loss needs the matrix: linear in the logits, they are sums of embeddings."""

from typing import Any

import torch
from torch import Tensor

COLUMNS = 64  # dims at a time
KEPT_ELEMENTS = 2**22  # of y: up to here sums are kept for the backward pass, which is a tenth of a step faster


def places(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers 0..M of the classes that `ids` (M,) and `rows` belong to; M: of none among `ids`.

    Example:
        >>> places(torch.tensor([7, 3, 7]), torch.tensor([7, 4]))
        (tensor([1, 0, 1]), tensor([1, 3]))
    """
    ordered = ids.sort().values
    place, own = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, rows)
    there = ordered[own.clamp_max(len(ids) - 1)] == rows
    return place, torch.where(there, own, torch.full_like(own, len(ids)))


def _summed(y: Tensor, place: Tensor, own: Tensor) -> Tensor:
    """Sums of y's rows by place, at the places `own`."""
    # Expanded, the zeros are written once, when the sums are.
    nothing = torch.zeros(1, 1, dtype=y.dtype, device=y.device).expand(len(place) + 1, y.shape[1])
    return nothing.index_add(0, place, y).index_select(0, own)


def class_sums(ids: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `rows`, ids of rows: the sum of y (M, D) over equal ids, and their number."""
    place, own = places(ids, rows)
    return _summed(y.to(_work(y)), place, own), class_counts(place, own)


def class_counts(place: Tensor, own: Tensor) -> Tensor:
    """For each of the places `own`: how many of `place` are the same, in float64."""
    counts = torch.zeros(len(place) + 1, dtype=torch.float64, device=place.device)
    return counts.index_add(0, place, counts.new_ones(len(place)))[own]


def _work(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.float64 else torch.float32


class _Products(torch.autograd.Function):
    """<x_i, sum of y over i's place - among_i y_(first + i)> (n,), which keeps no sums for its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, place: Tensor, own: Tensor, among: Tensor, first: int) -> Tensor:
        work = torch.promote_types(x.dtype, _work(y))
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for c in range(0, x.shape[1], COLUMNS):
            sums = _others(y[:, c : c + COLUMNS], place, own, among, first)
            total = total + (x[:, c : c + COLUMNS].to(work) * sums).sum(1, dtype=torch.float64)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.first = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, place, own, among = ctx.saved_tensors
        gradient = gradient.to(_work(y))[:, None]
        # Buffers that are batched under vmap where any of the operands is.
        link = gradient[0].to(x.dtype) + x[0, :1] + y[0, :1]
        dx, dy = link.expand(x.shape).clone(), link.expand(y.shape).clone()
        of_rows = slice(ctx.first, ctx.first + len(x))
        for c in range(0, x.shape[1], COLUMNS):
            columns = slice(c, c + COLUMNS)
            dx[:, columns] = (gradient * _others(y[:, columns], place, own, among, ctx.first)).to(dx.dtype)
            weighted = gradient * x[:, columns].to(gradient.dtype)
            found = torch.zeros(1, 1, dtype=weighted.dtype, device=x.device).expand(len(place) + 1, weighted.shape[1])
            found = found.index_add(0, own, weighted).index_select(0, place)
            dy[:, columns] = found.to(dy.dtype)
            dy[of_rows, columns] = (found[of_rows] - among[:, None].to(found.dtype) * weighted).to(dy.dtype)
        return dx, dy, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None, *_: Any) -> Tensor:
        x, y, place, own, among = ctx.saved_tensors
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for left, right in ((dx, y), (x, dy)):
            if left is not None and right is not None:
                total = total + _Products.apply(left, right, place, own, among, ctx.first)
        return total


def _others(y: Tensor, place: Tensor, own: Tensor, among: Tensor, first: int) -> Tensor:
    y = y.to(_work(y))
    return _summed(y, place, own) - y[first : first + len(own)] * among[:, None].to(y.dtype)


def products_with_sums(x: Tensor, y: Tensor, ids: Tensor, rows: Tensor, among: Tensor, first: int) -> Tensor:
    """(n,) float64: the sum of <x_i, y_j> over the j of equal ids, without `among_i` times j = first + i.

    Args:
        x: (n, D).
        y: (M, D), with `ids` (M,).
        rows: (n,) ids of x's rows.
        among: (n,) float64.
        first: where y has the rows beside x's.

    Example:
        >>> x = torch.eye(2)
        >>> products_with_sums(x, x, torch.zeros(2).long(), torch.zeros(2).long(), torch.zeros(2).double(), 0).tolist()
        [1.0, 1.0]
    """
    place, own = places(ids, rows)
    if y.shape[0] * y.shape[1] <= KEPT_ELEMENTS:
        sums = _others(y, place, own, among, first)
        return (x.to(torch.promote_types(x.dtype, sums.dtype)) * sums).sum(1, dtype=torch.float64)
    found: Tensor = _Products.apply(x, y, place, own, among, first)
    return found

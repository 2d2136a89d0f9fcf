"""What the losses over classes of pairs share: ids, weights, reductions, safe sums, the batch's place among ranks."""

import math
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs, embeddings, scalar
from gapkern.losses.spread import Spread, by_ring, class_counts, dense
from gapkern.losses.steps import IN_A_RING, in_float, wanted
from gapkern.ops import autocast

REDUCTIONS = ("mean", "sum", "none")


def integers(name: str, value: Any, rows: int, like: Tensor) -> Tensor:
    """`value` as (rows,) int64 on the device of `like`.

    Raises:
        TypeError: not integers.
        ValueError: another shape.
    """
    value = torch.as_tensor(value, device=like.device)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {str(value.dtype).removeprefix('torch.')}")
    if tuple(value.shape) != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(value.shape)}")
    found: Tensor = value.to(torch.int64)
    return found


def pair_of_ids(ids: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """`ids` of the rows of x and of y: one vector for both, or two.

    Raises:
        TypeError, ValueError: as `integers`.
    """
    if ids is None:
        return None
    if isinstance(ids, (tuple, list)) and len(ids) == 2 and not isinstance(ids[0], (int, float)):
        return integers("ids[0]", ids[0], x.shape[0], x), integers("ids[1]", ids[1], y.shape[0], y)
    row = integers("ids", ids, x.shape[0], x)
    if y.shape[0] != x.shape[0]:
        raise ValueError(f"ids: expected two vectors, ({x.shape[0]},) and ({y.shape[0]},), got one")
    return row, row


def check_weights(weights: Any, x: Tensor) -> Tensor | None:
    """(N,) float64, or None.

    Raises:
        TypeError, ValueError: not (N,) numbers, or negative ones.
    """
    if weights is None:
        return None
    weights = _check.tensor("weights", weights)
    if tuple(weights.shape) != (x.shape[0],):
        raise ValueError(f"weights: expected shape ({x.shape[0]},), got {tuple(weights.shape)}")
    found: Tensor = weights.to(x.device, torch.float64)
    return found


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    found = _check.number(name, value, low=0)
    if found >= 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {found:g}")
    return found


def log_sum(terms: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient at an empty sum, all -inf, is zero."""
    most = terms.detach().amax(dim, keepdim=True)
    empty = most == -math.inf
    most = most.masked_fill(empty, 0)
    total = (terms - most).exp().sum(dim)
    empty = empty.squeeze(dim)
    return (total.masked_fill(empty, 1).log() + most.squeeze(dim)).masked_fill(empty, -math.inf)


def surprise(label: Tensor, others: list[Tensor], counted: int = 1) -> Tensor:
    """-log of the label's share: log(counted + sum exp(others - label)), small losses to their last digit."""
    apart = torch.stack([other - label for other in others])
    total = log_sum(apart, 0) if len(others) > 1 else apart[0]
    return added(total, counted)


def added(total: Tensor, counted: int) -> Tensor:
    """log(counted + exp(total)); where nothing is counted, and nothing there, 0."""
    if counted == 0:
        return total.masked_fill(total == -math.inf, 0)
    return torch.logaddexp(total, torch.full_like(total, math.log(counted)))


def own_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> (N,) in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(work) * y.to(work)).sum(1, dtype=torch.float64)


class Batch:
    """A batch on one process, or spread over ranks: what is whole, where its rows lie, and how losses are reduced."""

    def __init__(self, group: Any, exchange: str):
        self.place = None if group is None or group is False else distributed.shard(group)
        self.exchange, self.terms, self.travels, self._agreed = exchange, "", False, True
        try:
            by_ring(exchange, None)
        except ValueError as error:
            self.refuse(error)
            raise

    def refuse(self, error: Exception) -> None:
        if self.place is not None:
            distributed.refuse(self.place, error)

    def enter(self, terms: str, scalars: dict[str, Tensor], **features: Tensor | None) -> None:
        """Says what this rank is about to do, and fixes the factors of gradients; `features` and `scalars` by name."""
        self.travels = by_ring(self.exchange, self.place, *features.values())
        given = {k: v for k, v in {**features, **scalars}.items() if v is not None}
        self.terms = wanted(terms + IN_A_RING if self.travels else terms, **given)
        if self.travels and self.place is not None:
            first = next(iter(given.values()))
            shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in given.items() if v.dim() and v.shape != first.shape)
            distributed.agree(first, self.place, f"{self.terms}: {shapes}")
        self._agreed = self.travels or self.place is None

    def feature(self, x: Tensor) -> Tensor:
        return x if self.place is None else distributed.scale_gradient(x, 1 / self.place.world)

    def scalar(self, s: Tensor) -> Tensor:
        return s if self.place is None else distributed.mean_gradient(s, self.place)

    def spread(self, x: Tensor) -> Spread:
        """This rank's rows as a part of all ranks', with gradients. The first gather is at once: ranks agree there."""
        found = Spread(x, self.place, self.terms, self.travels)
        if not self._agreed:
            found.everyone()
            self._agreed = True
        return found

    def constant(self, x: Tensor) -> Tensor:
        """Rows of all ranks, without."""
        return x.detach() if self.place is None else distributed.stack(x, self.place).flatten(0, 1)

    def first(self, x: Tensor) -> int:
        """Where this rank's rows of x begin among everyone's."""
        return 0 if self.place is None else self.place.rank * x.shape[0]

    def columns(self, partial: Tensor, mine: Tensor) -> Tensor:
        """Log-sum-exps over all ranks' rows, of the columns of `mine`."""
        if self.place is None:
            return partial
        start = self.first(mine)
        return distributed.merge_columns(partial, self.place)[start : start + mine.shape[0]]

    def column_sums(self, partial: Tensor, mine: Tensor) -> Tensor:
        """Sums over all ranks' rows, of the columns of `mine`."""
        if self.place is None:
            return partial
        start = self.first(mine)
        return distributed.sum_columns(partial, self.place)[start : start + mine.shape[0]]

    def merged(self, partial: Tensor) -> Tensor:
        """A log-sum-exp over all ranks."""
        return partial if self.place is None else distributed.merge_columns(partial, self.place)

    def reduce(self, losses: Tensor, weights: Tensor | None, reduction: str, like: Tensor) -> Tensor:
        """`losses` (n,) float64 to the loss: a mean weighted by `weights`, 0 where all of them are 0."""
        world = 1 if self.place is None else self.place.world
        weighted = losses if weights is None else losses * weights
        if reduction == "none":
            # The factor 1 / W is that of a mean over ranks; rows on their own need none.
            return in_float(distributed.scale_gradient(weighted, world), like)
        if weights is None:
            total = torch.full((), float(len(losses) * world), dtype=torch.float64, device=losses.device)
        else:
            total = weights.detach().sum()
            total = total if self.place is None else distributed.sum_columns(total, self.place)
        total = torch.where(total == 0, torch.ones_like(total), total)
        mean = weighted.sum() / total * world
        if self.place is not None:
            mean = distributed.mean_value(mean, self.place)
        return in_float(mean if reduction == "mean" else mean * total, like)


def check_second(name: str, value: Any, like: Tensor, first: str, rows: str) -> Tensor:
    """Further embeddings (rows, D) beside `like`, in its dtype.

    Raises:
        TypeError, ValueError: other dtypes, widths or devices.
    """
    value = embeddings(name, value, rows)
    _check.same_width(**{first: like, name: value})
    _check.same_device(**{first: like, name: value})
    if autocast.dtype_of(value) != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as in {first}, got {value.dtype}")
    found: Tensor = value.to(like.dtype)
    return found


__all__ = [
    "REDUCTIONS",
    "Batch",
    "added",
    "check_pairs",
    "check_second",
    "check_weights",
    "class_counts",
    "dense",
    "fraction",
    "integers",
    "log_sum",
    "own_products",
    "pair_of_ids",
    "scalar",
    "surprise",
]

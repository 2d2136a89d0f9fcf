"""Collectives with gradients for losses whose batch is spread over ranks; each rank holds n of the N = W n rows.

What all ranks differentiate together is the sum of their losses, so the gradient of a rank's local mean over its n rows
is W times that of the mean over the whole batch; `scale_gradient` takes the factor off where it is not wanted.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's place in a group."""

    group: Any
    rank: int
    world: int


def shard(group: Any) -> Shard:
    """The rank's place in `group` (True: the default group).

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
    group = dist.group.WORLD if group is True else group
    return Shard(group, dist.get_rank(group), dist.get_world_size(group))


def check_even(place: Shard, **tensors: Tensor) -> None:
    """Refuses shards of different shapes or dtypes on every rank alike, before anything can wait for anyone.

    Raises:
        ValueError: the ranks' shards differ.
    """
    first = next(iter(tensors.values()))
    mine = torch.tensor(
        [value for t in tensors.values() for value in (*t.shape, _DTYPES.index(t.dtype))], device=first.device
    )
    everyone = [torch.empty_like(mine) for _ in range(place.world)]
    dist.all_gather(everyone, mine, group=place.group)
    if all(torch.equal(other, everyone[0]) for other in everyone):
        return
    sizes = [tuple(other[:2].tolist()) for other in everyone]
    raise ValueError(
        f"{next(iter(tensors))}: expected the same shape and dtype on every rank, got shapes {sizes}; "
        "drop the last uneven batch (drop_last=True)"
    )


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _all_gather(x: Tensor, place: Shard) -> Tensor:
    """(n, ...) of every rank, stacked by rank: (W n, ...)."""
    x = x.contiguous()
    everyone = [torch.empty_like(x) for _ in range(place.world)]
    dist.all_gather(everyone, x, group=place.group)
    return torch.cat(everyone)


def _reduce_scatter(x: Tensor, place: Shard) -> Tensor:
    """The sum over ranks of this rank's rows of x (W n, ...)."""
    x = x.contiguous()
    if dist.get_backend(place.group) == "nccl":
        mine = x.new_empty((x.shape[0] // place.world, *x.shape[1:]))
        dist.reduce_scatter_tensor(mine, x, group=place.group)
        return mine
    # Other backends sum in float32 at least, and everywhere.
    total = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x.clone()
    dist.all_reduce(total, group=place.group)
    return total.chunk(place.world)[place.rank].to(x.dtype).clone()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return _all_gather(x, place)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.place), None


class _MergeColumns(torch.autograd.Function):
    """Log-sum-exps over the whole batch from each rank's log-sum-exps over its own rows."""

    @staticmethod
    def forward(ctx, partial, place):
        everyone = _all_gather(partial[None], place)
        total = everyone.logsumexp(0)
        ctx.place = place
        ctx.save_for_backward(partial, total)
        return total

    @staticmethod
    def backward(ctx, grad):
        partial, total = ctx.saved_tensors
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.place.group)
        return grad * (partial - total).exp(), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _MeanGradient(torch.autograd.Function):
    """The same parameter on every rank: its gradient is the mean over ranks, on every rank."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.place.group)
        return grad / ctx.place.world, None


class _MeanValue(torch.autograd.Function):
    """The mean over ranks; each rank's gradient passes straight."""

    @staticmethod
    def forward(ctx, x, place):
        total = x.clone()
        dist.all_reduce(total, group=place.group)
        return total / place.world

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def gather(x: Tensor, place: Shard) -> Tensor:
    """(n, D) of every rank as (N, D); the gradient is summed over ranks and each gets its rows'."""
    return _Gather.apply(x, place)


def merge_columns(partial: Tensor, place: Shard) -> Tensor:
    """(N,): log of the sum over ranks of exp(partial), partial (N,)."""
    return _MergeColumns.apply(partial, place)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


def mean_gradient(x: Tensor, place: Shard) -> Tensor:
    """x, whose gradient is averaged over ranks."""
    return _MeanGradient.apply(x, place) if x.requires_grad else x


def mean_value(x: Tensor, place: Shard) -> Tensor:
    """The mean of x over ranks, differentiated as this rank's x."""
    return _MeanValue.apply(x, place)

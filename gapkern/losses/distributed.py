"""Collectives with gradients for losses whose batch is spread over ranks; each rank holds n of the N = W n rows.

What all ranks differentiate together is the sum of their losses, so the gradient of a rank's local mean over its n rows
is W times that of the mean over the whole batch; `scale_gradient` takes the factor off where it is not wanted.

The collectives are operators, `torch.ops.gapkern.ranks_*`, so that torch.compile keeps the graph whole. Before the
first one of a loss, `gather`, the ranks agree on what they are about to do (`gapkern.losses.agreement`).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from gapkern.losses import agreement
from gapkern.ops import derivatives
from gapkern.ops.constant import constant, eager


@dataclass(frozen=True)
class Shard:
    """This rank's place in a group, which has a name."""

    group: str
    rank: int
    world: int


def shard(group: Any) -> Shard:
    """The rank's place in `group`: a process group, a one-dimensional DeviceMesh, or True for the default group.

    Raises:
        RuntimeError: torch.distributed is not initialised, or forward-mode differentiation.
        TypeError, ValueError: not a group, a mesh of several dimensions, or a group without this process.
    """
    return Shard(*_place(group))


@constant  # compiled graphs are of one group
def _place(group: Any) -> tuple[str, int, int]:
    """The group's name, this process's rank in it, and its size."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
    if forward_ad._current_level >= 0:
        raise RuntimeError("gapkern: losses over ranks have no forward-mode derivative; use reverse mode (backward())")
    group = dist.group.WORLD if group is True else group
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a one-dimensional DeviceMesh, got one of {group.ndim} dimensions; name one of them, "
                "as in mesh['dp']"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is in, got one without it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed group, a one-dimensional DeviceMesh or True, "
            f"got {type(group).__name__}"
        )
    return group.group_name, dist.get_rank(group), dist.get_world_size(group)


@eager
def agree(x: Tensor, place: Shard, terms: str) -> None:
    """What `gather` does first, for what goes around in a ring.

    Raises:
        ValueError, TypeError: as `gather`.
    """
    agreement.reach(_group(place.group), agreement.terms_of(x, terms))


def process_group(place: Shard) -> Any:
    """The torch.distributed group of `place`."""
    return _group(place.group)


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def _stack(x: Tensor, group: str, world: int) -> Tensor:
    """(W, ...): x of every rank."""
    x = x.contiguous()
    everyone = x.new_empty((world, *x.shape))
    dist.all_gather(list(everyone.unbind()), x, group=_group(group))
    return everyone


def _gather(x: Tensor, terms: str, group: str, world: int) -> Tensor:
    agreement.reach(_group(group), agreement.terms_of(x, terms))
    return _stack(x, group, world).flatten(0, 1)


def _reduce_scatter(x: Tensor, group: str, world: int) -> Tensor:
    """The sum over ranks of this rank's rows of x (W n, ...)."""
    x = x.contiguous()
    if dist.get_backend(_group(group)) == "nccl":
        mine = x.new_empty((x.shape[0] // world, *x.shape[1:]))
        dist.reduce_scatter_tensor(mine, x, group=_group(group))
        return mine
    # Other backends sum in float32 at least, and everywhere.
    total = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x.clone()
    dist.all_reduce(total, group=_group(group))
    return total.chunk(world)[dist.get_rank(_group(group))].to(x.dtype).clone()


def _sum(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_group(group))
    return total


def _log_sum_exp(x: Tensor, group: str) -> Tensor:
    """In two sums, so that memory is that of x whatever the number of ranks."""
    most = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=_group(group))
    empty = most == -torch.inf
    total = (x - most.masked_fill(empty, 0)).exp()
    dist.all_reduce(total, group=_group(group))
    return (total.log() + most).masked_fill(empty, -torch.inf)


_library = torch.library.Library("gapkern", "FRAGMENT")
_library.define("ranks_gather(Tensor x, str terms, str group, int world) -> Tensor")
_library.define("ranks_stack(Tensor x, str group, int world) -> Tensor")
_library.define("ranks_reduce_scatter(Tensor x, str group, int world) -> Tensor")
_library.define("ranks_sum(Tensor x, str group) -> Tensor")
_library.define("ranks_mean(Tensor x, str group, int world) -> Tensor")
_library.define("ranks_logsumexp(Tensor x, str group, int world) -> Tensor")
_library.define("ranks_same(Tensor x, str group, int world) -> Tensor")
for _name, _kernel in {
    "gather": _gather,
    "stack": _stack,
    "reduce_scatter": _reduce_scatter,
    "sum": _sum,
    "mean": lambda x, group, world: _sum(x, group) / world,
    "logsumexp": lambda x, group, world: _log_sum_exp(x, group),
    "same": lambda x, group, world: x.clone(),
}.items():
    _library.impl(f"ranks_{_name}", _kernel, "CompositeExplicitAutograd")


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name in ("sum", "mean", "logsumexp", "same"):
    torch.library.register_fake(f"gapkern::ranks_{_name}", _like, lib=_library)


@torch.library.register_fake("gapkern::ranks_gather", lib=_library)
def _(x: Tensor, terms: str, group: str, world: int) -> Tensor:
    return x.new_empty((world * x.shape[0], *x.shape[1:]))


@torch.library.register_fake("gapkern::ranks_stack", lib=_library)
def _(x: Tensor, group: str, world: int) -> Tensor:
    return x.new_empty((world, *x.shape))


@torch.library.register_fake("gapkern::ranks_reduce_scatter", lib=_library)
def _(x: Tensor, group: str, world: int) -> Tensor:
    return x.new_empty((x.shape[0] // world, *x.shape[1:]))


def _save_group(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group, ctx.world = inputs[-2:]


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[1]


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save_group(ctx, inputs, output)
    ctx.save_for_backward(inputs[0], output)


def _backward_gather(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.gapkern.ranks_reduce_scatter(grad, ctx.group, ctx.world), None, None, None


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.gapkern.ranks_sum(grad, ctx.group), None


def _backward_logsumexp(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    partial, total = ctx.saved_tensors
    share = (partial - total).exp().masked_fill(total == -torch.inf, 0)  # of an empty sum
    return torch.ops.gapkern.ranks_sum(grad, ctx.group) * share, None, None


def _backward_same(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.gapkern.ranks_sum(grad, ctx.group) / ctx.world, None, None


def _straight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None, None


derivatives.register("ranks_gather", _backward_gather, save=_save_group)
derivatives.register("ranks_sum", _backward_sum, save=_save_sum)
derivatives.register("ranks_mean", _straight)
derivatives.register("ranks_logsumexp", _backward_logsumexp, save=_save_logsumexp)
derivatives.register("ranks_same", _backward_same, save=_save_group)
for _name in ("stack", "reduce_scatter"):
    derivatives.register(f"ranks_{_name}", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None


def gather(x: Tensor, place: Shard, terms: str) -> Tensor:
    """(n, D) of every rank as (N, D); the gradient is summed over ranks and each gets its rows'.

    Raises:
        ValueError, TypeError: on every rank alike, where a rank's x or `terms` differ, or one has called `refuse`.
    """
    return torch.ops.gapkern.ranks_gather(x, terms, place.group, place.world)


def refuse(place: Shard, error: Exception) -> None:
    """Raises `error` on every rank, the others being about to `gather`; it names the rank."""
    agreement.reach(_group(place.group), agreement.problem(error))


def stack(x: Tensor, place: Shard) -> Tensor:
    """(W, ...): x of every rank, without a gradient."""
    return torch.ops.gapkern.ranks_stack(x.detach(), place.group, place.world)


def merge_columns(partial: Tensor, place: Shard) -> Tensor:
    """(N,): log of the sum over ranks of exp(partial), partial (N,)."""
    return torch.ops.gapkern.ranks_logsumexp(partial, place.group, place.world)


def sum_columns(partial: Tensor, place: Shard) -> Tensor:
    """The sum over ranks; its gradient is the sum over ranks too."""
    return torch.ops.gapkern.ranks_sum(partial, place.group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


def mean_gradient(x: Tensor, place: Shard) -> Tensor:
    """x, whose gradient is averaged over ranks."""
    return torch.ops.gapkern.ranks_same(x, place.group, place.world) if x.requires_grad else x


def mean_value(x: Tensor, place: Shard) -> Tensor:
    """The mean of x over ranks, differentiated as this rank's x."""
    return torch.ops.gapkern.ranks_mean(x, place.group, place.world)

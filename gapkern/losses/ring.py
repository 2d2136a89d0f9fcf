"""Rows of other ranks that are visited instead of gathered: they travel around the ranks, and their gradients follow.

At step k rank r holds the rows of rank r - k, while those of r - k - 1 are on their way. The backward pass goes around
again; the gradients of a rank's rows travel one step behind them and are home after W steps. A rank holds the rows of
three ranks at most, whatever W is: its own, the visitors, and the next ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gapkern.losses import distributed
from gapkern.ops import derivatives
from gapkern.ops.constant import eager

ROWS, GRADIENTS = 0, 1  # tags of what travels


@dataclass(frozen=True)
class Visit:
    """What is done with the rows of each rank.

    Args:
        place: this rank.
        function: (owner, visitors, *leaves) -> tensors. It is called with the rows of every rank, and differentiated.
        merges: for each of the tensors how those of the ranks become one: "lse" logaddexp, "sum", "columns" one after
            the other in the order of ranks, "own" that of this rank's own rows.
        again: whether the backward pass calls `function` again instead of keeping what it needs, which is for
            functions that keep more than a few numbers a row.
    """

    place: distributed.Shard
    function: Callable[..., tuple[Tensor, ...]]
    merges: tuple[str, ...]
    again: bool = False


def visit(job: Visit, visitors: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The merged results of `job` over the rows of all ranks.

    Args:
        job: what is done.
        visitors: this rank's tensors, as large on every rank; they go to all ranks.
        leaves: what else is differentiated.
    """
    found: tuple[Tensor, ...] = _visit(job, tuple(visitors), tuple(leaves))
    return found


@eager
def _visit(job: Visit, visitors: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*visitors, *leaves))
    found: tuple[Tensor, ...] = _Visited.apply(job, len(visitors), wanted, *visitors, *leaves)
    return found


class _Transfer:
    """Tensors on their way to the next rank, and those of the rank before."""

    def __init__(self, tensors: Sequence[Tensor], place: distributed.Shard, tag: int):
        group = distributed.process_group(place)
        before, after = (dist.get_global_rank(group, (place.rank + k) % place.world) for k in (-1, 1))
        self.sent = [t.contiguous() for t in tensors]
        self.received = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
        operations = []
        for mine, theirs in zip(self.sent, self.received, strict=True):
            operations.append(dist.P2POp(dist.isend, mine, after, group, tag))
            operations.append(dist.P2POp(dist.irecv, theirs, before, group, tag))
        self.requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        self.sent, self.requests = [], []
        return self.received


class _Stand(torch.autograd.Function):
    """Visitors in a graph that does not hold them; the gradient goes to `stand`, of their shape and without memory."""

    @staticmethod
    def forward(ctx: Any, stand: Tensor, visitor: Tensor) -> Tensor:
        return visitor.view_as(visitor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Held:
    """The visitors of the moment, which saved tensors of a graph stand for."""

    def __init__(self) -> None:
        self.visitors: Sequence[Tensor] = ()

    def pack(self, t: Tensor) -> Any:
        for i, visitor in enumerate(self.visitors):
            if t.data_ptr() == visitor.data_ptr() and t.shape == visitor.shape and t.dtype == visitor.dtype:
                return i
        return t

    def unpack(self, kept: Any) -> Tensor:
        found: Tensor = self.visitors[kept] if isinstance(kept, int) else kept
        return found


class _Part:
    """The results for one rank's rows and their graph, in which those rows are not saved but found again."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], owner: int):
        self.function, self.owner = function, owner
        # Apart from the graph: what it refers to must not refer to it.
        self.held = _Held()

    def evaluate(
        self, visitors: Sequence[Tensor], leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """The results, without a graph; `needs` of the visitors and the leaves says what has gradients."""
        self.stands, seen = [], []
        self.held.visitors = visitors
        with torch.enable_grad():
            for visitor, need in zip(visitors, needs, strict=False):
                if need:
                    self.stands.append(visitor.new_zeros(()).expand(visitor.shape).requires_grad_())
                    seen.append(_Stand.apply(self.stands[-1], visitor))
                else:
                    seen.append(visitor)
            rest = needs[len(visitors) :]
            self.leaves = [t.detach().requires_grad_(need) for t, need in zip(leaves, rest, strict=True)]
            with torch.autograd.graph.saved_tensors_hooks(self.held.pack, self.held.unpack):
                self.results = self.function(self.owner, seen, *self.leaves)
        self.held.visitors = ()
        return tuple(t.detach() for t in self.results)

    def gradients(
        self, visitors: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the visitors and of the leaves, where there are any."""
        self.held.visitors = visitors
        inputs = [*self.stands, *(t for t in self.leaves if t.requires_grad)]
        pairs = [(r, g) for r, g in zip(self.results, grads, strict=True) if g is not None and r.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs:
            results, of_results = zip(*pairs, strict=True)
            found = torch.autograd.grad(results, inputs, of_results, retain_graph=True, allow_unused=True)
        self.held.visitors = ()
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
        return filled[: len(self.stands)], filled[len(self.stands) :]


def _owner(place: distributed.Shard, step: int) -> int:
    return (place.rank - step) % place.world


class _Visited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Visit, count: int, wanted: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        place = job.place
        visitors: Sequence[Tensor] = [t.detach().contiguous() for t in tensors[:count]]
        leaves = tensors[count:]
        ctx.save_for_backward(*tensors)
        ctx.job, ctx.count = job, count
        ctx.needs = [wanted and need for need in ctx.needs_input_grad[3:]]
        ctx.parts, ctx.logs = [], {k: [] for k, merge in enumerate(job.merges) if merge == "lse"}
        results: list[Any] = [None] * len(job.merges)
        for step in range(place.world):
            transfer = None if step + 1 == place.world else _Transfer(visitors, place, ROWS)
            owner = _owner(place, step)
            if wanted and not job.again:
                ctx.parts.append(_Part(job.function, owner))
                found = ctx.parts[-1].evaluate(visitors, leaves, ctx.needs)
            else:
                found = tuple(t.detach() for t in job.function(owner, visitors, *(t.detach() for t in leaves)))
            for k, merge in enumerate(job.merges):
                results[k] = _merged(merge, results[k], found[k], owner, place)
                if merge == "lse" and wanted:
                    ctx.logs[k].append(found[k])
            if transfer is not None:
                visitors = transfer.wait()
        ctx.totals = {k: results[k].detach() for k in ctx.logs}
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(derivatives.TWICE)
        job, place, count = ctx.job, ctx.job.place, ctx.count
        tensors = ctx.saved_tensors
        visitors: Sequence[Tensor] = [t.detach().contiguous() for t in tensors[:count]]
        needs = ctx.needs
        of_leaves: list[Tensor] = []
        on_their_way: _Transfer | None = None
        for step in range(place.world):
            transfer = None if step + 1 == place.world else _Transfer(visitors, place, ROWS)
            if job.again:
                part = _Part(job.function, _owner(place, step))
                part.evaluate(visitors, tensors[count:], needs)
            else:
                part = ctx.parts[step]
            of_visitors, found = part.gradients(visitors, [_share(ctx, k, g, step) for k, g in enumerate(grads)])
            of_visitors = [g.float() if g.itemsize < 4 else g for g in of_visitors]
            of_leaves = [a + b for a, b in zip(of_leaves, found, strict=True)] if of_leaves else found
            if on_their_way is not None:
                of_visitors = [a + b for a, b in zip(on_their_way.wait(), of_visitors, strict=True)]
            if place.world > 1:
                on_their_way = _Transfer(of_visitors, place, GRADIENTS)
            if transfer is not None:
                visitors = transfer.wait()
        if on_their_way is not None:
            of_visitors = on_their_way.wait()
        found_all = iter([*of_visitors, *of_leaves])
        return (
            None,
            None,
            None,
            *(next(found_all).to(t.dtype) if n else None for t, n in zip(tensors, needs, strict=True)),
        )


def _share(ctx: Any, k: int, grad: Tensor, step: int) -> Tensor | None:
    """The gradient of a part's result, of that of the merged one."""
    merge, place = ctx.job.merges[k], ctx.job.place
    if merge == "lse":
        total = ctx.totals[k]
        found: Tensor = grad * (ctx.logs[k][step] - total).exp().masked_fill(total == -torch.inf, 0)
        return found
    if merge == "columns":
        return grad.chunk(place.world)[_owner(place, step)]
    return grad if merge == "sum" or step == 0 else None


def _merged(merge: str, total: Tensor | None, found: Tensor, owner: int, place: distributed.Shard) -> Tensor:
    if merge == "columns":
        if total is None:
            total = found.new_empty((place.world, *found.shape)).flatten(0, 1)
        total.chunk(place.world)[owner].copy_(found)
        return total
    if total is None:
        return found.clone()
    if merge == "own":
        return total
    return total + found if merge == "sum" else torch.logaddexp(total, found)

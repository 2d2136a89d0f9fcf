"""`torch.ops.gapkern.contrastive_self_lse`: the rows of x against all others of x, by the classes of `masked`.

On the CPU half the logits are formed (csrc/contrastive/classes.cpp); elsewhere they are `contrastive_masked_lse`'s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import dispatch, masked, masked_tangents
from gapkern.ops.contrastive.arguments import MaskedArguments, MaskedBackwardArguments, absent, given
from gapkern.ops.precision import matmul_precision

EXTRA_COLUMNS = 512  # csrc/contrastive/kept.h: kOwnExtra

_library = torch.library.Library("gapkern", "IMPL")


def self_columns(n: int | torch.SymInt) -> int | torch.SymInt:
    """Columns of kept logits, beside n rows: those above the diagonal, and what blocks overhang."""
    return torch.sym_min(n, n // 2 + EXTRA_COLUMNS)


class SelfArguments(NamedTuple):
    """The arguments of `contrastive_self_lse`, in the order of its schema."""

    x: Tensor  # (N, D)
    logit_scale: Tensor  # one element
    ids: Tensor  # (N,) int64, or (0,)
    limit: Tensor  # (N,) of t, or (0,)
    similarity: str
    equal: str
    precision: str
    work_bytes: int = 0

    def pairs(self) -> MaskedArguments:
        """Of `contrastive_masked_lse`, whose rows are the same."""
        none, _, matrix = absent(self.x)
        return MaskedArguments(
            x=self.x,
            y=self.x,
            logit_scale=self.logit_scale,
            row_ids=self.ids,
            col_ids=self.ids,
            row_limit=self.limit,
            col_limit=none,
            guide_x=matrix,
            guide_y=matrix,
            guide_row_limit=none,
            guide_col_limit=none,
            similarity=self.similarity,
            label_offset=0,
            label="left_out",
            equal=self.equal,
            precision=self.precision,
        )


def self_lse(
    x: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    equal: str = "left_out",
    limit: Tensor | None = None,
    similarity: str = "dot",
    work_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of each row of x against the others: `masked_lse(x, x, label="left_out")`, whose rows alone count.

    The logits are symmetric, and on the CPU half of them are formed.

    Args:
        x: (N, D) float32, float16, bfloat16 or float64.
        logit_scale: one element.
        ids: (N,) integers in [0, 2^24).
        equal: what pairs of equal ids are, "positive" or "left_out".
        limit: (N,): row i leaves out pairs with t above limit_i.
        similarity: "dot" or "sqeuclidean".
        work_bytes: memory the forward pass may keep for the backward pass: of N^2 / 2 logits, or nothing.

    Returns:
        In float64 (N,) each: over negatives, and over positives; an empty class has -inf.

    Example:
        >>> negative, positive = self_lse(torch.eye(3), torch.tensor(2.0))
        >>> [round(v, 4) for v in negative.tolist()], positive.tolist()
        ([0.6931, 0.6931, 0.6931], [-inf, -inf, -inf])
    """
    none, integers, _ = absent(x)
    negative, positive, *_ = torch.ops.gapkern.contrastive_self_lse(
        x,
        logit_scale,
        given(ids, integers),
        given(limit, none),
        similarity,
        equal,
        matmul_precision(x.device.type),
        work_bytes,
    )
    return negative, positive


def _forward(*inputs):
    row_negative, _, row_positive, _, none, *_ = dispatch.masked_lse(SelfArguments(*inputs).pairs())
    return row_negative, row_positive, none, none.clone()


def _backward_kernel(*inputs):
    grads, lses, arguments, needs = inputs[:2], inputs[2:4], SelfArguments(*inputs[6:-1]), inputs[-1]
    pairs, none = arguments.pairs(), grads[0].new_empty(0)
    zero, nowhere = torch.zeros_like(grads[0]), torch.full_like(grads[0], 1e30)  # columns have no gradient
    dx, dy, of_scale = dispatch.masked_lse_backward(
        MaskedBackwardArguments(
            grads=(grads[0], zero, grads[1], zero, none),
            lses=(lses[0], nowhere, lses[1], nowhere),
            saved=(none, none, none),
            pairs=pairs,
            needs=[needs[0], needs[0], needs[1]],
        )
    )
    return dx + dy, of_scale


for _name, _kernel in (("self_lse", _forward), ("self_lse_backward", _backward_kernel)):
    _library.impl(f"contrastive_{_name}", autocast.untouched(_kernel), "CompositeExplicitAutograd")


@torch.library.register_fake("gapkern::contrastive_self_lse", lib=_library)
def _(*inputs):
    arguments = SelfArguments(*inputs)
    x, n = arguments.x, arguments.x.shape[0]
    if x.device.type != "cpu":
        return masked.doubles(x, (n,), (n,), (0,), (0,))
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = self_columns(n)
    rows: int | torch.SymInt = masked.rows_kept(n, columns, work.itemsize, arguments.work_bytes)
    if isinstance(rows, int) and rows < n:
        rows = 0
    return *masked.doubles(x, (n,), (n,), (4, n)), x.new_empty((rows, columns), dtype=work)


@torch.library.register_fake("gapkern::contrastive_self_lse_backward", lib=_library)
def _(*inputs):
    arguments, needs = SelfArguments(*inputs[6:-1]), inputs[-1]
    x = arguments.x
    return x.new_empty(x.shape if needs[0] else (0,)), arguments.logit_scale.new_empty((1,) if needs[1] else (0,))


def _save(ctx, inputs, output):
    tensors, ctx.options = inputs[:4], inputs[4:-1]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, *grads):
    tensors, results = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    grads = tuple(torch.zeros_like(r) if g is None else g for g, r in zip(grads[:2], results[:2], strict=True))
    needs = list(ctx.needs_input_grad[:2])
    found = torch.ops.gapkern.contrastive_self_lse_backward(*grads, *results, *tensors, *ctx.options, needs)
    dx, ds = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return dx, None if ds is None else ds.reshape(tensors[1].shape), *(None,) * 6


def _jvp(inputs, tangents):
    x, logit_scale = tangents[:2]
    found = masked_tangents.masked_lse(SelfArguments(*inputs).pairs(), (x, x, logit_scale, *(None,) * 14))
    return found[0], found[2], None, None


derivatives.register("contrastive_self_lse", _backward, save=_save, jvp=_jvp)
derivatives.register("contrastive_self_lse_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_self_lse", autocast.rounded(torch.ops.gapkern.contrastive_self_lse, 1), _key)

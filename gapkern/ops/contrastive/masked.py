"""`torch.ops.gapkern.contrastive_masked_lse`: log-sum-exps of logits over disjoint classes of pairs.

With t_ij = <x_i, y_j>, or -||x_i - y_j||^2, every pair is of one class, the first that applies:
    label     j = i + label_offset; counted by itself, or left out;
    positive  equal ids, where equal="positive";
    left out  equal ids, where equal="left_out"; t_ij above its row's or its column's limit; u_ij =
              <guide_x_i, guide_y_j> above a limit of the guide's;
    negative  all others.
An absent tensor is one without elements. The gradient weights are e^(s t - lse) of the pair's own class, 0 where left
out; limits and guides are constants.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import dispatch, masked_tangents
from gapkern.ops.contrastive.arguments import MaskedArguments, MaskedBackwardArguments, absent, given
from gapkern.ops.precision import matmul_precision

_library = torch.library.Library("gapkern", "IMPL")


class Classes(NamedTuple):
    """Float64 results of `masked_lse`; an empty class has -inf."""

    row_negative: Tensor  # (N,)
    col_negative: Tensor  # (M,)
    row_positive: Tensor  # (N,)
    col_positive: Tensor  # (M,)
    label: Tensor  # (N,) s t at the labels, -inf without one; (0,) unless they are counted


def masked_lse(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    equal: str = "left_out",
    row_limit: Tensor | None = None,
    col_limit: Tensor | None = None,
    guide_x: Tensor | None = None,
    guide_y: Tensor | None = None,
    guide_row_limit: Tensor | None = None,
    guide_col_limit: Tensor | None = None,
    similarity: str = "dot",
    label_offset: int = 0,
    label: str = "counted",
    work_bytes: int = 0,
) -> Classes:
    """Row and column log-sum-exps of the logits, over negatives and over positives, and the labels' logits.

    Gradients reach x, y and logit_scale, once; memory is linear in N + M.

    Args:
        x: (N, D) float32, float16, bfloat16 or float64.
        y: (M, D), the same dtype.
        logit_scale: one element.
        row_ids, col_ids: (N,) and (M,) integers in [0, 2^24), together.
        equal: what pairs of equal ids are, "positive" or "left_out".
        row_limit, col_limit: (N,), (M,): pairs with t above either are left out.
        guide_x, guide_y: (N, G), (M, G): what the guide's limits are about.
        guide_row_limit, guide_col_limit: (N,), (M,).
        similarity: "dot" or "sqeuclidean".
        label_offset: the label of row i is column i + label_offset, where there is one.
        label: "counted" by itself, "left_out" of everything, or "none": no pair is a label.
        work_bytes: memory the forward pass may keep for the backward pass (on the CPU).

    Example:
        >>> x = torch.eye(3)
        >>> found = masked_lse(x, x, torch.tensor(2.0))
        >>> [round(v, 4) for v in found.row_negative.tolist()], found.label.tolist()
        ([0.6931, 0.6931, 0.6931], [2.0, 2.0, 2.0])
    """
    none, integers, matrix = absent(x)
    return Classes(
        *torch.ops.gapkern.contrastive_masked_lse(
            x,
            y,
            logit_scale,
            given(row_ids, integers),
            given(col_ids, integers),
            given(row_limit, none),
            given(col_limit, none),
            given(guide_x, matrix),
            given(guide_y, matrix),
            given(guide_row_limit, none),
            given(guide_col_limit, none),
            similarity,
            label_offset,
            label,
            equal,
            matmul_precision(x.device.type),
            work_bytes,
        )[:5]
    )


def _forward(*inputs):
    return dispatch.masked_lse(MaskedArguments(*inputs))


def _backward_kernel(*inputs):
    return dispatch.masked_lse_backward(MaskedBackwardArguments.of(*inputs))


for _name, _kernel in (("masked_lse", _forward), ("masked_lse_backward", _backward_kernel)):
    _library.impl(f"contrastive_{_name}", autocast.untouched(_kernel), "CompositeExplicitAutograd")


def doubles(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float64) for shape in shapes)


def rows_kept(n: int | torch.SymInt, m: int | torch.SymInt, item: int, work_bytes: int) -> int | torch.SymInt:
    if work_bytes <= 0:
        return 0
    # As an expression of the batch it would be compared with 0 and 1, which holds for some batches and not others.
    if not (isinstance(n, int) and isinstance(m, int)):
        return torch.library.get_ctx().new_dynamic_size()
    return min(n, work_bytes // (m * item))


@torch.library.register_fake("gapkern::contrastive_masked_lse", lib=_library)
def _(*inputs):
    arguments = MaskedArguments(*inputs)
    n, m = arguments.counts()
    labels = n if arguments.label == "counted" else 0
    classes = doubles(arguments.x, (n,), (m,), (n,), (m,), (labels,))
    work = torch.float64 if arguments.x.dtype == torch.float64 else torch.float32
    if arguments.x.device.type != "cpu":
        return *classes, *doubles(arguments.x, (0,), (0,), (0,))
    rows = rows_kept(n, m, work.itemsize, arguments.work_bytes)
    return *classes, *doubles(arguments.x, (5, n), (4, m)), arguments.x.new_empty((rows, m), dtype=work)


@torch.library.register_fake("gapkern::contrastive_masked_lse_backward", lib=_library)
def _(*inputs):
    arguments, needs = MaskedArguments(*inputs[12:-1]), inputs[-1]
    x, y = arguments.x, arguments.y
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        y.new_empty(y.shape if needs[1] else (0,)),
        arguments.logit_scale.new_empty((1,) if needs[2] else (0,)),
    )


def _save(ctx, inputs, output):
    tensors, ctx.options = inputs[:11], inputs[11:-1]
    ctx.mark_non_differentiable(*output[5:])
    ctx.save_for_backward(*tensors, *output[:4], *output[5:])


def _backward(ctx, *grads):
    tensors, results = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
    x, _, logit_scale = tensors[:3]
    label = x.shape[0] if ctx.options[2] == "counted" else 0
    shapes = (*(r.shape for r in results[:4]), (label,))
    grads = tuple(
        x.new_zeros(shape, dtype=torch.float64) if g is None else g for g, shape in zip(grads[:5], shapes, strict=True)
    )
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.gapkern.contrastive_masked_lse_backward(*grads, *results, *tensors, *ctx.options, needs)
    dx, dy, ds = (g if needed else None for g, needed in zip(found, needs, strict=True))
    return dx, dy, None if ds is None else ds.reshape(logit_scale.shape), *(None,) * 14


derivatives.register("contrastive_masked_lse", _backward, save=_save, jvp=masked_tangents.masked_lse)
derivatives.register("contrastive_masked_lse_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_masked_lse", autocast.rounded(torch.ops.gapkern.contrastive_masked_lse), _key)

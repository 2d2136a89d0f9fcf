"""`torch.ops.gapkern.contrastive_prefix_lse`: log-sum-exps of the logits of all prefixes at once, on the CPU.

csrc/contrastive/prefixes.h has the contract. Devices without a kernel for it take `lse_pair` a prefix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import tangents
from gapkern.ops.contrastive.masked import doubles, rows_kept

_library = torch.library.Library("gapkern", "IMPL")


def prefix_lse(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    row_factors: Tensor,
    col_factors: Tensor,
    dims: Sequence[int],
    *,
    precision: str = "highest",
    work_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lse_pair` of each prefix's logits S_k[i, j] = s f_ki g_kj <x_i[:d_k], y_j[:d_k]>.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, on the CPU.
        texts: (M, D), M >= N, the same dtype.
        logit_scale: s, one element.
        row_factors: (P, N) float64, f.
        col_factors: (P, M) float64, g.
        dims: the P widths d_k, increasing; the last is D.
        precision, work_bytes: as for `lse_pair`; the memory is that of all prefixes.

    Returns:
        In float64: row_lse (P, N), col_lse (P, M), positive (P, N). Gradients reach all tensors, once.

    Example:
        >>> x = torch.eye(3)
        >>> ones = torch.ones(2, 3, dtype=torch.float64)
        >>> row, col, positive = prefix_lse(x, x, torch.tensor(2.0), ones, ones, (2, 3))
        >>> [[round(v, 4) for v in losses] for losses in (row - positive).tolist()]
        [[0.2395, 0.2395, 1.0986], [0.2395, 0.2395, 0.2395]]
    """
    row, col, positive, *_ = torch.ops.gapkern.contrastive_prefix_lse(
        images, texts, logit_scale, row_factors, col_factors, list(dims), precision, work_bytes
    )
    return row, col, positive


@torch.library.register_fake("gapkern::contrastive_prefix_lse", lib=_library)
def _(images, texts, logit_scale, row_factors, col_factors, dims, precision, work_bytes):
    n, m, count = images.shape[0], texts.shape[0], len(dims)
    work = torch.float64 if images.dtype == torch.float64 else torch.float32
    rows = rows_kept(n, m, work.itemsize * count, work_bytes)
    return (
        *doubles(images, (count, n), (count, m), (count, n), (count, 3, n), (count, 2, m)),
        images.new_empty((rows * count, m), dtype=work),
    )


@torch.library.register_fake("gapkern::contrastive_prefix_lse_backward", lib=_library)
def _(grad_row, grad_col, grad_positive, images, texts, logit_scale, row_factors, col_factors, *rest):
    needs = rest[-1]
    given = (images, texts, logit_scale, row_factors, col_factors)
    shapes = [(t.numel(),) if t is logit_scale else t.shape for t in given]
    return tuple(t.new_empty(shape if needed else (0,)) for t, shape, needed in zip(given, shapes, needs, strict=True))


def _save(ctx, inputs, output):
    ctx.dims, ctx.precision, _ = inputs[5:]
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*inputs[:5], *output[3:])


def _backward(ctx, *grads):
    inputs, state = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    row_factors, col_factors = inputs[3:]
    shapes = (row_factors.shape, col_factors.shape, row_factors.shape)
    given = [state[0].new_zeros(shape) if g is None else g for g, shape in zip(grads[:3], shapes, strict=True)]
    needs = list(ctx.needs_input_grad[:5])
    found = torch.ops.gapkern.contrastive_prefix_lse_backward(*given, *inputs, *state, ctx.dims, ctx.precision, needs)
    return *(g.reshape(t.shape) if needed else None for g, t, needed in zip(found, inputs, needs, strict=True)), *[
        None
    ] * 3


def _jvp(inputs, of_inputs):
    images, texts, scale, *factors = inputs[:5]
    work = torch.float64 if images.dtype == torch.float64 else torch.float32

    def prefix(k: int, width: int, side: int) -> tuple[Tensor, Tensor | None]:
        x, f = (images, texts)[side][:, :width].to(work), factors[side][k, :, None].to(work)
        dx, df = of_inputs[side], of_inputs[3 + side]
        total = None if dx is None else dx[:, :width].to(work) * f
        if df is not None:
            by_factor = x * df[k, :, None].to(work)
            total = by_factor if total is None else total + by_factor
        return x * f, total

    found = []
    for k, width in enumerate(inputs[5]):
        (x, dx), (y, dy) = (prefix(k, width, side) for side in (0, 1))
        found.append(tangents.log_sum_exps((x, y, scale, "dot", 0), (dx, dy, of_inputs[2])))
    return *(torch.stack(same) for same in zip(*found, strict=True)), None, None, None


derivatives.register("contrastive_prefix_lse", _backward, save=_save, jvp=_jvp)
derivatives.register("contrastive_prefix_lse_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)
_library.impl("contrastive_prefix_lse", autocast.rounded(torch.ops.gapkern.contrastive_prefix_lse), "AutocastCPU")

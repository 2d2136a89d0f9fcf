"""`torch.ops.gapkern.contrastive_masked_sigmoid`: the sigmoid loss with positives by ids, in chunks of rows.

sum_ij w_ij softplus(-z_ij S_ij), S = s <x_i, y_j> + bias: z = +1 and w_ij = row_weights_i + col_weights_j where ids are
equal, else z = -1 and w = 1. Loss and gradients come from one pass over the logits.
"""

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import saved
from gapkern.ops.contrastive.chunked import _Gradients, _Logits
from gapkern.ops.contrastive.masked import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS
from gapkern.ops.precision import matmul_precision

_library = torch.library.Library("gapkern", "FRAGMENT")
_library.define(
    "contrastive_masked_sigmoid(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor row_ids,"
    " Tensor col_ids, Tensor row_weights, Tensor col_weights, str precision, bool[2] needs)"
    " -> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_logit_scale, Tensor grad_logit_bias)"
)


def masked_sigmoid_sum(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weights: Tensor,
    col_weights: Tensor,
) -> Tensor:
    """0-d float64: the weighted sum over all pairs; gradients reach x, y, logit_scale and logit_bias, once.

    Args:
        x, y: (N, D), (M, D).
        logit_scale, logit_bias: one element each.
        row_ids, col_ids: (N,), (M,) integers.
        row_weights, col_weights: (N,), (M,) float64, whose sums are the weights of positive pairs.

    Example:
        >>> x, ids, half = torch.eye(2), torch.arange(2), torch.full((2,), 0.5, dtype=torch.float64)
        >>> s, b = torch.tensor(10.0), torch.tensor(-10.0)
        >>> round(float(masked_sigmoid_sum(x, x, s, b, ids, ids, half, half)), 4)
        1.3864
    """
    grads = torch.is_grad_enabled()
    needs = [grads and x.requires_grad, grads and y.requires_grad]
    return torch.ops.gapkern.contrastive_masked_sigmoid(
        x,
        y,
        logit_scale,
        logit_bias,
        row_ids,
        col_ids,
        row_weights,
        col_weights,
        matmul_precision(x.device.type),
        needs,
    )[0]


def _kernel(x, y, logit_scale, logit_bias, row_ids, col_ids, row_weights, col_weights, precision, needs):
    logits = _Logits(x, y, "dot")
    logits.step = max(1, (CUDA_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // y.shape[0])
    gradients = _Gradients(logits, needs)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_bias = torch.zeros_like(loss)
    scale, bias = (v.reshape(()).to(logits.dtype) for v in (logit_scale, logit_bias))
    row_weights, col_weights = (w.to(logits.dtype) for w in (row_weights, col_weights))
    none = x.new_empty(0, dtype=logits.dtype)
    for rows in logits.chunks():
        t = logits.products(rows)
        positive = row_ids[rows, None] == col_ids
        z = positive.to(t.dtype).mul_(2).sub_(1)
        w = torch.where(positive, row_weights[rows, None] + col_weights, 1.0)
        s = z * (t * scale + bias)
        ds = torch.sigmoid(-s).mul_(z).mul_(w).neg_()
        loss -= torch.sum(torch.nn.functional.logsigmoid(s).mul_(w), dtype=torch.float64)
        grad_bias += ds.sum(dtype=torch.float64)
        of_scale = torch.sum(ds * t, dtype=torch.float64).reshape(1)
        gradients.add(rows, ds.to(x.dtype), of_scale, none, none)
    dx, dy, of_scale = gradients.finish(scale)
    return loss, dx, dy, of_scale.clone(), grad_bias


_library.impl("contrastive_masked_sigmoid", autocast.untouched(_kernel), "CompositeExplicitAutograd")


@torch.library.register_fake("gapkern::contrastive_masked_sigmoid", lib=_library)
def _(x, y, logit_scale, logit_bias, row_ids, col_ids, row_weights, col_weights, precision, needs):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalar = x.new_empty((), dtype=torch.float64)
    return (
        scalar,
        x.new_empty(x.shape if needs[0] else (0,), dtype=dtype),
        y.new_empty(y.shape if needs[1] else (0,), dtype=dtype),
        torch.empty_like(scalar),
        torch.empty_like(scalar),
    )


derivatives.register("contrastive_masked_sigmoid", saved.backward, save=saved.save, arguments=saved.needed)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_masked_sigmoid", autocast.rounded(torch.ops.gapkern.contrastive_masked_sigmoid), _key)

"""`torch.ops.gapkern.contrastive_masked_sigmoid`: the sigmoid loss with positives by ids.

sum_ij a_ij softplus(-S_ij) + b_ij softplus(S_ij), S = s <x_i, y_j> + bias. Where ids are equal a_ij = row_weights_i +
col_weights_j, and b_ij = 0, or 1 - a_ij with soft targets, which are a; elsewhere a = 0 and b = 1. Loss and gradients
come from one pass over the logits.
"""

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import dispatch, masked_tangents, saved
from gapkern.ops.contrastive.arguments import MaskedSigmoidArguments
from gapkern.ops.precision import matmul_precision

_library = torch.library.Library("gapkern", "IMPL")


def masked_sigmoid_sum(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    row_weights: Tensor,
    col_weights: Tensor,
    *,
    soft_targets: bool = False,
) -> Tensor:
    """0-d float64: the weighted sum over all pairs; gradients reach x, y, logit_scale and logit_bias, once.

    Args:
        x, y: (N, D), (M, D).
        logit_scale, logit_bias: one element each.
        row_ids, col_ids: (N,), (M,) int64.
        row_weights, col_weights: (N,), (M,) float64, whose sums a_ij are the weights of positive pairs.
        soft_targets: a_ij is the target probability of a positive pair instead, of weight 1.

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
        soft_targets,
        matmul_precision(x.device.type),
        needs,
    )[0]


def _forward(*inputs):
    return dispatch.masked_sigmoid(MaskedSigmoidArguments(*inputs))


_library.impl("contrastive_masked_sigmoid", autocast.untouched(_forward), "CompositeExplicitAutograd")


@torch.library.register_fake("gapkern::contrastive_masked_sigmoid", lib=_library)
def _(x, y, logit_scale, logit_bias, row_ids, col_ids, row_weights, col_weights, soft_targets, precision, needs):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalar = x.new_empty((), dtype=torch.float64)
    return (
        scalar,
        x.new_empty(x.shape if needs[0] else (0,), dtype=dtype),
        y.new_empty(y.shape if needs[1] else (0,), dtype=dtype),
        torch.empty_like(scalar),
        torch.empty_like(scalar),
    )


def _jvp(inputs, tangents):
    return masked_tangents.masked_sigmoid(inputs, tangents), None, None, None, None


derivatives.register("contrastive_masked_sigmoid", saved.backward, save=saved.save, jvp=_jvp, arguments=saved.needed)

for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_masked_sigmoid", autocast.rounded(torch.ops.gapkern.contrastive_masked_sigmoid), _key)

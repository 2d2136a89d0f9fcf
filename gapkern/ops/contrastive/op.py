"""`torch.ops.gapkern.contrastive_lse` and `sigmoid_loss`: public functions, fake kernels, derivatives, autocast."""

import torch
from torch import Tensor

from gapkern.ops import autocast, derivatives
from gapkern.ops.contrastive import chunked, dispatch, emulation, masked_emulation, masked_steps, saved, tangents
from gapkern.ops.contrastive.arguments import LseBackwardArguments


def lse_pair(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    *,
    similarity: str = "dot",
    label_offset: int = 0,
    precision: str = "highest",
    work_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column log-sum-exps of the logits, and the logit of each row's label.

    Every softmax loss over pairs, in one direction or both, follows from these three vectors; their gradients reach
    images, texts and logit_scale, once (double backward is refused).

    Args:
        images: (N, D) float32, float16, bfloat16 or float64.
        texts: (M, D), the same dtype.
        logit_scale: one element, any floating-point dtype.
        similarity: "dot", S = s <x, y>, or "sqeuclidean", S = -s ||x - y||^2.
        label_offset: the label of row i is column i + label_offset.
        precision: "medium" allows bfloat16 products with float32 accumulation; "highest" and "high" are true float32.
        work_bytes: memory the forward pass may keep for the backward pass, so that it need not form logits again.

    Returns:
        In float64: row_lse (N,) = logsumexp_j S_ij, col_lse (M,) = logsumexp_i S_ij, positive (N,) =
        S[i, i + label_offset].

    Example:
        >>> x = torch.eye(3)
        >>> row, col, positive = lse_pair(x, x, torch.tensor(2.0))
        >>> [round(v, 4) for v in (row - positive).tolist()]
        [0.2395, 0.2395, 0.2395]
    """
    row, col, positive, *_ = torch.ops.gapkern.contrastive_lse(
        images, texts, logit_scale, similarity, label_offset, precision, work_bytes
    )
    return row, col, positive


def sigmoid_sum(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    label_offset: int = 0,
    precision: str = "highest",
) -> Tensor:
    """Sum over all pairs of the sigmoid loss, in one pass that also forms the gradients.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64.
        texts: (M, D), the same dtype.
        logit_scale: one element, any floating-point dtype.
        logit_bias: one element, any floating-point dtype.
        label_offset: column i + label_offset is the positive of row i; a row whose label lies outside [0, M) has none.
        precision: as for `lse_pair`.

    Returns:
        0-d float64: sum_ij softplus(-z_ij (s <x_i, y_j> + bias)), z = +1 for positives and -1 for all other pairs.

    Example:
        >>> x = torch.eye(2)
        >>> round(float(sigmoid_sum(x, x, torch.tensor(10.0), torch.tensor(-10.0))), 4)
        1.3864
    """
    grads = torch.is_grad_enabled()
    needs = [grads and images.requires_grad, grads and texts.requires_grad]
    return torch.ops.gapkern.sigmoid_loss(images, texts, logit_scale, logit_bias, label_offset, precision, needs)[0]


@torch.library.register_fake("gapkern::sigmoid_loss")
def _(images, texts, logit_scale, logit_bias, label_offset, precision, needs):
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    scalar = images.new_empty((), dtype=torch.float64)
    return (
        scalar,
        images.new_empty(images.shape if needs[0] else (0,), dtype=dtype),
        texts.new_empty(texts.shape if needs[1] else (0,), dtype=dtype),
        torch.empty_like(scalar),
        torch.empty_like(scalar),
    )


def _jvp_sigmoid(inputs, tangents_):
    return tangents.sigmoid(inputs, tangents_), None, None, None, None


@torch.library.register_fake("gapkern::contrastive_lse")
def _(images, texts, logit_scale, similarity, label_offset, precision, work_bytes):
    n, m = images.shape[0], texts.shape[0]
    double = images.dtype == torch.float64
    rows: int | torch.SymInt = 0
    if work_bytes > 0 and dispatch.keeps(images, similarity, precision):
        rows = work_bytes // (m * (8 if double else 4))
        # As an expression of the batch it would be compared with 0 and 1, which holds for some batches and not others.
        rows = min(n, rows) if isinstance(n, int) and isinstance(m, int) else torch.library.get_ctx().new_dynamic_size()
    return (
        images.new_empty((n,), dtype=torch.float64),
        images.new_empty((m,), dtype=torch.float64),
        images.new_empty((n,), dtype=torch.float64),
        images.new_empty((3, n), dtype=torch.float64),
        images.new_empty((2, m), dtype=torch.float64),
        images.new_empty((rows, m), dtype=torch.float64 if double else torch.float32),
    )


@torch.library.register_fake("gapkern::contrastive_lse_backward")
def _(*inputs):
    arguments = LseBackwardArguments(*inputs)
    images, texts, needs = arguments.images, arguments.texts, arguments.needs
    return (
        images.new_empty(images.shape if needs[0] else (0,)),
        texts.new_empty(texts.shape if needs[1] else (0,)),
        arguments.logit_scale.new_empty((1,) if needs[2] else (0,)),
    )


def _save(ctx, inputs, output):
    images, texts, logit_scale, ctx.similarity, ctx.label_offset, ctx.precision, _ = inputs
    stats_and_kept = output[3:]
    ctx.mark_non_differentiable(*stats_and_kept)
    ctx.save_for_backward(images, texts, logit_scale, *stats_and_kept)


def _backward(ctx, grad_row, grad_col, grad_positive, *_):
    images, texts, logit_scale, row_stats, col_stats, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_row = row_stats.new_zeros(images.shape[0]) if grad_row is None else grad_row
    grad_col = col_stats.new_zeros(texts.shape[0]) if grad_col is None else grad_col
    grad_positive = row_stats.new_zeros(images.shape[0]) if grad_positive is None else grad_positive
    arguments = LseBackwardArguments(
        grad_row=grad_row,
        grad_col=grad_col,
        grad_positive=grad_positive,
        images=images,
        texts=texts,
        logit_scale=logit_scale,
        row_stats=row_stats,
        col_stats=col_stats,
        kept=kept,
        similarity=ctx.similarity,
        label_offset=ctx.label_offset,
        precision=ctx.precision,
        needs=needs,
    )
    dx, dy, ds = torch.ops.gapkern.contrastive_lse_backward(*arguments)
    return (
        dx if needs[0] else None,
        dy if needs[1] else None,
        ds.reshape(logit_scale.shape) if needs[2] else None,
        None,
        None,
        None,
        None,
    )


def _jvp(inputs, tangents_):
    return *tangents.log_sum_exps(inputs, tangents_), None, None, None


derivatives.register("contrastive_lse", _backward, save=_save, jvp=_jvp)
derivatives.register("contrastive_lse_backward", derivatives.refuse_twice, jvp=derivatives.refuse_jvp_twice)
derivatives.register("sigmoid_loss", saved.backward, save=saved.save, jvp=_jvp_sigmoid, arguments=saved.needed)
for _step in (*chunked.STEPS, *masked_steps.STEPS, *emulation.STEPS, *masked_emulation.STEPS):
    derivatives.register(_step, derivatives.refuse_step, jvp=derivatives.refuse_jvp_step)

_library = torch.library.Library("gapkern", "IMPL")


def _lse_backward(*inputs):
    return dispatch.contrastive_lse_backward(LseBackwardArguments(*inputs))


_KERNELS = {
    "contrastive_lse": dispatch.contrastive_lse,
    "contrastive_lse_backward": _lse_backward,
    "sigmoid_loss": dispatch.sigmoid_loss,
}
for _name, _kernel in _KERNELS.items():
    _library.impl(_name, autocast.untouched(_kernel), "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("contrastive_lse", autocast.rounded(torch.ops.gapkern.contrastive_lse), _key)
    _library.impl("sigmoid_loss", autocast.rounded(torch.ops.gapkern.sigmoid_loss), _key)

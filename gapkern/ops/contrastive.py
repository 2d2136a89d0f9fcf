"""`torch.ops.gapkern.contrastive_lse`: log-sum-exps of a logit matrix that is never formed."""

import torch
from torch import Tensor

from gapkern.ops import hopper


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
        precision: "highest" is true float32; "high" and "medium" allow bfloat16 products with float32 accumulation.
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


def _save_sigmoid(ctx, inputs, output):
    images, texts, logit_scale, logit_bias = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [t.dtype for t in (images, texts, logit_scale, logit_bias)]
    ctx.shapes = [logit_scale.shape, logit_bias.shape]
    ctx.save_for_backward(*output[1:])


def _backward_sigmoid(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    if torch.is_grad_enabled():  # the saved gradients are constants: a second differentiation would silently be wrong
        _refuse(ctx)
    needs, (dx, dy, ds, db) = ctx.needs_input_grad, ctx.saved_tensors
    return (
        (dx * grad_loss).to(ctx.dtypes[0]) if needs[0] else None,
        (dy * grad_loss).to(ctx.dtypes[1]) if needs[1] else None,
        (ds * grad_loss).to(ctx.dtypes[2]).reshape(ctx.shapes[0]) if needs[2] else None,
        (db * grad_loss).to(ctx.dtypes[3]).reshape(ctx.shapes[1]) if needs[3] else None,
        None,
        None,
        None,
    )


@torch.library.register_fake("gapkern::contrastive_lse")
def _(images, texts, logit_scale, similarity, label_offset, precision, work_bytes):
    n, m = images.shape[0], texts.shape[0]
    double = images.dtype == torch.float64
    rows = torch.sym_min(n, max(work_bytes, 0) // (m * (8 if double else 4))) if work_bytes else 0
    return (
        images.new_empty((n,), dtype=torch.float64),
        images.new_empty((m,), dtype=torch.float64),
        images.new_empty((n,), dtype=torch.float64),
        images.new_empty((3, n), dtype=torch.float64),
        images.new_empty((2, m), dtype=torch.float64),
        images.new_empty((rows, m), dtype=torch.float64 if double else torch.float32),
    )


@torch.library.register_fake("gapkern::contrastive_lse_backward")
def _(
    grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats, col_stats, kept, similarity, label_offset,
    precision, needs,
):  # fmt: skip
    return (
        images.new_empty(images.shape if needs[0] else (0,)),
        texts.new_empty(texts.shape if needs[1] else (0,)),
        logit_scale.new_empty((1,) if needs[2] else (0,)),
    )


def _save(ctx, inputs, output):
    images, texts, logit_scale, ctx.similarity, ctx.label_offset, ctx.precision, _ = inputs
    stats_and_kept = output[3:]
    ctx.mark_non_differentiable(*stats_and_kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images, texts, logit_scale, *stats_and_kept)


def _backward(ctx, grad_row, grad_col, grad_positive, *_):
    images, texts, logit_scale, row_stats, col_stats, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grad_row = row_stats.new_zeros(images.shape[0]) if grad_row is None else grad_row
    grad_col = col_stats.new_zeros(texts.shape[0]) if grad_col is None else grad_col
    grad_positive = row_stats.new_zeros(images.shape[0]) if grad_positive is None else grad_positive
    dx, dy, ds = torch.ops.gapkern.contrastive_lse_backward(
        grad_row, grad_col, grad_positive, images, texts, logit_scale, row_stats, col_stats, kept,
        ctx.similarity, ctx.label_offset, ctx.precision, needs,
    )  # fmt: skip
    return (
        dx if needs[0] else None,
        dy if needs[1] else None,
        ds.reshape(logit_scale.shape) if needs[2] else None,
        None,
        None,
        None,
        None,
    )


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "gapkern: the contrastive losses can be differentiated once; double backward (create_graph=True) is refused"
    )


torch.library.register_autograd("gapkern::contrastive_lse", _backward, setup_context=_save)
torch.library.register_autograd("gapkern::contrastive_lse_backward", _refuse)
torch.library.register_autograd("gapkern::sigmoid_loss", _backward_sigmoid, setup_context=_save_sigmoid)

_library = torch.library.Library("gapkern", "IMPL")


def _autocast(operator, device: str):
    """Under autocast only the embeddings take the lower precision: a rounded logit_scale would shift every logit."""

    def call(images, texts, *rest):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            if images.dtype != torch.float64:
                images, texts = images.to(dtype), texts.to(dtype)
            return operator(images, texts, *rest)

    return call


for _name in ("contrastive_lse", "contrastive_lse_backward", "sigmoid_loss"):
    _library.impl(_name, hopper.dispatch(_name), "CompositeExplicitAutograd")
for _name in ("contrastive_lse", "sigmoid_loss"):
    for _device in ("cpu", "cuda"):
        _library.impl(_name, _autocast(getattr(torch.ops.gapkern, _name), _device), f"Autocast{_device.upper()}")

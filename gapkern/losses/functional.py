"""The losses as functions, on one process or over a torch.distributed group."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.ops import contrastive

# memory="auto" lets the forward pass keep this much for the backward pass, which then forms the logits once less.
AUTO_BYTES = 256 * 2**20


def work_bytes(memory: str | int, images: Tensor, texts: Tensor) -> int:
    """Bytes of N x M work space that a `memory` argument allows."""
    if isinstance(memory, str):
        _check.choice("memory", memory, ("auto", "recompute", "keep"))
        item = 8 if images.dtype == torch.float64 else 4
        return {"recompute": 0, "auto": AUTO_BYTES, "keep": images.shape[0] * texts.shape[0] * item}[memory]
    return _check.integer("memory", memory, low=0)


def _matmul_precision() -> str:
    """What products of float32 may round to; asked once per compiled graph."""
    return torch.get_float32_matmul_precision()


# As torch.compiler.assume_constant_result leaves it; calling that imports torch._dynamo, half of this package's import.
_matmul_precision.__dict__["_dynamo_marked_constant"] = True


def scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(_check.number(name, value), dtype=torch.float64, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    return value


def check_pairs(images: Tensor, texts: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Checks the embeddings; returns logit_scale as a tensor."""
    images, texts = _check.matrix("images", images), _check.matrix("texts", texts, rows="M")
    _check.same_width(images=images, texts=texts)
    _check.same_device(images=images, texts=texts)
    if images.dtype != texts.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"texts: expected {images.dtype} as in images, got {texts.dtype}")
    _check.same_rows(images=images, texts=texts)
    return scalar("logit_scale", logit_scale, images)


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    similarity: str = "dot",
    reduction: str = "mean",
    memory: str | int = "auto",
    group: Any = None,
) -> Tensor:
    """The symmetric contrastive (CLIP) loss of N pairs: row i of `images` belongs to row i of `texts`.

    With S = s <x_i, y_j> (+ bias) and both softmaxes, loss_i = -(log Qx(i, i) + log Qy(i, i)) / 2: half of the paper's
    Eq. 6 per pair, which is open_clip's average of the two directions. Memory grows linearly in N.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, any strides.
        texts: (N, D), the same dtype.
        logit_scale: s, one element.
        logit_bias: added to every logit, one element. Both softmaxes are invariant to it, so its gradient is zero.
        similarity: "dot", or "sqeuclidean" for S = -s ||x_i - y_j||^2.
        reduction: "mean", "sum", or "none" for one loss per pair, shape (N,).
        memory: "recompute" keeps nothing N x N for the backward pass, "keep" keeps the logits and saves a quarter of
            the arithmetic, a number allows that many bytes, "auto" keeps up to 256 MiB.
        group: a torch.distributed group (True: the default one) over whose ranks the batch is spread; images and texts
            are this rank's pairs, as many on every rank. The value ("none": of this rank's pairs) and the gradients
            are those of the whole batch on one process. Each rank forms its rows of the logits once.

    Returns:
        The loss, 0-d or (N,), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, widths or row counts that do not match, or an unknown option.
        TypeError: not floating-point tensors, or two dtypes.
        RuntimeError: a group without torch.distributed; double backward.

    Example:
        >>> images = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> round(float(contrastive_loss(images, images, logit_scale=10.0)), 6)
        0.000943
    """
    _check.choice("reduction", reduction, ("mean", "sum", "none"))
    scale = check_pairs(images, texts, logit_scale)
    if group is None:
        losses = pair_losses(images, texts, scale, similarity, memory)
    else:
        place = distributed.shard(group)
        losses = sharded_losses(images, texts, scale, similarity, memory, place, 1 / place.world)
    losses = without_gradient(losses, logit_bias)
    if reduction == "none":
        # The factor 1 / W is that of a mean over ranks; pairs on their own need none.
        return in_float(losses if group is None else distributed.scale_gradient(losses, place.world), images)
    if group is None:
        return in_float(losses.mean() if reduction == "mean" else losses.sum(), images)
    mean = distributed.mean_value(losses.mean(), place)
    return in_float(mean if reduction == "mean" else mean * len(images) * place.world, images)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Any = None,
) -> Tensor:
    """The sigmoid (SigLIP) loss: (1/N) sum_ij softplus(-z_ij (s <x_i, y_j> + bias)), z = +1 for the pairs and else -1.

    Loss and gradients come from one pass over the logits, which are never stored.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, any strides.
        texts: (N, D), the same dtype.
        logit_scale: s, one element.
        logit_bias: one element.
        group: as for `contrastive_loss`.

    Returns:
        0-d, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as `contrastive_loss`.

    Example:
        >>> x = torch.eye(2)
        >>> round(float(sigmoid_loss(x, x, 10.0, -10.0)), 4)
        0.6932
    """
    scale = check_pairs(images, texts, logit_scale)
    bias = scalar("logit_bias", logit_bias, images)
    if group is None:
        return in_float(sigmoid_rows(images, texts, scale, bias, 0) / len(images), images)
    place = distributed.shard(group)
    return in_float(
        distributed.mean_value(sharded_sigmoid(images, texts, scale, bias, place, 1 / place.world), place), images
    )


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor, similarity: str, memory: str | int) -> Tensor:
    """(N,) float64."""
    row, col, positive = log_sum_exps(images, texts, scale, similarity, memory, 0)
    return (row + col) / 2 - positive


def log_sum_exps(images, texts, scale, similarity, memory, label_offset):
    _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
    return contrastive.lse_pair(
        images,
        texts,
        scale,
        similarity=similarity,
        label_offset=label_offset,
        precision=_matmul_precision(),
        work_bytes=work_bytes(memory, images, texts),
    )


def sharded_losses(images, texts, scale, similarity, memory, place, factor: float) -> Tensor:
    """(n,) float64 losses of this rank's pairs within the whole batch.

    `factor` multiplies the gradients of images and texts; 1 is that of the sum of all ranks' means.
    """
    distributed.check_even(place, images=images, texts=texts)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale = distributed.mean_gradient(scale, place)
    everyone = distributed.gather(texts, place)
    own = slice(place.rank * len(texts), (place.rank + 1) * len(texts))
    row, partial, positive = log_sum_exps(images, everyone, scale, similarity, memory, own.start)
    return (row + distributed.merge_columns(partial, place)[own]) / 2 - positive


def sigmoid_rows(images, texts, scale, bias, label_offset) -> Tensor:
    return contrastive.sigmoid_sum(images, texts, scale, bias, label_offset=label_offset, precision=_matmul_precision())


def sharded_sigmoid(images, texts, scale, bias, place, factor: float) -> Tensor:
    """0-d float64: this rank's rows against all texts, over its number of pairs."""
    distributed.check_even(place, images=images, texts=texts)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale, bias = (distributed.mean_gradient(t, place) for t in (scale, bias))
    everyone = distributed.gather(texts, place)
    return sigmoid_rows(images, everyone, scale, bias, place.rank * len(texts)) / len(images)


def without_gradient(losses: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """The losses themselves: a bias moves all logits alike. Its gradient is zero, and is there."""
    if logit_bias is None:
        return losses
    bias = scalar("logit_bias", logit_bias, losses).reshape(())
    return losses + (bias - bias)


def in_float(losses: Tensor, images: Tensor) -> Tensor:
    return losses if images.dtype == torch.float64 else losses.float()

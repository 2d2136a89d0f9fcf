"""Contrastive losses that never form the N x M logits, and drop-in classes for open_clip."""

import torch
from torch import Tensor

from gapkern import _check
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


def _scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(_check.number(name, value), dtype=torch.float64, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    return value


def _pairs(images: Tensor, texts: Tensor) -> None:
    images, texts = _check.matrix("images", images), _check.matrix("texts", texts, rows="M")
    _check.same_width(images=images, texts=texts)
    _check.same_device(images=images, texts=texts)
    if images.dtype != texts.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"texts: expected {images.dtype} as in images, got {texts.dtype}")


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    similarity: str = "dot",
    reduction: str = "mean",
    memory: str | int = "auto",
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

    Returns:
        The loss, 0-d or (N,), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, widths or row counts that do not match, or an unknown option.
        TypeError: not floating-point tensors, or two dtypes.

    Example:
        >>> images = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> round(float(contrastive_loss(images, images, logit_scale=10.0)), 6)
        0.000943
    """
    _pairs(images, texts)
    _check.same_rows(images=images, texts=texts)
    _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
    _check.choice("reduction", reduction, ("mean", "sum", "none"))
    scale = _scalar("logit_scale", logit_scale, images)
    row, col, positive = contrastive.lse_pair(
        images,
        texts,
        scale,
        similarity=similarity,
        precision=torch.get_float32_matmul_precision(),
        work_bytes=work_bytes(memory, images, texts),
    )
    losses = (row + col) / 2 - positive
    if logit_bias is not None:
        bias = _scalar("logit_bias", logit_bias, images).reshape(())
        losses = losses + (bias - bias)
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return losses if images.dtype == torch.float64 else losses.float()


class ClipLoss(torch.nn.Module):
    """Drop-in for open_clip's `ClipLoss`.

    Example:
        >>> loss = ClipLoss()
        >>> features = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> sorted(loss(features, features, torch.tensor(10.0), output_dict=True))
        ['contrastive_loss']
    """

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        loss = contrastive_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

"""The losses as functions, on one process or over a torch.distributed group."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.ops import contrastive
from gapkern.ops.precision import matmul_precision

# memory="auto" lets the forward pass keep this much for the backward pass, which then forms the logits once less.
AUTO_BYTES = 256 * 2**20
ALL_BYTES = 2**62


def work_bytes(memory: str | int) -> int:
    """Bytes of N x M work space that a `memory` argument allows."""
    if isinstance(memory, str):
        _check.choice("memory", memory, ("auto", "recompute", "keep"))
        return {"recompute": 0, "auto": AUTO_BYTES, "keep": ALL_BYTES}[memory]
    return _check.integer("memory", memory, low=0)


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
    ids: Any = None,
    positives: str = "out",
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """The symmetric contrastive (CLIP) loss of N pairs: row i of `images` belongs to row i of `texts`.

    With S = s <x_i, y_j> (+ bias) and both softmaxes, loss_i = -(log Qx(i, i) + log Qy(i, i)) / 2: half of the paper's
    Eq. 6 per pair, which is open_clip's average of the two directions. Memory grows linearly in N.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, any strides.
        texts: (N, D), the same dtype.
        logit_scale: s, one element: a tensor on the embeddings' device or the CPU, or a number.
        logit_bias: added to every logit, one element. Both softmaxes are invariant to it, so its gradient is zero.
        similarity: "dot", or "sqeuclidean" for S = -s ||x_i - y_j||^2.
        reduction: "mean", "sum", or "none" for one loss per pair, shape (N,).
        memory: "recompute" keeps nothing N x N for the backward pass, "keep" keeps the logits and saves a quarter of
            the arithmetic, a number allows that many bytes, "auto" keeps up to 256 MiB.
        group: a torch.distributed group, a one-dimensional DeviceMesh, or True for the default group, over whose ranks
            the batch is spread; images and texts are this rank's pairs, as many on every rank. The value ("none": of
            this rank's pairs) and the gradients are those of the whole batch on one process. Each rank forms its rows
            of the logits once. A rank's bad input raises on every rank.
        ids: (N,) integers, or a pair of such for images and texts: all pairs of equal ids are positives, and row i's
            own text always is one (UniCL, Yang et al. 2022, Eq. 3-4; captions of one image).
        positives: with ids, "out", the mean over positives outside of the logarithm (SupCon, Khosla et al. 2020,
            Eq. 2), or "in", inside of it (Eq. 3).
        label_smoothing: eps: the target is 1 - eps on the positives and eps spread evenly over all N.
        weights: (N,) of the pairs; "mean" is weighted by them.

    Returns:
        The loss, 0-d or (N,), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, widths or row counts that do not match, or an unknown option.
        TypeError: not floating-point tensors, or two dtypes.
        RuntimeError: a group without torch.distributed; double backward (`torch.func.hessian` too).

    Example:
        >>> images = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> round(float(contrastive_loss(images, images, logit_scale=10.0)), 6)
        0.000943
    """
    if ids is not None or weights is not None or label_smoothing != 0 or positives != "out":
        from gapkern.losses.multiple import multiple_positives_loss

        return multiple_positives_loss(
            images,
            texts,
            logit_scale,
            logit_bias,
            similarity=similarity,
            reduction=reduction,
            memory=memory,
            group=group,
            ids=ids,
            positives=positives,
            label_smoothing=label_smoothing,
            weights=weights,
        )
    place = None if group is None or group is False else distributed.shard(group)
    try:
        _check.choice("reduction", reduction, ("mean", "sum", "none"))
        _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
        images, texts, scale = check_pairs(images, texts, logit_scale)
        work_bytes(memory)
        bias = None if logit_bias is None else scalar("logit_bias", logit_bias, images)
    except (TypeError, ValueError) as error:
        if place is not None:
            distributed.refuse(place, error)
        raise
    if place is None:
        losses = without_gradient(pair_losses(images, texts, scale, similarity, memory), bias)
        if reduction == "none":
            return in_float(losses, images)
        return in_float(losses.mean() if reduction == "mean" else losses.sum(), images)
    terms = f"contrastive_loss(similarity={similarity!r}, reduction={reduction!r})"
    losses = sharded_losses(images, texts, scale, similarity, memory, place, 1 / place.world, terms)
    losses = without_gradient(losses, bias)
    if reduction == "none":
        # The factor 1 / W is that of a mean over ranks; pairs on their own need none.
        return in_float(distributed.scale_gradient(losses, place.world), images)
    mean = distributed.mean_value(losses.mean(), place)
    return in_float(mean if reduction == "mean" else mean * images.shape[0] * place.world, images)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Any = None,
    ids: Any = None,
    positives: str = "sum",
) -> Tensor:
    """The sigmoid (SigLIP) loss: (1/N) sum_ij softplus(-z_ij (s <x_i, y_j> + bias)), z = +1 for the pairs and else -1.

    Loss and gradients come from one pass over the logits, which are never stored.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, any strides.
        texts: (N, D), the same dtype.
        logit_scale: s, one element.
        logit_bias: one element.
        group: as for `contrastive_loss`.
        ids: (N,) integers, or a pair of such for images (N,) and texts (M,), which may then differ in number: z = +1
            for all pairs of equal ids, and for no others.
        positives: with ids, "sum", or "mean": a positive pair counts (1 / k_i + 1 / k_j) / 2, with k the numbers of
            positives of its image and of its text (SigLIP+).

    Returns:
        0-d, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as `contrastive_loss`.

    Example:
        >>> x = torch.eye(2)
        >>> round(float(sigmoid_loss(x, x, 10.0, -10.0)), 4)
        0.6932
    """
    if ids is not None or positives != "sum":
        from gapkern.losses.multiple import multiple_positives_sigmoid

        return multiple_positives_sigmoid(
            images, texts, logit_scale, logit_bias, group=group, ids=ids, positives=positives
        )
    place = None if group is None or group is False else distributed.shard(group)
    try:
        images, texts, scale = check_pairs(images, texts, logit_scale)
        bias = scalar("logit_bias", logit_bias, images)
    except (TypeError, ValueError) as error:
        if place is not None:
            distributed.refuse(place, error)
        raise
    if place is None:
        return in_float(sigmoid_rows(images, texts, scale, bias, 0) / images.shape[0], images)
    loss = sharded_sigmoid(images, texts, scale, bias, place, 1 / place.world, "sigmoid_loss")
    return in_float(distributed.mean_value(loss, place), images)


def pair_losses(images: Tensor, texts: Tensor, scale: Tensor, similarity: str, memory: str | int) -> Tensor:
    """(N,) float64."""
    row, col, positive = log_sum_exps(images, texts, scale, similarity, memory, 0)
    return (row + col) / 2 - positive


def log_sum_exps(
    images: Tensor, texts: Tensor, scale: Tensor, similarity: str, memory: str | int, label_offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    return contrastive.lse_pair(
        images,
        texts,
        scale,
        similarity=similarity,
        label_offset=label_offset,
        precision=matmul_precision(images.device.type),
        work_bytes=work_bytes(memory) if torch.is_grad_enabled() else 0,
    )


def wanted(terms: str, **tensors: Tensor) -> str:
    """`terms`, and which gradients flow: the ranks' backward passes meet too."""
    with_gradient = [name for name, t in tensors.items() if torch.is_grad_enabled() and t.requires_grad]
    return f"{terms} with gradients of {', '.join(with_gradient) or 'nothing'}"


def own_rows(texts: Tensor, place: distributed.Shard) -> slice:
    """Where this rank's rows are among everyone's."""
    return slice(place.rank * texts.shape[0], (place.rank + 1) * texts.shape[0])


def sharded_losses(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    similarity: str,
    memory: str | int,
    place: distributed.Shard,
    factor: float,
    terms: str,
) -> Tensor:
    """(n,) float64 losses of this rank's pairs within the whole batch.

    `factor` multiplies the gradients of images and texts; 1 is that of the sum of all ranks' means.
    """
    terms = wanted(terms, images=images, texts=texts, logit_scale=scale)
    own = own_rows(texts, place)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale = distributed.mean_gradient(scale, place)
    everyone = distributed.gather(texts, place, terms)
    row, partial, positive = log_sum_exps(images, everyone, scale, similarity, memory, own.start)
    return (row + distributed.merge_columns(partial, place)[own]) / 2 - positive


def sigmoid_rows(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, label_offset: int) -> Tensor:
    precision = matmul_precision(images.device.type)
    return contrastive.sigmoid_sum(images, texts, scale, bias, label_offset=label_offset, precision=precision)


def sharded_sigmoid(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, place: distributed.Shard, factor: float, terms: str
) -> Tensor:
    """0-d float64: this rank's rows against all texts, over its number of pairs."""
    terms = wanted(terms, images=images, texts=texts, logit_scale=scale, logit_bias=bias)
    images, texts = (distributed.scale_gradient(t, factor) for t in (images, texts))
    scale, bias = (distributed.mean_gradient(t, place) for t in (scale, bias))
    everyone = distributed.gather(texts, place, terms)
    return sigmoid_rows(images, everyone, scale, bias, place.rank * texts.shape[0]) / images.shape[0]


def without_gradient(losses: Tensor, bias: Tensor | None) -> Tensor:
    """The losses themselves: a bias moves all logits alike. Its gradient is zero, and is there."""
    if bias is None:
        return losses
    return losses + (bias - bias).reshape(())


def in_float(losses: Tensor, images: Tensor) -> Tensor:
    return losses if images.dtype == torch.float64 else losses.float()

"""The losses as functions, on one process or over a torch.distributed group."""

from typing import Any

from torch import Tensor

from gapkern import _check
from gapkern.losses import distributed
from gapkern.losses.inputs import check_pairs, scalar
from gapkern.losses.multiple import multiple_positives_loss, multiple_positives_sigmoid
from gapkern.losses.spread import by_ring
from gapkern.losses.steps import (
    in_float,
    pair_losses,
    sharded_losses,
    sharded_sigmoid,
    sigmoid_rows,
    without_gradient,
    work_bytes,
)


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
    exchange: str = "auto",
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
            On CUDA nothing is kept with ids or label smoothing.
        group: a torch.distributed group, a one-dimensional DeviceMesh, or True for the default group, over whose ranks
            the batch is spread; images and texts are this rank's pairs, as many on every rank. The value ("none": of
            this rank's pairs) and the gradients are those of the whole batch on one process. Each rank forms its rows
            of the logits once. A rank's bad input raises on every rank.
        exchange: how the ranks' texts meet. "gather" brings all of them to each rank, O(N D) memory; "ring" sends them
            around, O(n D), while their products are formed, and their gradients after them; results differ by rounding.
            "auto" gathers while all texts and their gradients fit into 2 GiB, and always under `torch.compile`.
        ids: (N,) integers, or a pair of such for images and texts: all pairs of equal ids are positives, and row i's
            own text always is one (UniCL, Yang et al. 2022; captions of one image).
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
        >>> import torch
        >>> images = torch.nn.functional.normalize(torch.eye(4) + 0.1, dim=1)
        >>> round(float(contrastive_loss(images, images, logit_scale=10.0)), 6)
        0.000943
    """
    if ids is not None or weights is not None or label_smoothing != 0 or positives != "out":
        return multiple_positives_loss(
            images,
            texts,
            logit_scale,
            logit_bias,
            similarity=similarity,
            reduction=reduction,
            memory=memory,
            group=group,
            exchange=exchange,
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
        travels = by_ring(exchange, place, texts)
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
    losses = sharded_losses(images, texts, scale, similarity, memory, place, 1 / place.world, terms, travels)
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
    exchange: str = "auto",
    ids: Any = None,
    positives: str = "sum",
    symmetric: bool = True,
    soft_label: bool = False,
) -> Tensor:
    """The sigmoid (SigLIP) loss: (1/N) sum_ij softplus(-z_ij (s <x_i, y_j> + bias)), z = +1 for the pairs and else -1.

    Loss and gradients come from one pass over the logits, which are never stored.

    Args:
        images: (N, D) float32, float16, bfloat16 or float64, any strides.
        texts: (N, D), the same dtype.
        logit_scale: s, one element.
        logit_bias: one element.
        group, exchange: as for `contrastive_loss`.
        ids: (N,) integers, or a pair of such for images (N,) and texts (M,), which may then differ in number: z = +1
            for all pairs of equal ids, and for no others.
        positives: with ids, "sum", or "mean": a positive pair has the weight a = (1 / k_i + 1 / k_j) / 2, with k the
            numbers of positives of its image and of its text (SigLIP+).
        symmetric: with "mean"; False: images are the anchors, a = 1 / k_i.
        soft_label: with "mean"; True: a is the pair's target probability instead of its weight, and its term
            a softplus(-S) + (1 - a) softplus(S).

    Returns:
        0-d, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as `contrastive_loss`.

    Example:
        >>> import torch
        >>> x = torch.eye(2)
        >>> round(float(sigmoid_loss(x, x, 10.0, -10.0)), 4)
        0.6932
    """
    if ids is not None or positives != "sum" or soft_label is not False or symmetric is not True:
        return multiple_positives_sigmoid(
            images,
            texts,
            logit_scale,
            logit_bias,
            group=group,
            exchange=exchange,
            ids=ids,
            positives=positives,
            symmetric=symmetric,
            soft_label=soft_label,
        )
    place = None if group is None or group is False else distributed.shard(group)
    try:
        images, texts, scale = check_pairs(images, texts, logit_scale)
        bias = scalar("logit_bias", logit_bias, images)
        travels = by_ring(exchange, place, texts)
    except (TypeError, ValueError) as error:
        if place is not None:
            distributed.refuse(place, error)
        raise
    if place is None:
        return in_float(sigmoid_rows(images, texts, scale, bias, 0) / images.shape[0], images)
    loss = sharded_sigmoid(images, texts, scale, bias, place, 1 / place.world, "sigmoid_loss", travels)
    return in_float(distributed.mean_value(loss, place), images)

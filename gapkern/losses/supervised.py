"""Losses whose positives are classes: SupCon, and MIL-NCE."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs
from gapkern.losses.inputs import embeddings
from gapkern.ops import autocast


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: str = "out",
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
) -> Tensor:
    """The supervised contrastive loss (SupCon, Khosla et al. 2020, Eq. 2): rows of one label belong together.

    With P_i the other rows of i's label, loss_i = logsumexp_{j != i} S_ij - mean_{p in P_i} S_ip. Anchors without
    positives have no loss, and do not count in the mean.

    Args:
        features: (N, D) float32, float16, bfloat16 or float64.
        labels: (N,) integers.
        logit_scale: 1 / temperature, one element.
        positives: "out" (Eq. 2), or "in", the mean inside of the logarithm (Eq. 3).
        weights: (N,) of the anchors; "mean" is weighted by them.
        reduction: "mean", "sum", or "none" for (N,), 0 at anchors without positives.
        group, exchange: as for `contrastive_loss`.

    Raises:
        ValueError, TypeError: shapes and dtypes that do not match, or an unknown option.

    Example:
        >>> x = torch.eye(4)
        >>> round(float(supcon_loss(x, torch.tensor([0, 0, 1, 1]), 1.0)), 4)
        1.0986
    """
    batch = pairs.Batch(group, exchange)
    try:
        _check.choice("reduction", reduction, pairs.REDUCTIONS)
        _check.choice("positives", positives, ("out", "in"))
        x = embeddings("features", features)
        x = x.to(autocast.dtype_of(x))
        scale = pairs.scalar("logit_scale", logit_scale, x)
        ids = pairs.integers("labels", labels, len(x), x)
        weights = pairs.check_weights(weights, x)
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    like = x
    batch.enter(f"supcon_loss({positives!r}, {reduction!r})", {"logit_scale": scale}, features=x)
    x, scale = batch.feature(x), batch.scalar(scale)
    everyone = batch.spread(x)
    (all_ids,) = pairs.dense(batch.constant(ids))
    ids = all_ids[everyone.first : everyone.first + len(x)]
    others = pairs.class_counts(all_ids, ids, len(all_ids)) - 1
    there = others > 0
    # Before the log-sum-exps: derivatives are formed in reverse, and theirs first, while they have the memory alone.
    if positives == "out":
        t = everyone.class_sums(x, ids, all_ids)[0] / others.clamp_min(1)
    negative, positive = everyone.against_itself(scale, ids=all_ids, equal="positive")
    positive = torch.where(there, positive, torch.zeros_like(positive))
    losses = pairs.surprise(positive, [negative])
    if positives == "in":
        losses = losses + torch.log(others.clamp_min(1))
    else:
        losses = losses + torch.where(others > 1, positive - scale.reshape(()).double() * t, torch.zeros_like(t))
    losses = torch.where(there, losses, torch.zeros_like(losses))
    weights = there.double() if weights is None else weights * there
    return batch.reduce(losses, weights, reduction, like)


def mil_nce_loss(
    videos: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
) -> Tensor:
    """MIL-NCE (Miech et al. 2020, Eq. 1): any of K candidate texts may be a video's.

    loss_i = -log(P / (P + Q)): P sums exp(s <x_i, y_ik>) over its own candidates, Q over the other videos' candidates
    for this video and over the other videos for its candidates.

    Args:
        videos: (N, D) float32, float16, bfloat16 or float64.
        texts: (N, K, D), the same dtype.
        logit_scale: s, one element.
        weights, reduction, group, exchange: as for `contrastive_loss`.

    Raises:
        ValueError, TypeError: shapes and dtypes that do not match, or an unknown option.

    Example:
        >>> x = torch.eye(3)
        >>> round(float(mil_nce_loss(x, x[:, None].repeat(1, 2, 1), 1.0)), 4)
        0.9048
    """
    batch = pairs.Batch(group, exchange)
    try:
        _check.choice("reduction", reduction, pairs.REDUCTIONS)
        x = embeddings("videos", videos)
        x = x.to(autocast.dtype_of(x))
        y = _check.tensor("texts", texts)
        if y.dim() != 3 or len(y) != len(x) or y.shape[1] == 0:
            raise ValueError(f"texts: expected shape ({len(x)}, K, {x.shape[1]}), got {tuple(y.shape)}")
        candidates = y.shape[1]
        y = pairs.check_second("texts", y.flatten(0, 1), x, "videos", "N K")
        scale = pairs.scalar("logit_scale", logit_scale, x)
        weights = pairs.check_weights(weights, x)
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    like = x
    batch.enter(f"mil_nce_loss({candidates}, {reduction!r})", {"logit_scale": scale}, videos=x, texts=y)
    x, y, scale = batch.feature(x), batch.feature(y), batch.scalar(scale)
    everyone = batch.spread(y)
    owners = torch.arange(len(everyone), device=x.device) // candidates
    ids = torch.arange(len(x), device=x.device) + batch.first(x)
    found = everyone.masked_lse(x, scale, row_ids=ids, col_ids=owners, equal="positive", label="none")
    of_texts = pairs.log_sum(batch.columns(found.col_negative, y).unflatten(0, (len(x), candidates)), 1)
    losses = pairs.surprise(found.row_positive, [found.row_negative, of_texts])
    return batch.reduce(losses, weights, reduction, like)

"""The family of contrastive losses as their definitions read, with all logits and masks in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gapkern.reference.classes import INF, lse, masked_sigmoid_sum, similarities

Ids = Tensor | tuple[Tensor, Tensor]


def reduced(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """A weighted mean, sum, or the weighted losses."""
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    if reduction == "none":
        return weights * losses
    total = (weights * losses).sum()
    return total / weights.sum().clamp_min(1e-300) if reduction == "mean" else total


def info_nce_loss(
    q: Tensor,
    d: Tensor,
    s: Tensor | float,
    *,
    hard_negatives: Tensor | None = None,
    share_hard_negatives: bool = False,
    extra_negatives: Tensor | None = None,
    directions: Sequence[str] = ("q-d",),
    partition: str = "joint",
    ids: Ids | None = None,
    margin: float | None = None,
    label_smoothing: float = 0.0,
    debias: Tensor | float = 0.0,
    hardness: float = 0.0,
    hardness_of: str = "in-batch",
    decoupled: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Every option of `gapkern.info_nce_loss`: lists of (logits, kept, candidate of the smoothed target).

    Example:
        >>> round(float(info_nce_loss(torch.eye(4), torch.eye(4), 2.0)), 4)
        0.3408
    """
    n = len(q)
    own = (q * d).sum(1)
    limit = torch.full_like(own, INF) if margin is None else own.detach() + margin
    two_ids: tuple[Tensor | None, Tensor | None]
    two_ids = (None, None) if ids is None else ids if isinstance(ids, tuple) else (ids, ids)
    id_q, id_d = two_ids
    eye = torch.eye(n, dtype=torch.bool, device=q.device)
    qd = q @ d.T
    both = {"q-d", "d-q"} <= set(directions)
    above = {
        "q-d": (qd > limit[:, None]) | ((qd > limit) if both else torch.zeros_like(eye)),
        "d-q": (limit[:, None] < qd.T) | ((limit < qd.T) if both else torch.zeros_like(eye)),
    }

    def same(a: Tensor | None, b: Tensor | None) -> Tensor:
        return torch.zeros_like(eye) if a is None or b is None else a[:, None] == b

    alpha_batch = hardness if hardness_of != "hard" else 0.0
    alpha_own = hardness if hardness_of != "in-batch" else 0.0

    def raised(t: Tensor, alpha: float) -> Tensor:
        return s * t + alpha * t.detach()

    # (t, logits, negatives kept, candidates of the smoothed target) of each side.
    sides: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {"q": [], "d": []}
    if "q-d" in directions:
        duplicates = same(id_q, id_d) & ~eye
        sides["q"].append((qd, raised(qd, alpha_batch), ~eye & ~duplicates & ~above["q-d"], ~duplicates, n - 1))
    if "d-q" in directions:
        duplicates = same(id_d, id_q) & ~eye
        sides["d"].append((qd.T, s * qd.T, ~eye & ~duplicates & ~above["d-q"], ~duplicates, n - 1))
    for name, side, x, id_x in (("q-q", "q", q, id_q), ("d-d", "d", d, id_d)):
        if name in directions:
            t = x @ x.T
            kept = ~eye & ~same(id_x, id_x)
            sides[side].append((t, s * t, kept & ~(t > limit[:, None]), kept, n - 1))
    if hard_negatives is not None:
        k = hard_negatives.shape[1]
        t = torch.einsum("nd,nkd->nk", q, hard_negatives)
        every = torch.ones_like(t, dtype=torch.bool)
        sides["q"].append((t, raised(t, alpha_own), t <= limit[:, None], every, k))
        if share_hard_negatives:
            flat = hard_negatives.flatten(0, 1)
            others = torch.arange(n, device=q.device)[:, None] != torch.arange(n * k, device=q.device) // k
            for side, x, alpha in (("q", q, alpha_batch), ("d", d, 0.0)):
                if side == "q" or "d-d" in directions:
                    t = x @ flat.T
                    sides[side].append((t, raised(t, alpha), others & (t <= limit[:, None]), others, (n - 1) * k))
    if extra_negatives is not None:
        t = q @ extra_negatives.T
        every = torch.ones_like(t, dtype=torch.bool)
        sides["q"].append((t, raised(t, alpha_batch), t <= limit[:, None], every, len(extra_negatives)))
    if partition == "joint":
        groups = [(sides["q"] + sides["d"], 0 if decoupled else len({"q-d", "d-q"} & set(directions)))]
    else:
        groups = [(blocks, 0 if decoupled else 1) for blocks in sides.values() if blocks]
    losses = torch.zeros_like(own)
    for blocks, counted in groups:
        logits = torch.cat([block[1] for block in blocks], 1)
        kept = torch.cat([block[2] for block in blocks], 1)
        z = torch.where(kept, (logits - (s * own)[:, None]), torch.full_like(logits, -INF))
        total = z.exp().sum(1)
        count = sum(block[4] for block in blocks)
        if (torch.is_tensor(debias) or debias) and count:
            mean = (total / count - debias) / (1 - debias)
            total = count * torch.maximum(mean, torch.exp(-s - s * own))
        if counted:
            losses = losses + torch.log(counted + total)
        else:
            losses = losses + torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), 0.0)
        if label_smoothing:
            candidates = torch.cat([block[3] for block in blocks], 1)
            t = torch.cat([block[0] for block in blocks], 1)
            mean_t = (t * candidates).sum(1) / candidates.sum(1)
            losses = losses + label_smoothing * s * (own - mean_t)
    return reduced(losses / len(groups), weights, reduction)


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    s: Tensor | float,
    *,
    ids: Ids | None = None,
    positives: str = "out",
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    similarity: str = "dot",
) -> Tensor:
    """CLIP's loss with several positives, smoothed labels and weights.

    Example:
        >>> round(float(contrastive_loss(torch.eye(2), torch.eye(2), 1.0)), 4)
        0.3133
    """
    logits = s * similarities(x, y, similarity)
    right = torch.eye(len(x), dtype=torch.bool, device=x.device)
    if ids is not None:
        id_x, id_y = ids if isinstance(ids, tuple) else (ids, ids)
        right = right | (id_x[:, None] == id_y)
    losses = torch.zeros_like(logits[0])
    for way, target in ((logits, right), (logits.T, right.T)):
        target = target.to(way.dtype) / target.sum(1, keepdim=True)
        if positives == "in":
            losses = losses - (way.softmax(1) * target).sum(1).log()
        else:
            target = (1 - label_smoothing) * target + label_smoothing / len(x)
            losses = losses - (way.log_softmax(1) * target).sum(1)
    return reduced(losses / 2, weights, reduction)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    s: Tensor | float,
    bias: Tensor | float,
    *,
    ids: Ids,
    positives: str = "sum",
    symmetric: bool = True,
    soft_label: bool = False,
) -> Tensor:
    """SigLIP's loss with positives by ids; "mean" is SigLIP+: positives' weights, or with soft_label their targets.

    Example:
        >>> round(float(sigmoid_loss(torch.eye(2), torch.eye(2), 10.0, -10.0, ids=torch.arange(2))), 4)
        0.6932
    """
    id_x, id_y = ids if isinstance(ids, tuple) else (ids, ids)
    right = id_x[:, None] == id_y
    weights = [torch.full(t.shape, 0.5, dtype=x.dtype, device=x.device) for t in (id_x, id_y)]
    if positives == "mean":
        shares = (0.5, 0.5) if symmetric else (1, 0)
        weights = [
            share / right.sum(dim, dtype=x.dtype).clamp_min(1) for share, dim in zip(shares, (1, 0), strict=True)
        ]
    return masked_sigmoid_sum(x, y, s, bias, id_x, id_y, *weights, soft_targets=soft_label) / len(x)


def supcon_loss(
    x: Tensor,
    labels: Tensor,
    s: Tensor | float,
    *,
    positives: str = "out",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """SupCon over anchors that have a positive.

    Example:
        >>> round(float(supcon_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]), 1.0)), 4)
        1.0986
    """
    logits = s * (x @ x.T)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    right = (labels[:, None] == labels) & others
    there = right.any(1)
    log_share = logits - lse(logits, others, 1).masked_fill(~others.any(1), 0)[:, None]
    if positives == "in":
        losses = -(lse(log_share, right, 1).masked_fill(~there, 0) - right.sum(1, dtype=x.dtype).clamp_min(1).log())
    else:
        losses = -(log_share * right).sum(1) / right.sum(1).clamp_min(1)
    losses = torch.where(there, losses, torch.zeros_like(losses))
    weights = there.to(x.dtype) if weights is None else weights * there
    return reduced(losses, weights, reduction)


def mil_nce_loss(
    x: Tensor, y: Tensor, s: Tensor | float, *, weights: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """MIL-NCE; y (N, K, D).

    Example:
        >>> round(float(mil_nce_loss(torch.eye(3), torch.eye(3)[:, None], 1.0)), 4)
        0.9048
    """
    logits = s * torch.einsum("nd,mkd->nmk", x, y)
    n = len(x)
    own = torch.eye(n, dtype=torch.bool, device=x.device)[..., None].expand_as(logits)
    positive = lse(logits.flatten(1), own.flatten(1), 1)
    rows = lse(logits.flatten(1), ~own.flatten(1), 1)
    columns = lse(logits.transpose(0, 1).flatten(1), ~own.transpose(0, 1).flatten(1), 1)
    losses = torch.log1p((rows - positive).exp() + (columns - positive).exp())
    return reduced(losses, weights, reduction)


def gist_loss(
    q: Tensor,
    d: Tensor,
    s: Tensor | float,
    guide_q: Tensor,
    guide_d: Tensor,
    *,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    weights: Tensor | None = None,
    reduction: str = "mean",
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    contrast_queries: bool = True,
    contrast_documents: bool = True,
) -> Tensor:
    """GISTEmbed's loss.

    Example:
        >>> x = torch.eye(3)
        >>> round(float(gist_loss(x, x, 1.0, x, x, contrast_queries=False, contrast_documents=False)), 4)
        0.5514
    """
    eye = torch.eye(len(q), dtype=torch.bool, device=q.device)
    own = (guide_q * guide_d).sum(1)
    limit = own - (margin if margin_strategy == "absolute" else margin * own.abs())
    blocks = [(q, d, guide_q, guide_d, ~eye)]
    if contrast_queries:
        blocks.append((q, q, guide_q, guide_q, ~eye))
    if contrast_documents:
        blocks.append((d, d, guide_d, guide_d, ~eye))
    if negatives is not None:
        assert guide_negatives is not None
        every = torch.ones(len(q), len(negatives), dtype=torch.bool, device=q.device)
        blocks.append((q, negatives, guide_q, guide_negatives, every))
    logits = torch.cat([s * (a @ b.T) for a, b, *_ in blocks], 1)
    kept = torch.cat([mask & (u @ v.T <= limit[:, None]) for _, _, u, v, mask in blocks], 1)
    label = s * (q * d).sum(1)
    losses = torch.log1p(torch.where(kept, logits - label[:, None], torch.full_like(logits, -INF)).exp().sum(1))
    return reduced(losses, weights, reduction)


def uniformity_loss(x: Tensor, t: Tensor | float = 2.0) -> Tensor:
    """Wang and Isola's uniformity.

    Example:
        >>> round(float(uniformity_loss(torch.eye(3))), 4)
        -4.0
    """
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    found: Tensor = (t * similarities(x, x, "sqeuclidean"))[others].exp().mean().log()
    return found

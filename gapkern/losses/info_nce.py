"""InfoNCE with everything that retrieval models add to it, and NT-Xent, which is one of its partitions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs
from gapkern.losses.candidates import Block, Candidates, log_sum_exps

DIRECTIONS = ("q-d", "d-q", "q-q", "d-d")
HARDNESS_OF = ("in-batch", "hard", "all")


def info_nce_loss(
    queries: Tensor,
    documents: Tensor,
    logit_scale: Tensor | float,
    *,
    hard_negatives: Tensor | None = None,
    share_hard_negatives: bool = False,
    extra_negatives: Tensor | None = None,
    directions: Sequence[str] = ("q-d",),
    partition: str = "joint",
    ids: Any = None,
    margin: float | None = None,
    label_smoothing: float = 0.0,
    debias: float | Tensor = 0.0,
    hardness: float = 0.0,
    hardness_of: str = "in-batch",
    decoupled: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, Eq. 4): row i of `documents` is the right one for row i of `queries`.

    With t = <., .> and s = logit_scale, loss_i = log(sum of exp(s t) over i's candidates) - s t(q_i, d_i). No matrix of
    logits is formed.

    Args:
        queries: (N, D) float32, float16, bfloat16 or float64.
        documents: (N, D), the same dtype.
        logit_scale: s, one element.
        hard_negatives: (N, K, D), each query's own.
        share_hard_negatives: hard negatives are candidates of every query, and of every other document in "d-d"
            (sentence-transformers).
        extra_negatives: (E, D), candidates of every query: a queue, or more documents. On ranks: each its own.
        directions: the candidates of pair i: "q-d" t(q_i, d_j), "d-q" t(d_i, q_j), "q-q" t(q_i, q_j) and "d-d"
            t(d_i, d_j), the last two with j != i.
        partition: "joint", one softmax over all of them (GTE, Li et al. 2023: the pair itself is counted in
            "q-d" and in "d-q"); "separate", one over the query's candidates and one over the document's, averaged.
        ids: (N,) integers, or a pair of such for queries and documents: candidates of equal ids are duplicates, and
            left out.
        margin: candidates with t > t(q_i, d_i) + margin are left out as presumed false negatives (Qwen3-Embedding).
            With both "q-d" and "d-q" a pair above the limit of either end is left out of both.
        label_smoothing: eps; the target is 1 - eps at the label and eps spread evenly over i's candidates, presumed
            false negatives among them, duplicates not.
        debias: tau+ in [0, 1), a number or (N,): the probability that a negative is a positive (Chuang et al. 2020,
            with one positive sample; the estimate is at least e^-s).
        hardness: alpha >= 0; logits of negatives in "q-d" have alpha t added, without its gradient (Lan et al. 2025,
            Eq. 5).
        hardness_of: which of them: "in-batch", "hard" (each query's own hard negatives), or "all".
        decoupled: the pair itself is left out of its softmax (DCL, Yeh et al. 2022, Eq. 6); without negatives it is 0.
        weights: (N,) of the pairs; "mean" is weighted by them.
        reduction: "mean", "sum", or "none" for (N,).
        group, exchange: as for `contrastive_loss`.

    Returns:
        The loss, 0-d or (N,), in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, options or their combinations. TypeError: dtypes.

    Example:
        >>> x = torch.eye(4)
        >>> round(float(info_nce_loss(x, x, 2.0)), 4)
        0.3408
        >>> round(float(info_nce_loss(x, x, 2.0, directions=("q-d", "d-q", "q-q", "d-d"))), 4)
        1.2876
    """
    batch = pairs.Batch(group, exchange)
    try:
        chosen = _directions(directions, partition)
        _check.choice("reduction", reduction, pairs.REDUCTIONS)
        _check.choice("hardness_of", hardness_of, HARDNESS_OF)
        queries, documents, scale = pairs.check_pairs(
            queries, documents, logit_scale, ("queries", "documents", "logit_scale")
        )
        two_ids = pairs.pair_of_ids(ids, queries, documents)
        weights = pairs.check_weights(weights, queries)
        hard = None if hard_negatives is None else _hard(hard_negatives, queries)
        extra = None
        if extra_negatives is not None:
            extra = pairs.check_second("extra_negatives", extra_negatives, queries, "queries", "E")
        margin = None if margin is None else _check.number("margin", margin)
        smoothing = pairs.fraction("label_smoothing", label_smoothing)
        prior = _prior(debias, queries)
        hardness = _check.number("hardness", hardness, low=0)
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    terms = f"info_nce_loss({sorted(chosen)}, {partition!r}, {reduction!r}, ids={ids is not None}, margin={margin})"
    batch.enter(terms, {"logit_scale": scale}, queries=queries, documents=documents, hard_negatives=hard)
    q, d = batch.feature(queries), batch.feature(documents)
    hard = None if hard is None else batch.feature(hard)
    extra = None if extra is None else batch.feature(extra)
    scale = batch.scalar(scale)
    problem = Candidates(batch, q, d, scale, two_ids, margin, chosen)
    if smoothing:
        problem.count_candidates = True
    query_terms, document_terms = log_sum_exps(problem, hard, share_hard_negatives, extra, hardness, hardness_of)
    label = problem.label
    assert label is not None
    parts: list[tuple[list[Tensor], int, list[Block]]] = []
    if partition == "joint":
        counted = 0 if decoupled else len(chosen & {"q-d", "d-q"})
        parts.append((query_terms + document_terms, counted, problem.sums["q"] + problem.sums["d"]))
    else:
        for terms_of, side in ((query_terms, "q"), (document_terms, "d")):
            if terms_of:
                parts.append((terms_of, 0 if decoupled else 1, problem.sums[side]))
    total = torch.zeros_like(label)
    for terms_of, counted, blocks in parts:
        total = total + _one_softmax(label, terms_of, counted, sum(count for count, _, _ in blocks), prior, scale)
        if smoothing:
            total = total + _smoothed(label, scale, smoothing, blocks)
    return batch.reduce(total / len(parts), weights, reduction, queries)


def _directions(directions: Any, partition: str) -> set[str]:
    if isinstance(directions, str):
        directions = (directions,)
    chosen = {_check.choice("directions", direction, DIRECTIONS) for direction in directions}
    _check.choice("partition", partition, ("joint", "separate"))
    if not chosen & {"q-d", "d-q"}:
        raise ValueError(f"directions: expected 'q-d' or 'd-q' among them, got {tuple(directions)!r}")
    if partition == "separate":
        for inner, needed in (("q-q", "q-d"), ("d-d", "d-q")):
            if inner in chosen and needed not in chosen:
                raise ValueError(f"directions: expected {needed!r} beside {inner!r} where partition='separate'")
    return chosen


def _hard(value: Any, queries: Tensor) -> Tensor:
    value = _check.tensor("hard_negatives", value)
    n, d = queries.shape
    if value.dim() != 3 or value.shape[0] != n or value.shape[2] != d or value.shape[1] == 0:
        raise ValueError(f"hard_negatives: expected shape ({n}, K, {d}), got {tuple(value.shape)}")
    flat = pairs.check_second("hard_negatives", value.flatten(0, 1), queries, "queries", "N K")
    found: Tensor = flat.unflatten(0, (n, -1))
    return found


def _prior(debias: Any, queries: Tensor) -> Tensor | None:
    if isinstance(debias, Tensor):
        if tuple(debias.shape) not in ((), (1,), (len(queries),)):
            raise ValueError(f"debias: expected one element or shape ({len(queries)},), got {tuple(debias.shape)}")
        return debias.to(queries.device, torch.float64)
    value = pairs.fraction("debias", debias)
    return torch.full((), value, dtype=torch.float64, device=queries.device) if value else None


def _one_softmax(
    label: Tensor, terms: list[Tensor], counted: int, negatives: int, prior: Tensor | None, scale: Tensor
) -> Tensor:
    if prior is None:
        return pairs.surprise(label, terms, counted)
    if negatives == 0:
        return pairs.surprise(label, terms, counted)
    total = pairs.log_sum(torch.stack([t - label for t in terms]), 0) - math.log(negatives)
    # (mean - tau) / (1 - tau) in units of the positive, at least e^-s over it.
    above = total > torch.log(prior)
    safe = torch.where(above, total, torch.ones_like(total))
    debiased = safe + torch.log1p(-prior * torch.exp(-safe)) - torch.log1p(-prior)
    floor = -scale.reshape(()).double() - label
    mean = torch.where(above & (debiased > floor), debiased, floor)
    return pairs.added(mean + math.log(negatives), counted)


def _smoothed(label: Tensor, scale: Tensor, smoothing: float, blocks: Sequence[tuple[int, Any, Any]]) -> Tensor:
    total = sum(t for _, t, _ in blocks)
    number = sum(c for _, _, c in blocks)
    found: Tensor = smoothing * (label - scale.reshape(()).double() * total / number)
    return found


def ntxent_loss(
    first: Tensor,
    second: Tensor,
    logit_scale: Tensor | float,
    *,
    decoupled: bool = False,
    ids: Any = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020, Eq. 1) of two views: each of the 2N rows against all others of both views.

    Args:
        first, second: (N, D), rows that belong together.
        logit_scale: 1 / temperature, one element.
        decoupled: the decoupled contrastive loss (DCL, Yeh et al. 2022, Eq. 6): a row's partner is no candidate.
        ids: (N,) integers, or two: rows of equal ids are left out.
        weights, reduction, group, exchange: as for `info_nce_loss`; "none" is the mean of a pair's two losses, (N,).

    Raises:
        ValueError, TypeError: as `info_nce_loss`.

    Example:
        >>> x = torch.eye(2)
        >>> round(float(ntxent_loss(x, x, 1.0)), 4)
        0.5514
    """
    return info_nce_loss(
        first,
        second,
        logit_scale,
        directions=DIRECTIONS,
        partition="separate",
        decoupled=decoupled,
        ids=ids,
        weights=weights,
        reduction=reduction,
        group=group,
        exchange=exchange,
    )

"""InfoNCE with everything that retrieval models add to it, and NT-Xent, which is one of its partitions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs
from gapkern.ops import contrastive

DIRECTIONS = ("q-d", "d-q", "q-q", "d-d")
HARDNESS_OF = ("in-batch", "hard", "all")

# Of a block of candidates: how many negatives; for label smoothing the candidates' sum of t, and how many they are.
_Block = tuple[int, Tensor | None, Tensor | None]


class _Scaled(torch.autograd.Function):
    """x, whose gradient is multiplied by a tensor of one element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.saved_tensors[0]).to(grad.dtype), None


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
        partition: "joint", one softmax over all of them (GTE, Li et al. 2023, Eq. 2-3: the pair itself is counted in
            "q-d" and in "d-q"); "separate", one over the query's candidates and one over the document's, averaged.
        ids: (N,) integers, or a pair of such for queries and documents: candidates of equal ids are duplicates, and
            left out.
        margin: candidates with t > t(q_i, d_i) + margin are left out as presumed false negatives (Qwen3-Embedding).
            With both "q-d" and "d-q" a pair above the limit of either end is left out of both.
        label_smoothing: eps; the target is 1 - eps at the label and eps spread evenly over i's candidates, presumed
            false negatives among them, duplicates not.
        debias: tau+ in [0, 1), a number or (N,): the probability that a negative is a positive (Chuang et al. 2020,
            Eq. 8 with M = 1; the estimate is at least e^-s).
        hardness: alpha >= 0; logits of negatives in "q-d" have alpha t added, without its gradient (Lan et al. 2025,
            Eq. 5).
        hardness_of: which of them: "in-batch", "hard" (each query's own hard negatives), or "all".
        decoupled: the pair itself is left out of its softmax (DCL, Yeh et al. 2022, Eq. 6); without negatives it is 0.
        weights: (N,) of the pairs; "mean" is weighted by them.
        reduction: "mean", "sum", or "none" for (N,).
        group: as for `contrastive_loss`.

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
    batch = pairs.Batch(group)
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
    problem = _Problem(batch, q, d, scale, two_ids, margin, chosen)
    if smoothing:
        problem.count_candidates = True
    query_terms, document_terms = _candidates(problem, hard, share_hard_negatives, extra, hardness, hardness_of)
    label = problem.label
    parts: list[tuple[list[Tensor], int, list[_Block]]] = []
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


class _Problem:
    """The batch's pairs, their logits, and what label smoothing and debiasing count."""

    def __init__(
        self,
        batch: pairs.Batch,
        q: Tensor,
        d: Tensor,
        scale: Tensor,
        two_ids: tuple[Tensor, Tensor] | None,
        margin: float | None,
        chosen: set[str],
    ):
        self.batch, self.q, self.d, self.scale, self.chosen = batch, q, d, scale, chosen
        self.count_candidates = False
        self.sums: dict[str, list[_Block]] = {"q": [], "d": []}
        self.first = batch.first(q)
        self.all_d = batch.everyone(d)
        self.all_q = batch.everyone(q) if "q-q" in chosen else None
        self.own_t = pairs.own_products(q, d)
        self.label = scale.reshape(()).double() * self.own_t
        self.limit = None if margin is None else self.own_t.detach() + margin
        self.ids: tuple[Tensor, ...] | None = None
        self.all_ids: tuple[Tensor, ...] | None = None
        if two_ids is not None:
            whole = [batch.constant(t) for t in two_ids]
            self.all_ids = pairs.dense(*whole)
            self.ids = tuple(t[self.first : self.first + len(q)] for t in self.all_ids)

    def block(
        self,
        side: str,
        x: Tensor,
        y: Tensor,
        *,
        scale: Tensor | None = None,
        row: int | None = None,
        col: int | None = None,
        label: str = "counted",
        **options: Any,
    ) -> contrastive.Classes:
        """Log-sum-exps of a block; `row`, `col`: which ids (0 queries', 1 documents')."""
        if row is not None and col is not None and self.all_ids is not None and self.ids is not None:
            options.update(row_ids=self.ids[row], col_ids=self.all_ids[col])
        offset = self.first if label != "none" else 0
        found = contrastive.masked_lse(
            x, y, self.scale if scale is None else scale, label=label, label_offset=offset, **options
        )
        return found

    def count(
        self,
        side: str,
        x: Tensor,
        y: Tensor,
        *,
        row: int | None = None,
        col: int | None = None,
        label: str = "counted",
    ) -> None:
        """Adds a block to the side's candidates."""
        negatives = len(y) - (label != "none")
        if not self.count_candidates:
            self.sums[side].append((negatives, None, None))
            return
        double = torch.float64
        wide = y.sum(0, dtype=double if y.dtype == double else torch.float32)
        total = pairs.own_products(x, wide.expand(len(x), -1).to(wide.dtype)) if len(x) else self.own_t
        number = torch.full_like(total, float(len(y)))
        own = y[self.first : self.first + len(x)]
        if row is not None and col is not None and self.all_ids is not None and self.ids is not None:
            same, count = pairs.class_sums(self.all_ids[col], y, self.ids[row])
            total, number = total - pairs.own_products(x, same), number - count
            if label == "counted":
                # A label's ids may differ, and then it was not among the equal ones.
                equal = self.ids[row] == self.all_ids[col][self.first : self.first + len(x)]
                total, number = total + pairs.own_products(x, own) * equal, number + equal
        if label == "left_out":
            among: Tensor | float = 1.0
            if row is not None and col is not None and self.all_ids is not None and self.ids is not None:
                among = (self.ids[row] != self.all_ids[col][self.first : self.first + len(x)]).double()
            total, number = total - pairs.own_products(x, own) * among, number - among
        self.sums[side].append((negatives, total, number))


def _candidates(
    problem: _Problem, hard: Tensor | None, share: bool, extra: Tensor | None, hardness: float, hardness_of: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-sum-exps of the negatives of the queries and of the documents."""
    q, d, batch, limit, chosen = problem.q, problem.d, problem.batch, problem.limit, problem.chosen
    of_queries: list[Tensor] = []
    of_documents: list[Tensor] = []
    raised = hardness > 0 and hardness_of != "hard"
    apart = raised and {"q-d", "d-q"} <= chosen
    col_limit = batch.constant(limit) if limit is not None and "d-q" in chosen else None
    both = {"q-d", "d-q"} <= chosen
    row_limit = limit if "q-d" in chosen else None
    if "q-d" in chosen:
        x, y, scale = _raised(q, problem.all_d, problem.scale, hardness if raised else 0.0)
        options: dict[str, Any] = {"row_limit": row_limit, "col_limit": col_limit if both else None, "row": 0, "col": 1}
        found = problem.block("q", x, y, scale=scale, **options)
        of_queries.append(found.row_negative)
        problem.count("q", q, problem.all_d, row=0, col=1)
        if both:
            if apart:
                found = problem.block("d", q, problem.all_d, **options)
            of_documents.append(batch.columns(found.col_negative, d))
    else:
        found = problem.block("d", q, problem.all_d, col_limit=col_limit, row=0, col=1)
        of_documents.append(batch.columns(found.col_negative, d))
    if "d-q" in chosen:
        # Not gathered for the log-sum-exps, which are the same block's columns.
        everyone = problem.all_q if problem.all_q is not None or not problem.count_candidates else batch.everyone(q)
        problem.count("d", d, q if everyone is None else everyone, row=1, col=0)
        if everyone is None and batch.place is not None:
            problem.sums["d"][-1] = (len(problem.all_d) - 1, None, None)
    if problem.all_q is not None:
        found = problem.block("q", q, problem.all_q, row_limit=limit, row=0, col=0, label="left_out")
        of_queries.append(found.row_negative)
        problem.count("q", q, problem.all_q, row=0, col=0, label="left_out")
    if "d-d" in chosen:
        found = problem.block("d", d, problem.all_d, row_limit=limit, row=1, col=1, label="left_out")
        of_documents.append(found.row_negative)
        problem.count("d", d, problem.all_d, row=1, col=1, label="left_out")
    if hard is not None:
        of_queries.append(_own_hard(problem, hard, hardness if hardness_of != "in-batch" else 0.0))
        if share:
            _shared_hard(problem, hard, hardness if raised else 0.0, of_queries, of_documents)
    if extra is not None:
        x, y, scale = _raised(q, extra, problem.scale, hardness if raised else 0.0)
        of_queries.append(problem.block("q", x, y, scale=scale, row_limit=limit, label="none").row_negative)
        problem.count("q", q, extra, label="none")
    return of_queries, of_documents


def _raised(x: Tensor, y: Tensor, scale: Tensor, hardness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and a scale whose logits are s t + alpha t with the gradient of s t alone."""
    if not hardness:
        return x, y, scale
    raised = scale.double() + hardness
    factor = (scale.detach().double() / raised.detach()).reshape(())
    return _Scaled.apply(x, factor), _Scaled.apply(y, factor), raised


def _own_hard(problem: _Problem, hard: Tensor, hardness: float) -> Tensor:
    work = torch.float64 if hard.dtype == torch.float64 else torch.float32
    t = torch.einsum("nd,nkd->nk", problem.q.to(work), hard.to(work)).double()
    s = problem.scale.reshape(()).double() * t + hardness * t.detach()
    if problem.limit is not None:
        s = s.masked_fill(t.detach() > problem.limit[:, None], -math.inf)
    k = hard.shape[1]
    problem.sums["q"].append((k, t.sum(1), torch.full_like(problem.own_t, float(k))))
    return pairs.log_sum(s, 1)


def _shared_hard(
    problem: _Problem, hard: Tensor, hardness: float, of_queries: list[Tensor], of_documents: list[Tensor]
) -> None:
    """The other rows' hard negatives."""
    n, k, _ = hard.shape
    everyone = problem.batch.everyone(hard.flatten(0, 1))
    owners = torch.arange(len(everyone), device=hard.device) // k
    own = owners[problem.first * k : (problem.first + n) * k : k]
    ids: dict[str, Any] = {"row_ids": own, "col_ids": owners, "equal": "left_out", "label": "none"}
    sides = [("q", problem.q, hardness, of_queries)]
    if "d-d" in problem.chosen:
        sides.append(("d", problem.d, 0.0, of_documents))
    for side, anchors, alpha, found in sides:
        x, y, scale = _raised(anchors, everyone, problem.scale, alpha)
        found.append(problem.block(side, x, y, scale=scale, row_limit=problem.limit, **ids).row_negative)
        total = pairs.own_products(anchors, everyone.sum(0).expand(n, -1) - hard.sum(1))
        others = len(everyone) - k
        problem.sums[side].append((others, total, torch.full_like(total, float(others))))


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
) -> Tensor:
    """NT-Xent (SimCLR, Chen et al. 2020, Eq. 1) of two views: each of the 2N rows against all others of both views.

    Args:
        first, second: (N, D), rows that belong together.
        logit_scale: 1 / temperature, one element.
        decoupled: the decoupled contrastive loss (DCL, Yeh et al. 2022, Eq. 6): a row's partner is no candidate.
        ids: (N,) integers, or two: rows of equal ids are left out.
        weights, reduction, group: as for `info_nce_loss`; "none" is the mean of a pair's two losses, (N,).

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
    )

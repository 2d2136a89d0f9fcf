"""The candidates of InfoNCE: blocks of logits by direction, hard and extra negatives, and what each block counts."""

import math
from typing import Any

import torch
from torch import Tensor

from gapkern.losses import pairs
from gapkern.losses.spread import Spread
from gapkern.ops import contrastive

# Of a block of candidates: how many negatives; for label smoothing the candidates' sum of t, and how many they are.
Block = tuple[int, Tensor | None, Tensor | None]


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


class Candidates:
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
        self.sums: dict[str, list[Block]] = {"q": [], "d": []}
        self.first = batch.first(q)
        self.all_d = batch.spread(d)
        self.all_q = batch.spread(q)
        self.own_t = pairs.own_products(q.detach(), d.detach())
        self.label: Tensor | None = None  # of the block of queries and documents
        self.limit = None if margin is None else self.own_t + margin
        self.ids: tuple[Tensor, ...] | None = None
        self.all_ids: tuple[Tensor, ...] | None = None
        if two_ids is not None:
            whole = [batch.constant(t) for t in two_ids]
            self.all_ids = pairs.dense(*whole)
            self.ids = tuple(t[self.first : self.first + len(q)] for t in self.all_ids)

    def block(
        self,
        x: Tensor,
        rows: Spread,
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
        return rows.masked_lse(x, self.scale if scale is None else scale, label=label, **options)

    def against_itself(self, rows: Spread, which: int) -> Tensor:
        """Log-sum-exps over the others of a side: 0 the queries, 1 the documents."""
        ids = None if self.all_ids is None else self.all_ids[which]
        return rows.against_itself(self.scale, ids=ids, limit=self.limit)[0]

    def count(self, side: str, x: Tensor, rows: Spread, row: int, col: int, label: str = "counted") -> None:
        """Adds a block with labels to the side's candidates."""
        negatives = len(rows) - 1
        if not self.count_candidates:
            self.sums[side].append((negatives, None, None))
            return
        total = pairs.own_products(x, rows.total().expand(len(x), -1))
        number = torch.full_like(total, float(len(rows)))
        if self.all_ids is not None and self.ids is not None:
            of_rows, of_columns = self.ids[row], self.all_ids[col]
            total = total - rows.class_sums(x, of_rows, of_columns)[0]
            classes = 2 * len(rows)
            number = number - pairs.class_counts(of_columns, of_rows, classes) + (of_rows == self.ids[col])
        if label == "left_out":
            total, number = total - pairs.own_products(x, rows.mine), number - 1
        self.sums[side].append((negatives, total, number))


def log_sum_exps(
    problem: Candidates, hard: Tensor | None, share: bool, extra: Tensor | None, hardness: float, hardness_of: str
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
    # Derivatives are formed in reverse: those of the block with the most memory first.
    if "q-q" in chosen:
        of_queries.append(problem.against_itself(problem.all_q, 0))
        problem.count("q", q, problem.all_q, 0, 0, "left_out")
    if "d-d" in chosen:
        of_documents.append(problem.against_itself(problem.all_d, 1))
        problem.count("d", d, problem.all_d, 1, 1, "left_out")
    if "q-d" in chosen:
        x, rows, scale = _raised(q, problem.all_d, problem.scale, hardness if raised else 0.0)
        options: dict[str, Any] = {"row_limit": row_limit, "col_limit": col_limit if both else None, "row": 0, "col": 1}
        found = problem.block(x, rows, scale=scale, **options)
        of_queries.append(found.row_negative)
        problem.count("q", q, problem.all_d, 0, 1)
        if both:
            if apart:
                found = problem.block(q, problem.all_d, **options)
            of_documents.append(batch.columns(found.col_negative, d))
    else:
        found = problem.block(q, problem.all_d, col_limit=col_limit, row=0, col=1)
        of_documents.append(batch.columns(found.col_negative, d))
    if raised and not apart and "q-d" in chosen:
        problem.label = problem.scale.reshape(()).double() * pairs.own_products(q, d)
    else:
        problem.label = found.label
    if "d-q" in chosen:
        problem.count("d", d, problem.all_q, 1, 0)
    if hard is not None:
        of_queries.append(_own_hard(problem, hard, hardness if hardness_of != "in-batch" else 0.0))
        if share:
            _shared_hard(problem, hard, hardness if raised else 0.0, of_queries, of_documents)
    if extra is not None:
        # Each rank's own.
        x, rows, scale = _raised(q, Spread(extra, None), problem.scale, hardness if raised else 0.0)
        of_queries.append(problem.block(x, rows, scale=scale, row_limit=limit, label="none").row_negative)
        total = pairs.own_products(q, Spread(extra, None).total().expand(len(q), -1))
        problem.sums["q"].append((len(extra), total, torch.full_like(total, float(len(extra)))))
    return of_queries, of_documents


def _raised(x: Tensor, rows: Spread, scale: Tensor, hardness: float) -> tuple[Tensor, Spread, Tensor]:
    """Embeddings and a scale whose logits are s t + alpha t with the gradient of s t alone."""
    if not hardness:
        return x, rows, scale
    raised = scale.double() + hardness
    factor = (scale.detach().double() / raised.detach()).reshape(())
    return _Scaled.apply(x, factor), rows.map(lambda y: _Scaled.apply(y, factor)), raised


def _own_hard(problem: Candidates, hard: Tensor, hardness: float) -> Tensor:
    work = torch.float64 if hard.dtype == torch.float64 else torch.float32
    t = torch.einsum("nd,nkd->nk", problem.q.to(work), hard.to(work)).double()
    s = problem.scale.reshape(()).double() * t + hardness * t.detach()
    if problem.limit is not None:
        s = s.masked_fill(t.detach() > problem.limit[:, None], -math.inf)
    k = hard.shape[1]
    problem.sums["q"].append((k, t.sum(1), torch.full_like(problem.own_t, float(k))))
    return pairs.log_sum(s, 1)


def _shared_hard(
    problem: Candidates, hard: Tensor, hardness: float, of_queries: list[Tensor], of_documents: list[Tensor]
) -> None:
    """The other rows' hard negatives."""
    n, k, _ = hard.shape
    everyone = problem.batch.spread(hard.flatten(0, 1))
    owners = torch.arange(len(everyone), device=hard.device) // k
    own = owners[everyone.first : everyone.first + n * k : k]
    ids: dict[str, Any] = {"row_ids": own, "col_ids": owners, "equal": "left_out", "label": "none"}
    sides = [("q", problem.q, hardness, of_queries)]
    if "d-d" in problem.chosen:
        sides.append(("d", problem.d, 0.0, of_documents))
    for side, anchors, alpha, found in sides:
        x, rows, scale = _raised(anchors, everyone, problem.scale, alpha)
        found.append(problem.block(x, rows, scale=scale, row_limit=problem.limit, **ids).row_negative)
        total = problem.own_t
        if problem.count_candidates:
            total = pairs.own_products(anchors, everyone.total() - hard.sum(1))
        others = len(everyone) - k
        problem.sums[side].append((others, total, torch.full_like(total, float(others))))

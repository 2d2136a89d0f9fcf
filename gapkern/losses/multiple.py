"""Several positives for a row: contrastive_loss and sigmoid_loss with ids, label smoothing and weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs, ring, spread, steps
from gapkern.ops import contrastive


def multiple_positives_loss(
    images: Any,
    texts: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    similarity: str,
    reduction: str,
    memory: str | int,
    group: Any,
    exchange: str,
    ids: Any,
    positives: str,
    label_smoothing: Any,
    weights: Any,
) -> Tensor:
    """See `gapkern.contrastive_loss`."""
    batch = pairs.Batch(group, exchange)
    try:
        _check.choice("reduction", reduction, pairs.REDUCTIONS)
        _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
        _check.choice("positives", positives, ("out", "in"))
        images, texts, scale = pairs.check_pairs(images, texts, logit_scale)
        steps.work_bytes(memory)
        bias = None if logit_bias is None else pairs.scalar("logit_bias", logit_bias, images)
        smoothing = pairs.fraction("label_smoothing", label_smoothing)
        if smoothing and positives == "in":
            raise ValueError("label_smoothing: expected 0 with positives='in', whose target is no distribution")
        weights = pairs.check_weights(weights, images)
        two_ids = pairs.pair_of_ids(ids, images, texts)
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    terms = f"contrastive_loss({similarity!r}, {reduction!r}, {positives!r}, {smoothing}, ids={ids is not None})"
    batch.enter(terms, {"logit_scale": scale}, images=images, texts=texts)
    if two_ids is None and not smoothing:
        if batch.place is None:
            losses = steps.pair_losses(images, texts, scale, similarity, memory)
        else:
            place = batch.place
            losses = steps.sharded_losses(
                images, texts, scale, similarity, memory, place, 1 / place.world, terms, batch.travels
            )
    else:
        x, y, scale = batch.feature(images), batch.feature(texts), batch.scalar(scale)
        work_bytes = steps.work_bytes(memory) if torch.is_grad_enabled() else 0
        losses = _both_ways(batch, x, y, scale, two_ids, positives, smoothing, similarity, work_bytes)
    return batch.reduce(steps.without_gradient(losses, bias), weights, reduction, images)


def _both_ways(
    batch: pairs.Batch,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    two_ids: tuple[Tensor, Tensor] | None,
    positives: str,
    smoothing: float,
    similarity: str,
    work_bytes: int,
) -> Tensor:
    n = len(x)
    all_y, all_x = batch.spread(y), batch.spread(x)
    own = slice(all_x.first, all_x.first + n)
    options: dict[str, Any] = {}
    if two_ids is not None:
        row_ids, col_ids = pairs.dense(*(batch.constant(t) for t in two_ids))
        options = {"row_ids": row_ids[own], "col_ids": col_ids, "equal": "positive"}
    s = scale.reshape(()).double()
    rests: list[Tensor] = []
    means: tuple[Tensor, ...] = ()
    if two_ids is not None:
        labels = (row_ids[own] == col_ids[own]).double()  # whether they are among the equal ids
        for ids, of in (col_ids, row_ids[own]), (row_ids, col_ids[own]):
            rests.append(pairs.class_counts(ids, of, 2 * len(ids)) - labels)
        if positives == "out":
            # Before the log-sum-exps: derivatives are formed in reverse, and theirs first, while they have the memory
            # alone.
            of_rows, of_columns = all_y.class_sums(x, row_ids[own], col_ids, similarity)
            means = (of_rows, batch.column_sums(of_columns, y))
    found = all_y.masked_lse(x, scale, similarity=similarity, work_bytes=work_bytes, **options)
    total = torch.zeros_like(found.label)
    sides = (
        (x, all_y, found.row_negative, found.row_positive, 0),
        (y, all_x, batch.columns(found.col_negative, y), batch.columns(found.col_positive, y), 1),
    )
    for mine, others, negative, positive, side in sides:
        mean = found.label
        if two_ids is None:
            total = total + pairs.surprise(found.label, [negative])
        else:
            rest, together = rests[side], torch.logaddexp(found.label, positive)
            total = total + pairs.surprise(together, [negative])
            if positives == "in":
                total = total + torch.log1p(rest)
            else:
                mean = (found.label + s * means[side]) / (1 + rest)
                # One positive alone: both are its logit.
                total = total + torch.where(rest > 0, together - mean, torch.zeros_like(mean))
        if smoothing:
            sums = others.total().expand(n, -1)
            squares = others.map(_norms).total()[0] if similarity == "sqeuclidean" else s.new_zeros(())
            number = torch.full_like(mean, float(len(others)))
            everything = _sum_t(mine, sums, number, squares, similarity) / len(others)
            total = total + smoothing * (mean - s * everything)
    return total / 2


def _norms(x: Tensor) -> Tensor:
    return x.double().square().sum(1, keepdim=True)


def _sum_t(x: Tensor, sums: Tensor, counts: Tensor, squares: Tensor, similarity: str) -> Tensor:
    """The sum of t(x_i, .) over `counts` vectors, of their sum and the sum of their squared norms."""
    if similarity == "dot":
        return pairs.own_products(x, sums)
    return 2 * pairs.own_products(x.double(), sums) - counts * _norms(x)[:, 0] - squares


def multiple_positives_sigmoid(
    images: Any,
    texts: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    group: Any,
    exchange: str,
    ids: Any,
    positives: str,
    symmetric: bool,
    soft_label: bool,
) -> Tensor:
    """See `gapkern.sigmoid_loss`."""
    batch = pairs.Batch(group, exchange)
    try:
        _check.choice("positives", positives, ("sum", "mean"))
        for name, given, default in ("symmetric", symmetric, True), ("soft_label", soft_label, False):
            if not isinstance(given, bool):
                raise TypeError(f"{name}: expected True or False, got {given!r}")
            if given is not default and positives == "sum":
                raise ValueError(f"{name}: expected {default} with positives='sum', got {given}")
        if ids is None:
            raise ValueError("positives: expected 'sum' without ids, got 'mean'")
        images, texts, scale = pairs.check_pairs(images, texts, logit_scale, rectangular=True)
        bias = pairs.scalar("logit_bias", logit_bias, images)
        found = pairs.pair_of_ids(ids, images, texts)
        assert found is not None
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    scalars = {"logit_scale": scale, "logit_bias": bias}
    terms = f"sigmoid_loss({positives!r}, ids, {symmetric}, {soft_label})"
    batch.enter(terms, scalars, images=images, texts=texts)
    x, y, s, b = batch.feature(images), batch.feature(texts), batch.scalar(scale), batch.scalar(bias)
    row_ids, col_ids = pairs.dense(*(batch.constant(t) for t in found))
    weights = [torch.full(t.shape, 0.5, dtype=torch.float64, device=x.device) for t in (row_ids, col_ids)]
    if positives == "mean":
        shares = (0.5, 0.5) if symmetric else (1.0, 0.0)
        weights = [
            share / pairs.class_counts(other, mine, len(row_ids) + len(col_ids)).clamp_min(1)
            for share, mine, other in zip(shares, (row_ids, col_ids), (col_ids, row_ids), strict=True)
        ]
    own = slice(batch.first(x), batch.first(x) + len(x))
    rows = (row_ids[own], weights[0][own])
    total = _sigmoid_sum(batch.spread(y), x, s, b, rows, (col_ids, weights[1]), soft_label)
    return batch.reduce((total / len(x)).reshape(1), None, "mean", images)


def _sigmoid_sum(
    everyone: spread.Spread,
    x: Tensor,
    s: Tensor,
    b: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    soft_targets: bool,
) -> Tensor:
    """`contrastive.masked_sigmoid_sum` of x against the rows of all ranks; `rows`, `columns`: ids and weights."""

    def total(x: Tensor, y: Tensor, s: Tensor, b: Tensor, part: slice) -> Tensor:
        classes = (rows[0], columns[0][part], rows[1], columns[1][part])
        return contrastive.masked_sigmoid_sum(x, y, s, b, *classes, soft_targets=soft_targets)

    if not everyone.travels:
        return total(x, everyone.everyone(), s, b, slice(None))
    m = len(everyone.mine)

    def block(owner: int, visitors: Sequence[Tensor], x: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor]:
        return (total(x, visitors[0], s, b, slice(owner * m, (owner + 1) * m)),)

    assert everyone.place is not None
    job = ring.Visit(everyone.place, block, ("sum",), again=True)
    return ring.visit(job, [everyone.mine], (x, s, b))[0]

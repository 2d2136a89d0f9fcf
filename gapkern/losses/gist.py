"""GISTEmbed's loss: a guide's embeddings say which negatives are false."""

from typing import Any

import torch
from torch import Tensor

from gapkern import _check
from gapkern.losses import pairs
from gapkern.losses.inputs import embeddings
from gapkern.losses.spread import Spread


def gist_loss(
    queries: Tensor,
    documents: Tensor,
    logit_scale: Tensor | float,
    guide_queries: Tensor,
    guide_documents: Tensor,
    *,
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_queries: bool = True,
    contrast_documents: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    group: Any = None,
    exchange: str = "auto",
) -> Tensor:
    """InfoNCE whose false negatives a guide finds (GISTEmbed, Solatorio 2024).

    Pair i's candidates are all documents and negatives for its query, with `contrast_queries` the other queries, and
    with `contrast_documents` the other documents for its document, where the guide's similarity of the two is at most
    that of the pair itself, u_ii, less margin; "relative": less margin |u_ii|.

    Args:
        queries, documents: (N, D) float32, float16, bfloat16 or float64.
        logit_scale: 1 / temperature, one element.
        guide_queries, guide_documents: (N, G), constants.
        negatives: (E, D), shared by all queries. On ranks: each its own.
        guide_negatives: (E, G), with `negatives`.
        margin: how far below the pair's own similarity a negative must lie.
        margin_strategy: "absolute" or "relative".
        contrast_queries, contrast_documents: whether queries, or documents, are each other's negatives.
        weights, reduction, group, exchange: as for `contrastive_loss`.

    Raises:
        ValueError, TypeError: shapes and dtypes that do not match, or an unknown option.

    Example:
        >>> x = torch.eye(3)
        >>> round(float(gist_loss(x, x, 1.0, x, x, contrast_queries=False, contrast_documents=False)), 4)
        0.5514
    """
    batch = pairs.Batch(group, exchange)
    try:
        _check.choice("reduction", reduction, pairs.REDUCTIONS)
        _check.choice("margin_strategy", margin_strategy, ("absolute", "relative"))
        margin = _check.number("margin", margin)
        names = ("queries", "documents", "logit_scale")
        q, d, scale = pairs.check_pairs(queries, documents, logit_scale, names)
        guide_q, guide_d = embeddings("guide_queries", guide_queries), embeddings("guide_documents", guide_documents)
        _check.same_rows(queries=q, guide_queries=guide_q, guide_documents=guide_d)
        _check.same_width(guide_queries=guide_q, guide_documents=guide_d)
        weights = pairs.check_weights(weights, q)
        if (negatives is None) != (guide_negatives is None):
            raise ValueError("guide_negatives: expected together with negatives")
        if negatives is not None:
            negatives = pairs.check_second("negatives", negatives, q, "queries", "E")
            guide_negatives = embeddings("guide_negatives", guide_negatives, "E")
            _check.same_rows(negatives=negatives, guide_negatives=guide_negatives)
            _check.same_width(guide_queries=guide_q, guide_negatives=guide_negatives)
    except (TypeError, ValueError) as error:
        batch.refuse(error)
        raise
    like = q
    terms = f"gist_loss({margin}, {margin_strategy!r}, {contrast_queries}, {contrast_documents}, {reduction!r})"
    batch.enter(terms, {"logit_scale": scale}, queries=q, documents=d)
    q, d, scale = batch.feature(q), batch.feature(d), batch.scalar(scale)
    work = torch.promote_types(torch.promote_types(guide_q.dtype, guide_d.dtype), torch.float32)
    guide_q, guide_d = guide_q.detach().to(work), guide_d.detach().to(work)
    own = pairs.own_products(guide_q, guide_d)
    limit = own - (margin if margin_strategy == "absolute" else margin * own.abs())
    all_d = batch.spread(d)
    blocks = [(q, all_d, guide_q, guide_d, "counted")]
    if contrast_queries:
        blocks.append((q, batch.spread(q), guide_q, guide_q, "left_out"))
    if contrast_documents:
        blocks.append((d, all_d, guide_d, guide_d, "left_out"))
    found = [
        rows.masked_lse(x, scale, guide_x=u, guide_y=v, guide_row_limit=limit, label=label)
        for x, rows, u, v, label in blocks
    ]
    if negatives is not None and guide_negatives is not None:
        guide = guide_negatives.detach().to(work)
        rows = Spread(batch.feature(negatives), None)  # each rank's own
        options: dict[str, Any] = {"guide_x": guide_q, "guide_row_limit": limit}
        found.append(rows.masked_lse(q, scale, guide_y=guide, label="none", **options))
    losses = pairs.surprise(found[0].label, [classes.row_negative for classes in found])
    return batch.reduce(losses, weights, reduction, like)

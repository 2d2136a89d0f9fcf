"""What projecting the queries buys in an index that exists, of any origin; and the projection that buys it.

The index is only read. Queries that were held out of the fit are searched for in it as they are and projected, and both
answers are compared with an exact search of the rows.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated
from gapkern._search import search
from gapkern.gap import Projection
from gapkern.retrieval import certified, families, foreign, lookup
from gapkern.retrieval._faiss import errors

CHUNK = 2**14  # queries searched at once


@dataclass(frozen=True)
class Repair:
    """What was measured on `held_out` queries.

    Attributes:
        index: FAISS's type of it.  metric: "l2" or "ip".  vectors, dims: its size.
        rows: "embeddings", "index" where it holds them as they were, or "codes": what they decode to, against which an
            index of codes makes no error to be seen.
        components: k.  kept: share of the held-out queries whose exact first neighbour the projection keeps.
        agreement_before, agreement_after: share whose first neighbour in the index is that of the exact search.
        recall_before, recall_after: share of the exact k neighbours that the index finds.
        gain, error: recall_after - recall_before, and its standard error.
        worth: both are not lower, and recall or agreement higher by more than their standard error.
        certified_before, certified_after: share whose first neighbour the codes cannot have changed, by `certify`; None
            without embeddings, or where the index scores otherwise than by what it decodes to. Of codes alone: what
            lists or a graph leave out is not in it.
    """

    index: str
    metric: str
    vectors: int
    dims: int
    rows: str
    components: int
    kept: float
    k: int
    fitted: int
    held_out: int
    agreement_before: float
    agreement_after: float
    recall_before: float
    recall_after: float
    gain: float
    error: float
    worth: bool
    certified_before: float | None
    certified_after: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@isolated
def repair(
    existing: str | os.PathLike[str],
    queries: Any,
    *,
    embeddings: Any = None,
    n_components: int | float | str = "auto",
    agreement: float = 0.99,
    k: int = 10,
    parameters: str | None = None,
    model: str | None = None,
) -> tuple[Repair, Projection]:
    """Fits a projection to every other query and measures the rest in the index, without and with it.

    Args:
        existing: FAISS's file of an index by L2 or inner product, a folder with one, as autofaiss and clip-retrieval
            write them, or one of `GapIndex.save`.
        queries: (Q, D), 4 or more.
        embeddings: (G, D), the rows that were indexed, in the order of their ids, or a file or folder of them, whose
            shards are taken in autofaiss's order too where that is what was indexed; by default those in `embeddings`,
            `img_emb` or `text_emb` beside the index that are of its size and that its codes stand for, or what the
            index decodes to.
        n_components, agreement, model: as for `Projection`, whose "auto" keeps `agreement` of the exact k neighbours.
        k: neighbours that are compared.
        parameters: FAISS's search parameters, as "nprobe=16".

    Raises:
        TypeError, ValueError: no such index; one without rows, of another metric, that moves its queries already, or
            whose codes FAISS does not decode; mismatched widths; embeddings of other rows, or two sets beside it.
    """
    path, index = foreign.opened(existing)
    metric, kind = foreign.metric(index, path), foreign.kind(index)
    y = _check.finite("queries", _check.matrix("queries", queries, rows="Q")).detach().cpu()
    if y.shape[1] != index.d:
        raise ValueError(f"queries: expected D = {index.d} as in {path}, got shape {tuple(y.shape)}")
    if len(y) < 4:
        raise ValueError(f"queries: expected 4 or more, some to fit to and some to measure, got {len(y)}")
    if parameters:
        lookup.tune(index, parameters, kind)
    k = _check.integer("k", k, low=1, high=index.ntotal)
    rows, ids, source = foreign.rows(index, embeddings, path)
    centred = metric == "ip" and families.about_centres(index)
    projection = Projection(n_components, metric, agreement, model=model, centred=centred, neighbours=k)
    projection.fit(rows, y[::2])
    held = y[1::2]
    true = ids[search(held, rows, k, metric=metric)[1]]
    projected = projection.transform_queries(held)
    kept = ids[search(projected, rows, 1, metric=metric)[1]][:, 0] == true[:, 0]
    answers = [_answers(index, x, k) for x in (held, projected)]
    first = [(found[:, 0] == true[:, 0]).double() for found in answers]
    shares = [(found[:, :, None] == true[:, None, :]).any(1).double().mean(1) for found in answers]
    gain, error = _difference(*shares)
    more, its = _difference(*first)
    worth = min(gain, more) >= 0 and (gain > error or more > its)
    sure = certified.certificates(index, rows, held, projection) if source == "embeddings" else None
    result = Repair(
        index=kind,
        metric=metric,
        vectors=int(index.ntotal),
        dims=int(index.d),
        rows=source,
        components=projection.n_components_,
        kept=float(kept.double().mean()),
        k=k,
        fitted=len(y[::2]),
        held_out=len(held),
        agreement_before=float(first[0].mean()),
        agreement_after=float(first[1].mean()),
        recall_before=float(shares[0].mean()),
        recall_after=float(shares[1].mean()),
        gain=gain,
        error=error,
        worth=worth,
        certified_before=None if sure is None else float(sure.before.certified.double().mean()),
        certified_after=None if sure is None else float(sure.after.certified.double().mean()),
    )
    return result, projection


def _difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean of what each query gained, and its standard error."""
    gained = after - before
    return float(gained.mean()), float(gained.std(correction=0) / len(gained) ** 0.5)


def _answers(index: Any, queries: Tensor, k: int) -> Tensor:
    """Ids (Q, k) that the index finds."""
    found = []
    for some in queries.split(CHUNK):
        with errors("existing", "an index that can be searched"):
            found.append(torch.from_numpy(index.search(np.ascontiguousarray(some.float().numpy()), k)[1]))
    return torch.cat(found)


__all__ = ["Repair", "repair"]

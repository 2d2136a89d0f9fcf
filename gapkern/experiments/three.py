"""The paper's Figure 8 with a third line: embeddings as they are, the gap closed by the shift, each query projected."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gapkern.gap import MeanShift, Projection
from gapkern.perturb import Perturbation, title
from gapkern.robustness import sweep

NONE, SHIFT, PROJECTION = MOVES = ("as they are", "gap closed by the shift", "queries projected")
KEPT = ("robustness", "agreement", "accuracy", "clean_accuracy", "method")
WHAT = ("perturbation", "variance", "scale", "bins", "range", "label", "stages")


def measured(
    queries: Tensor,
    gallery: Tensor,
    labels: Any,
    perturbations: Sequence[Perturbation],
    *,
    shift: MeanShift | None,
    projection: Projection,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each perturbation a row as the embeddings are, one shifted, and one projected, by the projection's metric.

    Args:
        shift: None leaves its rows out, as under inner product, where a shift changes no score's order.
    """
    options: dict[str, Any] = {"metric": projection.metric, "seed": seed}
    found = sweep(queries, gallery, [0, 1], perturbations, labels, shift=projection, **options).rows
    rows = [{"moved": PROJECTION if row["alpha"] else NONE, **row} for row in found]
    if shift is not None:
        found = sweep(queries, gallery, [1], perturbations, labels, shift=shift, **options).rows
        rows += [{"moved": SHIFT, **row} for row in found]
    order = [title(row) for row in rows]
    rows.sort(key=lambda row: (order.index(title(row)), MOVES.index(row["moved"])))
    return [{name: row[name] for name in ("moved", *WHAT, *KEPT)} for row in rows]


def lines(rows: Iterable[dict[str, Any]], value: str) -> dict[str, tuple[list[float], list[float]]]:
    """For each move the variances and the values there, ascending."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: (MOVES.index(row["moved"]), row["variance"])):
        variances, values = found.setdefault(row["moved"], ([], []))
        variances.append(row["variance"])
        values.append(row[value])
    return found

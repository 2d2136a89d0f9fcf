"""What quantisers keep of the neighbours, before and after the gap is closed."""

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapkern import _check, files
from gapkern._rows import unit
from gapkern.gap import MeanShift, Projection, transforms
from gapkern.retrieval import families
from gapkern.retrieval._faiss import rotations
from gapkern.retrieval.index import GapIndex
from gapkern.retrieval.recalls import pairs, places

REPEATS = 3  # searches that are timed
# Steps in which OPQ learns its rotation. FAISS's 50 take three times as long in all, and add 0.01 to the agreement of
# 20,000 rows of 512.
ROTATIONS = 10


def usual(dims: int, count: int) -> list[str]:
    """Factory strings of the usual quantisers for a gallery (count, dims).

    Codebooks take 8 bits where there are FAISS's 39 rows for each centroid, and 6 or 4 where there are fewer. "np":
    without polysemous training, which takes longest, and orders centroids for a search that is not done here.

    Example:
        >>> usual(512, 25000)
        ['Flat', 'SQ8', 'SQ4', 'PQ64np', 'IVF158,PQ64np', 'OPQ64,PQ64np', 'RaBitQ']
    """
    pieces = max(m for m in range(1, max(1, dims // 8) + 1) if dims % m == 0)
    bits = next((bits for bits in (8, 6) if count >= 39 * 2**bits), 4)
    product = f"PQ{pieces}" + ("" if bits == 8 else f"x{bits}") + "np"
    lists = max(1, min(math.isqrt(count), count // 39))
    # OPQ learns its rotation with 256 centroids whatever follows, which few rows do not determine.
    rotated = [f"OPQ{pieces},{product}"] if bits == 8 else []
    return ["Flat", "SQ8", "SQ4", product, f"IVF{lists},{product}", *rotated, "RaBitQ"]


@dataclass
class QuantiserResult:
    """A row for each quantiser and side of the shift.

    Attributes:
        rows: factory, parameters, shift (False, True), recall@1 and recall@k (None without positives), agreement (share
            of queries whose first neighbour is that of an exact search before the shift), overlap@k (share of those k
            neighbours that are found), bytes_per_vector, queries_per_second.
        left_out: factory strings that could not be built here, with the reason.
        orthogonality: share of the gap that the shift closes at alpha = 1.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    orthogonality: float
    count: int
    queries: int
    k: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        return files.write_json(path, self.to_dict())

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        def save(temporary: Path) -> None:
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)

        return files.write(path, save)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Agreement, overlap and recall of each quantiser, before and after."""
        from gapkern import figures

        figure = figures.quantisers(self)
        return files.write(path, lambda temporary: figure.savefig(temporary, dpi=130))


def compare_quantisers(
    queries: Any,
    gallery: Any,
    factories: Sequence[str] | None = None,
    *,
    shift: MeanShift | Projection | None = None,
    metric: str = "l2",
    positives: Any = None,
    k: int = 10,
    probes: int | None = None,
    sample: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantiserResult:
    """Builds an index of each kind on the gallery as it is and with the gap closed, and compares their answers.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        factories: FAISS factory strings (default: `usual`: Flat, SQ8, SQ4, PQ, IVF-PQ, OPQ, RaBitQ).
        shift: a fitted shift or projection (default: one fitted here, `MeanShift()` for "l2" and
            `Projection(metric="ip")` for "ip"). Indexes whose codes are about centres (RaBitQ) take a projection by
            inner product `about_mean`, as `repair` does.
        metric: "l2" or "ip", as for `GapIndex`.
        positives: as for `recall`.
        k: neighbours that are looked at.
        probes: lists that are searched where there are inverted lists (default: an eighth of them).
        sample: gallery rows, drawn evenly, from which codes are learned (default: all).
        progress: called with indexes done and in all.

    Raises:
        TypeError, ValueError: what `GapIndex` and `recall` raise; no factory string that can be built.

    Example:
        >>> import torch
        >>> gallery = torch.nn.functional.normalize(torch.randn(300, 16), dim=1)
        >>> queries = gallery + 0.05 * torch.randn(300, 16) + torch.ones(16)
        >>> result = compare_quantisers(queries, gallery, ["Flat", "SQ8"], shift=MeanShift(n_components="auto"))
        Traceback (most recent call last):
        ...
        ValueError: shift: expected a fitted MeanShift, got MeanShift(...)
        >>> result = compare_quantisers(queries, gallery, ["Flat", "SQ8"])
        >>> [(row["factory"], row["shift"]) for row in result.rows]
        [('Flat', False), ('Flat', True), ('SQ8', False), ('SQ8', True)]
    """
    queries = _check.matrix("queries", queries, rows="Q").detach()
    gallery = _check.matrix("gallery", gallery, rows="G").detach()
    _check.same_width(queries=queries, gallery=gallery)
    k = _check.integer("k", k, low=1, high=len(gallery))
    _check.choice("metric", metric, ("l2", "ip"))
    transforms.check("shift", shift)
    transforms.fits_metric("shift", shift, metric)
    if isinstance(shift, Projection) and shift.metric == "cosine":
        gallery = unit(gallery.to(torch.promote_types(gallery.dtype, torch.float32)))
    truth = GapIndex(metric=metric).add(gallery).search(queries, k)[1]
    if shift is None:
        shift = (MeanShift() if metric == "l2" else Projection(metric="ip")).fit(gallery, queries)
    wanted = None if positives is None else pairs(positives, len(queries), len(gallery))
    count = len(gallery) if sample is None else min(len(gallery), _check.integer("sample", sample, low=1))
    learned = gallery
    if count < len(gallery):
        learned = gallery[torch.linspace(0, len(gallery) - 1, count, dtype=torch.float64).round().long()]
    factories = usual(gallery.shape[1], count) if factories is None else list(factories)
    rows, left_out = [], {}
    for number, factory in enumerate(factories):
        for moved in (None, shift):
            try:
                index = GapIndex(factory, metric, d=gallery.shape[1])
                if moved is not None:
                    index = GapIndex(factory, metric, _fitting(moved, index), d=gallery.shape[1])
                _learned(index, learned).add(gallery)
            except ValueError as error:
                left_out[factory] = str(error)
                break
            rows.append(_row(index, factory, queries, wanted, truth, k, probes))
        progress(number + 1, len(factories))
    if not rows:
        raise ValueError(f"factories: expected one that can be built here, got {left_out}")
    return QuantiserResult(rows, left_out, transforms.closed(shift, queries), len(gallery), len(queries), k)


def _fitting(shift: MeanShift | Projection, index: GapIndex) -> MeanShift | Projection:
    """The move that an index's codes gain most from."""
    about = isinstance(shift, Projection) and families.about_centres(index.faiss_index)
    return shift.about_mean() if isinstance(shift, Projection) and about else shift


def _learned(index: GapIndex, sample: Tensor) -> GapIndex:
    for rotation in rotations(index.faiss_index):
        rotation.niter = ROTATIONS
    return index.train(sample)


def _row(index: Any, factory: str, queries: Any, wanted: Any, truth: Any, k: int, probes: Any) -> dict[str, Any]:
    parameters = ""
    lists = index.nlist
    if lists:
        parameters = f"nprobe={probes or max(1, math.ceil(lists / 8))}"
        index.set_parameters(parameters)
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        found = index.search(queries, k)[1]
        spent.append(time.perf_counter() - started)
    hits = None if wanted is None else places(found, 0, *wanted)
    overlap = (found[:, :, None] == truth[:, None, :]).any(1).double().mean()
    return {
        "factory": factory,
        "parameters": parameters,
        "shift": index.shift is not None,
        "recall@1": None if hits is None else float((hits < 1).double().mean()),
        f"recall@{k}": None if hits is None else float((hits < k).double().mean()),
        "agreement": float((found[:, 0] == truth[:, 0]).double().mean()),
        f"overlap@{k}": float(overlap),
        "bytes_per_vector": index.bytes_per_vector,
        "queries_per_second": len(queries) / statistics.median(spent),
    }

"""What the projection keeps and gains on real models' embeddings: neighbours at k = 1 to 10, and robustness to noise.

The embeddings are those of `bench_quantisers`, and the demo's digits. Either modality is searched, the first G rows of
it, by the rows of the other. Robustness is exact, by squared distance and by inner product.

And `reduce=True`, which rotates both sides into the hull's k dimensions: what an index of k columns in place of D
answers, how large it is, and how fast, the queries' rotation included.
"""

import functools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import harness
from bench.bench_quantisers import MODELS
from gapkern import Gaussian, MeanShift, Projection
from gapkern._search import search
from gapkern.retrieval import GapIndex
from gapkern.robustness import robustness

SIZES = (10, 50, 100, 500)  # gallery rows, as far as there are so many, all fewer than dimensions
NEIGHBOURS, VARIANCE = 10, 0.04
LOW_RANK, ASKED, REPEATS = 64, 500, 5
LOW_RANK_ROWS = {"quick": 2000, "full": 20_000}


def place() -> Path:
    """Where Liang et al.'s features are."""
    return Path(os.environ.get("GAPKERN_TEST_DATA", harness.RESULTS.parent.parent.parent / "shared" / "data"))


def data(mode: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Set, direction, queries and gallery."""
    for name, title in MODELS.items():
        if (place() / f"features_{name}.npy").exists():
            images, texts = torch.from_numpy(np.load(place() / f"features_{name}.npy", allow_pickle=False))
            for direction, queries, gallery in (("image to text", images, texts), ("text to image", texts, images)):
                for size in sorted({min(size, len(gallery)) for size in SIZES}):
                    if size < gallery.shape[1]:
                        yield title, direction, queries, gallery[:size]
    if mode == "full":
        yield "digits", "image to prompt", *_digits()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from gapkern import datasets
    from gapkern.experiments import digits

    scans = datasets.scans(0)
    trained = digits.train(scans, seed=0)
    return digits.embed_images(trained, scans.test_images), digits.embed_prompts(trained, digits.TEMPLATES)[0]


def row(queries: Tensor, gallery: Tensor) -> dict[str, float]:
    """None, shift and projection of one gallery: robustness by each metric, and whether every neighbour stays."""
    noise, k = Gaussian(VARIANCE), min(NEIGHBOURS, len(gallery))
    shift = MeanShift(n_components="exact").fit(gallery, queries)
    found = {"identical": 1.0, "components": Projection("exact").fit(gallery).n_components_}
    found["l2 shift"] = robustness(queries, gallery, noise, shift=shift).robustness
    for metric in ("l2", "ip"):
        projection = Projection("exact", metric).fit(gallery, queries)
        before = search(queries, gallery, k, metric=metric)[1]
        after = search(projection.transform_queries(queries), gallery, k, metric=metric)[1]
        found["identical"] = min(found["identical"], float((before == after).double().mean()))
        for name, moved in (("none", None), ("projection", projection)):
            found[f"{metric} {name}"] = robustness(queries, gallery, noise, metric=metric, shift=moved).robustness
    return found


def narrow(mode: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Set, queries and gallery: prompts, small galleries, and a model whose embeddings have a low rank."""
    wanted = {("digits", 10), ("CLIP", 100), ("VideoCLIP", 100)}
    for name, direction, queries, gallery in data(mode):
        if (name, len(gallery)) in wanted and direction != "text to image":
            yield f"{name}, {direction}", queries, gallery
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(LOW_RANK, 512, generator=generator) / LOW_RANK**0.5
    gallery = torch.randn(LOW_RANK_ROWS[mode], LOW_RANK, generator=generator) @ mixed + 1
    asked = gallery[:ASKED] + 0.5 * torch.randn(ASKED, LOW_RANK, generator=generator) @ mixed
    yield f"model of rank {LOW_RANK}", asked + 0.1 * torch.randn(ASKED, 512, generator=generator) + 0.3, gallery


def reduced(queries: Tensor, gallery: Tensor, metric: str) -> dict[str, float]:
    """Indexes of D and of k columns: whether they answer alike, bytes a row, and queries a second."""
    k = min(NEIGHBOURS, len(gallery))
    projection = Projection("exact", metric, reduce=True).fit(gallery)
    indexes = [GapIndex(metric=metric).add(gallery), GapIndex(metric=metric, shift=projection).add(gallery)]
    answers = [index.search(queries, k)[1] for index in indexes]
    spent: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for index, times in zip(indexes, spent, strict=True):
            started = time.perf_counter()
            index.search(queries, k)
            times.append(time.perf_counter() - started)
    before, after = (len(queries) / statistics.median(times) for times in spent)
    return {
        "components": projection.n_components_,
        "identical": float((answers[0] == answers[1]).double().mean()),
        "bytes_per_vector": [index.bytes_per_vector for index in indexes],
        "queries_per_second": [before, after],
    }


def run(mode: str) -> dict:
    cases = []
    for name, direction, queries, gallery in data(mode):
        facts = {"data": name, "direction": direction, "Q": len(queries), "G": len(gallery), "D": gallery.shape[1]}
        cases.append({**facts, "k": min(NEIGHBOURS, len(gallery)), **row(queries, gallery)})
        print(
            ", ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{v}" for key, v in cases[-1].items()), flush=True
        )
    narrower = []
    for name, queries, gallery in narrow(mode):
        for metric in ("l2", "ip"):
            facts = {"data": name, "metric": metric, "Q": len(queries), "G": len(gallery), "D": gallery.shape[1]}
            narrower.append({**facts, **reduced(queries, gallery, metric)})
            print(", ".join(f"{key} {v}" for key, v in narrower[-1].items()), flush=True)
    return {**harness.facts("projection"), "variance": VARIANCE, "cases": cases, "reduced": narrower}

"""What the projection keeps and gains on real models' embeddings: neighbours at k = 1 to 10, and robustness to noise.

The embeddings are those of `bench_quantisers`, and the demo's digits. Either modality is searched, the first G rows of
it, by the rows of the other. Robustness is exact, by squared distance and by inner product.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import harness
from bench.bench_quantisers import MODELS
from gapkern import Gaussian, MeanShift, Projection
from gapkern._search import search
from gapkern.robustness import robustness

SIZES = (10, 50, 100, 500)  # gallery rows, as far as there are so many, all fewer than dimensions
NEIGHBOURS, VARIANCE = 10, 0.04


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
        from gapkern.experiments import digits

        scans = digits.load(0)
        trained = digits.train(scans, seed=0)
        prompts = digits.embed_prompts(trained, digits.TEMPLATES)[0]
        yield "digits", "image to prompt", digits.embed_images(trained, scans.test_images), prompts


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


def run(mode: str) -> dict:
    cases = []
    for name, direction, queries, gallery in data(mode):
        facts = {"data": name, "direction": direction, "Q": len(queries), "G": len(gallery), "D": gallery.shape[1]}
        cases.append({**facts, "k": min(NEIGHBOURS, len(gallery)), **row(queries, gallery)})
        print(
            ", ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{v}" for key, v in cases[-1].items()), flush=True
        )
    return {**harness.facts("projection"), "variance": VARIANCE, "cases": cases}

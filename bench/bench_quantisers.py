"""What quantisers keep of the neighbours, with the gap open and closed: published embeddings, and more rows like them.

The embeddings are those of Liang et al., *Mind the Gap* (2022): `features_<name>.npy`, float32 (2, N, D), in the folder
GAPKERN_TEST_DATA or ../shared/data beside the repository, left out where they are not. The second modality is searched.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench import harness
from gapkern.retrieval import compare_quantisers
from gapkern.testing import clip_like

MODELS = {"clip": "CLIP", "convirt": "ConVIRT", "videoclip": "VideoCLIP"}
SIZES = {"quick": (1500, 64), "full": (20_000, 512)}
QUERIES, SAMPLE, K = 2000, 10_000, 10


def data(mode: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, queries and gallery of each case; row i of both is a pair."""
    place = Path(os.environ.get("GAPKERN_TEST_DATA", harness.RESULTS.parent.parent.parent / "shared" / "data"))
    for name, title in MODELS.items():
        if (place / f"features_{name}.npy").exists():
            images, texts = torch.from_numpy(np.load(place / f"features_{name}.npy", allow_pickle=False))
            yield title, images, texts
    images, texts = clip_like(*SIZES[mode])
    yield "synthetic", images[:QUERIES], texts


def run(mode: str) -> dict:
    cases = []
    for name, queries, gallery in data(mode):
        found = compare_quantisers(queries, gallery, positives=np.arange(len(queries)), sample=SAMPLE, k=K)
        parameters = {"data": name, "Q": len(queries), "G": len(gallery), "D": gallery.shape[1], "sample": SAMPLE}
        cases.append({**parameters, **found.to_dict()})
        print(", ".join(f"{key}={value}" for key, value in parameters.items()))
        for row in found.rows:
            numbers = "".join(f"{row[key]:9.3f}" for key in ("agreement", f"overlap@{K}", f"recall@{K}"))
            side = "closed" if row["shift"] else "open"
            print(
                f"  {row['factory']:<14} {side:<7} {numbers} {row['bytes_per_vector']:7.0f} B "
                f"{row['queries_per_second']:9.0f} queries/s",
                flush=True,
            )
    return {**harness.facts("quantisers"), "cases": cases}

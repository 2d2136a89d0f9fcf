"""Recall both ways against FAISS's flat searches and CLIP_benchmark's own code, and the memory that each takes.

The gallery is images, the queries five or four captions of each; CLIP_benchmark's contender is its `recall_at_k` in
batches of 64 on the whole score matrix, as its retrieval task calls it (package clip-benchmark; left out where absent).
"""

import importlib.util

import torch

from bench import harness
from bench.harness import Case, Contender
from gapkern.retrieval import recall
from gapkern.testing import clip_like, peak_memory

DIMS, KS = 512, (1, 5, 10)
SIZES = {"quick": [(2000, 400)], "full": [(5000, 1000), (25_000, 5000), (100_000, 25_000)]}
FITS = 5000  # texts for which CLIP_benchmark's matrices are made


def embeddings(texts: int, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts, images, and each text's image. Texts of one image share a part of their noise."""
    gallery, first = clip_like(images, DIMS)
    belongs = torch.arange(texts) * images // texts
    queries = first[belongs] + 0.03 * torch.randn(texts, DIMS, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(queries, dim=1), gallery, belongs


def faiss_recall(queries, gallery, belongs, search_only=False):
    """Two flat searches, and hits looked up among the ids found."""
    import faiss

    found = []
    for asking, searched in ((queries, gallery), (gallery, queries)):
        index = faiss.IndexFlatL2(DIMS)
        index.add(searched.numpy())
        found.append(torch.from_numpy(index.search(asking.numpy(), max(KS))[1]))
    if search_only:
        return found
    hits = found[0] == belongs[:, None], belongs[found[1]] == torch.arange(len(gallery))[:, None]
    return {
        f"{name}_recall@{k}": float(hit[:, :k].any(1).double().mean())
        for name, hit in zip(("image_retrieval", "text_retrieval"), hits, strict=True)
        for k in KS
    }


def clip_benchmark_recall(queries, gallery, belongs):
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = queries @ gallery.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), belongs] = True
    return {
        f"{name}_recall@{k}": float((batchify(recall_at_k, s, p, 64, "cpu", k=k) > 0).double().mean())
        for name, s, p in (("image_retrieval", scores, positive), ("text_retrieval", scores.T, positive.T))
        for k in KS
    }


def cases(mode: str):
    theirs = importlib.util.find_spec("clip_benchmark") is not None
    for texts, images in SIZES[mode]:
        queries, gallery, belongs = embeddings(texts, images)

        def check(results, texts=texts):
            for name, result in results.items():
                for key, value in results["gapkern"].items():
                    # Others decide near-ties by rounding.
                    assert not isinstance(result, dict) or abs(result[key] - value) <= 1e-3, (name, key, value, result)

        contenders = [
            Contender(
                "FAISS, two flat searches", lambda a=queries, b=gallery, c=belongs: faiss_recall(a, b, c), "baseline"
            ),
            Contender("gapkern", lambda a=queries, b=gallery, c=belongs: recall(a, b, c, KS)),
        ]
        if theirs and texts <= FITS:
            contenders.append(
                Contender(
                    "CLIP_benchmark", lambda a=queries, b=gallery, c=belongs: clip_benchmark_recall(a, b, c), "baseline"
                )
            )
        if texts <= 25_000:
            product = torch.empty(texts, images)
            contenders.append(
                Contender(
                    "limit: one product", lambda a=queries, b=gallery, o=product: torch.mm(a, b.T, out=o), "limit"
                )
            )
        parameters = {"operation": "recall, both ways", "Q": texts, "G": images, "D": DIMS}
        yield Case(parameters, contenders, check, "FAISS, two flat searches")


def memory(mode: str) -> list[dict]:
    rows = []
    calls = {"FAISS, two flat searches": "faiss_recall", "gapkern": "ours", "CLIP_benchmark": "clip_benchmark_recall"}
    theirs = importlib.util.find_spec("clip_benchmark") is not None
    for texts, images in SIZES[mode]:
        row: dict = {"Q": texts, "G": images, "D": DIMS}
        for name, call in calls.items():
            if name == "CLIP_benchmark" and (texts > FITS or not theirs):
                continue
            setup = f"""
import sys
sys.path.insert(0, {str(harness.RESULTS.parent.parent)!r})
from bench.bench_retrieval import *
ours = lambda a, b, c: recall(a, b, c, KS)
{call}(*embeddings(64, 16))
data = embeddings({texts}, {images})
"""
            row[name] = peak_memory(f"{call}(*data)", setup=setup)
        rows.append(row)
        print("peak MiB", row, flush=True)
    return rows


def run(mode: str) -> dict:
    result = harness.run("retrieval", cases(mode), seconds=3.0 if mode == "quick" else 8.0)
    return {**result, "peak_memory_mib": memory(mode)}

"""What each kind of index finds of the exact neighbours: queries as they are, shifted, projected, and centred.

Real embeddings (those of `bench_quantisers`), and rows of CLIP's joint covariance. Queries of the other modality, and
of the gallery's own. An index is built once and asked in four ways, as shift and projection move queries alone:

* none: the queries as they are.
* shift: less the part of the gap outside of the gallery's hull (`MeanShift(moves="queries")`), "auto".
* projection: on the gallery's hull or its leading directions (`Projection`), "auto"; `about_mean` for RaBitQ's codes.
* centring: by L2 the queries less the whole gap; by inner product the gallery less its mean, in an index of its own,
  which changes no order of scores.

Recall@10 is that of the exact search by the queries as they are, once at fixed probes and, where a parameter trades it
for speed, at the speed that queries as they are have there.
"""

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import bench_projection, harness
from gapkern import MeanShift, Projection
from gapkern._search import search
from gapkern.retrieval import GapIndex
from gapkern.retrieval._faiss import rotations
from gapkern.retrieval.families import about_centres

ROWS = {"quick": 2000, "full": 100_000}
QUERIES, SAMPLE, K, REPEATS = 600, 10_000, 10, 3
ROTATIONS = 4  # steps in which OPQ learns
MOVES = ("none", "shift", "projection", "centring")
PROBES = {"IVF": ("nprobe", (1, 2, 4, 8, 16, 32)), "HNSW": ("efSearch", (16, 32, 64, 128))}
FIXED = {"IVF": 8, "HNSW": 32}


def kinds(dims: int, count: int) -> dict[str, str]:
    """Factory strings by kind."""
    pieces = max(m for m in range(1, dims // 8 + 1) if dims % m == 0)
    bits = next((bits for bits in (8, 6) if count >= 39 * 2**bits), 4)
    lists = max(4, min(math.isqrt(count), count // 39))
    product = f"PQ{pieces}{'' if bits == 8 else f'x{bits}'}np"
    found = {
        "Flat": "Flat",
        "IVF": f"IVF{lists},Flat",
        "HNSW": "HNSW16",
        "SQ8": "SQ8",
        "SQ4": "SQ4",
        "PQ": product,
        "OPQ-PQ": f"OPQ{pieces},{product}",
        "RaBitQ": "RaBitQ",
        "IVF-RaBitQ": f"IVF{lists},RaBitQ",
    }
    if bits < 8:  # OPQ learns by 256 centroids whatever follows; FAISS may end the process where rows are few
        del found["OPQ-PQ"]
    return found


def data(mode: str) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    """Set, gallery, and queries by whether they are of the other modality or of the gallery's own."""
    for name, title in bench_projection.MODELS.items():
        path = bench_projection.place() / f"features_{name}.npy"
        if not path.exists():
            continue
        images, texts = torch.from_numpy(np.load(path, allow_pickle=False))
        held = len(texts) // 5
        yield title, texts[held:], {"images": images[:QUERIES], "texts": texts[:held]}
        if name == "clip":
            yield "like CLIP", *_like(images, texts, ROWS[mode])


def _like(images: Tensor, texts: Tensor, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows with the joint mean and covariance of pairs."""
    pairs = torch.cat([images, texts], 1).double()
    mean = pairs.mean(0)
    root = (pairs - mean) / len(pairs) ** 0.5
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat(
        [
            (mean + torch.randn(n, len(root), generator=generator, dtype=torch.float64) @ root).float()
            for n in [10_000] * ((count + 2 * QUERIES) // 10_000) + [(count + 2 * QUERIES) % 10_000]
        ]
    )
    asked, gallery = drawn.split(images.shape[1], 1)
    gallery = gallery.contiguous()
    return gallery[:count], {"images": asked[:QUERIES].contiguous(), "texts": gallery[count : count + QUERIES]}


def moved(gallery: Tensor, queries: Tensor, metric: str) -> dict[str, Any]:
    """For each move the function that queries go through, and "about mean", the projection for codes about centres.

    Of the queries every other one is fitted to, the rest is held out.
    """
    fitted = queries[::2]
    shift = MeanShift(moves="queries").fit(gallery, fitted)
    projection = Projection("auto", metric, neighbours=min(K, len(gallery))).fit(gallery, fitted)
    gap = fitted.mean(0) - gallery.mean(0)
    return {
        "none": lambda y: y,
        "shift": shift.transform_queries,
        "projection": projection.transform_queries,
        "about mean": projection.about_mean().transform_queries,
        "centring": (lambda y: y - gap) if metric == "l2" else (lambda y: y),
    }


def measure(index: GapIndex, move: Any, queries: Tensor, truth: Tensor) -> tuple[float, float]:
    """Recall of the true neighbours, and queries a second in the fastest of the searches, moving them included."""
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        found = index.search(move(queries), truth.shape[1])[1]
        spent.append(time.perf_counter() - started)
        if sum(spent) > 0.3:
            break
    recall = (found[:, :, None] == truth[:, None, :]).any(1).double().mean()
    return float(recall), len(queries) / min(spent)


def at_speed(curve: list[tuple[float, float]], speed: float) -> float:
    """The recall that points (recall, queries a second) have at a speed; between two, linearly in its logarithm."""
    points = sorted((math.log(s), r) for r, s in curve)
    return float(np.interp(math.log(speed), [s for s, _ in points], [r for _, r in points]))


def built(factory: str, metric: str, gallery: Tensor) -> tuple[GapIndex, float]:
    started = time.perf_counter()
    index = GapIndex(factory, metric, d=gallery.shape[1])
    for rotation in rotations(index.faiss_index):
        rotation.niter, rotation.niter_pq_0 = ROTATIONS, 10  # FAISS's 50 and 40 take ten times as long
    step = max(1, len(gallery) // SAMPLE)
    index.train(gallery[::step]).add(gallery)
    return index, time.perf_counter() - started


def rows(gallery: Tensor, asked: dict[str, Tensor], metric: str) -> Iterator[dict[str, Any]]:
    """A row for each kind, side that asks, and move."""
    k = min(K, len(gallery))
    moves = {side: moved(gallery, queries, metric) for side, queries in asked.items()}
    held = {side: queries[1::2] for side, queries in asked.items()}
    truths = {side: search(queries, gallery, k, metric=metric)[1] for side, queries in held.items()}
    for kind, factory in kinds(gallery.shape[1], min(len(gallery), SAMPLE)).items():
        name, values = next((p for prefix, p in PROBES.items() if kind.startswith(prefix)), ("", ()))
        fixed = next((v for prefix, v in FIXED.items() if kind.startswith(prefix)), 0)
        try:
            index, seconds = built(factory, metric, gallery)
            centred = built(factory, metric, gallery - gallery.mean(0)) if metric == "ip" else (index, seconds)
        except ValueError as error:
            print(f"  left out: {factory}: {error}", flush=True)
            continue
        for side, queries in held.items():
            speed = 0.0
            for move in MOVES:
                which, spent = centred if move == "centring" else (index, seconds)
                mapped = "about mean" if move == "projection" and about_centres(index.faiss_index) else move
                curve = {}
                for value in values or (0,):
                    if name:
                        which.set_parameters(f"{name}={min(value, which.nlist) if which.nlist else value}")
                    curve[value] = measure(which, moves[side][mapped], queries, truths[side])
                recall, here = curve[fixed]
                speed = speed or here
                yield {
                    "kind": kind,
                    "factory": factory,
                    "parameters": f"{name}={fixed}" if name else "",
                    "asks": side,
                    "move": move,
                    f"recall@{k}": recall,
                    "queries_per_second": here,
                    f"recall@{k} at {MOVES[0]}'s speed": at_speed(list(curve.values()), speed) if name else None,
                    "bytes_per_vector": which.bytes_per_vector,
                    "seconds_to_build": spent,
                }


def run(mode: str) -> dict:
    cases = []
    for name, gallery, asked in data(mode):
        for metric in ("l2", "ip"):
            facts = {
                "data": name,
                "metric": metric,
                "G": len(gallery),
                "D": gallery.shape[1],
                "k": min(K, len(gallery)),
            }
            print(", ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
            found, recall = [], f"recall@{facts['k']}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for row in rows(gallery, asked, metric):
                    found.append(row)
                    print(
                        f"  {row['kind']:<11} {row['asks']:<7} {row['move']:<11} {row[recall]:.3f} "
                        f"{row['queries_per_second']:9.0f}/s {row['bytes_per_vector']:6.0f} B "
                        f"{row['seconds_to_build']:6.2f} s",
                        flush=True,
                    )
            sizes = {f"Q, {side}": len(queries[1::2]) for side, queries in asked.items()}
            cases.append({**facts, **sizes, "rows": found})
    return {**harness.facts("indexes"), "cases": cases}

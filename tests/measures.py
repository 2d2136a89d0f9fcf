"""Every public measure as a function of the same pairs, and when two results of one are the same."""

import importlib.util
import math
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from gapkern import Gaussian, MeanShift, Projection, Quantize, Replace, Uniform, best_alpha, gap_metrics, sweep
from gapkern.dynamics import descend, evaluate, isotropic_gaussians, measure, tight_clusters
from gapkern.evaluation import classification, mixed_retrieval, multiple_choice, retrieval, templates
from gapkern.evaluation.settings import Settings
from gapkern.gap import BASELINES, MixedShift, fuse, gap_structure
from gapkern.perturb import perturb
from gapkern.ranks import Rows
from gapkern.retrieval import recall
from gapkern.robustness import robustness
from gapkern.theory import assess, certify, freeze, leading_gradient, orthogonality, preservation, robustness_curve

faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def pairs():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(48, 12, generator=generator, dtype=torch.float32)
    texts = images + 0.4 * torch.randn(48, 12, generator=generator, dtype=torch.float32) + 0.5
    return images, texts


def fitted_baselines(x, y):
    found = {}
    for name, make in BASELINES.items():
        baseline = make().fit(y, x)
        found[name] = baseline.transform(y), baseline.transform_queries(x)
    return found


def shifts(x, y):
    parts = MeanShift().partial_fit(y[:20], x[:25]).merge(MeanShift().fit(y[20:], x[25:]))
    return [
        (s.gap_vector_, s.shift_vector_, s.n_components_, s.orthogonality_, s.agreement_, s.transform(y))
        for s in (MeanShift().fit(y, x), parts, MeanShift(normalize=True).fit(y, x).at(0.5))
    ]


def perturbed(x, y):
    return [
        perturb(y, p, seed=3)
        for p in (Gaussian(0.5), Uniform(0.5), Quantize(7), Quantize(7, "global"), Gaussian(0.1) | Quantize(5))
    ]


def robust(x, y):
    shift = MeanShift().fit(y, x)
    labels = list(range(len(x)))
    return [
        without_seconds(robustness(x, y, p, labels=labels, shift=s, method=m, trials=3))
        for p, s, m in (
            (Gaussian(0.5), None, "exact"),
            (Gaussian(0.5), shift, "projected"),
            (Uniform(0.5), shift, "sample"),
            (Quantize(4), shift, "auto"),
            (Replace(y.flip(1)), None, "auto"),
        )
    ]


def without_seconds(result):
    return {name: value for name, value in vars(result).items() if name != "seconds"}


def swept(x, y):
    rows = sweep(x, y, [0.0, 1.0], [Gaussian(0.5), Quantize(4)], range(len(x)), trials=2).rows
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def descents(x, y):
    options = {"lr": 0.1, "steps": 6, "record_every": 2}
    return [
        descend(x, y, 2.0, **options).rows,
        descend(x, y, 2.0, optimizer="adam", sphere=True, learn_scale=True, batch=16, snapshots=[3], **options),
    ]


def tasks(x, y):
    rows, others = Rows(x, 0, len(x)), Rows(y, 0, len(y))
    settings = Settings("auto", (Gaussian(0.2), Quantize(4)))
    of, all_rows = torch.arange(48, device="cpu") // 4, torch.arange(48, device="cpu")
    return [
        classification(rows, of, y[::4], settings),
        templates(rows, of, torch.stack([y[::4], y[1::4]]), ["a", "b"], settings),
        retrieval(rows, others, all_rows, (1, 5), settings),
        multiple_choice(Rows(x[::4], 0, 12), others, of, all_rows[:12] // 12, settings),
    ]


def indexes(x, y):
    from gapkern.retrieval import GapIndex, compare_quantisers

    shift = MeanShift().fit(y, x)
    found = [GapIndex(factory, shift=shift).train(y).add(y).search(x, 5) for factory in ("Flat", "IVF4,Flat", "SQ8")]
    rows = compare_quantisers(x, y, ["Flat", "SQ8"]).rows
    index, kept = GapIndex().add(y), GapIndex("IVF4,SQ8", "ip", Projection("exact", "ip").fit(y[:6], x)).train(y).add(y)
    removed = kept.remove_ids(torch.arange(3, device="cpu"))
    return (
        found,
        [removed, kept.search(x, 5), kept.reconstruct(7), kept.reconstruct_batch([9, 4])],
        [{k: v for k, v in r.items() if k != "queries_per_second"} for r in rows],
        recall(x, None, range(48), index=index),
    )


def mixed(x, y):
    names = ["image", "text", "fused"] * 16
    found = [MixedShift(method).fit(y, x, names) for method in ("means", "shift")]
    labels = torch.arange(48, device="cpu")
    outcomes = [mixed_retrieval(x, y, names, labels, labels, shift=shift).to_dict() for shift in [None, *found]]
    return outcomes, fuse(x, y), [shift.transform(y, names) for shift in found]


ENTRIES = {
    "gap_metrics": lambda x, y: gap_metrics(x, y),
    "gap_structure": lambda x, y: gap_structure(x, y, labels=torch.arange(48, device="cpu") % 5),
    "baselines": fitted_baselines,
    "mixed": mixed,
    "certify": lambda x, y: certify(x, y, y + 0.1, Projection("exact").fit(y[:20], x)).to_dict(),
    "mean_shift": shifts,
    "perturb": perturbed,
    "robustness": robust,
    "sweep": swept,
    "best_alpha": lambda x, y: best_alpha(x, y, Gaussian(0.5), shift=MeanShift().fit(y, x), tolerance=0.3),
    "assess": lambda x, y: assess(x, y, 2.0),
    "theory": lambda x, y: [
        leading_gradient(x, y, 2.0),
        freeze(x, y, 2.0),
        orthogonality(x, y),
        preservation(x, y, MeanShift().fit(y, x)),
        robustness_curve(x, y, Gaussian(0.5), alphas=[0, 1]),
    ],
    "dynamics": lambda x, y: [
        evaluate(x, y, 2.0),
        measure(x, y),
        tight_clusters(5, 3, 0.1, 1.0),
        isotropic_gaussians(5, 3, 1.0),
    ],
    "descend": descents,
    "recall": lambda x, y: recall(x, y, [[i, (i + 1) % 48] for i in range(48)], metric="l2"),
    "evaluation": tasks,
    "index": pytest.param(indexes, marks=faiss),
}


def plain(value):
    """Nested lists of plain values and arrays."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(value.device), tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if is_dataclass(value):
        return [plain(getattr(value, f.name)) for f in fields(value)]
    if isinstance(value, dict):
        return [(k, plain(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return repr(value)


def close(value, truth):
    """The same to what the order of sums may do."""
    if isinstance(value, torch.Tensor):
        scale = float(truth.double().abs().max()) if truth.numel() else 0.0
        return torch.allclose(value.double(), truth.double(), rtol=1e-6, atol=1e-6 * scale, equal_nan=True)
    if isinstance(value, np.ndarray):
        return close(torch.from_numpy(value), torch.from_numpy(truth))
    if is_dataclass(value):
        return all(close(getattr(value, f.name), getattr(truth, f.name)) for f in fields(value))
    if isinstance(value, dict):
        return value.keys() == truth.keys() and all(close(value[k], truth[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(truth) and all(map(close, value, truth))
    if isinstance(value, float):
        return math.isclose(value, truth, rel_tol=1e-6, abs_tol=1e-7) or (math.isnan(value) and math.isnan(truth))
    return isinstance(value, str) or value == truth

"""Robustness under Gaussian noise: the exact integral against sampling with plain PyTorch, 100 trials.

By squared distance and by inner product. The sampler works on all queries, as the integral does: nothing is scaled.
"""

import torch

from bench import harness
from bench.harness import Case, Contender
from gapkern import Gaussian
from gapkern._search import best
from gapkern.reference.robustness import winning_probability_inner
from gapkern.robustness import robustness

SIZES = {"quick": (1000, 200), "full": (10_000, 1000), "avx2": (10_000, 1000)}
DIMS, TRIALS, VARIANCE = 512, 100, 1e-4
INNER = {"groups of ten": 1e-3, "equally far": 1e-4}  # variances at which about half of the neighbours survive
CHECKED = 25  # queries integrated by SciPy


def _sampled(queries, gallery, metric="l2", variance=VARIANCE, trials=TRIALS):
    """The whole loop, one GEMM and one argmin or argmax a trial."""

    def found(rows):
        if metric == "ip":
            return (queries @ rows.T).argmax(1)
        return (rows.square().sum(1) - 2 * queries @ rows.T).argmin(1)

    clean = found(gallery)
    kept = []
    for _ in range(trials):
        noisy = gallery + variance**0.5 * torch.randn_like(gallery)
        kept.append((found(noisy) == clean).double().mean())
    return torch.stack(kept)


def _beside_scipy(queries, gallery, variance, measured) -> float:
    """Mean difference of some queries' robustness from SciPy's integral."""
    some = torch.linspace(0, len(queries) - 1, CHECKED).long()
    errors = []
    for q in some.tolist():
        y = queries[q].double()
        scores = gallery.double() @ y
        wins = winning_probability_inner(scores, int(scores.argmax()), float(variance**0.5 * y.norm()))
        errors.append(abs(wins - float(measured[q])))
    return sum(errors) / len(errors)


def _galleries(q: int, g: int):
    """A gallery of groups of ten similar rows, where few rivals matter, and one where all are equally far."""
    groups = harness.unit(g // 10, DIMS).repeat_interleave(10, 0)
    similar = torch.nn.functional.normalize(groups + 0.2 * harness.unit(g, DIMS, seed=1), dim=1)
    asked = similar[torch.arange(q) % g] + 0.3 * harness.unit(q, DIMS, seed=2)
    yield "groups of ten", asked, similar
    # Random directions: squared distances spread by about one standard deviation of their noise, so nothing is pruned.
    yield "equally far", 0.3 * harness.unit(q, DIMS, seed=5), harness.unit(g, DIMS, seed=4)


def cases(mode: str):
    q, g = SIZES[mode]
    for name, queries, gallery in _galleries(q, g):
        yield _case(name, queries, gallery, "l2", VARIANCE)
        yield _case(name, queries, gallery, "ip", INNER[name])


def _case(name, queries, gallery, metric, variance):
    noise = Gaussian(variance, "per_coordinate")

    def exact():
        return robustness(queries, gallery, noise, metric=metric).per_query

    def check(results):
        means = results["PyTorch, 100 trials"]
        error = float(results["gapkern, exact"].mean() - means.mean())
        assert abs(error) <= 3 * float(means.std()) / TRIALS**0.5 + 1e-4, error

    measured = exact()
    parameters = {
        "gallery": name,
        "metric": metric,
        "Q": len(queries),
        "G": len(gallery),
        "D": DIMS,
        "trials": TRIALS,
        "variance": variance,
        "robustness": float(measured.mean()),
    }
    if metric == "ip":
        parameters["error"] = _beside_scipy(queries, gallery, variance, measured)
        assert parameters["error"] <= 1e-4, parameters["error"]
    return Case(
        parameters,
        [
            Contender("PyTorch, 100 trials", lambda: _sampled(queries, gallery, metric, variance), "baseline"),
            Contender("gapkern, exact", exact),
            Contender("limit: one clean search", lambda: best(queries, gallery, metric), "limit"),
        ],
        check,
        "PyTorch, 100 trials",
    )


def run(mode: str) -> dict:
    return harness.run("robustness", cases(mode), seconds=3.0 if mode == "quick" else 30.0)

"""Robustness under Gaussian noise: the exact integral against sampling with plain PyTorch, 100 trials."""

import torch

from bench import harness
from bench.harness import Case, Contender
from gapkern import Gaussian
from gapkern._search import nearest
from gapkern.robustness import robustness

SIZES = {"quick": (1000, 200), "full": (10_000, 1000)}
DIMS, TRIALS, VARIANCE = 512, 100, 1e-4


def _sampled(queries, gallery, trials=TRIALS):
    """The whole loop, one GEMM and one argmin a trial."""
    clean = (gallery.square().sum(1) - 2 * queries @ gallery.T).argmin(1)
    kept = []
    for _ in range(trials):
        noisy = gallery + VARIANCE**0.5 * torch.randn_like(gallery)
        kept.append(((noisy.square().sum(1) - 2 * queries @ noisy.T).argmin(1) == clean).double().mean())
    return torch.stack(kept)


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
        noise = Gaussian(VARIANCE, "per_coordinate")

        def exact(queries=queries, gallery=gallery, noise=noise):
            return robustness(queries, gallery, noise).per_query

        def check(results):
            means = results["PyTorch, 100 trials"]
            error = float(results["gapkern, exact"].mean() - means.mean())
            assert abs(error) <= 3 * float(means.std()) / TRIALS**0.5 + 1e-4, error

        yield Case(
            {"gallery": name, "Q": q, "G": g, "D": DIMS, "trials": TRIALS},
            [
                Contender("PyTorch, 100 trials", lambda a=queries, b=gallery: _sampled(a, b), "baseline"),
                Contender("gapkern, exact", exact),
                Contender("limit: one clean search", lambda a=queries, b=gallery: nearest(a, b), "limit"),
            ],
            check,
            "PyTorch, 100 trials",
        )


def run(mode: str) -> dict:
    return harness.run("robustness", cases(mode), seconds=3.0 if mode == "quick" else 30.0)

"""Counter-based noise and quantisation against plain PyTorch's generator and operations."""

import torch

from bench import harness
from bench.harness import Case, Contender
from gapkern.reference import perturb as reference

ROWS = {"quick": 5_000, "full": 50_000, "avx2": 50_000}


def cases(mode: str):
    n, d = ROWS[mode], 768
    x = harness.unit(n, d)
    for law, draw in (("gaussian", torch.randn_like), ("uniform", torch.rand_like)):
        yield Case(
            {"operation": law, "N": n, "D": d},
            [
                Contender("PyTorch", lambda draw=draw: x + 0.1 * draw(x), "baseline"),
                Contender("gapkern", lambda law=law: torch.ops.gapkern.perturb_noise(x, law, 0.1, 1, 0, 0)),
                Contender("limit: clone", x.clone, "limit"),
            ],
            lambda results: None,
            "PyTorch",
            2 * 4 * x.numel(),
        )
    low, high = x.amin(0), x.amax(0)
    yield Case(
        {"operation": "quantize", "N": n, "D": d},
        [
            Contender("PyTorch", lambda: reference.quantize(x, low, high, 32), "baseline"),
            Contender("gapkern", lambda: torch.ops.gapkern.perturb_quantize(x, low, high, 32)),
            Contender("limit: clone", x.clone, "limit"),
        ],
        lambda results: torch.testing.assert_close(results["gapkern"], results["PyTorch"]),
        "PyTorch",
        2 * 4 * x.numel(),
    )


def run(mode: str) -> dict:
    return harness.run("perturb", cases(mode), seconds=3.0 if mode == "quick" else 8.0)

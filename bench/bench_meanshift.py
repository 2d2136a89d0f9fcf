"""Mean, shift and normalisation against plain PyTorch and a plain copy: all bound by memory."""

import torch

from bench import harness
from bench.harness import Case, Contender

ROWS = {"quick": 50_000, "full": 1_000_000, "avx2": 1_000_000}


def cases(mode: str):
    n, d = ROWS[mode], 768
    for dtype in (torch.float32, torch.bfloat16):
        x = harness.unit(n, d).to(dtype)
        shift64 = torch.linspace(-0.1, 0.1, d, dtype=torch.float64)
        shift = shift64.to(dtype)
        size = x.numel() * x.element_size()
        warm = torch.zeros_like(x)
        for normalize in (False, True):

            def plain(x=x, shift=shift, normalize=normalize):
                moved = x + shift
                return torch.nn.functional.normalize(moved, dim=1) if normalize else moved

            def ours(x=x, shift64=shift64, normalize=normalize):
                return torch.ops.gapkern.meanshift_apply(x, shift64, normalize)

            def check(results, tolerance=1e-6 if dtype == torch.float32 else 1e-2):
                a, b = (results[name][:1000].double() for name in ("gapkern", "PyTorch"))
                assert float((a - b).norm() / b.norm()) < tolerance

            yield Case(
                {"operation": "shift + normalize" if normalize else "shift", "N": n, "D": d, "dtype": str(dtype)[6:]},
                [
                    Contender("PyTorch", plain, "baseline"),
                    Contender("gapkern", ours),
                    Contender("limit: clone", x.clone, "limit"),
                    Contender("limit: copy into warm memory", lambda x=x, warm=warm: warm.copy_(x), "limit"),
                ],
                check,
                "PyTorch",
                2 * size,
            )
        yield Case(
            {"operation": "column sum", "N": n, "D": d, "dtype": str(dtype)[6:]},
            [
                Contender("PyTorch, float64", lambda x=x: x.sum(0, dtype=torch.float64), "baseline"),
                Contender("PyTorch, own dtype", lambda x=x: x.sum(0), "baseline"),
                Contender("gapkern, float64", lambda x=x: torch.ops.gapkern.meanshift_sum(x)),
            ],
            lambda results: torch.testing.assert_close(results["gapkern, float64"], results["PyTorch, float64"]),
            "PyTorch, float64",
            size,
        )


def run(mode: str) -> dict:
    return harness.run("meanshift", cases(mode), seconds=3.0 if mode == "quick" else 10.0)

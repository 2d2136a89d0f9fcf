"""What a device copies and multiplies at most, and what works on rows: sums, shifts, noise, the nearest ones."""

from collections.abc import Callable, Iterator

import torch

from bench.gpu.checks import COMPARED, near, rows
from bench.harness import Case, Contender
from gapkern import Gaussian
from gapkern._search import nearest
from gapkern.reference import perturb as perturb_reference
from gapkern.robustness import robustness


def ceilings(device: str, quick: bool) -> Iterator[Case]:
    size = 2**20 if quick else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Contender("limit: copy", lambda: target.copy_(source), "limit")
    yield Case({"ceiling": "copy", "bytes": 2 * size}, [copy], lambda r: None, traffic=2 * size)
    n = 256 if quick else 8192
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = Contender("limit: product", lambda a=a, b=b: a @ b, "limit")
        yield Case({"ceiling": str(dtype)[6:], "operations": 2 * n**3}, [product])


def rowwise(device: str, quick: bool) -> Iterator[Case]:
    """Column sums, shifts and noise: bound by memory."""
    ops = torch.ops.gapkern

    def normal(t):
        return torch.nn.functional.normalize(t, dim=1)

    n, d = (64, 32) if quick else (1_000_000, 768)
    cells = [torch.full((1,), v, device=device) for v in (-0.1, 0.1)]
    for dtype in (torch.bfloat16, torch.float32):
        x = rows(n, d, device=device, dtype=dtype)
        shift64 = torch.linspace(-0.1, 0.1, d, dtype=torch.float64, device=device)
        shift, size = shift64.to(dtype), x.numel() * x.element_size()
        close = 2e-2 if dtype == torch.bfloat16 else 1e-5
        pairs: list[tuple[str, int, Callable, Callable]] = [
            ("column sum", size, lambda x=x: x.sum(0, dtype=torch.float64), lambda x=x: ops.meanshift_sum(x)),
            ("shift", 2 * size, lambda x=x, s=shift: x + s, lambda x=x, s=shift64: ops.meanshift_apply(x, s, False)),
            (
                "shift + normalize",
                2 * size,
                lambda x=x, s=shift: normal(x + s),
                lambda x=x, s=shift64: ops.meanshift_apply(x, s, True),
            ),
            (
                "gaussian noise",
                2 * size,
                lambda x=x: x + 0.1 * torch.randn_like(x),
                lambda x=x: ops.perturb_noise(x, "gaussian", 0.1, 1, 0, 0),
            ),
            (
                "shift + normalize + noise",
                2 * size,
                lambda x=x, s=shift: normal(x + s) + 0.1 * torch.randn_like(x),
                lambda x=x, s=shift64: ops.perturb_noisy_gallery(x, s, "gaussian", 0.1, 1, 0, 0, True, "after"),
            ),
            (
                "quantize",
                2 * size,
                lambda x=x: perturb_reference.quantize(x, *cells, 32),
                lambda x=x: ops.perturb_quantize(x, *cells, 32),
            ),
        ]
        for name, traffic, plain, ours in pairs:

            def check(results, name=name, x=x, close=close):
                a, b = (results[k] for k in ("gapkern", "PyTorch"))
                if "noise" in name:  # other draws: their spread must be that of the law
                    spread = [float((r[:COMPARED].double() - x[:COMPARED].double()).std()) for r in (a, b)]
                    assert abs(spread[0] / spread[1] - 1) < (0.1 if len(x) < COMPARED else 0.01), spread
                else:
                    near({"gapkern": [a], "PyTorch": [b]}, "gapkern", "PyTorch", close)

            about = {"operation": name, "N": n, "D": d, "dtype": str(dtype)[6:]}
            both = [Contender("PyTorch", plain, "baseline"), Contender("gapkern", ours)]
            yield Case(about, both, check, "PyTorch", traffic)

        mean = x.mean(0, dtype=torch.float64)
        gram = [
            Contender("PyTorch", lambda x=x, m=mean: _gram(x, m), "baseline"),
            Contender("gapkern", lambda x=x, m=mean: ops.meanshift_gram(x, m)),
        ]

        def same(results):
            near({name: [value] for name, value in results.items()}, "gapkern", "PyTorch", 1e-10)

        about = {"operation": f"Gram matrix of {str(dtype)[6:]}", "N": n, "D": d, "dtype": "float64"}
        yield Case({**about, "operations": 2 * n * d * d}, gram, same, "PyTorch")


def _gram(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    centred = x.double() - mean
    return centred.T @ centred


def search(device: str, quick: bool) -> Iterator[Case]:
    """Nearest rows, and the exact robustness of a large query set."""
    q, g, d = (40, 12, 16) if quick else (50_000, 1000, 768)
    gallery = rows(g, d, device=device, seed=1)
    queries = gallery[torch.arange(q, device=device) % g] + 0.3 * rows(q, d, device=device, seed=2)

    def plain():
        return (gallery.square().sum(1) - 2 * queries @ gallery.T).argmin(1)

    def same(results):
        a, b = results["gapkern"], results["PyTorch"]
        assert float((a == b).double().mean()) > 0.999

    about = {"Q": q, "G": g, "D": d, "dtype": "float32", "operations": 2 * q * g * d}
    both = [Contender("PyTorch", plain, "baseline"), Contender("gapkern", lambda: nearest(queries, gallery))]
    yield Case({"operation": "nearest", **about}, both, same, "PyTorch")
    variance, trials = 1e-3, 20 if quick else 100

    def sampled():
        clean, kept = plain(), []
        for _ in range(trials):
            noisy = gallery + variance**0.5 * torch.randn_like(gallery)
            kept.append(((noisy.square().sum(1) - 2 * queries @ noisy.T).argmin(1) == clean).double().mean())
        return torch.stack(kept)

    def exact():
        return robustness(queries, gallery, Gaussian(variance, "per_coordinate")).per_query

    def agree(results):
        means = results[f"PyTorch, {trials} trials"]
        error = float(results["gapkern, exact"].mean() - means.mean())
        assert abs(error) <= 4 * float(means.std()) / trials**0.5 + 1e-3, error

    both = [Contender(f"PyTorch, {trials} trials", sampled, "baseline"), Contender("gapkern, exact", exact)]
    yield Case({"operation": "robustness", **about}, both, agree, both[0].name)

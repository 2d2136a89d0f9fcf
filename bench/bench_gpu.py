"""The CUDA kernels against their limits: `bash bench/gpu.sh` runs this, each section in a process of its own.

python bench/bench_gpu.py SECTION --out FOLDER [--device cpu] [--quick] [--seconds 60]
python bench/bench_gpu.py smoke [--device cpu]      every operator and loss once, against the CPU
python bench/bench_gpu.py collect --out FOLDER      one gpu.json of all sections, and a short table

Limits are measured in the same run: bytes over the rate of a device copy, 2 operations a product over the rate of an
8192^3 matrix product in the inputs' dtype. Before each timed call a buffer larger than the cache is written. A
contender that raises or runs out of memory is recorded as failed, with the reason, and the others go on.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import gapkern  # noqa: E402
from bench import harness  # noqa: E402
from bench.harness import Case, Contender  # noqa: E402
from gapkern import Gaussian, contrastive_loss, files, sigmoid_loss  # noqa: E402
from gapkern._search import nearest  # noqa: E402
from gapkern.ops.contrastive import dispatch  # noqa: E402
from gapkern.reference import perturb as perturb_reference  # noqa: E402
from gapkern.robustness import robustness  # noqa: E402
from gapkern.testing import compare  # noqa: E402

SCALE = 50.0
EAGER = "eager, one logit matrix"
COMPARED = 4096  # rows of a result, so that a check costs little beside the timing


def rows(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random rows of unit length, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device=device)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def _near(results: dict[str, Any], name: str, expected: str, tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(results[name], results[expected], strict=True)):
        found = compare(*(v[:COMPARED] if v.dim() > 1 else v for v in (a, b)))
        assert not found.mismatched, f"{name}, result {i}: {found}"
        assert found.relative_l2 < tolerance, f"{name}, result {i}: {found}"


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


def _eager(x, y, scale):
    logits = scale * (x @ y.T).float()
    labels = torch.arange(len(x), device=x.device)
    return (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2


def _others(compiled: bool) -> Iterator[tuple[str, Callable]]:
    yield EAGER, _eager
    if compiled:
        yield "torch.compile", torch.compile(_eager)
    for name in ("open_clip", "inf_cl"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out", flush=True)
            continue
        if name == "open_clip":
            yield name, module.ClipLoss()
        else:  # cal_inf_loss(q, k, labels=None, scale=None, head_dim=256): one direction's mean
            yield name, lambda x, y, s, m=module: (m.cal_inf_loss(x, y, scale=s) + m.cal_inf_loss(y, x, scale=s)) / 2


def _against_eager(results: dict[str, Any], tolerance: float) -> dict[str, str]:
    """What is wrong of the others; raises where a result of ours is."""
    wrong = {}
    for name in results:
        try:
            _near(results, name, EAGER, tolerance)
        except AssertionError as error:
            if name.startswith("gapkern"):
                raise
            wrong[name] = harness.reason(error)
    return wrong


def _gradients(loss: Callable, inputs: list[torch.Tensor]) -> Callable[[], tuple]:
    def once():
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, [t for t in inputs if t.requires_grad])

    return once


def _pair(n: int, d: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    x, y = (rows(n, d, device=device, seed=s) for s in (0, 1))
    y = torch.nn.functional.normalize(y + 0.15 * x, dim=1)
    return [*(t.to(dtype).requires_grad_() for t in (x, y)), torch.tensor(SCALE, device=device)]


def _lse_of_chunks(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exps of the rows and columns of scale x y^T in float32, 2048 rows of logits at a time."""
    row, col = [], torch.full((len(y),), -torch.inf, device=y.device)
    for part in x.split(2048):
        logits = scale * (part @ y.T)
        row.append(logits.logsumexp(1))
        col = torch.logaddexp(col, logits.logsumexp(0))
    return torch.cat(row), col


def _check_large(result: tuple, inputs: list[torch.Tensor]) -> None:
    """The contrastive loss, and 64 rows of either gradient, of batches whose logits need not fit into memory."""
    loss, dx, dy = result
    x, y, scale = (t.detach().float() for t in inputs[:3])
    lse, n, few = _lse_of_chunks(x, y, scale), len(x), min(64, len(x))
    expected = ((lse[0] + lse[1]) / 2 - scale * torch.linalg.vecdot(x, y)).mean()
    _near({"ours": [loss], "exact": [expected]}, "ours", "exact", 1e-4)
    for found, (a, b), (of_a, of_b) in ((dx, (x, y), lse), (dy, (y, x), lse[::-1])):
        logits = scale * (a[:few] @ b.T)
        softmax = (logits - of_a[:few, None]).exp() + (logits - of_b).exp()
        gradient = scale / (2 * n) * (softmax @ b - 2 * b[:few])
        _near({"ours": [found[:few]], "exact": [gradient]}, "ours", "exact", 3e-2)


def _check_large_sigmoid(result: tuple, inputs: list[torch.Tensor]) -> None:
    loss, dx, dy = result
    x, y, scale, bias = (t.detach().float() for t in inputs)
    n, few, expected = len(x), min(64, len(x)), x.new_zeros(())
    for start in range(0, n, 2048):
        logits = scale * (x[start : start + 2048] @ y.T) + bias
        expected += torch.nn.functional.softplus(logits).sum() - logits.diagonal(start).sum()
    _near({"ours": [loss], "exact": [expected / n]}, "ours", "exact", 1e-4)
    for found, a, b in ((dx, x, y), (dy, y, x)):
        weights = torch.sigmoid(scale * (a[:few] @ b.T) + bias)
        weights.diagonal()[:] -= 1
        _near({"ours": [found[:few]], "exact": [scale / n * (weights @ b)]}, "ours", "exact", 3e-2)


def ours(device: str, quick: bool) -> Iterator[Case]:
    """The targets' shapes: bfloat16, 32768 pairs, nothing of anybody else's beside them."""
    for n, d in ((64, 32),) if quick else ((32768, 768), (32768, 512), (32768, 1024)):
        inputs = _pair(n, d, device, torch.bfloat16)
        contenders = [
            Contender(f"gapkern, {kind}", _gradients(functools.partial(contrastive_loss, memory=kind), inputs))
            for kind in ("recompute", "keep")
        ]

        def check(results, inputs=inputs):
            for result in results.values():
                _check_large(result, inputs)

        yield Case({"N": n, "D": d, "dtype": "bfloat16", "operations": 8 * n * n * d}, contenders, check)


def _of_memeff(x, y, scale):
    # Its temperature is a number of its own, the gradient by it not among its results.
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)
    return loss(x, y)


def _of_siglip_kernel(x, y, scale, bias):
    return importlib.import_module("siglip_kernel").fused_siglip_loss(x, y, scale.log(), bias)


def rivals(device: str, quick: bool) -> Iterator[Case]:
    """The published fused losses, from their wheels where they import."""
    n, d = (64, 32) if quick else (65536, 768)
    inputs = _pair(n, d, device, torch.bfloat16)
    contenders = [
        Contender("memeff", _gradients(_of_memeff, inputs), "baseline"),
        Contender("gapkern, recompute", _gradients(functools.partial(contrastive_loss, memory="recompute"), inputs)),
    ]

    def check_each(results, check, inputs):
        wrong = {}
        for name, result in results.items():
            try:
                check(result, inputs)
            except AssertionError as error:
                if name.startswith("gapkern"):
                    raise
                wrong[name] = harness.reason(error)
        return wrong

    about = {"operation": "softmax", "N": n, "D": d, "dtype": "bfloat16"}
    yield Case(
        {**about, "operations": 8 * n * n * d},
        contenders,
        lambda results: check_each(results, _check_large, inputs),
        "memeff",
    )
    pairs = [*inputs[:2], *(torch.tensor(v, device=device) for v in (10.0, -10.0))]
    contenders = [
        Contender("siglip-kernel", _gradients(_of_siglip_kernel, pairs), "baseline"),
        Contender("gapkern", _gradients(sigmoid_loss, pairs)),
    ]
    about["operation"] = "sigmoid"
    yield Case(
        {**about, "operations": 6 * n * n * d},
        contenders,
        lambda results: check_each(results, _check_large_sigmoid, pairs),
        "siglip-kernel",
    )


def contrastive(device: str, quick: bool, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Iterator[Case]:
    """Against PyTorch, compiled once, and open_clip."""
    shapes = ((64, 32),) if quick else ((32768, 768), (4096, 768), (16384, 768), (32768, 512), (32768, 1024))
    for number, (n, d) in enumerate(shapes):
        for dtype in dtypes:
            inputs = _pair(n, d, device, dtype)
            others = list(_others(compiled=number == 0 and dtype == torch.bfloat16 and not quick))
            contenders = [Contender(name, _gradients(f, inputs), "baseline") for name, f in others]
            for memory in ("recompute", "keep"):
                loss = functools.partial(contrastive_loss, memory=memory)
                contenders.append(Contender(f"gapkern, {memory}", _gradients(loss, inputs)))

            def check(results, dtype=dtype):
                return _against_eager(results, 3e-2 if dtype == torch.bfloat16 else 1e-4)

            about = {"N": n, "D": d, "dtype": str(dtype)[6:], "operations": 8 * n * n * d}
            yield Case(about, contenders, check, EAGER)


def float32(device: str, quick: bool) -> Iterator[Case]:
    yield from contrastive(device, quick, (torch.float32,))


def largest(device: str, quick: bool) -> Iterator[Case]:
    """A batch whose logits no device could hold; checked for being finite only."""
    n, d = (128, 32) if quick else (262_144, 512)
    inputs = _pair(n, d, device, torch.bfloat16)
    loss = functools.partial(contrastive_loss, memory="recompute")
    about = {"N": n, "D": d, "dtype": "bfloat16", "operations": 8 * n * n * d}

    def finite(results):
        assert all(t.isfinite().all() and t.abs().sum() > 0 for t in results["gapkern, recompute"])

    yield Case(about, [Contender("gapkern, recompute", _gradients(loss, inputs))], finite)


def memory(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Peak bytes above what was there before the call: gradients and whatever the loss works with."""
    if device == "cpu":
        return
    for n in (4096,) if quick else (4096, 16384, 32768):
        inputs = _pair(n, 768, device, torch.bfloat16)
        row: dict[str, Any] = {"N": n, "D": 768, "dtype": "bfloat16"}
        contenders = [(EAGER, _eager)]
        for kind in ("recompute", "keep"):
            contenders.append((f"gapkern, {kind}", lambda x, y, s, kind=kind: contrastive_loss(x, y, s, memory=kind)))
        for name, loss in contenders:
            try:
                row[name] = _peak(_gradients(loss, inputs))
            except RuntimeError as error:
                row[name] = f"failed: {harness.reason(error)}"
                torch.cuda.empty_cache()
        yield row


def _peak(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _eager_sigmoid(x, y, scale, bias):
    logits = (scale * (x @ y.T) + bias).float()
    signs = 2 * torch.eye(len(x), device=x.device) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / len(x)


def _sigmoid_of_open_clip(*inputs):
    return importlib.import_module("open_clip.loss").SigLipLoss()(*inputs)


def sigmoid(device: str, quick: bool) -> Iterator[Case]:
    """The sigmoid loss and its gradients."""
    for n, d in ((64, 32),) if quick else ((16384, 768), (32768, 768)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [*_pair(n, d, device, dtype)[:2], *(torch.tensor(v, device=device) for v in (10.0, -8.0))]
            contenders = [
                Contender(EAGER, _gradients(_eager_sigmoid, inputs), "baseline"),
                Contender("open_clip", _gradients(_sigmoid_of_open_clip, inputs), "baseline"),
                Contender("gapkern", _gradients(sigmoid_loss, inputs)),
            ]
            close = 3e-2 if dtype == torch.bfloat16 else 1e-4
            about = {"N": n, "D": d, "dtype": str(dtype)[6:], "operations": 6 * n * n * d}
            yield Case(about, contenders, lambda results, close=close: _against_eager(results, close), EAGER)


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
                    _near({"gapkern": [a], "PyTorch": [b]}, "gapkern", "PyTorch", close)

            about = {"operation": name, "N": n, "D": d, "dtype": str(dtype)[6:]}
            both = [Contender("PyTorch", plain, "baseline"), Contender("gapkern", ours)]
            yield Case(about, both, check, "PyTorch", traffic)

        mean = x.mean(0, dtype=torch.float64)
        gram = [
            Contender("PyTorch", lambda x=x, m=mean: _gram(x, m), "baseline"),
            Contender("gapkern", lambda x=x, m=mean: ops.meanshift_gram(x, m)),
        ]

        def same(results):
            _near({name: [value] for name, value in results.items()}, "gapkern", "PyTorch", 1e-10)

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


def operators(device: str) -> dict[str, Callable[[], Any]]:
    """Every CUDA operator once on small odd shapes, for the sanitizer; `smoke` compares them with the CPU's."""
    ops = torch.ops.gapkern
    x, y = (rows(77, 36, device="cpu", seed=s).to(device) for s in (3, 4))
    t, scale, bias = (x @ y.T).contiguous(), torch.tensor(10.0, device=device), torch.tensor(-3.0, device=device)
    none = x.new_empty(0)
    row, col = ((10 * t).double().logsumexp(i) / 0.6931471805599453 for i in (1, 0))
    grad = torch.linspace(0.1, 1, 77, device=device, dtype=torch.float64)
    shift = torch.linspace(-1, 1, 36, device=device, dtype=torch.float64)
    squared = (torch.cdist(x.cpu().double(), y.cpu().double()) ** 2).to(device)
    targets = torch.arange(77, device=device).reshape(77, 1)
    found = {
        "contrastive_chunk_lse": lambda: [
            v.double().logsumexp(0) if v.dim() > 1 else v for v in ops.contrastive_chunk_lse(t, none, none, scale, 0)
        ],
        "contrastive_chunk_gradient": lambda: ops.contrastive_chunk_gradient(
            t, none, none, scale, row, col, grad, grad, -grad, 0, x
        )[0],
        "contrastive_chunk_sigmoid": lambda: ops.contrastive_chunk_sigmoid(t, scale, bias, 0, x)[1],
        "meanshift_sum": lambda: ops.meanshift_sum(x),
        "meanshift_apply": lambda: ops.meanshift_apply(x, shift, True),
        "perturb_bits": lambda: ops.perturb_bits(x, 1, 2, 3),
        "perturb_noise": lambda: ops.perturb_noise(x, "gaussian", 0.1, 1, 2, 3),
        "perturb_noisy_gallery": lambda: ops.perturb_noisy_gallery(x, shift, "gaussian", 0.1, 1, 2, 3, True, "after"),
        "perturb_quantize": lambda: ops.perturb_quantize(x, x.amin(0), x.amax(0), 32),
        "robustness_exact": lambda: ops.robustness_exact(squared, targets, 0.01, 36),
        "robustness_exact_inner": lambda: ops.robustness_exact_inner(squared, targets, squared[:, 0].double()),
        "robustness_nearest": lambda: ops.robustness_nearest(x, y, y.mean(0))[:3],
        "meanshift_gram": lambda: ops.meanshift_gram(x, shift),
    }
    on_hopper = not dispatch.unsupported_reason(torch.device(device), torch.bfloat16, 8)
    return {**found, **_steps_on_hopper(device)} if device == "cpu" or on_hopper else found


def _steps_on_hopper(device: str) -> dict[str, Callable[[], Any]]:
    ops = torch.ops.gapkern
    x, y = (rows(77, 40, device="cpu", seed=s).to(device, torch.bfloat16) for s in (3, 4))
    one = torch.ones(77, device=device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-3.0, device=device)
    control = torch.tensor([10 / 0.6931471805599453, 0.0], device=device)
    none = x.new_empty(0, 80)
    lse = torch.full((77,), 12.0, device=device, dtype=torch.float64)
    grad = torch.linspace(0.1, 1, 77, device=device, dtype=torch.float64)
    common = torch.zeros(1, device=device)
    weights = list(ops.contrastive_sm90_weights(lse, lse, grad, grad, control)[:2])
    return {
        "contrastive_sm90_shift": lambda: ops.contrastive_sm90_shift(one, one, scale),
        "contrastive_sm90_sums": lambda: ops.contrastive_sm90_sums(x, y, control, none, 0),
        "contrastive_sm90_lse": lambda: ops.contrastive_sm90_lse(torch.exp2(lse), torch.exp2(lse), x, y, control, 0),
        "contrastive_sm90_positive": lambda: ops.contrastive_sm90_positive(x, y, 0),
        "contrastive_sm90_weights": lambda: ops.contrastive_sm90_weights(lse, lse, grad, grad, control),
        "contrastive_sm90_gradient": lambda: ops.contrastive_sm90_gradient(
            x, y, control, common, *weights, none, grad, 0
        )[:, :77],
        "contrastive_sm90_sigmoid": lambda: [v[:, :77] for v in ops.contrastive_sm90_sigmoid(x, y, scale, bias, 0)],
    }


def smoke(device: str) -> None:
    ours, expected = operators(device), operators("cpu")
    for name in ours:
        a, b = (v if isinstance(v, (list, tuple)) else [v] for v in (ours[name](), expected[name]()))
        for left, right in zip(a, b, strict=True):
            found = compare(left, right)
            close = 5e-3 if left.dtype == torch.bfloat16 else 1e-4
            assert found.relative_l2 < close, f"{name}: {found}"
            assert not found.mismatched, f"{name}: {found}"
        print(f"passed {name}", flush=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        results = []
        for place in (device, "cpu"):
            x, y = (rows(77, 40, device="cpu", seed=s).to(place, dtype).requires_grad_() for s in (3, 4))
            loss = contrastive_loss(x, y, 10.0)
            results.append([loss.detach(), *torch.autograd.grad(loss, (x, y))])
        _near({"a": results[0], "b": results[1]}, "a", "b", 2e-2 if dtype.itemsize == 2 else 1e-4)
        print(f"passed contrastive_loss {dtype}", flush=True)
        results = []
        for place in (device, "cpu"):
            x, y = (rows(77, 40, device="cpu", seed=s).to(place, dtype).requires_grad_() for s in (3, 4))
            loss = sigmoid_loss(x, y, 10.0, -3.0)
            results.append([loss.detach(), *torch.autograd.grad(loss, (x, y))])
        _near({"a": results[0], "b": results[1]}, "a", "b", 2e-2 if dtype.itemsize == 2 else 1e-4)
        print(f"passed sigmoid_loss {dtype}", flush=True)


SECTIONS: dict[str, Callable[[str, bool], Iterator[Any]]] = {
    "ours": ours,
    "ceilings": ceilings,
    "rivals": rivals,
    "contrastive": contrastive,
    "sigmoid": sigmoid,
    "float32": float32,
    "largest": largest,
    "rowwise": rowwise,
    "search": search,
    "memory": memory,
}


def run(section: str, device: str, quick: bool, seconds: float, out: Path | None) -> list[dict[str, Any]]:
    """Times a section's cases; what fails is recorded beside the rest. Written after every case to `out`."""
    done: list[dict[str, Any]] = []
    begin = time.monotonic()
    cases = SECTIONS[section](device, quick)
    while True:
        about: dict[str, Any] = {}
        try:
            case = next(cases)
            result, about = (case, {}) if isinstance(case, dict) else ({}, case.parameters)
            if not isinstance(case, dict):
                result = harness.time_case(case, seconds=0.05 if quick else 1.0, most=20, device=device, guarded=True)
                harness.print_case(result)
        except StopIteration:
            break
        except Exception as error:  # whatever is wrong with a case is a result too
            result = {**about, "error": harness.reason(error)}
            print(result, flush=True)
            if device != "cpu":
                torch.cuda.empty_cache()
        case = None  # its inputs make room for the next one's
        done.append(result)
        if out is not None:
            files.write_json(out / f"section-{section}.json", done)
        if time.monotonic() - begin > seconds:
            print(f"{section}: its {seconds:.0f} s are over", flush=True)
            break
    return done


def _ours_failed(case: dict[str, Any]) -> bool:
    return any(r["role"] == "ours" and "failed" in r for r in case.get("results", {}).values())


def _floor(case: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Seconds the case takes at least: 8NMD or bytes, at the measured rate."""
    if case.get("traffic"):
        return case["traffic"] / rates["copy"] if "copy" in rates else None
    dtype = case.get("dtype")
    return case["operations"] / rates[dtype] if case.get("operations") and dtype in rates else None


def collect(out: Path) -> dict[str, Any]:
    """One result of every section's file in `out`, with each contender's time over its floor."""
    found = {p.stem.partition("-")[2]: json.loads(p.read_text()) for p in sorted(out.glob("section-*.json"))}
    rates = {}
    for case in found.get("ceilings", []):
        for r in (r for r in case.get("results", {}).values() if "median" in r):
            rates[case["ceiling"]] = (case["traffic"] or case["operations"]) / r["median"]
    for cases in found.values():
        for case in cases:
            floor = _floor(case, rates)
            timed = [(name, r) for name, r in case.get("results", {}).items() if "median" in r]
            for name, r in timed if floor else ():
                # Kept exponentials save one product of four.
                part = 0.75 if name == "gapkern, keep" else 1.0
                r["floor"], r["over_floor"] = part * floor, r["median"] / (part * floor)
    stages = out / "stages.txt"
    return {
        "benchmark": "gpu",
        "commit": harness.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "version": gapkern.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "rates": rates,
        "stages": [line.split("\t") for line in stages.read_text().splitlines()] if stages.exists() else [],
        "sections": found,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    for stage in result["stages"]:
        yield "stage  " + "  ".join(stage)
    for rate, value in result["rates"].items():
        yield f"limit  {rate:<10} {value / 1e12:8.2f} " + ("TB/s" if rate == "copy" else "TFLOP/s")
    for section, cases in result["sections"].items():
        for case in cases:
            about = " ".join(str(case[k]) for k in ("operation", "N", "Q", "D", "dtype") if k in case)
            if "error" in case:
                yield f"{section} {about}: {case['error'][:90]}"
            base = case.get("results", {}).get(case.get("baseline"), {}).get("median")
            for name, r in case.get("results", {}).items():
                if "failed" in r:
                    yield f"{section} {about:<36} {name:<20} failed: {r['failed'][:90]}"
                elif r["role"] == "ours":
                    faster = f"{base / r['median']:7.2f}x" if base else ""
                    over = f"{r['over_floor']:6.2f} of floor" if "over_floor" in r else ""
                    yield f"{section} {about:<36} {name:<20} {1e3 * r['median']:10.3f} ms {faster} {over}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "smoke", "collect"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--also", type=Path, help="collect: write gpu.json into this folder too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; bench/results is left as it is")
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"argument --device: expected cpu or cuda, got {arguments.device!r}")
    if arguments.section == "collect" and arguments.out is None:
        parser.error("argument --out: needed by collect")
    if arguments.section == "smoke":
        smoke(arguments.device)
    elif arguments.section == "collect":
        result = collect(arguments.out)
        for folder in filter(None, (None if arguments.quick else harness.RESULTS, arguments.also)):
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / "gpu.json", result)
        print("\n".join(table(result)))
    else:
        done = run(arguments.section, arguments.device, arguments.quick, arguments.seconds, arguments.out)
        return 1 if any("error" in case or _ours_failed(case) for case in done) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

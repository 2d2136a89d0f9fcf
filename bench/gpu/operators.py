"""Every CUDA operator once, for the sanitizer and against the CPU's."""

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.checks import near, rows
from gapkern import contrastive_loss, sigmoid_loss
from gapkern.ops.contrastive import dispatch
from gapkern.testing import compare


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
    ids, limit = torch.arange(77, device=device) % 5, torch.full((77,), 0.3, device=device)
    classes = (ids, ids, limit, limit, t, limit, limit, 0, True)
    found = {
        "contrastive_chunk_lse": lambda: [
            v.double().logsumexp(0) if v.dim() > 1 else v for v in ops.contrastive_chunk_lse(t, none, none, scale, 0)
        ],
        "contrastive_chunk_gradient": lambda: ops.contrastive_chunk_gradient(
            t, none, none, scale, row, col, grad, grad, -grad, 0, x
        )[0],
        "contrastive_chunk_sigmoid": lambda: ops.contrastive_chunk_sigmoid(t, scale, bias, 0, x)[1],
        "contrastive_masked_chunk_lse": lambda: ops.contrastive_masked_chunk_lse(t, none, none, scale, *classes),
        "contrastive_masked_chunk_gradient": lambda: ops.contrastive_masked_chunk_gradient(
            t, none, none, scale, *classes, *(v.expand(2, 77) for v in (row, col, grad, grad)), -grad, x
        )[0],
        "contrastive_masked_chunk_sigmoid": lambda: ops.contrastive_masked_chunk_sigmoid(
            t, scale, bias, ids, ids, grad, grad, True, x
        )[1],
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
        **_classes_on_hopper(x, y, scale, bias),
    }


def _classes_on_hopper(x: torch.Tensor, y: torch.Tensor, scale: Any, bias: Any) -> dict[str, Callable[[], Any]]:
    ops, device = torch.ops.gapkern, x.device
    ids = torch.cat([torch.arange(77) % 7, torch.full((179,), -2)]).int()  # of columns to the end of a tile
    values = torch.linspace(0.1, 0.5, 256)

    def records(count: int, *columns: torch.Tensor) -> torch.Tensor:
        bits = [ids, *(v.view(torch.int32) for v in columns)]
        return torch.stack(bits, 1)[:count].contiguous().view(torch.float32).to(device)

    marks = records(77, values), records(256, values)
    even = (values.view(torch.int32) & ~1).view(torch.float32)
    weighted = records(77, values, even, even), records(256, values, even, even)
    control, always = torch.tensor([14.0, 0.0, -30.0], device=device), x.new_empty(0, dtype=torch.float32)
    sums = torch.rand(2, 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    grad = torch.linspace(0.1, 1, 77, device=device, dtype=torch.float64)

    def completed(step: Callable[[torch.Tensor, torch.Tensor], Any]) -> list[torch.Tensor]:
        pending = torch.full((2, 77), torch.inf, device=device, dtype=torch.float64)
        lse = pending, pending.clone()
        step(*lse)
        return list(lse)

    return {
        "contrastive_sm90_masked_sums": lambda: ops.contrastive_sm90_masked_sums(
            x, y, control, always, *marks, 0, True
        ),
        "contrastive_sm90_masked_merge": lambda: completed(
            lambda row, col: ops.contrastive_sm90_masked_merge(sums, sums, control, row, col)
        ),
        "contrastive_sm90_masked_repair": lambda: completed(
            lambda row, col: ops.contrastive_sm90_masked_repair(x, y, control, *marks, 0, row, col)
        ),
        "contrastive_sm90_masked_gradient": lambda: ops.contrastive_sm90_masked_gradient(
            x, y, control, *weighted, grad, 0
        )[:, :77],
        "contrastive_sm90_masked_sigmoid": lambda: [
            v[:, :77] for v in ops.contrastive_sm90_masked_sigmoid(x, y, scale, bias, *marks, True)
        ],
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
        near({"a": results[0], "b": results[1]}, "a", "b", 2e-2 if dtype.itemsize == 2 else 1e-4)
        print(f"passed contrastive_loss {dtype}", flush=True)
        results = []
        for place in (device, "cpu"):
            x, y = (rows(77, 40, device="cpu", seed=s).to(place, dtype).requires_grad_() for s in (3, 4))
            loss = sigmoid_loss(x, y, 10.0, -3.0)
            results.append([loss.detach(), *torch.autograd.grad(loss, (x, y))])
        near({"a": results[0], "b": results[1]}, "a", "b", 2e-2 if dtype.itemsize == 2 else 1e-4)
        print(f"passed sigmoid_loss {dtype}", flush=True)

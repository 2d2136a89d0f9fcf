"""Inputs of the GPU run's losses, their gradients as one call, and what a result must be near to."""

from collections.abc import Callable
from typing import Any

import torch

from bench import harness
from gapkern.testing import compare

SCALE = 50.0
EAGER = "eager, one logit matrix"
COMPARED = 4096  # rows of a result, so that a check costs little beside the timing


def rows(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random rows of unit length, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device=device)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def near(results: dict[str, Any], name: str, expected: str, tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(results[name], results[expected], strict=True)):
        found = compare(*(v[:COMPARED] if v.dim() > 1 else v for v in (a, b)))
        assert not found.mismatched, f"{name}, result {i}: {found}"
        assert found.relative_l2 < tolerance, f"{name}, result {i}: {found}"


def gradients(loss: Callable, inputs: list[torch.Tensor]) -> Callable[[], tuple]:
    def once():
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, [t for t in inputs if t.requires_grad])

    return once


def pair(n: int, d: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    x, y = (rows(n, d, device=device, seed=s) for s in (0, 1))
    y = torch.nn.functional.normalize(y + 0.15 * x, dim=1)
    return [*(t.to(dtype).requires_grad_() for t in (x, y)), torch.tensor(SCALE, device=device)]


def against_eager(results: dict[str, Any], tolerance: float) -> dict[str, str]:
    """What is wrong of the others; raises where a result of ours is."""
    wrong = {}
    for name in results:
        try:
            near(results, name, EAGER, tolerance)
        except AssertionError as error:
            if name.startswith("gapkern"):
                raise
            wrong[name] = harness.reason(error)
    return wrong


def _lse_of_chunks(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exps of the rows and columns of scale x y^T in float32, 2048 rows of logits at a time."""
    row, col = [], torch.full((len(y),), -torch.inf, device=y.device)
    for part in x.split(2048):
        logits = scale * (part @ y.T)
        row.append(logits.logsumexp(1))
        col = torch.logaddexp(col, logits.logsumexp(0))
    return torch.cat(row), col


def check_large(result: tuple, inputs: list[torch.Tensor]) -> None:
    """The contrastive loss, and 64 rows of either gradient, of batches whose logits need not fit into memory."""
    loss, dx, dy = result
    x, y, scale = (t.detach().float() for t in inputs[:3])
    lse, n, few = _lse_of_chunks(x, y, scale), len(x), min(64, len(x))
    expected = ((lse[0] + lse[1]) / 2 - scale * torch.linalg.vecdot(x, y)).mean()
    near({"ours": [loss], "exact": [expected]}, "ours", "exact", 1e-4)
    for found, (a, b), (of_a, of_b) in ((dx, (x, y), lse), (dy, (y, x), lse[::-1])):
        logits = scale * (a[:few] @ b.T)
        softmax = (logits - of_a[:few, None]).exp() + (logits - of_b).exp()
        gradient = scale / (2 * n) * (softmax @ b - 2 * b[:few])
        near({"ours": [found[:few]], "exact": [gradient]}, "ours", "exact", 3e-2)


def check_large_sigmoid(result: tuple, inputs: list[torch.Tensor]) -> None:
    loss, dx, dy = result
    x, y, scale, bias = (t.detach().float() for t in inputs)
    n, few, expected = len(x), min(64, len(x)), x.new_zeros(())
    for start in range(0, n, 2048):
        logits = scale * (x[start : start + 2048] @ y.T) + bias
        expected += torch.nn.functional.softplus(logits).sum() - logits.diagonal(start).sum()
    near({"ours": [loss], "exact": [expected / n]}, "ours", "exact", 1e-4)
    for found, a, b in ((dx, x, y), (dy, y, x)):
        weights = torch.sigmoid(scale * (a[:few] @ b.T) + bias)
        weights.diagonal()[:] -= 1
        near({"ours": [found[:few]], "exact": [scale / n * (weights @ b)]}, "ours", "exact", 3e-2)


def each(results: dict[str, Any], check: Callable[[Any, list[torch.Tensor]], None], inputs: list[torch.Tensor]):
    """What is wrong of the others by a check of one result; raises where a result of ours is."""
    wrong = {}
    for name, result in results.items():
        try:
            check(result, inputs)
        except AssertionError as error:
            if name.startswith("gapkern"):
                raise
            wrong[name] = harness.reason(error)
    return wrong

"""Comparisons for numerical tests: what differs, by how much, and where.

A bare `allclose` says yes or no. These say relative L2 error, cosine, bias and the worst element, and compare
our error with the error that plain PyTorch makes in the same dtype against a float64 truth.
"""

import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Comparison:
    """How `actual` differs from `expected`, all in float64.

    Attributes:
        relative_l2: ||actual - expected|| / ||expected||; the absolute norm where `expected` is all zero.
        cosine: cosine of the angle between the two, flattened; 1 where both are zero.
        bias: mean of (actual - expected) over mean of |expected|; noise averages out.
        max_abs: the largest absolute difference.
        worst_index: where it is.
        worst_actual, worst_expected: the two values there.
        mismatched: elements that are NaN or infinite in one, and not the same in the other.
    """

    relative_l2: float
    cosine: float
    bias: float
    max_abs: float
    worst_index: tuple[int, ...]
    worst_actual: float
    worst_expected: float
    mismatched: int

    def __str__(self) -> str:
        text = (
            f"relative L2 {self.relative_l2:.3e}, cosine {self.cosine:.9f}, bias {self.bias:+.3e}, "
            f"max |difference| {self.max_abs:.3e} at {self.worst_index} "
            f"(got {self.worst_actual:.9g}, expected {self.worst_expected:.9g})"
        )
        if self.mismatched:
            text += f", {self.mismatched} NaN or infinite where the other is not"
        return text


def _float64(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def compare(actual: Any, expected: Any) -> Comparison:
    """Compares two tensors, arrays or numbers of one shape.

    NaNs and infinities count as equal where both sides have the same one; they are left out of the norms.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> print(compare(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])))
        relative L2 2.236e-01, cosine 0.99..., bias +1.667e-01, max |difference| 5.000e-01 at (1,) ...
    """
    a, b = _float64(actual), _float64(expected)
    if a.shape != b.shape:
        raise ValueError(f"actual: expected shape {b.shape} as in expected, got {a.shape}")
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    usable = np.isfinite(a) & np.isfinite(b)
    mismatched = int(np.count_nonzero(~usable & ~same))
    x, y = np.where(usable, a, 0.0), np.where(usable, b, 0.0)
    difference = x - y
    if a.size == 0:
        return Comparison(0.0, 1.0, 0.0, 0.0, (), 0.0, 0.0, 0)

    norm_x, norm_y = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    distance = float(np.linalg.norm(difference))
    if norm_x and norm_y:
        cosine = float((x / norm_x * (y / norm_y)).sum())
    else:
        cosine = 1.0 if norm_x == norm_y else 0.0
    scale = float(np.abs(y).mean())
    badness = np.where(usable, np.abs(difference), np.where(same, 0.0, np.inf))
    worst = np.unravel_index(int(badness.argmax()), badness.shape)
    return Comparison(
        relative_l2=distance / norm_y if norm_y else distance,
        cosine=cosine,
        bias=float(difference.mean()) / scale if scale else float(difference.mean()),
        max_abs=float(np.abs(difference).max()),
        worst_index=tuple(int(i) for i in worst),
        worst_actual=float(a[worst]),
        worst_expected=float(b[worst]),
        mismatched=mismatched,
    )


def assert_near(actual: Any, expected: Any, relative_l2: float, *, name: str = "result") -> Comparison:
    """Asserts a relative L2 error of at most `relative_l2`, and the same NaNs and infinities.

    Raises:
        AssertionError: with the whole comparison in its message.

    Example:
        >>> comparison = assert_near(torch.tensor([1.0, 2.000001]), [1.0, 2.0], 1e-6)
    """
    comparison = compare(actual, expected)
    if comparison.mismatched or not comparison.relative_l2 <= relative_l2:
        raise AssertionError(f"{name}: relative L2 error above {relative_l2:.3e}: {comparison}")
    return comparison


def assert_three_way(
    ours: Any, torch_result: Any, truth: Any, margin: float, *, name: str = "result"
) -> tuple[Comparison, Comparison]:
    """Asserts that our error against the truth is at most PyTorch's own error plus a margin.

    Args:
        ours: our result, in any dtype.
        torch_result: plain PyTorch's result for the same inputs in the same dtype.
        truth: the result for the same (already rounded) inputs in float64.
        margin: what our relative L2 error may exceed PyTorch's by.
        name: what is compared, for the message.

    Raises:
        AssertionError: our error is larger, or a NaN or infinity stands where the truth has none.

    Example:
        >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> ours, theirs = assert_three_way([1.0, 2.0002], [1.0, 2.0001], truth, margin=1e-4)
    """
    our_error, torch_error = compare(ours, truth), compare(torch_result, truth)
    # Where PyTorch itself breaks down its error says nothing, so only the margin is left.
    allowed = margin + (0.0 if torch_error.mismatched else torch_error.relative_l2)
    if our_error.mismatched or not our_error.relative_l2 <= allowed:
        raise AssertionError(
            f"{name}: error above PyTorch's own + {margin:.3e}\n  ours:    {our_error}\n  PyTorch: {torch_error}"
        )
    return our_error, torch_error


_PEAK = """
{setup}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from what is resident now
def _memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
_before = _memory("VmRSS")
{code}
print((_memory("VmHWM") - _before) / 1024)
"""


def peak_memory_program(code: str, *, setup: str) -> str:
    """The Python program of `peak_memory`, whose last line is the answer, to run in a process of one's own choice."""
    return _PEAK.format(setup=setup, code=code)


def peak_memory(code: str, *, setup: str) -> float:
    """MiB by which `code` raises a fresh Python process's peak memory above what it held after `setup`. Linux only.

    `setup` should already have done a small piece of the same work, so that libraries and threads are there.

    Example:
        >>> peak_memory("x = bytearray(50 * 2**20)", setup="") > 45
        True
    """
    done = subprocess.run(
        [sys.executable, "-c", peak_memory_program(code, setup=setup)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split("\n")[-2])


def clip_like(count: int, dims: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of unit vectors, images and texts (count, dims), with the first and second moments of CLIP ViT-B/16's.

    Mean cosines as on COCO: 0.53 within images, 0.515 within texts, 0.16 between unpaired, 0.31 between paired. Each
    side is a fixed direction plus noise orthogonal to both; the two noises of a pair share a part.

    Example:
        >>> images, texts = clip_like(500, 256)
        >>> float((images * texts).sum(1).mean()), float((images.mean(0) - texts.mean(0)).norm())
        (0.31..., 0.85...)
    """
    generator = torch.Generator().manual_seed(seed)
    within_texts, within_images, between, paired = 0.515, 0.53, 0.16, 0.31

    def unit(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    axis = unit(torch.randn(dims, generator=generator))
    other = torch.randn(dims, generator=generator)
    other = unit(other - (other @ axis) * axis)

    def noise() -> torch.Tensor:
        e = torch.randn(count, dims, generator=generator)
        return unit(e - (e @ axis)[:, None] * axis - (e @ other)[:, None] * other)

    angle = between / (within_texts * within_images) ** 0.5
    shared = (paired - between) / ((1 - within_texts) * (1 - within_images)) ** 0.5
    of_texts, of_images = noise(), noise()
    texts = within_texts**0.5 * axis + (1 - within_texts) ** 0.5 * of_texts
    of_images = shared * of_texts + (1 - shared**2) ** 0.5 * of_images
    direction = angle * axis + (1 - angle**2) ** 0.5 * other
    images = within_images**0.5 * direction + (1 - within_images) ** 0.5 * of_images
    return unit(images), unit(texts)


def hears_interrupts() -> None:
    """For `subprocess`'s preexec_fn: what is started from a shell's background job ignores SIGINT otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

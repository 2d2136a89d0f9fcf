"""Gradient descent on the contrastive loss with the embeddings themselves as parameters (the paper's Section 3)."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check
from gapkern._ambient import isolated, isolation
from gapkern._rows import unit
from gapkern._threads import one_thread
from gapkern.dynamics.measures import Evaluation, evaluate_unchecked, measure, pairs
from gapkern.dynamics.trajectory import COLUMNS, Snapshot, Trajectory

__all__ = ["OPTIMIZERS", "descend", "isotropic_gaussians", "tight_clusters"]

OPTIMIZERS = ("gd", "sgd", "adam")
SMALL = 2**22  # N x N x D below which one thread is as fast as many


@isolated
def tight_clusters(
    n: int, dims: int, radius: float, gap: float, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Two Gaussian clusters, `gap` apart: the start of Theorem 3.1.

    Args:
        n: pairs; row i of one belongs to row i of the other, though both are drawn independently.
        dims: D.
        radius: root mean square distance of a row from its cluster's mean.
        gap: distance of the two means, along the first coordinate; the means are exact.
        seed: of the draws.
        dtype: float64 or float32.

    Returns:
        images and texts, (n, dims) each.

    Example:
        >>> x, y = tight_clusters(5, 3, radius=1e-3, gap=2.0)
        >>> [round(v, 9) for v in (y.mean(0) - x.mean(0)).tolist()]
        [2.0, 0.0, 0.0]
    """
    x, y = isotropic_gaussians(n, dims, gap, radius / math.sqrt(_check.integer("dims", dims, low=1)), seed=seed)
    x, y = x - x.mean(0), y - y.mean(0)
    y[:, 0] += gap
    return x.to(dtype), y.to(dtype)


@isolated
def isotropic_gaussians(
    n: int, dims: int, gap: float, deviation: float = 1.0, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """images ~ N(0, deviation^2 I) and texts ~ N(gap e_1, deviation^2 I), (n, dims) each: the paper's toy model.

    Example:
        >>> x, y = isotropic_gaussians(1000, 2, gap=4.0)
        >>> round(float((y - x).mean(0)[0]))
        4
    """
    n, dims = _check.integer("n", n, low=1), _check.integer("dims", dims, low=1)
    gap, deviation = _check.number("gap", gap, low=0), _check.number("deviation", deviation, low=0)
    generator = torch.Generator().manual_seed(_check.integer("seed", seed, low=0, high=2**63 - 1))
    x, y = (deviation * torch.randn(n, dims, generator=generator, dtype=torch.float64) for _ in range(2))
    y[:, 0] += gap
    return x.to(dtype), y.to(dtype)


def descend(
    images: Tensor | np.ndarray,
    texts: Tensor | np.ndarray,
    logit_scale: float,
    *,
    lr: float,
    steps: int,
    similarity: str = "sqeuclidean",
    sphere: bool = False,
    optimizer: str = "gd",
    batch: int | None = None,
    learn_scale: bool = False,
    record_every: int | None = None,
    snapshots: Iterable[int] = (),
    seed: int = 0,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Trajectory:
    """Moves N pairs down the contrastive loss and records what becomes of the gap.

    No N x N matrix is formed: memory grows as N D, time as N^2 D for a step over all pairs or a recorded one.

    Args:
        images: (N, D) float32 or float64, the start; row i is paired with row i of `texts`.
        texts: (N, D), the same dtype.
        logit_scale: s = 1 / tau, above 0.
        lr: step size, of the gradient of `contrastive_loss`, the mean over pairs and directions. Between tight clusters
            steps above N / (s^2 ||g||^2) overshoot along the gap g (Theorem 3.1).
        steps: number of steps.
        similarity: "sqeuclidean", or "dot".
        sphere: keep all rows on the unit sphere: the tangential part of each gradient, then rows scaled to length 1.
        optimizer: "gd", the whole gradient; "sgd", plain steps on batches; "adam", on all pairs or on batches.
        batch: pairs in a step of "sgd" (by default 256) or "adam" (all); each pass over the pairs is shuffled anew.
        learn_scale: let log(s) descend too, as CLIP does.
        record_every: steps between records; by default about 100 records. The last step is always recorded.
        snapshots: steps, out of 0 ... steps, at which embeddings and softmax sums are kept (and a row is recorded).
        seed: of the batches.
        on_record: called with each row as it is recorded.

    Raises:
        TypeError, ValueError: arguments of a wrong type or out of range.
        RuntimeError: the loss became infinite or NaN.

    Example:
        >>> x, y = tight_clusters(6, 8, radius=1e-2, gap=2.0)
        >>> path = descend(x, y, logit_scale=2.0, lr=0.5, steps=400)
        >>> first, last = path.rows[0], path.rows[-1]
        >>> last["loss"] < first["loss"], last["gap_norm"] > 1
        (True, True)
    """
    lr = _check.number("lr", lr, low=0, exclusive=True)
    steps = _check.integer("steps", steps, low=0)
    _check.choice("optimizer", optimizer, OPTIMIZERS)
    _check.choice("similarity", similarity, ("dot", "sqeuclidean"))
    every = max(1, steps // 100) if record_every is None else _check.integer("record_every", record_every, low=1)
    wanted = {_check.integer("snapshots", step, low=0, high=steps) for step in snapshots}
    seed = _check.integer("seed", seed, low=0, high=2**63 - 1)
    logit_scale = _check.number("logit_scale", logit_scale, low=0, exclusive=True)
    with isolation():
        images, texts = (x.clone() for x in pairs(images, texts))
        size = _batch(optimizer, batch, len(images))
        if sphere:
            images, texts = (_unit(name, x) for name, x in (("images", images), ("texts", texts)))
        log_scale = torch.tensor(math.log(logit_scale), dtype=torch.float64)
        parameters = [images, texts, *([log_scale] if learn_scale else [])]
        rule = torch.optim.Adam(parameters, lr) if optimizer == "adam" else torch.optim.SGD(parameters, lr)
    descent = _Descent(images, texts, log_scale, rule, similarity, sphere)
    batches = None if size == len(images) else _batches(len(images), size, seed)
    records = descent.records(steps, every, wanted, batches)
    rows: list[dict[str, Any]] = []
    small = len(images) ** 2 * images.shape[1] < SMALL
    with one_thread() if small else nullcontext(_here) as run:
        while (row := run(next, records, None)) is not None:
            rows.append(row)
            if on_record:
                on_record(row)
    settings = {
        "pairs": len(images),
        "dims": images.shape[1],
        "logit_scale": logit_scale,
        "lr": lr,
        "steps": steps,
        "similarity": similarity,
        "sphere": bool(sphere),
        "optimizer": optimizer,
        "batch": None if size == len(images) else size,
        "learn_scale": bool(learn_scale),
        "seed": seed,
        "dtype": str(images.dtype).removeprefix("torch."),
    }
    return Trajectory(rows, images, texts, descent.scale, descent.kept, settings)


@dataclass(eq=False)
class _Descent:
    """Embeddings and log(s) (float64, 0-d) on their way down, moved in place by `rule`."""

    images: Tensor
    texts: Tensor
    log_scale: Tensor
    rule: torch.optim.Optimizer
    similarity: str
    sphere: bool
    kept: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.log_scale.exp())

    @isolated
    def records(
        self, steps: int, every: int, wanted: set[int], batches: Iterator[Tensor] | None
    ) -> Iterator[dict[str, Any]]:
        """Goes down and yields a row at every recorded step; batches of rows, or None for all of them at each step."""
        images, texts = self.images, self.texts
        for step in range(steps + 1):
            recorded = step % every == 0 or step == steps or step in wanted
            chosen = slice(None) if batches is None or recorded else next(batches)
            at = self._evaluate(chosen, step)
            if step in wanted:
                self.kept[step] = Snapshot(images.clone(), texts.clone(), at.sums_images, at.sums_texts)
            if recorded:
                gradient = math.hypot(float(at.images.norm()), float(at.texts.norm()))
                known = {"step": step, "gradient_norm": gradient, "logit_scale": self.scale}
                known |= measure(images, texts, at)
                yield {name: known[name] for name in COLUMNS}
            if step == steps:
                break
            if recorded and batches is not None:
                chosen = next(batches)
                at = self._evaluate(chosen, step)
            self._move(chosen, at)
        images.grad = texts.grad = None

    def _evaluate(self, chosen: slice | Tensor, step: int) -> Evaluation:
        images, texts = self.images[chosen], self.texts[chosen]
        at = evaluate_unchecked(images, texts, self.log_scale.exp(), self.similarity)
        if not math.isfinite(at.loss):
            raise RuntimeError(f"the loss is {at.loss} after {step} steps; a smaller lr may help")
        if self.sphere:
            of_x, of_y = (
                grad - (grad * x).sum(1, keepdim=True) * x for grad, x in ((at.images, images), (at.texts, texts))
            )
            at = replace(at, images=of_x, texts=of_y)
        return at

    def _move(self, chosen: slice | Tensor, at: Evaluation) -> None:
        images, texts, log_scale = self.images, self.texts, self.log_scale
        images.grad, texts.grad = torch.zeros_like(images), torch.zeros_like(texts)
        images.grad[chosen], texts.grad[chosen] = at.images, at.texts
        log_scale.grad = torch.tensor(at.logit_scale, dtype=torch.float64) * log_scale.exp()
        self.rule.step()
        if self.sphere:
            for x in (images, texts):
                x /= x.norm(dim=1, keepdim=True)


def _here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _batch(optimizer: str, batch: int | None, pairs: int) -> int:
    if optimizer == "gd" and batch is not None:
        raise ValueError(f"batch: expected None for optimizer='gd', which takes all pairs, got {batch}; use 'sgd'")
    if batch is None:
        return min(256, pairs) if optimizer == "sgd" else pairs
    return _check.integer("batch", batch, low=1, high=pairs)


def _batches(pairs: int, size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after another; the few that are left over at the end of a pass are dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(pairs, generator=generator)
        yield from order.split(size)[: pairs // size]


def _unit(name: str, x: Tensor) -> Tensor:
    if not bool((x != 0).any(1).all()):
        raise ValueError(f"{name}: expected rows of a length above 0 for sphere=True, got a zero row")
    return unit(x)

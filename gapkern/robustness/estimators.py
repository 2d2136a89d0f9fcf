"""How many nearest neighbours survive a perturbation of the gallery (Chowers et al., CVPR 2026, Eq. 10)."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern import _check, _progress
from gapkern._ambient import isolated
from gapkern._search import CHUNK, best, lowest
from gapkern.gap import MeanShift, Projection
from gapkern.perturb import Gaussian, Perturbation, title
from gapkern.robustness.laws import Distances, InnerProducts, Law
from gapkern.robustness.result import RobustnessResult
from gapkern.robustness.task import Setting, Task, gini

__all__ = ["METHODS", "robustness"]

METHODS = ("auto", "exact", "projected", "sample")
Tick = Callable[[float], None]


class _Tally:
    """Counts wins per query and per trial, and remembers who won instead."""

    def __init__(self, task: Task, trials: int) -> None:
        self.task = task
        device = task.queries.device
        self.wins = torch.zeros(3, len(task.queries), dtype=torch.float64, device=device)  # stays, agrees, right
        self.by_trial = torch.zeros(trials, dtype=torch.float64, device=device)
        self.lead = torch.zeros(len(task.queries), dtype=torch.int64, device=device)

    def add(self, found: Tensor, first: int, trial: int) -> None:
        """found (T, n): nearest rows in trials trial .. trial + T - 1 of queries first .. first + n - 1."""
        queries = slice(first, first + found.shape[1])
        stays = found == self.task.stays[queries]
        self.wins[0, queries] += stays.sum(0)
        self.wins[1, queries] += (found == self.task.agrees[queries]).sum(0)
        right = self.task.right(found, first)
        if right is not None:
            self.wins[2, queries] += right.sum(0)
        self.by_trial[trial : trial + found.shape[0]] += stays.sum(1)
        # Majority vote in one pass (Boyer and Moore): whoever won most of the flips ends with a lead.
        rivals, lead = self.task.rivals[queries], self.lead[queries]
        for rows, stayed in zip(found, stays, strict=True):
            same = rows == rivals
            new = ~stayed & ~same & (lead == 0)
            lead += (~stayed).long() * torch.where(same | new, 1, -1)
            rivals[new] = rows[new]

    def finish(self) -> tuple[Tensor, float]:
        trials = len(self.by_trial)
        means = self.by_trial / len(self.task.queries)
        return self.wins / trials, float(means.std() / math.sqrt(trials)) if trials > 1 else math.nan


def _exact(task: Task, law: Law, trials: int, seed: int, tick: Tick) -> tuple[Tensor, float]:
    """The winning probabilities as integrals: no sampling error."""
    result = torch.zeros(3, len(task.queries), dtype=torch.float64, device=task.queries.device)
    members = None if task.labels is None else _members(task)
    for rows, scores, slack in law.scores():
        # The scores are there already: no search of their own for the clean neighbours.
        task.stays[rows], task.rivals[rows] = lowest(scores, slack, task.queries[rows], task.gallery, law.metric)
        stays, agrees = task.stays[rows], task.agrees[rows]
        targets = torch.stack([stays, torch.where(agrees == stays, -1, agrees)], 1)
        if members is not None:
            targets = torch.cat([targets, members[rows]], 1)
        p = law.chances(rows, scores, targets)
        result[0, rows] = p[:, 0]
        result[1, rows] = torch.where(agrees == stays, p[:, 0], p[:, 1])
        if members is not None:
            # The chance of a class is the sum over its rows.
            result[2, rows] = p[:, 2:].sum(1)
        tick(len(scores))
    return result, 0.0


def _members(task: Task) -> Tensor:
    """(Q, T) gallery rows that are right for each query, -1 where there are fewer than T."""
    assert task.labels is not None
    order = torch.argsort(task.classes, stable=True)
    ordered = task.classes[order]
    first = torch.searchsorted(ordered, task.labels)
    count = torch.searchsorted(ordered, task.labels, right=True) - first
    places = torch.arange(max(1, int(count.max())), device=order.device)[None]
    rows = order[(first[:, None] + places).clamp_max(len(order) - 1)]
    return torch.where(places < count[:, None], rows, -1)


def _projected(task: Task, law: Law, trials: int, seed: int, tick: Tick) -> tuple[Tensor, float]:
    """Draws noisy scores instead of noise, of the rows that may win."""
    tally = _Tally(task, trials)
    generator = torch.Generator(task.queries.device).manual_seed(seed)
    for part, scores, _ in law.scores():
        draws = law.draws(part, scores)
        batch = max(1, CHUNK // draws.means.numel())
        for trial in range(0, trials, batch):
            place = draws.draw(min(batch, trials - trial), generator).argmin(2)
            found = draws.rivals.expand(len(place), -1, -1).gather(2, place[..., None])[..., 0]
            tally.add(found, part.start, trial)
        tick(len(scores))
    return tally.finish()


def _sample(task: Task, trials: int, seed: int, tick: Tick) -> tuple[Tensor, float]:
    """Draws the perturbation literally; one noisy gallery per trial, shared by all queries."""
    tally = _Tally(task, trials)
    for trial in range(trials):
        found = best(*task.perturbed(seed, trial), task.setting.metric, exact=not task.setting.perturbation.random)
        tally.add(found[None], 0, trial)
        tick(len(task.queries) / trials)
    return tally.finish()


@isolated
def robustness(
    queries: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    perturbation: Perturbation,
    *,
    labels: Any = None,
    gallery_labels: Any = None,
    shift: MeanShift | Projection | None = None,
    metric: str = "l2",
    on: str = "gallery",
    when: str = "after",
    method: str = "auto",
    trials: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> RobustnessResult:
    """The share of queries whose Euclidean nearest neighbour survives a perturbation of the gallery (Eq. 10).

    Args:
        queries: (Q, D).
        gallery: (G, D), the rows that are searched.
        perturbation: see `gapkern.perturb`. The gallery of a `Replace` is shifted too.
        labels: (Q,) integers: the right gallery row of each query, or its class where `gallery_labels` are given.
        gallery_labels: (G,) integers: the class of each gallery row.
        shift: a fitted `MeanShift` or `Projection`, applied to both sides first.
        metric: what is searched by: "l2", "ip" (largest inner product) or "cosine".
        on: "gallery", or "queries" to perturb the queries instead.
        when: the perturbation comes "after" the shift, as where a shifted gallery is stored in few bits, or "before".
        method: "exact" integrates the winning probabilities (Gaussian noise on the gallery, "l2" and "ip"; no sampling
            error, below 1e-4 per query); "projected" draws noisy scores (the same law); "sample" draws the perturbation
            literally; "auto" is exact where it can be and otherwise sample.
        trials: draws for "projected" and "sample". What is not random needs one and gets one.
        seed: of the draws.
        progress: say on stderr what is done: a bar on a terminal, elsewhere a line every half minute.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes that do not match, values that are not finite, a method that cannot serve the perturbation.

    Example:
        >>> gallery = torch.eye(3)
        >>> result = robustness(gallery + 0.1, gallery, Gaussian(0.5), labels=[0, 1, 2])
        >>> result.method, result.clean_accuracy, round(result.robustness, 3)
        ('exact', 1.0, 0.931)
    """
    started = time.perf_counter()
    setting = Setting(perturbation, labels, gallery_labels, shift, metric, on, when)
    _check.choice("method", method, METHODS)
    trials = _check.integer("trials", trials, low=1, high=2**32)
    seed = _check.integer("seed", seed, low=0, high=2**63 - 1)
    if method in ("exact", "projected") and not setting.integrable:
        raise ValueError(
            f"method: {method!r} is for Gaussian noise on the gallery, got {title(perturbation.describe())!r} on the "
            f"{on}{' before it is normalised' if setting.rescaled else ''}; use 'sample' or 'auto'"
        )
    if method == "auto":
        method = "exact" if setting.integrable else "sample"
    search = method != "exact" or not perturbation.random
    task = Task.of(queries, gallery, setting)
    if search:
        task.search()
    with _ticks(progress, title(perturbation.describe()), len(task.queries)) as tick:
        if not perturbation.random:
            method, trials = "none drawn", 1
            means, _ = _sample(task, 1, seed, tick)
            stderr = 0.0
        else:
            means, stderr = _drawn_or_integrated(method, task, trials, seed, tick)
    clean = task.right(task.stays, 0)
    return RobustnessResult(
        robustness=float(means[0].mean()),
        agreement=float(means[1].mean()),
        accuracy=math.nan if clean is None else float(means[2].mean()),
        clean_accuracy=math.nan if clean is None else float(clean.double().mean()),
        gini=gini(task.classes[task.stays], task.classes),
        stderr=stderr,
        per_query=means[0].cpu(),
        nearest=task.stays.cpu(),
        rivals=task.rivals.cpu(),
        method=method,
        trials=0 if method == "exact" else trials,
        seconds=time.perf_counter() - started,
    )


def _drawn_or_integrated(method: str, task: Task, trials: int, seed: int, tick: Tick) -> tuple[Tensor, float]:
    if method == "sample":
        return _sample(task, trials, seed, tick)
    assert isinstance(task.setting.perturbation, Gaussian)
    variance = task.setting.perturbation.per_coordinate(task.noisy_dims)
    law = (InnerProducts if task.setting.metric == "ip" else Distances)(task.queries, task.gallery, variance)
    return (_exact if method == "exact" else _projected)(task, law, trials, seed, tick)


@contextmanager
def _ticks(wanted: bool, name: str, queries: int) -> Iterator[Tick]:
    """A function that is told of more queries done, or parts of them, and shows it where that is wanted."""
    done = 0.0
    with _progress.shown({name: name}, {name: "queries"}, wanted=wanted) as step:

        def tick(amount: float) -> None:
            nonlocal done
            done += amount
            step(name, round(done), queries)

        yield tick

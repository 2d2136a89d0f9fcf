"""Theorems 3.1 and 3.2 and Assumption 3.3, what training does to the gap: each statement against what is measured."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gapkern.dynamics import Trajectory, descend, isotropic_gaussians, tight_clusters
from gapkern.experiments.reproduce.claims import Claim, Context, Figure, Result, Table, judge
from gapkern.experiments.reproduce.embeddings import Embeddings
from gapkern.experiments.reproduce.lines import Panel, lines
from gapkern.theory import Orthogonality, freeze, leading_gradient, orthogonality


def thm3_1(context: Context) -> Result:
    """The gradient of tight, distant clusters against its leading term."""
    n, dims, scale, gap = (40, 8, 50.0, 3.0) if context.quick else (400, 64, 50.0, 3.0)
    rows = []
    for radius in np.geomspace(1e-2, 1e-6, 9 if context.quick else 17):
        found = leading_gradient(*tight_clusters(n, dims, float(radius), gap, seed=context.seed), scale)
        names = ("tightness", "distance", "slope", "correlation", "relative_error", "first_order_error")
        rows.append({"radius": float(radius), **{name: getattr(found, name) for name in names}})
    path = descend(
        *tight_clusters(n, dims, 1e-3, gap, seed=context.seed),
        scale,
        lr=n / (8 * scale**2 * gap**2),
        steps=20,
        record_every=1,
    )
    run = f"{n} pairs in {dims} dimensions, two clusters {gap:g} apart, logit scale {scale:g}, squared distances"
    claims = [_along_the_gap(run, rows), _first_order(run, rows), _shrinks_first(run, path)]
    caption = (
        "How far the gradient on the texts is from what is predicted. The leading term's error levels off at the "
        "pull of each text's partner, which is smaller by the factor s ‖g‖²; with it the error falls as the radius."
    )
    text = (
        "With L the paper's Eq. 6 and S = −s ‖x − y‖², the gradient on text i is (2 s / N) Σₖ (Qx + Qy − 2 I)ₖᵢ (xₖ − "
        "yᵢ). Expanded about the two means its terms of order zero cancel, and (4 s / N) (s [g · (yᵢ − μ)] g − (xᵢ − "
        "μₓ)) is left. `gapkern.theory.leading_gradient` gives both for any embeddings."
    )
    return Result(claims, [Figure("thm3.1", caption, partial(lines, _errors(rows)), rows)], text=text)


def _along_the_gap(run: str, rows: list[dict[str, float]]) -> Claim:
    tightest = rows[-1]
    return judge(
        "In tight clusters far apart the gradient on a text is along the gap, in proportion to how far the text is "
        "along it: (4 s² / N) [g · (y − μ)] g.",
        f"{run}, radius {tightest['radius']:.0e}; measured over predicted, all entries.",
        {"correlation": tightest["correlation"], "slope": tightest["slope"]},
        tightest["correlation"] > 0.999 and abs(tightest["slope"] - 1) < 0.01,
        "slope or correlation is off",
    )


def _first_order(run: str, rows: list[dict[str, float]]) -> Claim:
    radii, errors = ([row[name] for row in rows[3:]] for name in ("radius", "first_order_error"))
    order, tightest = np.polyfit(np.log(radii), np.log(errors), 1)[0], rows[-1]
    return judge(
        "What the leading term leaves out vanishes as the clusters tighten and draw apart.",
        f"{run}, radii 1e-2 to 1e-6; with the pull of a text's partner, −(4 s / N) (x − μ), added.",
        {
            "power of the radius with which the error falls": float(order),
            "error at the least radius": tightest["first_order_error"],
            "without the pull": tightest["relative_error"],
        },
        abs(order - 1) < 0.1 and tightest["first_order_error"] < 1e-3,
        "the error does not fall linearly",
    )


def _shrinks_first(run: str, path: Trajectory) -> Claim:
    first, last = path.rows[0], path.rows[-1]
    left = {k: last[f"variance_{k}_texts"] / first[f"variance_{k}_texts"] for k in ("along", "across")}
    return judge(
        "So descent first shrinks the variance along the gap.",
        f"{run}, radius 1e-3, 20 steps.",
        {"variance along the gap, share left": left["along"], "across, share left": left["across"]},
        left["along"] < 0.1 < 0.5 < left["across"],
        "the variance along the gap is not the first to shrink",
    )


def _errors(rows: list[dict[str, float]]) -> list[Panel]:
    radii = [row["radius"] for row in rows]
    leading, whole = ([row[name] for row in rows] for name in ("relative_error", "first_order_error"))
    slopes = [abs(row["slope"] - 1) for row in rows]
    across = "radius of the clusters"
    return [
        Panel(
            "The theorem's term, and all of first order",
            across,
            "relative error of the gradient",
            {"leading term": (radii, leading), "with the partner's pull": (radii, whole)},
            "xy",
            True,
        ),
        Panel("Measured over predicted", across, "|slope − 1|", {"slope": (radii, slopes)}, "xy", True),
    ]


def thm3_2(context: Context) -> Result:
    """The gap stands still where softmaxes are doubly stochastic, and what it feels elsewhere."""
    steps = 2000 if context.quick else 10_000
    angles = torch.arange(7, dtype=torch.float64) * 2 * torch.pi / 7
    x, y = (_ring(angles + turn, height) for turn, height in ((0.0, 0.0), (0.35, 0.8)))
    ring = descend(x, y, 2.0, lr=0.2, steps=steps)
    n = 20
    path = descend(
        *tight_clusters(n, n // 2, 1e-2, 2.0, seed=context.seed), 2.0, lr=n / 20, steps=steps, record_every=10
    )
    claims = [
        _feels_nothing(ring, x, y, steps),
        _feels_imbalance(x, y, context.seed),
        _freezes(path, n, steps),
        _within_its_bound(context.seed, 20 if context.quick else 200),
    ]
    caption = (
        "Descent from two tight clusters: as the softmax sums approach one the gap stops, the loss goes on falling."
    )
    numbers = {"frozen": path.frozen(), "last": path.rows[-1], "ring": ring.rows[-1]}
    return Result(claims, [Figure("thm3.2", caption, partial(lines, _freezing(path)), path.rows)], numbers=numbers)


def _ring(angles: Tensor, height: float) -> Tensor:
    return torch.stack([angles.cos(), angles.sin(), torch.full_like(angles, height)], 1)


def _feels_nothing(ring: Trajectory, x: Tensor, y: Tensor, steps: int) -> Claim:
    first, last = ring.rows[0], ring.rows[-1]
    felt = float(freeze(x, y, 2.0).texts.abs().max())
    return judge(
        "Where both modalities are constant along the gap and the softmaxes doubly stochastic, the gap feels "
        "nothing while the rest aligns.",
        f"Seven pairs on two rings, one turned against the other, {steps} steps of descent.",
        {
            "change of the gap": abs(last["gap_norm"] - 0.8) / 0.8,
            "largest gradient along it": felt,
            "loss left": last["loss"] / first["loss"],
        },
        abs(last["gap_norm"] - 0.8) < 1e-9 and felt < 1e-12 and last["loss"] < 0.5 * first["loss"],
        "the gap moved, or the loss did not fall",
    )


def _feels_imbalance(x: Tensor, y: Tensor, seed: int) -> Claim:
    uneven = y + 0.3 * torch.cat([noise(7, 2, seed), torch.zeros(7, 1, dtype=torch.float64)], 1)
    broken = freeze(x, uneven, 2.0, direction=torch.tensor([0.0, 0.0, 1.0]))
    felt = float(broken.texts.abs().max())
    return judge(
        "Where the softmaxes are not balanced, the direction of the gap does feel the loss.",
        "The same rings, one of them dented.",
        {"largest gradient along the gap": felt, "max |S − 1|": broken.residual_texts},
        felt > 1e-3,
        "the gradient along the gap is below 0.001",
    )


def _freezes(path: Trajectory, n: int, steps: int) -> Claim:
    frozen, last = path.frozen(), path.rows[-1]
    start = next((row for row in path.rows if row["step"] == frozen), last)
    span = max(1, last["step"] - start["step"])
    change = abs(last["gap_norm"] - start["gap_norm"]) / start["gap_norm"] * 1000 / span
    return judge(
        "Once the softmax sums are within a millionth of one, the gap is frozen while the loss still falls.",
        f"{n} pairs from two tight clusters, {steps} steps of descent.",
        {
            "change of the gap in 1000 steps": change,
            "frozen from step": math.nan if frozen is None else frozen,
            "loss left since": last["loss"] / start["loss"],
            "gap": last["gap_norm"],
        },
        frozen is not None and change < 1e-6 and last["loss"] < 0.9 * start["loss"] and last["gap_norm"] > 1,
        "the gap did not freeze, or the loss no longer fell",
    )


def _within_its_bound(seed: int, cases: int) -> Claim:
    worst = _worst_excess(seed, cases)
    return judge(
        "In between, what the gap feels is bounded by how far sums and modalities are from even.",
        f"{cases} random pairs of clouds and directions, both similarities: |gradient − prediction| over its bound.",
        {"largest share of the bound": worst},
        worst <= 1,
        "a gradient lies outside its bound",
    )


def _worst_excess(seed: int, cases: int) -> float:
    """The largest |measured - predicted| over its bound, in random clouds along random directions."""
    worst = 0.0
    for case in range(cases):
        x, y = isotropic_gaussians(16, 4, 2.0, 0.5, seed=seed + case)
        direction = noise(1, 4, seed + case)[0]
        found = freeze(x, y, 3.0, similarity=("dot", "sqeuclidean")[case % 2], direction=direction)
        for side in ("images", "texts"):
            apart = (getattr(found, side) - getattr(found, f"predicted_{side}")).abs()
            worst = max(worst, float((apart / (getattr(found, f"bound_{side}") + 1e-12)).max()))
    return worst


def noise(rows: int, dims: int, seed: int) -> Tensor:
    """Standard normal float64 (rows, dims)."""
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _freezing(path: Trajectory) -> list[Panel]:
    last = path.rows[-1]["gap_norm"]
    steps = [row["step"] for row in path.rows[:-1]]
    distance = [max(abs(row["gap_norm"] - last) / last, 1e-17) for row in path.rows[:-1]]
    sums = {"max |S − 1|": path.series("residual_texts"), "loss": path.series("loss")}
    return [
        Panel("Sums and loss", "step", "", sums, "xy"),
        Panel("The gap", "step", "relative distance from where it ends", {"gap": (steps, distance)}, "xy"),
    ]


def thm3_3(context: Context) -> Result:
    """Assumption 3.3: after descent, and in the embeddings given."""
    n = 20
    path = descend(*tight_clusters(n, n + 4, 1e-2, 2.0, seed=context.seed), 2.0, lr=n / 20, steps=1500, snapshots=[0])
    start = path.snapshots[0]
    before, after = orthogonality(start.texts, start.images), orthogonality(path.texts, path.images)
    claims = [
        judge(
            "Training makes the gap orthogonal to both modalities.",
            f"{n} pairs in {n + 4} dimensions from two tight clusters, 1500 steps of descent.",
            {
                "share of the gap outside the hulls": min(after.outside_gallery, after.outside_queries),
                "share of the variance along the gap": _variance_along(after),
                "at the start": _variance_along(before),
            },
            min(after.outside_gallery, after.outside_queries) > 0.999,
            "more than a thousandth of the gap lies in a modality's hull",
        )
    ]
    rows = [{"embeddings": "after descent", **vars(after)}, {"embeddings": "before descent", **vars(before)}]
    for data in context.embeddings:
        found = orthogonality(data.queries, data.gallery)
        rows.append({"embeddings": data.name, **vars(found)})
        claims.append(_orthogonal_to_what_is_searched(data, found))
    columns = {
        "embeddings": "embeddings",
        "gap_norm": "gap",
        "outside_gallery": "outside the texts",
        "outside_queries": "outside the images",
        "rank_gallery": "texts' dimensions",
        "deviation_gallery": "texts along g",
        "deviation_queries": "images along g",
    }
    return Result(claims, tables=[Table("How far the assumption is met", columns, rows)], numbers={"rows": rows})


def _variance_along(found: Orthogonality) -> float:
    """The share of a modality's variance that lies along the gap, the larger of both."""
    return max(found.variance_along_gallery, found.variance_along_queries)


def _orthogonal_to_what_is_searched(data: Embeddings, found: Orthogonality) -> Claim:
    return judge(
        "The gap is orthogonal to what is searched.",
        f"{data.name}: share of the gap outside the texts' hull.",
        {
            "share of the gap outside the texts' hull": found.outside_gallery,
            "texts' deviation along the gap, of its length": found.deviation_gallery,
            "images' deviation along the gap": found.deviation_queries,
        },
        found.outside_gallery > 0.95,
        f"{1 - found.outside_gallery**2:.0%} of the gap's square lies within the texts' hull; only the rest "
        "can be closed without moving a neighbour",
    )

"""Figures 3 to 6: where the gap comes from. Three points, descent from two starts, and when softmaxes are balanced."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch

from gapkern import figures
from gapkern.dynamics import Trajectory, descend, evaluate, isotropic_gaussians, tight_clusters
from gapkern.experiments.reproduce.claims import Claim, Context, Figure, Result, judge
from gapkern.experiments.reproduce.lines import Panel, clouds, lines, scatter

RELATIVE = (
    "Relative alignment means here: the texts are the images moved, all alike. The loss is `contrastive_loss`, half of "
    "the paper's."
)


def fig3(context: Context) -> Result:
    """Three pairs in the plane whose texts are the images moved: the loss does not see a gap across them."""
    scale = 2.0
    spreads = np.geomspace(0.1, 6, 40 if context.quick else 120)
    gaps = {"no gap": (0.0, 0.0), "gap 1 across": (0.0, 1.0), "gap 3 across": (0.0, 3.0), "gap 3 along": (3.0, 0.0)}
    rows: list[dict[str, Any]] = []
    for name, gap in gaps.items():
        for spread in spreads:
            x = float(spread) * torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
            at = evaluate(x, x + torch.tensor(gap, dtype=torch.float64), scale)
            gradient = torch.cat([at.images, at.texts]).norm()
            rows.append({"gap": name, "spread": float(spread), "loss": at.loss, "gradient": float(gradient)})

    def series(value: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            name: (
                [r["spread"] for r in rows if r["gap"] == name],
                [r[value] if r[value] > 1e-15 else math.nan for r in rows if r["gap"] == name],
            )
            for name in gaps
        }

    loss = {name: torch.tensor([r["loss"] for r in rows if r["gap"] == name], dtype=torch.float64) for name in gaps}
    apart = max(float((loss[name] - loss["no gap"]).abs().max()) for name in ("gap 1 across", "gap 3 across"))
    wide = {name: next(r for r in rows[::-1] if r["gap"] == name) for name in gaps}
    middle = int(np.argmin(np.abs(spreads - 2)))
    felt = float(loss["gap 3 along"][middle] - loss["no gap"][middle])
    run = f"Three pairs on a line in the plane, texts = images + gap, logit scale {scale:g}"
    claims = [
        judge(
            "With the modalities in relative alignment the loss does not depend on a gap across them.",
            f"{run}, gaps of 1 and 3 across the line against none, spreads 0.1 to 6.",
            {"largest difference of the loss": apart},
            apart < 1e-12,
            "the loss depends on the gap",
        ),
        judge(
            "Loss and gradient are then almost zero although the gap is open.",
            f"{run}, a gap of 3 across, points 6 apart.",
            {"loss": wide["gap 3 across"]["loss"], "gradient norm": wide["gap 3 across"]["gradient"]},
            max(wide["gap 3 across"]["loss"], wide["gap 3 across"]["gradient"]) < 1e-6,
            "loss or gradient is above 1e-6",
        ),
        judge(
            "A gap that lies along the points is felt: only an orthogonal one costs nothing.",
            f"{run}, a gap of 3 along the line against none, points {spreads[middle]:.2g} apart.",
            {"loss added by the gap": felt},
            felt > 1,
            "the gap along the points adds less than 1 to the loss",
        ),
    ]
    axis = "distance between neighbouring points"
    panels = [
        Panel("Loss", axis, "contrastive loss", series("loss"), "xy"),
        Panel("Size of the gradient", axis, "gradient norm", series("gradient"), "xy"),
    ]
    caption = (
        "Three pairs in relative alignment. The lines of all gaps across the points are one; they fall towards zero as "
        "the points move apart (drawn down to 1e-15), and the gap stays. A gap along the points costs, until they are "
        "further apart than it."
    )
    return Result(claims, [Figure("fig3", caption, partial(lines, panels), rows)], text=RELATIVE)


def fig4(context: Context) -> Result:
    """Descent from two tight clusters, free and on the sphere."""
    n, steps = (20, 1500) if context.quick else (60, 6000)
    claims: list[Claim] = []
    drawn: list[Figure] = []
    numbers: dict[str, Any] = {}
    for place, sphere in (("free", False), ("sphere", True)):
        path = _from_tight_clusters(n, steps, sphere, context.seed)
        first, last = path.rows[0], path.rows[-1]
        run = (
            f"{n} pairs in {path.settings['dims']} dimensions from two tight clusters, "
            f"{'on the unit sphere, dot products' if sphere else 'not normalised, squared distances'}, "
            f"logit scale {path.settings['logit_scale']:g}, {steps} steps of gradient descent."
        )
        claims += [
            judge(
                "Training ends with almost zero loss and the gap still open.",
                run,
                {"loss left": last["loss"] / first["loss"], "gap left": last["gap_norm"] / first["gap_norm"]},
                last["loss"] < 0.01 * first["loss"] and last["gap_norm"] > 0.5 * first["gap_norm"],
                "more than 1 % of the loss or less than half of the gap is left",
            ),
            judge(
                "The gap that is left is orthogonal to both modalities.",
                run,
                {
                    "share of the gap outside both": last["orthogonality"],
                    "at the start": first["orthogonality"],
                    "relative alignment": last["relative_alignment"],
                },
                last["orthogonality"] > 0.99,
                "more of the gap lies within the modalities",
            ),
        ]
        drawn += [
            Figure(
                f"fig4_{place}",
                f"{'On the unit sphere' if sphere else 'Not normalised'}: loss and gradient fall, variance grows "
                "across the gap and not along it, and the gap stays.",
                partial(figures.trajectory, path),
                path.rows,
            ),
            _cloud(path, f"fig4_{place}_points"),
        ]
        numbers[place] = {"settings": path.settings, "first": first, "last": last}
        context.progress(len(numbers), 2)
    return Result(claims, drawn, numbers=numbers)


def _from_tight_clusters(n: int, steps: int, sphere: bool, seed: int) -> Trajectory:
    """Steps are half of what overshoots along the gap: N / (s^2 ||g||^2)."""
    snapshots = [0, steps // 50, steps]
    if not sphere:
        x, y = tight_clusters(n, n // 2, 1e-2, 2.0, seed=seed)
        return descend(x, y, 2.0, lr=n / 32, steps=steps, record_every=5, snapshots=snapshots)
    x, y = tight_clusters(n, n + 12, 1e-2, 2**0.5, seed=seed)
    # A right angle apart, once they are of length 1.
    x[:, 0], y[:, 0] = x[:, 0] - 0.5**0.5, y[:, 0] - 0.5**0.5
    x[:, 1], y[:, 1] = x[:, 1] + 0.5**0.5, y[:, 1] + 0.5**0.5
    return descend(
        x, y, 30.0, lr=n / 900, steps=steps, similarity="dot", sphere=True, record_every=5, snapshots=snapshots
    )


def _cloud(path: Trajectory, name: str) -> Figure:
    """Points along the first gap and across it, where the last points differ most."""
    start, end = path.snapshots[0], path.snapshots[max(path.snapshots)]
    gap = start.texts.mean(0) - start.images.mean(0)
    along = gap / gap.norm()
    last = torch.cat([end.images - end.images.mean(0), end.texts - end.texts.mean(0)])
    last = last - (last @ along)[:, None] * along
    across = torch.linalg.svd(last, full_matrices=False).Vh[0]
    plane = torch.stack([along, across], 1)
    shown = {
        f"step {step}": ((kept.images @ plane).numpy(), (kept.texts @ plane).numpy())
        for step, kept in path.snapshots.items()
    }
    rows = [
        {"step": step, "modality": modality, "along": float(a), "across": float(b)}
        for step, kept in path.snapshots.items()
        for modality, x in (("images", kept.images), ("texts", kept.texts))
        for a, b in x @ plane
    ]
    caption = "The pairs along the gap and in the direction across it in which they end up differing most."
    return Figure(name, caption, partial(clouds, shown, "along the gap", "across it"), rows)


def fig5(context: Context) -> Result:
    """Two isotropic Gaussians: who is far from the other modality gets less than its share, so g shrinks first."""
    n, steps, seeds = (200, 40, 5) if context.quick else (1000, 80, 20)
    paths = []
    for i in range(seeds):
        x, y = isotropic_gaussians(n, 2, 6.0, seed=context.seed + i)
        paths.append(descend(x, y, 0.5, lr=n / 20, steps=steps, record_every=1, snapshots=[0, steps // 8, steps]))
        context.progress(i + 1, seeds)
    path = paths[0]
    correlation = max(p.rows[0]["sum_distance_correlation"] for p in paths)
    kept = {
        key: [p.rows[-1][f"variance_{key}_texts"] / p.rows[0][f"variance_{key}_texts"] for p in paths]
        for key in ("along", "across")
    }
    gap = min(p.rows[-1]["gap_norm"] / p.rows[0]["gap_norm"] for p in paths)
    run = f"{n} pairs from two isotropic Gaussians in the plane, 6 apart, logit scale 0.5, {seeds} seeds"
    claims = [
        judge(
            "The further a text is from the images, the less softmax mass S it receives.",
            f"{run}, at the start; the largest of the seeds.",
            {"rank correlation of S with distance": correlation},
            correlation < -0.95,
            "a rank correlation is above -0.95",
        ),
        judge(
            "Descent shrinks the variance along the gap first.",
            f"{run}, after {steps} steps; texts, the worst of the seeds.",
            {"variance along the gap, share left": max(kept["along"]), "across, share left": min(kept["across"])},
            max(kept["along"]) < 0.1 and min(kept["across"]) > 10 * max(kept["along"]),
            "the variance along the gap did not shrink to a tenth, or that across did too",
        ),
        judge(
            "Meanwhile the gap itself stays.",
            f"{run}, after {steps} steps; the smallest of the seeds.",
            {"gap left": gap},
            gap > 0.8,
            "more than a fifth of the gap is gone",
        ),
    ]
    shown, rows = {}, []
    for step, at in path.snapshots.items():
        distance = (at.texts - at.images.mean(0)).norm(dim=1)
        shown[f"step {step}"] = (distance.tolist(), at.sums_texts.clamp_min(1e-12).tolist())
        rows += [
            {"step": step, "distance": float(d), "sum": float(s)} for d, s in zip(distance, at.sums_texts, strict=True)
        ]
    variance = {
        f"{side}, {key} the gap": path.series(f"variance_{key}_{side}")
        for key in ("along", "across")
        for side in ("images", "texts")
    }
    panel = Panel("Variance within the modalities", "step", "variance", variance, "y")
    return Result(
        claims,
        [
            Figure(
                "fig5_sums",
                "Each text's softmax mass S over its distance from the images' mean. At the start the near ones "
                "receive nearly all; descent evens it out.",
                partial(scatter, shown, "distance from the images' mean", "S, softmax mass received"),
                rows,
            ),
            Figure(
                "fig5_variance",
                "The variance along the gap collapses within a few steps, before that across it has changed much.",
                partial(lines, [panel]),
                path.rows,
            ),
        ],
        numbers={"first": path.rows[0], "last": path.rows[-1]},
    )


def fig6(context: Context) -> Result:
    """The softmaxes' sums come to one late, when loss and variance along the gap have long fallen."""
    steps = 1500 if context.quick else 5000
    n = 20
    starts = {
        "two tight clusters": (tight_clusters(n, 10, 1e-2, 2.0, seed=context.seed), 2.0, 1.0),
        "two isotropic Gaussians": (isotropic_gaussians(100, 8, 6.0, seed=context.seed), 0.5, 4.0),
    }
    claims, panels, rows = [], [], []
    numbers: dict[str, Any] = {}
    for name, ((x, y), scale, lr) in starts.items():
        path = descend(x, y, scale, lr=lr, steps=steps, record_every=5)
        shrunk = _first(path, "variance_along_texts", 0.1 * path.rows[0]["variance_along_texts"])
        balanced = _first(path, "residual_texts", 2e-3)
        run = f"{len(x)} pairs from {name}, {x.shape[1]} dimensions, logit scale {scale:g}, up to {steps} steps."
        claims.append(
            judge(
                "The softmaxes become doubly stochastic only late, after the variance along the gap has shrunk.",
                run,
                {
                    "step at which sums are within 0.002 of 1": balanced["step"],
                    "step at which the variance along the gap is a tenth": shrunk["step"],
                    "loss left when sums are": balanced["loss"] / path.rows[0]["loss"],
                },
                balanced["step"] > 2 * max(shrunk["step"], 1) and balanced["loss"] < 0.1 * shrunk["loss"],
                "the sums were balanced as soon as the variance had shrunk",
            )
        )
        last = path.rows[-1]
        early, late = _drift(path.rows, shrunk["step"]), _drift(path.rows, balanced["step"])
        claims.append(
            judge(
                "From then on the gap hardly moves.",
                run,
                {
                    "change of the gap after": late,
                    "before": early,
                    "gap left": last["gap_norm"] / path.rows[0]["gap_norm"],
                },
                late < 1e-3,
                "the gap still changes by more than a thousandth",
            )
        )
        for row in path.rows:
            rows.append({"start": name, **row})
        first = path.rows[0]
        series = {
            "max |S − 1|": path.series("residual_texts"),
            "variance along the gap, relative": _relative(path, "variance_along_texts", first),
            "loss, relative": _relative(path, "loss", first),
        }
        panels.append(Panel(f"From {name}", "step", "", series, "xy"))
        numbers[name] = {"shrunk": shrunk, "balanced": balanced, "last": last, "frozen": path.frozen()}
    caption = (
        "How far the texts' softmax sums S are from one, beside the variance along the gap and the loss, both relative "
        "to the start."
    )
    return Result(claims, [Figure("fig6", caption, partial(lines, panels), rows)], numbers=numbers)


def _first(path: Trajectory, name: str, below: float) -> dict[str, Any]:
    """The first row in which a value is small enough; the last one if there is none."""
    return next((row for row in path.rows if row[name] < below), path.rows[-1])


def _drift(rows: list[dict[str, Any]], step: int) -> float:
    """Relative change of the gap between a step and the end."""
    start = next(row["gap_norm"] for row in rows if row["step"] >= step)
    return abs(rows[-1]["gap_norm"] - start) / start


def _relative(path: Trajectory, name: str, first: dict[str, Any]) -> tuple[list[int], list[float]]:
    steps, values = path.series(name)
    return steps, [max(v / first[name], 1e-30) for v in values]

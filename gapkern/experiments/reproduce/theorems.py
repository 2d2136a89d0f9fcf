"""Theorems 3.1 to 3.5: what each says against what is measured, on constructed cases and on the embeddings given."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapkern._search import nearest
from gapkern._threads import one_thread
from gapkern.dynamics import descend, isotropic_gaussians, tight_clusters
from gapkern.experiments.reproduce.claims import Claim, Context, Figure, Result, Table, judge
from gapkern.experiments.reproduce.embeddings import Embeddings, noise_that_keeps
from gapkern.experiments.reproduce.lines import Panel, lines
from gapkern.gap import MeanShift
from gapkern.gap.moments import Moments, hull
from gapkern.perturb import Gaussian
from gapkern.theory import freeze, leading_gradient, orthogonality, preservation, robustness_curve

STEADY = 2e-5  # what the integral behind exact robustness may be off by, twice over


def thm3_1(context: Context) -> Result:
    """The gradient of tight, distant clusters against its leading term."""
    n, dims, scale, gap = (40, 8, 50.0, 3.0) if context.quick else (400, 64, 50.0, 3.0)
    radii = np.geomspace(1e-2, 1e-6, 9 if context.quick else 17)
    rows = []
    for radius in radii:
        found = leading_gradient(*tight_clusters(n, dims, float(radius), gap, seed=context.seed), scale)
        names = ("tightness", "distance", "slope", "correlation", "relative_error", "first_order_error")
        rows.append({"radius": float(radius), **{name: getattr(found, name) for name in names}})
    tightest = rows[-1]
    order = np.polyfit(np.log([r["radius"] for r in rows[3:]]), np.log([r["first_order_error"] for r in rows[3:]]), 1)[
        0
    ]
    path = descend(
        *tight_clusters(n, dims, 1e-3, gap, seed=context.seed),
        scale,
        lr=n / (8 * scale**2 * gap**2),
        steps=20,
        record_every=1,
    )
    first, last = path.rows[0], path.rows[-1]
    left = {k: last[f"variance_{k}_texts"] / first[f"variance_{k}_texts"] for k in ("along", "across")}
    run = f"{n} pairs in {dims} dimensions, two clusters {gap:g} apart, logit scale {scale:g}, squared distances"
    claims = [
        judge(
            "In tight clusters far apart the gradient on a text is along the gap, in proportion to how far the text is "
            "along it: (4 s² / N) [g · (y − μ)] g.",
            f"{run}, radius {tightest['radius']:.0e}; measured over predicted, all entries.",
            {"correlation": tightest["correlation"], "slope": tightest["slope"]},
            tightest["correlation"] > 0.999 and abs(tightest["slope"] - 1) < 0.01,
            "slope or correlation is off",
        ),
        judge(
            "What the leading term leaves out vanishes as the clusters tighten and draw apart.",
            f"{run}, radii 1e-2 to 1e-6; with the pull of a text's partner, −(4 s / N) (x − μ), added.",
            {
                "power of the radius with which the error falls": float(order),
                "error at the least radius": tightest["first_order_error"],
                "without the pull": tightest["relative_error"],
            },
            abs(order - 1) < 0.1 and tightest["first_order_error"] < 1e-3,
            "the error does not fall linearly",
        ),
        judge(
            "So descent first shrinks the variance along the gap.",
            f"{run}, radius 1e-3, 20 steps.",
            {"variance along the gap, share left": left["along"], "across, share left": left["across"]},
            left["along"] < 0.1 < 0.5 < left["across"],
            "the variance along the gap is not the first to shrink",
        ),
    ]

    def series(name: str) -> tuple[list[float], list[float]]:
        return [r["radius"] for r in rows], [abs(r[name] - 1) if name == "slope" else r[name] for r in rows]

    panels = [
        Panel(
            "The theorem's term, and all of first order",
            "radius of the clusters",
            "relative error of the gradient",
            {"leading term": series("relative_error"), "with the partner's pull": series("first_order_error")},
            "xy",
            True,
        ),
        Panel(
            "Measured over predicted", "radius of the clusters", "|slope − 1|", {"slope": series("slope")}, "xy", True
        ),
    ]
    caption = (
        "How far the gradient on the texts is from what is predicted. The leading term's error levels off at the "
        "pull of each text's partner, which is smaller by the factor s ‖g‖²; with it the error falls as the radius."
    )
    text = (
        "With L the paper's Eq. 6 and S = −s ‖x − y‖², the gradient on text i is (2 s / N) Σₖ (Qx + Qy − 2 I)ₖᵢ (xₖ − "
        "yᵢ). Expanded about the two means its terms of order zero cancel, and (4 s / N) (s [g · (yᵢ − μ)] g − (xᵢ − "
        "μₓ)) is left. `gapkern.theory.leading_gradient` gives both for any embeddings."
    )
    return Result(claims, [Figure("thm3.1", caption, partial(lines, panels), rows)], text=text)


def thm3_2(context: Context) -> Result:
    """The gap stands still where softmaxes are doubly stochastic, and what it feels elsewhere."""
    steps = 2000 if context.quick else 10_000
    angles = torch.arange(7, dtype=torch.float64) * 2 * torch.pi / 7
    x, y = (_ring(angles + turn, height) for turn, height in ((0.0, 0.0), (0.35, 0.8)))
    ring = descend(x, y, 2.0, lr=0.2, steps=steps)
    felt = freeze(x, y, 2.0)
    uneven = y + 0.3 * torch.cat([_noise(7, 2, context.seed), torch.zeros(7, 1, dtype=torch.float64)], 1)
    broken = freeze(x, uneven, 2.0, direction=torch.tensor([0.0, 0.0, 1.0]))
    n = 20
    path = descend(
        *tight_clusters(n, n // 2, 1e-2, 2.0, seed=context.seed), 2.0, lr=n / 20, steps=steps, record_every=10
    )
    frozen = path.frozen()
    start = next((row for row in path.rows if row["step"] == frozen), path.rows[-1])
    last = path.rows[-1]
    span = max(1, last["step"] - start["step"])
    change = abs(last["gap_norm"] - start["gap_norm"]) / start["gap_norm"] * 1000 / span
    worst = _worst_excess(context.seed, 20 if context.quick else 200)
    claims = [
        judge(
            "Where both modalities are constant along the gap and the softmaxes doubly stochastic, the gap feels "
            "nothing while the rest aligns.",
            f"Seven pairs on two rings, one turned against the other, {steps} steps of descent.",
            {
                "change of the gap": abs(ring.rows[-1]["gap_norm"] - 0.8) / 0.8,
                "largest gradient along it": float(felt.texts.abs().max()),
                "loss left": ring.rows[-1]["loss"] / ring.rows[0]["loss"],
            },
            abs(ring.rows[-1]["gap_norm"] - 0.8) < 1e-9
            and float(felt.texts.abs().max()) < 1e-12
            and ring.rows[-1]["loss"] < 0.5 * ring.rows[0]["loss"],
            "the gap moved, or the loss did not fall",
        ),
        judge(
            "Where the softmaxes are not balanced, the direction of the gap does feel the loss.",
            "The same rings, one of them dented.",
            {"largest gradient along the gap": float(broken.texts.abs().max()), "max |S − 1|": broken.residual_texts},
            float(broken.texts.abs().max()) > 1e-3,
            "the gradient along the gap is below 0.001",
        ),
        judge(
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
        ),
        judge(
            "In between, what the gap feels is bounded by how far sums and modalities are from even.",
            f"{20 if context.quick else 200} random pairs of clouds and directions, both similarities: "
            "|gradient − prediction| over its bound.",
            {"largest share of the bound": worst},
            worst <= 1,
            "a gradient lies outside its bound",
        ),
    ]
    gap = [abs(row["gap_norm"] - last["gap_norm"]) / last["gap_norm"] for row in path.rows]
    steps_seen = [row["step"] for row in path.rows]
    panels = [
        Panel(
            "Sums and loss",
            "step",
            "",
            {"max |S − 1|": path.series("residual_texts"), "loss": path.series("loss")},
            "xy",
        ),
        Panel(
            "The gap",
            "step",
            "relative distance from where it ends",
            {"gap": (steps_seen[:-1], [max(g, 1e-17) for g in gap[:-1]])},
            "xy",
        ),
    ]
    caption = (
        "Descent from two tight clusters: as the softmax sums approach one the gap stops, the loss goes on falling."
    )
    numbers = {"frozen": frozen, "last": last, "ring": ring.rows[-1]}
    return Result(claims, [Figure("thm3.2", caption, partial(lines, panels), path.rows)], numbers=numbers)


def _noise(rows: int, dims: int, seed: int) -> Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ring(angles: Tensor, height: float) -> Tensor:
    return torch.stack([angles.cos(), angles.sin(), torch.full_like(angles, height)], 1)


def _worst_excess(seed: int, cases: int) -> float:
    """The largest |measured - predicted| over its bound, in random clouds along random directions."""
    worst = 0.0
    for case in range(cases):
        x, y = isotropic_gaussians(16, 4, 2.0, 0.5, seed=seed + case)
        direction = _noise(1, 4, seed + case)[0]
        found = freeze(x, y, 3.0, similarity=("dot", "sqeuclidean")[case % 2], direction=direction)
        for side in ("images", "texts"):
            apart = (getattr(found, side) - getattr(found, f"predicted_{side}")).abs()
            worst = max(worst, float((apart / (getattr(found, f"bound_{side}") + 1e-12)).max()))
    return worst


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
                "share of the variance along the gap": _share_along(path.texts, path.images),
                "at the start": _share_along(start.texts, start.images),
            },
            min(after.outside_gallery, after.outside_queries) > 0.999,
            "more than a thousandth of the gap lies in a modality's hull",
        )
    ]
    rows = [{"embeddings": "after descent", **vars(after)}, {"embeddings": "before descent", **vars(before)}]
    for data in context.embeddings:
        found = orthogonality(data.queries, data.gallery)
        rows.append({"embeddings": data.name, **vars(found)})
        claims.append(
            judge(
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
        )
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


def _share_along(queries: Tensor, gallery: Tensor) -> float:
    """The share of a modality's variance that lies along the gap, the larger of both."""
    found = orthogonality(queries, gallery)
    return max(found.variance_along_gallery, found.variance_along_queries)


def thm3_4(context: Context) -> Result:
    """Exact robustness rises as the gap is closed: in random orthogonal cases, and in the embeddings given."""
    cases = 200 if context.quick else 1000
    generator = torch.Generator().manual_seed(context.seed)
    falls, gains = [], []
    with one_thread() as run:
        for case in range(cases):
            queries, gallery, noise = _orthogonal(generator)
            curve = run(robustness_curve, queries, gallery, noise, alphas=(0, 0.25, 0.5, 0.75, 1))
            falls.append(curve.worst_fall)
            gains.append(curve.robustness[-1] - curve.robustness[0])
            if case % 50 == 0:
                context.progress(case, cases)
    claims = [
        judge(
            "If the gap is orthogonal to both modalities, closing it makes every query's neighbour more robust, "
            "monotonically.",
            f"{cases} random galleries of 2 to 8 rows in 2 to 8 dimensions with an orthogonal gap and Gaussian noise, "
            "exact robustness at five alphas.",
            {"worst fall of any query": max(falls), "mean gain": sum(gains) / cases, "least gain": min(gains)},
            max(falls) < STEADY,
            "a query's robustness falls",
        )
    ]
    rows: list[dict[str, Any]] = []
    series, numbers = {}, {}
    for data in context.embeddings:
        curve, chosen = _curve(data, context.quick)
        rows += [
            {"embeddings": data.name, "alpha": a, "robustness": r}
            for a, r in zip(curve.alphas, curve.robustness, strict=True)
        ]
        series[data.name] = (curve.alphas, curve.robustness)
        numbers[data.name] = curve.to_dict()
        ends = {a: r for a, r in zip(curve.alphas, curve.robustness, strict=True) if a in (0.0, 1.0)}
        claims += [
            judge(
                "Closing what is orthogonal to the texts raises the share of neighbours that survive noise.",
                f"{data.name}: the texts' hull kept, Gaussian noise of {chosen.variance:g} in all; exact.",
                {"closed": ends[1.0], "open": ends[0.0]},
                ends[1.0] > ends[0.0],
                "the share does not rise",
            ),
            judge(
                "Every query gains until the texts' mean has come level with it.",
                f"{data.name}: the same, query by query; the largest fall before that.",
                {"worst fall": curve.worst_fall_to_peak, "queries that never fall up to alpha 1": curve.rising},
                curve.worst_fall_to_peak < STEADY,
                "a query falls before the texts are level with it",
            ),
        ]
    figures = []
    if series:
        panel = Panel("Exact robustness", "α, the share of the gap that is closed", "robustness", series, "", True)
        caption = "Share of queries that keep their neighbour under noise; the shift keeps the texts' whole hull."
        figures.append(Figure("thm3.4", caption, partial(lines, [panel]), rows))
    return Result(claims, figures, numbers={"cases": cases, "worst_fall": max(falls), **numbers})


def _orthogonal(generator: torch.Generator) -> tuple[Tensor, Tensor, Gaussian]:
    """Queries, a gallery and noise: the means differ by a vector that is orthogonal to both hulls."""
    limits = ((2, 9), (1, 6), (1, 6), (1, 4))
    g, q, inner, extra = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in limits)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(inner + extra, inner + extra)).Q
    gallery = draw(g, inner) @ basis[:inner]
    queries = draw(q, inner) @ basis[:inner]
    away = 3 * float(torch.rand(1, generator=generator)) * draw(extra) @ basis[inner:]
    variance = float(10 ** (2 * torch.rand(1, generator=generator) - 1.5))
    return queries - queries.mean(0) + gallery.mean(0) + away, gallery, Gaussian(variance, "per_coordinate")


def _curve(data: Embeddings, quick: bool):
    noise = noise_that_keeps(0.7, data)
    shift = MeanShift(n_components="exact").fit(data.gallery, data.queries)
    alphas = tuple(i / 4 for i in range(7)) if quick else tuple(i / 8 for i in range(13))
    return robustness_curve(data.queries, data.gallery, noise, alphas=alphas, shift=shift), noise


def thm3_5(context: Context) -> Result:
    """Shifts orthogonal to the gallery change no neighbour; margins say which stay under any other."""
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    panels = []
    for data in context.embeddings:
        claims.append(_orthogonal_shifts(data, context.seed))
        shift = MeanShift(n_components=0).fit(data.gallery, data.queries)
        alphas = [i / 4 for i in range(7)] if context.quick else [i / 16 for i in range(25)]
        found = preservation(data.queries, data.gallery, shift, alpha=max(alphas))
        before = nearest(data.queries, data.gallery)
        wrong, shares = 0, []
        for alpha in alphas:
            same = before == nearest(data.queries, shift.at(alpha).transform(data.gallery))
            kept = found.reach >= alpha
            sure = found.margin > alpha * found.bound + found.slack
            wrong += int((kept & ~same).sum()) + int((sure & ~same).sum())
            shares.append([float(of.double().mean()) for of in (same, kept, sure)])
        kinds = ("measured", "predicted", "guaranteed")
        rows += [
            {"embeddings": data.name, "alpha": alpha, **dict(zip(kinds, of, strict=True))}
            for alpha, of in zip(alphas, shares, strict=True)
        ]
        measured, predicted, guaranteed = shares[alphas.index(1)]
        claims.append(
            judge(
                "A shift that is only partly orthogonal keeps every neighbour whose margin it cannot overcome.",
                f"{data.name}: the whole gap closed, unprojected, at {len(alphas)} alphas; margins from one search.",
                {
                    "guarantees that failed": wrong,
                    "neighbours kept at alpha 1": measured,
                    "predicted": predicted,
                    "guaranteed by the smallest margin": guaranteed,
                },
                wrong == 0,
                "a neighbour left that was predicted to stay",
            )
        )
        panels.append(
            Panel(
                data.name,
                "α, the share of the gap that is closed",
                "share of neighbours kept",
                {kind: (alphas, list(values)) for kind, values in zip(kinds, zip(*shares, strict=True), strict=True)},
                "",
                True,
            )
        )
    caption = (
        "The whole gap closed, nothing projected out: the share of neighbours that stay, what the margins of one "
        "search predict for every alpha, and what the smallest margin alone guarantees."
    )
    figures = [Figure("thm3.5", caption, partial(lines, panels), rows)] if panels else []
    text = (
        "A shift v of the gallery adds 2 v · (xⱼ − x*) to every margin ‖y − xⱼ‖² − ‖y − x*‖². Orthogonal to the "
        "gallery's affine hull it adds nothing; otherwise the neighbour stays while the margins exceed what is taken "
        "off them: `gapkern.theory.preservation`."
    )
    if not claims:
        claims = [
            Claim("A shift orthogonal to the gallery changes no neighbour.", "Not run.", {}, None, "no embeddings")
        ]
    return Result(claims, figures, text=text)


def _orthogonal_shifts(data: Embeddings, seed: int) -> Claim:
    claim = "A shift orthogonal to the texts' affine hull changes no nearest neighbour, however far it goes."
    basis = hull(Moments.of(data.gallery), data.gallery)
    if basis.shape[1] >= data.gallery.shape[1]:
        reason = "the texts fill the whole space: no direction is orthogonal to them"
        return Claim(claim, f"{data.name}: not run.", {}, None, reason)
    before = nearest(data.queries, data.gallery.double())
    changed, sizes = 0, (0.1, 1.0, 10.0)
    for i, size in enumerate(sizes):
        v = _noise(1, data.gallery.shape[1], seed + i)[0]
        v = v - basis @ (basis.T @ v)
        v = size * (v - basis @ (basis.T @ v)) / v.norm()
        changed += int((before != nearest(data.queries.double(), data.gallery.double() + v)).sum())
    return judge(
        claim,
        f"{data.name}: random orthogonal shifts of lengths 0.1, 1 and 10, {len(before)} queries each.",
        {"neighbours changed": changed, "dimensions of the texts' hull": basis.shape[1]},
        changed == 0,
        "a neighbour changed",
    )

"""Theorems 3.4 and 3.5, what closing the gap does to neighbours: each statement against what is measured."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gapkern._search import nearest
from gapkern._threads import one_thread
from gapkern.experiments.reproduce.claims import Claim, Context, Figure, Result, judge
from gapkern.experiments.reproduce.embeddings import Embeddings, noise_that_keeps
from gapkern.experiments.reproduce.lines import Panel, lines
from gapkern.experiments.reproduce.training_theorems import noise
from gapkern.gap import MeanShift
from gapkern.gap.moments import Moments, hull
from gapkern.perturb import Gaussian
from gapkern.theory import RobustnessCurve, preservation, robustness_curve

STEADY = 2e-5  # what the integral behind exact robustness may be off by, twice over
ALPHA = "α, the share of the gap that is closed"
KINDS = ("measured", "predicted", "guaranteed")


def thm3_4(context: Context) -> Result:
    """Exact robustness rises as the gap is closed: in random orthogonal cases, and in the embeddings given."""
    cases = 100 if context.quick else 1000
    falls, gains = _random_cases(context, cases)
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
        points = list(zip(curve.alphas, curve.robustness, strict=True))
        rows += [{"embeddings": data.name, "alpha": a, "robustness": r} for a, r in points]
        series[data.name] = (curve.alphas, curve.robustness)
        numbers[data.name] = curve.to_dict()
        claims += _more_survive(data.name, curve, chosen)
    figures = []
    if series:
        panel = Panel("Exact robustness", ALPHA, "robustness", series, "", True)
        caption = "Share of queries that keep their neighbour under noise; the shift keeps the texts' whole hull."
        figures.append(Figure("thm3.4", caption, partial(lines, [panel]), rows))
    return Result(claims, figures, numbers={"cases": cases, "worst_fall": max(falls), **numbers})


def _random_cases(context: Context, cases: int) -> tuple[list[float], list[float]]:
    """The largest fall of any query's robustness, and the gain of all queries', in each of so many random cases."""
    generator = torch.Generator().manual_seed(context.seed)
    falls, gains = [], []
    with one_thread() as run:
        for case in range(cases):
            queries, gallery, gaussian = _orthogonal(generator)
            curve = run(robustness_curve, queries, gallery, gaussian, alphas=(0, 0.25, 0.5, 0.75, 1))
            falls.append(curve.worst_fall)
            gains.append(curve.robustness[-1] - curve.robustness[0])
            if case % 50 == 0:
                context.progress(case, cases)
    return falls, gains


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


def _curve(data: Embeddings, quick: bool) -> tuple[RobustnessCurve, Gaussian]:
    chosen = noise_that_keeps(0.7, data)
    shift = MeanShift(n_components="exact").fit(data.gallery, data.queries)
    alphas = tuple(i / 4 for i in range(7)) if quick else tuple(i / 8 for i in range(13))
    return robustness_curve(data.queries, data.gallery, chosen, alphas=alphas, shift=shift), chosen


def _more_survive(name: str, curve: RobustnessCurve, chosen: Gaussian) -> list[Claim]:
    ends = {a: r for a, r in zip(curve.alphas, curve.robustness, strict=True) if a in (0.0, 1.0)}
    return [
        judge(
            "Closing what is orthogonal to the texts raises the share of neighbours that survive noise.",
            f"{name}: the texts' hull kept, Gaussian noise of {chosen.variance:g} in all; exact.",
            {"closed": ends[1.0], "open": ends[0.0]},
            ends[1.0] > ends[0.0],
            "the share does not rise",
        ),
        judge(
            "Every query gains until the texts' mean has come level with it.",
            f"{name}: the same, query by query; the largest fall before that.",
            {"worst fall": curve.worst_fall_to_peak, "queries that never fall up to alpha 1": curve.rising},
            curve.worst_fall_to_peak < STEADY,
            "a query falls before the texts are level with it",
        ),
    ]


def thm3_5(context: Context) -> Result:
    """Shifts orthogonal to the gallery change no neighbour; margins say which stay under any other."""
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    panels = []
    alphas = [i / 4 for i in range(7)] if context.quick else [i / 16 for i in range(25)]
    for data in context.embeddings:
        wrong, shares = _kept(data, alphas)
        rows += [
            {"embeddings": data.name, "alpha": alpha, **dict(zip(KINDS, of, strict=True))}
            for alpha, of in zip(alphas, shares, strict=True)
        ]
        claims += [
            _orthogonal_shifts(data, context.seed),
            _keeps_what_it_cannot_overcome(data.name, len(alphas), wrong, shares[alphas.index(1)]),
        ]
        series = {kind: (alphas, list(of)) for kind, of in zip(KINDS, zip(*shares, strict=True), strict=True)}
        panels.append(Panel(data.name, ALPHA, "share of neighbours kept", series, "", True))
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


def _kept(data: Embeddings, alphas: list[float]) -> tuple[int, list[list[float]]]:
    """How many predictions and guarantees failed; for each alpha the shares of neighbours, as `KINDS` has them."""
    shift = MeanShift(n_components=0).fit(data.gallery, data.queries)
    found = preservation(data.queries, data.gallery, shift, alpha=max(alphas))
    before = nearest(data.queries, data.gallery)
    wrong, shares = 0, []
    for alpha in alphas:
        same = before == nearest(data.queries, shift.at(alpha).transform(data.gallery))
        kept = found.reach >= alpha
        sure = found.margin > alpha * found.bound + found.slack
        wrong += int((kept & ~same).sum()) + int((sure & ~same).sum())
        shares.append([float(of.double().mean()) for of in (same, kept, sure)])
    return wrong, shares


def _keeps_what_it_cannot_overcome(name: str, alphas: int, wrong: int, shares: list[float]) -> Claim:
    measured, predicted, guaranteed = shares
    return judge(
        "A shift that is only partly orthogonal keeps every neighbour whose margin it cannot overcome.",
        f"{name}: the whole gap closed, unprojected, at {alphas} alphas; margins from one search.",
        {
            "guarantees that failed": wrong,
            "neighbours kept at alpha 1": measured,
            "predicted": predicted,
            "guaranteed by the smallest margin": guaranteed,
        },
        wrong == 0,
        "a neighbour left that was predicted to stay",
    )


def _orthogonal_shifts(data: Embeddings, seed: int) -> Claim:
    claim = "A shift orthogonal to the texts' affine hull changes no nearest neighbour, however far it goes."
    basis = hull(Moments.of(data.gallery), data.gallery)
    if basis.shape[1] >= data.gallery.shape[1]:
        reason = "the texts fill the whole space: no direction is orthogonal to them"
        return Claim(claim, f"{data.name}: not run.", {}, None, reason)
    before = nearest(data.queries, data.gallery.double())
    changed, sizes = 0, (0.1, 1.0, 10.0)
    for i, size in enumerate(sizes):
        v = noise(1, data.gallery.shape[1], seed + i)[0]
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

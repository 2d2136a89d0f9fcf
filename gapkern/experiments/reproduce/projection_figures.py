"""Beyond the paper: Figure 8 with a third line, each image projected on the texts' hull; and by inner product."""

from functools import partial
from typing import Any

import torch

from gapkern._search import search
from gapkern.experiments import figures, three
from gapkern.experiments.reproduce.claims import KEPT, Claim, Context, Figure, Result, judge
from gapkern.experiments.reproduce.embeddings import Embeddings, noise_that_keeps
from gapkern.experiments.reproduce.robustness_figures import STEADY
from gapkern.gap import Projection
from gapkern.perturb import Gaussian

TIMES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # the variance at which 70 % survive with the gap open
K = 10  # neighbours that are compared


def projection(context: Context) -> Result:
    """Robustness over the variance of the noise: as it is, shifted, projected."""
    claims, drawn, numbers = [], [], {}
    sets = context.embeddings
    for done, data in enumerate(sets):
        hard = noise_that_keeps(0.7, data).variance
        noise = [Gaussian(float(f"{hard * times:.3g}")) for times in TIMES]
        rows = {}
        for metric in ("l2", "ip"):
            fitted = Projection(data.components, metric).fit(data.gallery, data.queries)
            shift = data.shift if metric == "l2" else None
            rows[metric] = three.measured(
                data.queries, data.gallery, data.labels, noise, shift=shift, projection=fitted, seed=context.seed
            )
            claims.append(_neighbours(data, fitted))
        claims += [_against_the_shift(data, rows["l2"], noise), _by_inner_product(data, rows["ip"], noise)]
        numbers[data.name] = {"components": fitted.n_components_, "offset": fitted.offset_}
        lines = [three.lines(rows[metric], "robustness") for metric in ("l2", "ip")]
        drawn.append(
            Figure(
                f"projection_{data.slug}",
                f"{data.name}: Gaussian noise on every text, by the energy of the noise vector. Left by Euclidean "
                "distance, right by inner product, where a shift changes nothing.",
                partial(figures.over_noise, *lines, label="robustness by inner product", scale="in all"),
                [{"embeddings": data.name, "metric": metric, **row} for metric in rows for row in rows[metric]],
            )
        )
        context.progress(done + 1, len(sets))
    text = (
        "The shift removes from the images what they have in common. `gapkern.Projection` takes each image y to the "
        "nearest point y' of the texts' hull H. For every text x in H, |y - x|² = |y - y'|² + |y' - x|²: all squared "
        "distances fall by the same number, so that no neighbour changes, while noise ε on a text enters as "
        "2 ε · (y' - x), which is no larger than before."
    )
    return Result(claims, drawn, [], numbers, text)


def _neighbours(data: Embeddings, fitted: Projection) -> Claim:
    k, metric = min(K, len(data.gallery)), fitted.metric
    before, after = (
        search(y.double(), data.gallery.double(), k, metric=metric)[1]
        for y in (data.queries, fitted.transform_queries(data.queries.double()))
    )
    same = (before == after).double()
    number = {f"of {k} neighbours kept": float(same.mean()), "first neighbour kept": float(same[:, 0].mean())}
    whole = data.components == "exact"
    by = "Euclidean distance" if metric == "l2" else "inner product"
    return judge(
        "Projecting the images on the texts' hull changes no neighbour.",
        f"{data.name}, by {by}: {fitted.n_components_} of {fitted.n_features_in_} dimensions.",
        number,
        float(same.mean()) == 1 if whole else float(same[:, 0].mean()) >= KEPT,
        "some neighbours change"
        if whole
        else "only the texts' leading directions are kept, and some neighbours change",
    )


def _at(rows: list[dict[str, Any]], noise: Gaussian) -> dict[str, float]:
    return {row["moved"]: row["robustness"] for row in rows if row["variance"] == noise.variance}


def _against_the_shift(data: Embeddings, rows: list[dict[str, Any]], noise: list[Gaussian]) -> Claim:
    hard = _at(rows, noise[TIMES.index(1)])
    gains = torch.tensor([_at(rows, n)[three.PROJECTION] - _at(rows, n)[three.SHIFT] for n in noise])
    gain = hard[three.PROJECTION] - hard[three.SHIFT]
    return judge(
        "Projected images keep more of their nearest texts under noise than the shift does.",
        f"{data.name}: {len(noise)} variances; the numbers are for {noise[TIMES.index(1)].variance:g}.",
        {"gain over the shift": gain, **hard, "least gain": float(gains.min())},
        gain > 0 and float(gains.min()) >= -STEADY,
        f"robustness changes by {gain:+.2g} against the shift, at some variance by {float(gains.min()):+.2g}",
    )


def _by_inner_product(data: Embeddings, rows: list[dict[str, Any]], noise: list[Gaussian]) -> Claim:
    hard = _at(rows, noise[TIMES.index(1)])
    gains = [_at(rows, n)[three.PROJECTION] - _at(rows, n)[three.NONE] for n in noise]
    gain = hard[three.PROJECTION] - hard[three.NONE]
    return judge(
        "It does so by inner product as well, where a shift changes nothing.",
        f"{data.name}: the same noise, the largest inner product in the place of the least distance.",
        {"gain": gain, **hard, "least gain": min(gains)},
        gain > 0 and min(gains) >= -STEADY,
        f"robustness changes by {gain:+.2g}, at some variance by {min(gains):+.2g}",
    )

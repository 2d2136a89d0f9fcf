"""Figures 8 to 10: robustness over the share of the gap that is closed, under noise, rounding and rewording."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gapkern.experiments.reproduce import drawings
from gapkern.experiments.reproduce.claims import KEPT, Claim, Context, Figure, Result, judge
from gapkern.experiments.reproduce.embeddings import Embeddings, noise_that_keeps
from gapkern.perturb import Gaussian, Perturbation, Quantize, Replace, title
from gapkern.robustness import SweepResult, robustness, sweep

ALPHAS = tuple(i / 8 for i in range(13))
QUICK_ALPHAS = tuple(i / 4 for i in range(7))
TOTAL = (0.005, 0.022, 0.040)  # the paper's variances
BINS = (32, 64, 128, 256)  # the paper's
COARSE = (4, 8, 16)
STEADY = 2e-5  # what the integral behind exact robustness may be off by, twice over


def _sweeps(
    context: Context, kinds: Callable[[Embeddings], list[Perturbation]]
) -> list[tuple[Embeddings, SweepResult]]:
    """For each set of embeddings the perturbations `kinds(data)`, over alpha; nothing for a set without any."""
    alphas = QUICK_ALPHAS if context.quick else ALPHAS
    sets = context.embeddings
    found = []
    for done, data in enumerate(sets):
        perturbations = kinds(data)
        rows: list[dict[str, Any]] = []
        for n, alpha in enumerate(alphas):
            if perturbations:
                rows += sweep(
                    data.queries, data.gallery, [alpha], perturbations, data.labels, shift=data.shift, seed=context.seed
                ).rows
            context.progress(done * len(alphas) + n + 1, len(sets) * len(alphas))
        found.append((data, SweepResult(rows, data.shift)))
    return found


def _points(data: Embeddings, result: SweepResult) -> list[dict[str, Any]]:
    names = (
        "alpha",
        "robustness",
        "robustness_low",
        "robustness_high",
        "agreement",
        "accuracy",
        "clean_accuracy",
        "gini",
        "method",
    )
    return [{"embeddings": data.name, "perturbation": title(r), **{n: r[n] for n in names}} for r in result.rows]


def _panels(data: Embeddings, result: SweepResult) -> dict[str, Any]:
    second = ("accuracy", "Nearest text is right") if data.labels is not None else ("agreement", "… and the original")
    return {
        heading: {_short(name): curve for name, curve in result.series(value).items()}
        for value, heading in (("robustness", "Nearest text survives (robustness)"), second)
    }


def _short(name: str) -> str:
    """A perturbation's title as a legend has it."""
    kind, what, *_ = [*name.split(), ""]
    return {"gaussian": f"variance {what}", "quantize": f"{what} levels"}.get(kind, name)


def _reference(result: SweepResult) -> dict[str, float]:
    clean = result.rows[0]["clean_accuracy"]
    return {} if clean is None else {"Nearest text is right": clean}


def fig8(context: Context) -> Result:
    """Robustness and accuracy over alpha under Gaussian noise on the gallery."""

    def kinds(data: Embeddings) -> list[Perturbation]:
        return [*(Gaussian(v) for v in TOTAL), noise_that_keeps(0.7, data)]

    claims, drawn, numbers = [], [], {}
    for data, result in _sweeps(context, kinds):
        curves = result.series("robustness")
        upto = {name: [v for a, v in zip(*pair, strict=True) if a <= 1] for name, pair in curves.items()}
        fall = max((a - b for values in upto.values() for a, b in itertools.pairwise(values)), default=0.0)
        fall = max(fall, 0.0)
        hard = list(curves)[-1]
        gain = upto[hard][-1] - upto[hard][0]
        numbers[data.name] = {"best_alpha": result.best(), "noise": list(curves)}
        claims += [
            judge(
                "Closing the gap makes nearest neighbours more robust to noise, more so the more of it is closed.",
                f"{data.name}: Gaussian noise on every text, {len(curves)} variances; exact, no sampling. The numbers "
                f"are for variance {float(hard.split()[1]):g}, at which 70 % survive with the gap open.",
                {"gain": gain, "gap open": upto[hard][0], "gap closed": upto[hard][-1], "largest fall in a step": fall},
                gain > 0 and fall <= STEADY,
                "robustness does not rise"
                if gain <= 0
                else f"robustness rises by {gain:.2g} in all, but falls by {fall:.2g} in one step",
            ),
            _peak(data, result, hard),
            _clean(data, result),
        ]
        drawn.append(
            Figure(
                f"fig8_{data.slug}",
                f"{data.name}: Gaussian noise on every text; a line for each variance (total energy of the noise "
                "vector: the paper's three, and that at which 70 % of the neighbours survive with the gap open).",
                partial(drawings.over_alpha, _panels(data, result), reference=_reference(result)),
                _points(data, result),
            )
        )
    text = (
        "Every text is given its own Gaussian noise; robustness is the probability that an image keeps its nearest "
        "text. α is the share of the gap that is closed. The paper's Figures 8 to 10 show noise, quantisation and "
        "rewording for several models; here each figure shows one of them, on every set of embeddings."
    )
    return Result(claims, drawn, [], numbers, text)


def _peak(data: Embeddings, result: SweepResult, noise: str) -> Claim:
    best = result.best()[noise]
    alphas = result.series()[noise][0]
    step = alphas[1] - alphas[0]
    return judge(
        "Robustness is largest where the two means meet, and falls again beyond.",
        f"{data.name}: α from 0 to 1.5 in steps of {step:g}.",
        {"α of the largest robustness": best},
        abs(best - 1) <= step + 1e-9,
        "the projected shift closes only a part of the gap, so the means have not met at α = 1"
        if best > 1 and data.shift.orthogonality_ < 0.9
        else f"the peak is at α = {best:g}",
    )


def _clean(data: Embeddings, result: SweepResult) -> Claim:
    claim = "Without noise, closing the gap leaves accuracy as it was."
    at = {row["alpha"]: row["clean_accuracy"] for row in result.rows}
    if data.labels is None:
        return Claim(claim, f"{data.name}: not run.", {}, None, "this set has no right answers")
    change = at[1.0] - at[0.0]
    return judge(
        claim,
        f"{data.name}: {len(data.queries)} images, {len(data.gallery)} texts.",
        {"change": change, "gap open": at[0.0], "gap closed": at[1.0]},
        abs(change) <= 1 - KEPT,
        f"accuracy moves by {100 * change:+.1f} points",
    )


def _survival(claim: str, run: str, data: Embeddings, kinds: list[Perturbation], otherwise: str) -> Claim:
    """Judges mean robustness with the gap closed against that with it open, by what so many images can tell."""
    kept = [
        torch.stack(
            [robustness(data.queries, data.gallery, kind, shift=data.shift.at(alpha)).per_query for kind in kinds]
        ).mean(0)
        for alpha in (0.0, 1.0)
    ]
    change = kept[1] - kept[0]
    gain, error = float(change.mean()), float(change.std()) / len(change) ** 0.5
    number = {
        "gain": gain,
        "standard error": error,
        "gap open": float(kept[0].mean()),
        "gap closed": float(kept[1].mean()),
    }
    if float(kept[0].mean()) == 1:
        return Claim(claim, run, number, None, "nothing is lost with the gap open, so nothing can be gained")
    if abs(gain) <= 2 * error:
        return Claim(claim, run, number, None, f"{len(change)} images cannot tell so small a difference from none")
    return judge(claim, run, number, gain > 0, f"{-gain:.2g} fewer neighbours survive with the gap closed: {otherwise}")


def fig9(context: Context) -> Result:
    """Robustness and accuracy over alpha with the gallery quantised."""

    def kinds(data: Embeddings) -> list[Perturbation]:
        return [Quantize(b, r) for r in ("per_dimension", "global") for b in (*COARSE, *BINS)]

    claims, drawn = [], []
    for data, result in _sweeps(context, kinds):
        for extent, words in (
            ("per_dimension", "its own range for each coordinate"),
            ("global", "one range for all coordinates"),
        ):
            some = SweepResult([r for r in result.rows if r["range"] == extent], result.shift)
            claims.append(
                _survival(
                    "Closing the gap makes nearest neighbours more robust to quantisation.",
                    f"{data.name}: texts stored in 32, 64, 128 and 256 levels per coordinate, {words}; their mean.",
                    data,
                    [Quantize(b, extent) for b in BINS],
                    "what is moved along the gap meets other levels",
                )
            )
            drawn.append(
                Figure(
                    f"fig9_{data.slug}_{extent}",
                    f"{data.name}: texts quantised to 4 to 256 equal levels, {words}. The paper's are 32 to 256.",
                    partial(drawings.over_alpha, _panels(data, some), reference=_reference(some)),
                    _points(data, some),
                )
            )
    text = (
        "After the shift, every coordinate of every text is rounded to one of a few equal levels, as when an index is "
        "compressed. Nothing is random here: a neighbour survives or it does not."
    )
    return Result(claims, drawn, [], {}, text)


def fig10(context: Context) -> Result:
    """Robustness and accuracy over alpha with the gallery in other words."""

    def kinds(data: Embeddings) -> list[Perturbation]:
        return [Replace(gallery, name) for name, gallery in list(data.rewordings.items())[1:]]

    claims, drawn = [], []
    claim = "Closing the gap makes nearest neighbours more robust to rewording."
    for data, result in _sweeps(context, kinds):
        if not result.rows:
            claims.append(
                Claim(claim, f"{data.name}: not run.", {}, None, "this set has no second wording of its captions")
            )
            continue
        others = kinds(data)
        claims.append(
            _survival(
                claim,
                f"{data.name}: {len(others)} other wordings, mean over them; the shift stays that of the first.",
                data,
                others,
                "the shift is orthogonal to the first wording only; the others vary along it, and their texts move "
                "past each other",
            )
        )
        drawn.append(
            Figure(
                f"fig10_{data.slug}",
                f"{data.name}: the texts replaced by the same in other words.",
                partial(drawings.rewordings, _panels(data, result)),
                _points(data, result),
            )
        )
    text = (
        "The gallery is replaced by the same texts in other words, shifted by the shift that was fitted before. The "
        "paper treats a rewording as noise on each text; unlike the theorem's, it is neither independent nor Gaussian."
    )
    return Result(claims, drawn, [], {}, text)

"""One plot for each benchmark: times relative to the baseline, the limit among them."""

from pathlib import Path
from typing import Any

from gapkern import files
from gapkern.figures.canvas import COLOURS, MARKERS


def draw(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    if result["benchmark"] == "contrastive":
        figure = _over_batch(result, Figure)
    elif result["benchmark"] == "quantisers":
        figure = _quantisers(result, Figure)
    else:
        figure = _bars(result, Figure)
    machine = f"{result['env']['processor']}, {result['cores']} cores"
    figure.suptitle(f"{machine}, torch {result['env']['versions']['torch']}", fontsize=9)
    files.write(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _over_batch(result, figure_class):
    """Speed relative to open_clip over the batch size, D = 512."""
    figure = figure_class(figsize=(12.5, 4.2), layout="constrained")
    for ax, which in zip(figure.subplots(1, 2, sharey=True), ("forward", "forward+backward"), strict=True):
        cases = [c for c in result["cases"] if (c["similarity"], c["pass"], c["D"]) == ("dot", which, 512)]
        batches = [case["N"] for case in cases]
        for i, name in enumerate(cases[0]["results"]):
            ratios = [case["results"]["open_clip"]["median"] / case["results"][name]["median"] for case in cases]
            limit = cases[0]["results"][name]["role"] == "limit"
            ax.plot(
                batches,
                ratios,
                label=name,
                color="0.4" if limit else COLOURS[i % len(COLOURS)],
                linestyle=":" if limit else "-",
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
            )
        ax.set_xscale("log", base=2)
        ax.set_xlabel("batch size")
        ax.set_title(which, fontsize=10)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("times as fast as open_clip's ClipLoss")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _quantisers(result, figure_class):
    """The neighbours that each quantiser finds on each data set, with the gap open and closed."""
    figure = figure_class(figsize=(4.0 * len(result["cases"]), 3.6), layout="constrained")
    for ax, case in zip(figure.subplots(1, len(result["cases"]), squeeze=False)[0], result["cases"], strict=True):
        factories = list(dict.fromkeys(row["factory"] for row in case["rows"]))
        for shift, label in ((False, "as it is"), (True, "gap closed")):
            found = {row["factory"]: row[f"overlap@{case['k']}"] for row in case["rows"] if row["shift"] is shift}
            places = [i + (0.2 if shift else -0.2) for i in range(len(factories))]
            ax.barh(places, [found[f] for f in factories], 0.38, color=COLOURS[0] if shift else "0.7", label=label)
        ax.set_yticks(range(len(factories)), factories, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel(f"share of {case['k']} neighbours found")
        ax.set_title(f"{case['data']}, {case['G']:,} x {case['D']}", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    return figure


def _bars(result, figure_class):
    figure = figure_class(figsize=(9, 0.9 * len(result["cases"]) + 1.2), layout="constrained")
    ax = figure.subplots()
    ticks, labels, place = [], [], 0.0
    for case in result["cases"]:
        base = case["results"][case["baseline"]]["median"]
        start = place
        for name, r in case["results"].items():
            colour = {"ours": COLOURS[0], "baseline": "0.7", "limit": "0.4"}[r["role"]]
            ax.barh(-place, base / r["median"], color=colour, height=0.8)
            ax.annotate(f" {name}  {base / r['median']:.2f}x", (base / r["median"], -place), va="center", fontsize=7)
            place += 1
        parameters = [v for k, v in case.items() if k not in ("baseline", "traffic", "results")]
        ticks.append(-(start + place - 1) / 2)
        labels.append(", ".join(map(str, parameters)))
        place += 0.6
    ax.set_yticks(ticks, labels, fontsize=8)
    ax.set_xlabel("times as fast as the baseline")
    ax.set_xlim(right=ax.get_xlim()[1] * 1.25)
    ax.spines[["top", "right"]].set_visible(False)
    return figure

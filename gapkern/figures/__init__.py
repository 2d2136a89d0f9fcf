"""Figures of results, as their `plot` draws them."""

from typing import Any

import numpy as np

from gapkern.figures.canvas import COLOURS, legend, over_alpha, panels

__all__ = ["quantisers", "sweep", "trajectory"]


def sweep(result: Any) -> Any:
    """A `SweepResult` over alpha: robustness, agreement and, where labels were given, accuracy."""
    labelled = any(row["accuracy"] is not None for row in result.rows)
    names = ["robustness", "agreement", *(["accuracy"] if labelled else [])]
    figure, axes = panels(len(names))
    for ax, name in zip(axes, names, strict=True):
        over_alpha(result.series(name), ax, name)
        if name == "robustness":
            bounds = zip(
                result.series("robustness_low").values(), result.series("robustness_high").values(), strict=True
            )
            for i, ((alphas, low), (_, high)) in enumerate(bounds):
                ax.fill_between(alphas, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.12, linewidth=0)
        ax.set_title(
            {
                "robustness": "Nearest neighbour survives",
                "agreement": "… and is the original one",
                "accuracy": "Nearest neighbour is right",
            }[name],
            fontsize=10,
        )
    if labelled:
        alphas, clean = next(iter(result.series("clean_accuracy").values()))
        axes[-1].plot(alphas, clean, color="black", linewidth=1.2, label="unperturbed")
    legend(figure, axes[-1], 4)
    return figure


def trajectory(path: Any, *, tall: bool = False) -> Any:
    """A `Trajectory` over steps: loss and gradient, the gap, variance along and across it, softmax sums."""
    figure, axes = panels(4, tall=tall, width=4.0, height=3.4)
    shown_in = (
        ("loss and gradient", {"loss": "contrastive loss", "gradient_norm": "gradient norm"}, True),
        ("gap norm  ‖μ(texts) − μ(images)‖", {"gap_norm": "gap norm"}, False),
        (
            "variance within modalities",
            {
                "variance_along_images": "images, along g",
                "variance_along_texts": "texts, along g",
                "variance_across_images": "images, across g",
                "variance_across_texts": "texts, across g",
            },
            True,
        ),
        ("max |S − 1|", {"residual_images": "images", "residual_texts": "texts"}, True),
    )
    for ax, (heading, names, logarithmic) in zip(axes, shown_in, strict=True):
        for i, (name, label) in enumerate(names.items()):
            steps, values = path.series(name)
            shown = np.maximum(values, 1e-30) if logarithmic else values
            # The two modalities' lines often lie on each other.
            style = "--" if label.startswith("texts") else "-"
            ax.plot(steps, shown, label=label, color=COLOURS[i], linewidth=1.6, linestyle=style)
        if logarithmic:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.15 * max(shown))
        if len(names) > 1:
            ax.legend(fontsize=8, frameon=False)
        ax.set_title(heading, fontsize=10)
        ax.set_xlabel("step")
        if steps[-1] >= 100:
            ax.set_xscale("symlog", linthresh=10)  # most happens at the beginning
            ax.set_xlim(left=0)
    return figure


def quantisers(result: Any) -> Any:
    """A `QuantiserResult`: for each factory string two bars, before and after the gap is closed."""
    names = [n for n, v in result.rows[0].items() if n.startswith(("agreement", "overlap", "recall")) and v is not None]
    factories = list(dict.fromkeys(row["factory"] for row in result.rows))
    figure, axes = panels(len(names), width=3.6, height=0.42 * len(factories) + 1.6)
    size = {row["factory"]: row["bytes_per_vector"] for row in result.rows}
    for ax, name in zip(axes, names, strict=True):
        for shift, label in ((False, "as it is"), (True, "gap closed")):
            values = [next(r[name] for r in result.rows if (r["factory"], r["shift"]) == (f, shift)) for f in factories]
            places = np.arange(len(factories)) + (0.2 if shift else -0.2)
            ax.barh(places, values, 0.38, color=COLOURS[0] if shift else "0.7", label=label)
        ax.set_xlabel(name)
        ax.set_yticks(range(len(factories)), [f"{f}, {size[f]:.0f} B" for f in factories] if ax is axes[0] else [])
        ax.invert_yaxis()
    legend(figure, axes[0], 2)
    return figure

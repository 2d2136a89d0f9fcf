"""The reproduction's figures, each for a page's width or, with `tall`, for a telephone's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapkern.figures import canvas

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plane(queries: np.ndarray, before: np.ndarray, after: np.ndarray, *, tall: bool = False) -> Any:
    """Points (N, 2) of both modalities in one plane, the gallery before and after the shift."""
    figure, axes = canvas.panels(2, tall=tall, height=3.9)
    everything = np.concatenate([queries, before, after])
    low, high = everything.min(0), everything.max(0)
    room = 0.06 * (high - low)
    stars = {"marker": "*", "s": 130, "edgecolors": "black", "linewidths": 0.6}
    small = {"s": 9, "alpha": 0.45, "linewidths": 0}
    for ax, gallery, heading in zip(axes, (before, after), ("As given (α = 0)", "Shifted (α = 1)"), strict=True):
        ax.scatter(*queries.T, c=canvas.COLOURS[0], label="images", **small)
        ax.scatter(*gallery.T, c=canvas.COLOURS[1], zorder=3, label="texts", **(stars if len(gallery) <= 50 else small))
        if ax is axes[0]:
            ax.annotate(
                "",
                gallery.mean(0),
                queries.mean(0),
                arrowprops={"arrowstyle": "<->", "color": "0.15", "linewidth": 1.5},
                zorder=4,
            )
        ax.set_title(heading, fontsize=10)
        ax.set_xlim(low[0] - room[0], high[0] + room[0])
        ax.set_ylim(low[1] - room[1], high[1] + room[1])
        ax.set_xlabel("first principal component")
        ax.set_ylabel("second principal component")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize=9,
        frameon=False,
        markerscale=1.0 if len(before) <= 50 else 2.5,
    )
    return figure


def over_alpha(
    panels: Mapping[str, Series], *, reference: Mapping[str, float] | None = None, tall: bool = False, columns: int = 4
) -> Any:
    """A panel for each heading, a line for each series; `reference` draws a level into the panel of that heading."""
    figure, axes = canvas.panels(len(panels), tall=tall, height=3.6)
    for ax, (heading, series) in zip(axes, panels.items(), strict=True):
        canvas.over_alpha(series, ax, "share of images")
        ax.set_title(heading, fontsize=10)
        if reference and heading in reference:
            ax.axhline(reference[heading], color="black", linewidth=1.2, linestyle="--", zorder=1)
            ax.annotate(
                "unperturbed",
                (0.02, reference[heading]),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                xytext=(0, 3),
                textcoords="offset points",
            )
    canvas.legend(figure, axes[-1], 1 if tall and len(next(iter(panels.values()))) < 4 else 2 if tall else columns)
    return figure


def rewordings(panels: Mapping[str, Series], *, tall: bool = False) -> Any:
    """A panel for each heading: every rewording as a thin line, their mean as a bold one."""
    figure, axes = canvas.panels(len(panels), tall=tall, height=3.6)
    for ax, (heading, series) in zip(axes, panels.items(), strict=True):
        for n, (alphas, values) in enumerate(series.values()):
            ax.plot(alphas, values, color="0.7", linewidth=0.9, label="one rewording" if n == 0 else None)
        mean = np.mean([values for _, values in series.values()], axis=0)
        ax.plot(alphas, mean, color=canvas.COLOURS[0], marker="o", markersize=4, linewidth=2, label="their mean")
        canvas.alpha_axis(ax)
        ax.set_ylabel("share of images")
        ax.set_title(heading, fontsize=10)
    canvas.legend(figure, axes[-1], 2)
    return figure


def dots(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str], *, tall: bool = False) -> Any:
    """For each key of `panels`, `rows` by method on the vertical axis, a marker for each set of embeddings."""
    methods, sets = list(dict.fromkeys(r["method"] for r in rows)), list(dict.fromkeys(r["embeddings"] for r in rows))
    height = 0.3 * len(methods) + 0.9
    figure, axes = canvas.panels(len(panels), tall=tall, width=5.0 if tall else 2.9, height=height)
    for number, (ax, (key, heading)) in enumerate(zip(axes, panels.items(), strict=True)):
        for i, name in enumerate(sets):
            chosen = [
                (r[key], methods.index(r["method"])) for r in rows if r["embeddings"] == name and r[key] is not None
            ]
            places = np.array(chosen, dtype=float).reshape(-1, 2)
            offset = 0.14 * (i - (len(sets) - 1) / 2)
            ax.scatter(
                places[:, 0],
                places[:, 1] + offset,
                s=42,
                label=name,
                color=canvas.COLOURS[i % len(canvas.COLOURS)],
                marker=canvas.MARKERS[i % len(canvas.MARKERS)],
                zorder=3,
            )
        ax.set_yticks(range(len(methods)), methods if tall or number == 0 else [])
        ax.set_ylim(len(methods) - 0.5, -0.5)
        ax.set_xlim(-0.06, 1.06)
        ax.set_xticks([0, 0.5, 1])
        ax.set_xlabel(heading)
    canvas.legend(figure, axes[0], 1 if tall else 3)
    return figure

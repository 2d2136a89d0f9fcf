"""Drawings of paths and laws: lines in panels, and clouds of points at a few steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapkern.figures import canvas


@dataclass(frozen=True)
class Panel:
    """Lines over one axis: `series` by label, each (x, y); axes are logarithmic where `log` names them."""

    heading: str
    x: str
    y: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: str = ""
    markers: bool = False


def lines(panels: Sequence[Panel], *, tall: bool = False) -> Any:
    """Panels side by side, or with `tall` one below the other, each with its own legend."""
    figure, axes = canvas.panels(len(panels), tall=tall, height=3.6)
    for ax, panel in zip(axes, panels, strict=True):
        for i, (label, (x, y)) in enumerate(panel.series.items()):
            marker = canvas.MARKERS[i % len(canvas.MARKERS)] if panel.markers else None
            style = ("-", "--", ":", "-.")[i % 4]
            ax.plot(
                x,
                y,
                style,
                label=label,
                color=canvas.COLOURS[i % len(canvas.COLOURS)],
                marker=marker,
                markersize=4,
                linewidth=1.7,
            )
        if "x" in panel.log and min(x) > 0:
            ax.set_xscale("log")
        elif "x" in panel.log:  # steps, from 0 on
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xlim(left=0)
        if "y" in panel.log:
            ax.set_yscale("log")
        if len(panel.series) > 1:
            ax.legend(fontsize=8, frameon=False)
        ax.set_title(panel.heading, fontsize=10)
        ax.set_xlabel(panel.x)
        ax.set_ylabel(panel.y)
    return figure


def clouds(steps: Mapping[str, tuple[np.ndarray, np.ndarray]], x: str, y: str, *, tall: bool = False) -> Any:
    """Both modalities' points (N, 2) in a panel for each heading, partners joined where there are few."""
    figure, axes = canvas.panels(len(steps), tall=tall, width=4.0, height=3.7)
    for ax, (heading, (images, texts)) in zip(axes, steps.items(), strict=True):
        if len(images) <= 60:
            for a, b in zip(images, texts, strict=True):
                ax.plot(*np.stack([a, b]).T, color="0.8", linewidth=0.7, zorder=1)
        for points, label, colour in ((images, "images", canvas.COLOURS[0]), (texts, "texts", canvas.COLOURS[1])):
            ax.scatter(*points.T, s=16, alpha=0.8, linewidths=0, color=colour, label=label)
        ax.set_title(heading, fontsize=10)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.margins(0.12)
    canvas.legend(figure, axes[0], 2)
    return figure


def scatter(
    panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, tall: bool = False
) -> Any:
    """Points in a panel for each heading, y logarithmic and the same in all, down to 1e-10."""
    figure, axes = canvas.panels(len(panels), tall=tall, height=3.6)
    highest = max(max(up) for _, up in panels.values())
    for ax, (heading, (across, up)) in zip(axes, panels.items(), strict=True):
        ax.scatter(across, up, s=12, alpha=0.6, linewidths=0, color=canvas.COLOURS[1])
        ax.axhline(1, color="0.5", linewidth=1, linestyle=":")
        ax.set_yscale("log")
        ax.set_ylim(1e-10, 5 * highest)
        ax.set_title(heading, fontsize=10)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
    return figure

"""Figures that both the demo and the reproduction draw, each for a page's width or, with `tall`, for a telephone's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapkern.figures.canvas import COLOURS, MARKERS, legend, over_alpha, panels


def modalities(
    images: np.ndarray, texts: np.ndarray, shift: np.ndarray, classes: np.ndarray, names: Any, *, tall: bool = False
) -> Any:
    """Both modalities in the plane of their two leading principal components, before and after texts + shift.

    Each modality has the same weight in the plane's choice, whatever its number of rows.
    """
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    mean = (images.mean(0) + texts.mean(0)) / 2
    weighted = [(x - mean) / np.sqrt(len(x)) for x in (images, texts)]
    plane = np.linalg.svd(np.concatenate(weighted), full_matrices=False)[2][:2]
    dots, before, after = ((x - mean) @ plane.T for x in (images, texts, texts + shift))
    colours = np.array((*COLOURS, "#1f9d55", "#111827"))
    figure, axes = panels(2, tall=tall, height=4.2)
    everything = np.concatenate([dots, before, after])
    low, high = everything.min(0), everything.max(0)
    room = 0.06 * (high - low)
    for ax, stars, heading in zip(axes, (before, after), ("As trained (α = 0)", "Gap closed (α = 1)"), strict=True):
        ax.scatter(*dots.T, c=colours[classes % 10], s=8, alpha=0.5, linewidths=0, label="images")
        ax.scatter(
            *stars.T,
            marker="*",
            s=170,
            c=colours[np.arange(len(texts)) % 10],
            edgecolors="black",
            zorder=3,
            label="class prompts",
        )
        for name, place in zip(names, stars, strict=True):
            ax.annotate(name, place, xytext=(6, 3), textcoords="offset points", fontsize=8)
        if ax is axes[0]:
            ax.annotate("", stars.mean(0), dots.mean(0), arrowprops={"arrowstyle": "<->", "color": "0.25"}, zorder=4)
        ax.set_title(heading, fontsize=10)
        ax.set_xlim(low[0] - room[0], high[0] + 2 * room[0])
        ax.set_ylim(low[1] - room[1], high[1] + room[1])
        ax.set_xlabel("first principal component")
        ax.set_ylabel("second principal component")
    legend(figure, axes[0], 2)
    return figure


def training(history: Sequence[Mapping[str, float]], *, tall: bool = False) -> Any:
    """Loss and gap norm over training steps."""
    steps = [entry["step"] for entry in history]
    figure, axes = panels(2, tall=tall)
    axes[0].plot(steps, [entry["loss"] for entry in history], color=COLOURS[0])
    axes[0].set_ylabel("contrastive loss")
    axes[1].plot(steps, [entry["gap"] for entry in history], color=COLOURS[1])
    axes[1].set_ylabel("gap norm  ‖μ(images) − μ(texts)‖")
    axes[1].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("training step")
    return figure


def robustness_and_accuracy(result: Any, *, tall: bool = False) -> Any:
    """A `SweepResult` over alpha in two panels: robustness, and accuracy beside clean accuracy."""
    figure, axes = panels(2, tall=tall, height=3.9)
    over_alpha(result.series("robustness"), axes[0], "robustness")
    over_alpha(result.series("accuracy"), axes[1], "accuracy")
    alphas, clean = next(iter(result.series("clean_accuracy").values()))
    axes[1].plot(alphas, clean, color="black", linewidth=1.4, label="unperturbed")
    low = min(axes[0].get_ylim()[0], axes[1].get_ylim()[0])
    for ax in axes:
        ax.set_ylim(low, 1.005)
    legend(figure, axes[1], 2 if tall else 5)
    return figure


def templates(rows: Sequence[Mapping[str, Any]], *, tall: bool = False) -> Any:
    """Accuracy when a caption template takes the place of the first one: with the gap, and with the gap closed."""
    figure, (ax,) = panels(1, width=5.2 if tall else 9.0, height=0.34 * len(rows) + 1.3)
    places = np.arange(len(rows))[::-1]
    for offset, key, label, colour in (
        (0.18, "open", "gap as trained (α = 0)", COLOURS[7]),
        (-0.18, "closed", "gap closed (α = 1)", COLOURS[0]),
    ):
        ax.barh(places + offset, [row[key] for row in rows], height=0.34, label=label, color=colour)
    ax.set_yticks(places, [f"{row['template']}{'' if row['seen'] else '  (unseen)'}" for row in rows], fontsize=8)
    lowest = min(min(row["open"], row["closed"]) for row in rows)
    ax.set_xlim(max(0.0, lowest - 0.05), 1.0)
    ax.set_xlabel("accuracy on test images")
    legend(figure, ax, 2)
    return figure


def over_noise(
    robustness: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    second: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    clean: float | None = None,
    label: str = "accuracy",
    scale: str = "per coordinate",
    tall: bool = False,
) -> Any:
    """Named lines of (variances, values) in two panels: robustness, and accuracy beside `clean` accuracy."""
    figure, axes = panels(2, tall=tall, height=3.9)
    styles = dict(zip(robustness, zip((COLOURS[7], COLOURS[0], COLOURS[1]), MARKERS, strict=False), strict=False))
    for ax, series, name in zip(axes, (robustness, second), ("robustness", label), strict=True):
        for move, (variances, values) in series.items():
            colour, marker = styles[move]
            ax.plot(variances, values, label=move, color=colour, marker=marker, markersize=4, linewidth=1.8)
        ax.set_xscale("log")
        ax.set_xticks(variances, [f"{v:g}" for v in variances])
        ax.minorticks_off()
        ax.set_xlabel(f"variance of the noise, {scale}")
        ax.set_ylabel(name)
    if clean is not None:
        axes[1].axhline(clean, color="black", linewidth=1.4, label="unperturbed")
    low = min(ax.get_ylim()[0] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, 1.005)
    legend(figure, axes[0 if clean is None else 1], 2 if tall else 4)
    return figure

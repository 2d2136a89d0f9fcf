"""Figures that need no further words; matplotlib without its global state, so that no display is ever asked for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gapkern import _check

if TYPE_CHECKING:
    from gapkern.sweep import SweepResult

COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9b5a1a", "#e03e3e", "#64748b")
MARKERS = "osD^vP*X"


def _figure(columns: int, width: float = 5.2, height: float = 3.9) -> tuple[Any, Any]:
    figure_module = _check.extra("matplotlib.figure", "matplotlib", "demo")
    figure = figure_module.Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _alpha_axis(ax: Any) -> None:
    ax.axvline(1.0, color="0.6", linewidth=1, linestyle=":")
    ax.annotate("gap closed", (1.0, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, color="0.4",
                ha="right", va="bottom")  # fmt: skip
    ax.set_xlabel("α, the share of the gap that is closed")


def over_alpha(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ax: Any, *, label: str, dashed: bool = False
) -> None:
    """One line for each named series of (alphas, values)."""
    for i, (name, (alphas, values)) in enumerate(series.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        ax.plot(alphas, values, label=name, linewidth=1.8, linestyle="--" if dashed else "-", **style)
    _alpha_axis(ax)
    ax.set_ylabel(label)


def sweep(result: "SweepResult") -> Any:
    """Robustness, agreement and, where labels were given, accuracy of every perturbation over alpha."""
    labelled = any(row["accuracy"] is not None for row in result.rows)
    names = ["robustness", "agreement", *(["accuracy"] if labelled else [])]
    figure, axes = _figure(len(names), width=4.6)
    for ax, name in zip(axes, names, strict=True):
        over_alpha(result.series(name), ax, label=name)
        ax.set_title({"robustness": "Nearest neighbour survives", "agreement": "… and is the original one",
                      "accuracy": "Nearest neighbour is right"}[name], fontsize=10)  # fmt: skip
    if labelled:
        alphas, clean = next(iter(result.series("clean_accuracy").values()))
        axes[-1].plot(alphas, clean, color="black", linewidth=1.2, label="unperturbed")
    axes[-1].legend(fontsize=8, frameon=False)
    return figure


def modalities(images: np.ndarray, texts: np.ndarray, shift: np.ndarray, classes: np.ndarray, names: Any) -> Any:
    """Both modalities in the plane of their two leading principal components, before and after texts + shift."""
    both = np.concatenate([images, texts]).astype(np.float64)
    mean = both.mean(0)
    _, _, axes_rows = np.linalg.svd(both - mean, full_matrices=False)
    plane = axes_rows[:2]
    figure, axes = _figure(2, height=4.3)
    dots = (images - mean) @ plane.T
    for ax, moved, heading in zip(axes, (texts, texts + shift), ("As trained", "Gap closed (α = 1)"), strict=True):
        colours = np.array((*COLOURS, "#1f9d55", "#111827"))
        ax.scatter(*dots.T, c=colours[classes % 10], s=7, alpha=0.55, linewidths=0, label="images")
        stars = (moved - mean) @ plane.T
        ax.scatter(*stars.T, marker="*", s=190, c=colours[np.arange(len(texts)) % 10], edgecolors="black", zorder=3,
                   label="class prompts")  # fmt: skip
        for name, place in zip(names, stars, strict=True):
            ax.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        centres = dots.mean(0), stars.mean(0)
        ax.annotate("", centres[1], centres[0], arrowprops={"arrowstyle": "<->", "color": "0.35"})
        ax.set_title(heading, fontsize=10)
        ax.set_xlabel("first principal component")
    limits = np.concatenate([dots, (texts - mean) @ plane.T, (texts + shift - mean) @ plane.T])
    for ax in axes:
        ax.set_xlim(limits[:, 0].min() - 0.1, limits[:, 0].max() + 0.15)
        ax.set_ylim(limits[:, 1].min() - 0.1, limits[:, 1].max() + 0.1)
    axes[0].set_ylabel("second principal component")
    axes[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def training(history: Sequence[Mapping[str, float]]) -> Any:
    """Loss and gap norm over training steps."""
    steps = [entry["step"] for entry in history]
    figure, axes = _figure(2)
    axes[0].plot(steps, [entry["loss"] for entry in history], color=COLOURS[0])
    axes[0].set_ylabel("contrastive loss")
    axes[1].plot(steps, [entry["gap"] for entry in history], color=COLOURS[1])
    axes[1].set_ylabel("gap norm  ‖μ(images) − μ(texts)‖")
    axes[1].set_ylim(bottom=0)
    for ax in axes:
        ax.set_xlabel("training step")
    return figure


def robustness_and_accuracy(result: "SweepResult") -> Any:
    """Two panels over alpha: robustness, and accuracy under the same perturbations beside clean accuracy."""
    figure, axes = _figure(2)
    over_alpha(result.series("robustness"), axes[0], label="robustness")
    over_alpha(result.series("accuracy"), axes[1], label="accuracy")
    alphas, clean = next(iter(result.series("clean_accuracy").values()))
    axes[1].plot(alphas, clean, color="black", linewidth=1.4, label="unperturbed")
    low = min(axes[0].get_ylim()[0], axes[1].get_ylim()[0])
    for ax in axes:
        ax.set_ylim(low, 1.02)
    axes[1].legend(fontsize=8, frameon=False, loc="lower center", ncols=2)
    return figure


def templates(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy when a caption template takes the place of the first one: with the gap, and with the gap closed."""
    figure, (ax,) = _figure(1, width=9.0, height=0.34 * len(rows) + 1.3)
    places = np.arange(len(rows))[::-1]
    for offset, key, label, colour in ((0.18, "open", "gap as trained (α = 0)", COLOURS[7]),
                                       (-0.18, "closed", "gap closed (α = 1)", COLOURS[0])):  # fmt: skip
        ax.barh(places + offset, [row[key] for row in rows], height=0.34, label=label, color=colour)
    ax.set_yticks(places, [f"{row['template']}{'' if row['seen'] else '  (unseen)'}" for row in rows], fontsize=8)
    lowest = min(min(row["open"], row["closed"]) for row in rows)
    ax.set_xlim(max(0.0, lowest - 0.05), 1.0)
    ax.set_xlabel("accuracy on test images")
    ax.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure

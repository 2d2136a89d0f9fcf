"""Figures that need no further words; matplotlib without its global state, so that no display is ever asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapkern import _check

COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9b5a1a", "#e03e3e", "#64748b")
MARKERS = "osD^vP*X"


def _figure(panels: int, *, tall: bool = False, width: float = 4.8, height: float = 3.7) -> tuple[Any, Any]:
    """Panels side by side, or with `tall` one below the other, for narrow screens."""
    figure_module = _check.extra("matplotlib.figure", "matplotlib", "demo")
    rows, columns = (panels, 1) if tall else (1, panels)
    figure = figure_module.Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _legend(figure: Any, ax: Any, columns: int) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _alpha_axis(ax: Any) -> None:
    ax.axvline(1.0, color="0.6", linewidth=1, linestyle=":")
    ax.annotate(
        "gap closed",
        (1.0, 0.02),
        xycoords=("data", "axes fraction"),
        rotation=90,
        fontsize=8,
        color="0.4",
        ha="right",
        va="bottom",
    )
    ax.set_xlabel("α, the share of the gap that is closed")


def _over_alpha(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ax: Any, label: str) -> None:
    """One line for each named series of (alphas, values)."""
    for i, (name, (alphas, values)) in enumerate(series.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        ax.plot(alphas, values, label=name, linewidth=1.8, **style)
    _alpha_axis(ax)
    ax.set_ylabel(label)


def sweep(result: Any) -> Any:
    """A `SweepResult` over alpha: robustness, agreement and, where labels were given, accuracy."""
    labelled = any(row["accuracy"] is not None for row in result.rows)
    names = ["robustness", "agreement", *(["accuracy"] if labelled else [])]
    figure, axes = _figure(len(names))
    for ax, name in zip(axes, names, strict=True):
        _over_alpha(result.series(name), ax, name)
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
    _legend(figure, axes[-1], 4)
    return figure


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
    figure, axes = _figure(2, tall=tall, height=4.2)
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
    _legend(figure, axes[0], 2)
    return figure


def training(history: Sequence[Mapping[str, float]], *, tall: bool = False) -> Any:
    """Loss and gap norm over training steps."""
    steps = [entry["step"] for entry in history]
    figure, axes = _figure(2, tall=tall)
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
    figure, axes = _figure(2, tall=tall, height=3.9)
    _over_alpha(result.series("robustness"), axes[0], "robustness")
    _over_alpha(result.series("accuracy"), axes[1], "accuracy")
    alphas, clean = next(iter(result.series("clean_accuracy").values()))
    axes[1].plot(alphas, clean, color="black", linewidth=1.4, label="unperturbed")
    low = min(axes[0].get_ylim()[0], axes[1].get_ylim()[0])
    for ax in axes:
        ax.set_ylim(low, 1.005)
    _legend(figure, axes[1], 2 if tall else 5)
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
    figure, axes = _figure(2, tall=tall, height=3.9)
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
    _legend(figure, axes[0 if clean is None else 1], 2 if tall else 4)
    return figure


def templates(rows: Sequence[Mapping[str, Any]], *, tall: bool = False) -> Any:
    """Accuracy when a caption template takes the place of the first one: with the gap, and with the gap closed."""
    figure, (ax,) = _figure(1, width=5.2 if tall else 9.0, height=0.34 * len(rows) + 1.3)
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
    _legend(figure, ax, 2)
    return figure


def trajectory(path: Any, *, tall: bool = False) -> Any:
    """A `Trajectory` over steps: loss and gradient, the gap, variance along and across it, softmax sums."""
    figure, axes = _figure(4, tall=tall, width=4.0, height=3.4)
    panels = (
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
    for ax, (heading, names, logarithmic) in zip(axes, panels, strict=True):
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
    figure, axes = _figure(len(names), width=3.6, height=0.42 * len(factories) + 1.6)
    size = {row["factory"]: row["bytes_per_vector"] for row in result.rows}
    for ax, name in zip(axes, names, strict=True):
        for shift, label in ((False, "as it is"), (True, "gap closed")):
            values = [next(r[name] for r in result.rows if (r["factory"], r["shift"]) == (f, shift)) for f in factories]
            places = np.arange(len(factories)) + (0.2 if shift else -0.2)
            ax.barh(places, values, 0.38, color=COLOURS[0] if shift else "0.7", label=label)
        ax.set_xlabel(name)
        ax.set_yticks(range(len(factories)), [f"{f}, {size[f]:.0f} B" for f in factories] if ax is axes[0] else [])
        ax.invert_yaxis()
    _legend(figure, axes[0], 2)
    return figure

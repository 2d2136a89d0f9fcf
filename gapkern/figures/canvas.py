"""What figures share: panels, colours, legends; matplotlib without global state, so that it needs no display."""

from collections.abc import Mapping, Sequence
from typing import Any

from gapkern import _check

COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9b5a1a", "#e03e3e", "#64748b")
MARKERS = "osD^vP*X"


def panels(count: int, *, tall: bool = False, width: float = 4.8, height: float = 3.7) -> tuple[Any, Any]:
    """Panels side by side, or with `tall` one below the other, for narrow screens."""
    figure_module = _check.extra("matplotlib.figure", "matplotlib", "demo")
    rows, columns = (count, 1) if tall else (1, count)
    figure = figure_module.Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def legend(figure: Any, ax: Any, columns: int) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def alpha_axis(ax: Any) -> None:
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


def over_alpha(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ax: Any, label: str) -> None:
    """One line for each named series of (alphas, values)."""
    for i, (name, (alphas, values)) in enumerate(series.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        ax.plot(alphas, values, label=name, linewidth=1.8, **style)
    alpha_axis(ax)
    ax.set_ylabel(label)

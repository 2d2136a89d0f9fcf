"""The paper's figures and theorems (Chowers et al., CVPR 2026), run again: `gapkern reproduce`.

Each target is a function `(Context) -> Result` in one of this package's modules. `run` writes for each of its figures
PNG, PDF and CSV, for each target a JSON, and for all of them `report.html`.
"""

from dataclasses import dataclass

from gapkern.experiments.reproduce.claims import Claim, Context, Figure, Result, Table

__all__ = ["TARGETS", "Claim", "Context", "Figure", "Result", "Table", "Target"]


@dataclass(frozen=True)
class Target:
    """A figure or statement, and the function that reproduces it: `function` of `module` in this package.

    `uses_embeddings` tells whether its numbers depend on the embeddings given.
    """

    name: str
    title: str
    module: str
    function: str
    uses_embeddings: bool = False

    def __call__(self, context: Context) -> Result:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{self.module}"), self.function)(context)


# In the order in which a reader wants them.
TARGETS = {
    target.name: target
    for target in (
        Target("fig1", "The gap, and what rewording costs", "gap_figures", "fig1", True),
        Target("fig2", "Closing the gap naively", "gap_figures", "fig2", True),
        Target("fig3", "Three points in the plane: loss and gradient", "dynamics_figures", "fig3"),
        Target("fig4", "Training from two tight clusters", "dynamics_figures", "fig4"),
        Target("fig5", "The toy model: what shrinks first", "dynamics_figures", "fig5"),
        Target("fig6", "Softmaxes become doubly stochastic late", "dynamics_figures", "fig6"),
        Target("thm3.1", "Theorem 3.1: the gradient of tight, distant clusters", "theorems", "thm3_1"),
        Target("thm3.2", "Theorem 3.2: why the gap freezes", "theorems", "thm3_2"),
        Target("thm3.3", "Assumption 3.3: the gap is orthogonal to both modalities", "theorems", "thm3_3", True),
        Target("thm3.4", "Theorem 3.4: closing the gap makes neighbours robust", "theorems", "thm3_4", True),
        Target("thm3.5", "Theorem 3.5: an orthogonal shift changes no neighbour", "theorems", "thm3_5", True),
        Target("fig8", "Robustness to Gaussian noise", "robustness_figures", "fig8", True),
        Target("fig9", "Robustness to quantisation", "robustness_figures", "fig9", True),
        Target("fig10", "Robustness to rewording", "robustness_figures", "fig10", True),
        Target("baselines", "Every published way to close the gap", "comparison", "baselines", True),
    )
}

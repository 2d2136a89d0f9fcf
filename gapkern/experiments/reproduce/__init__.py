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

    `question` is what a reader should have in mind; `uses_embeddings` tells whether embeddings matter to the numbers.
    """

    name: str
    title: str
    module: str
    function: str
    question: str = ""
    uses_embeddings: bool = False

    def __call__(self, context: Context) -> Result:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{self.module}"), self.function)(context)


# In the order in which a reader wants them.
TARGETS = {
    target.name: target
    for target in (
        Target(
            "fig1",
            "The gap, and what rewording costs",
            "gap_figures",
            "fig1",
            "Do images and texts lie apart, and does it matter which words a text uses?",
            True,
        ),
        Target(
            "fig2",
            "Closing the gap naively",
            "gap_figures",
            "fig2",
            "Does closing the gap help? Published answers differ; this asks why.",
            True,
        ),
        Target(
            "fig3",
            "Three points in the plane: loss and gradient",
            "dynamics_figures",
            "fig3",
            "Does the loss want the gap closed? Three pairs, texts placed as their images, with and without a gap.",
        ),
        Target(
            "fig4",
            "Training from two tight clusters",
            "dynamics_figures",
            "fig4",
            "What does training do to two tight clusters that lie far apart, as a fresh model has them?",
        ),
        Target(
            "fig5",
            "The toy model: what shrinks first",
            "dynamics_figures",
            "fig5",
            "What does training take first from two round clouds? S is the softmax mass a text receives in all.",
        ),
        Target(
            "fig6",
            "Softmaxes become doubly stochastic late",
            "dynamics_figures",
            "fig6",
            "When does the pull along the gap end? Once all texts and images receive equal shares, S = 1.",
        ),
        Target(
            "thm3.1",
            "Theorem 3.1: the gradient of tight, distant clusters",
            "training_theorems",
            "thm3_1",
            "Which way does the loss push while the clusters are tight and far apart?",
        ),
        Target(
            "thm3.2",
            "Theorem 3.2: why the gap freezes",
            "training_theorems",
            "thm3_2",
            "Why does training leave the gap where it is?",
        ),
        Target(
            "thm3.3",
            "Assumption 3.3: the gap is orthogonal to both modalities",
            "training_theorems",
            "thm3_3",
            "Is the gap at right angles to all differences between texts, and between images?",
            True,
        ),
        Target(
            "thm3.4",
            "Theorem 3.4: closing the gap makes neighbours robust",
            "shift_theorems",
            "thm3_4",
            "Does closing the gap make every image's nearest text safer from noise?",
            True,
        ),
        Target(
            "thm3.5",
            "Theorem 3.5: an orthogonal shift changes no neighbour",
            "shift_theorems",
            "thm3_5",
            "Does a shift at right angles to the texts change any image's nearest text?",
            True,
        ),
        Target(
            "fig8",
            "Robustness to Gaussian noise",
            "robustness_figures",
            "fig8",
            "How much noise do nearest neighbours survive, with the gap open and closed?",
            True,
        ),
        Target(
            "fig9",
            "Robustness to quantisation",
            "robustness_figures",
            "fig9",
            "How much rounding do they survive?",
            True,
        ),
        Target(
            "fig10",
            "Robustness to rewording",
            "robustness_figures",
            "fig10",
            "Do they survive other words for the same thing?",
            True,
        ),
        Target(
            "baselines",
            "Every published way to close the gap",
            "comparison",
            "baselines",
            "There are other ways to bring two modalities together. Do they do as well?",
            True,
        ),
        Target(
            "projection",
            "Beyond the paper: projecting each image",
            "projection_figures",
            "projection",
            "Closing the gap moves all by one vector. Each image also has an offset of its own: does removing it help?",
            True,
        ),
    )
}

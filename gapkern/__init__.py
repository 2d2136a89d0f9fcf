"""gapkern: fused contrastive losses and modality-gap tools for multi-modal embeddings."""

from gapkern import _load
from gapkern._version import __version__

_load.load()

from gapkern.gap import MeanShift, gap_metrics  # noqa: E402
from gapkern.losses import ClipLoss, contrastive_loss  # noqa: E402
from gapkern.perturb import Gaussian, Quantize, Replace, Uniform, perturb  # noqa: E402
from gapkern.robustness import RobustnessResult, robustness  # noqa: E402
from gapkern.sweep import SweepResult, sweep  # noqa: E402

__all__ = [
    "ClipLoss",
    "Gaussian",
    "MeanShift",
    "Quantize",
    "Replace",
    "RobustnessResult",
    "SweepResult",
    "Uniform",
    "__version__",
    "contrastive_loss",
    "gap_metrics",
    "perturb",
    "robustness",
    "sweep",
]

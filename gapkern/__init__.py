"""gapkern: fused contrastive losses and modality-gap tools for multi-modal embeddings."""

from gapkern import _load
from gapkern._version import __version__

_load.load()

from gapkern.gap import MeanShift, gap_metrics  # noqa: E402
from gapkern.losses import ClipLoss, contrastive_loss  # noqa: E402

__all__ = ["ClipLoss", "MeanShift", "__version__", "contrastive_loss", "gap_metrics"]

"""gapkern: fused contrastive losses and modality-gap tools for multi-modal embeddings."""

from gapkern import _load
from gapkern._version import __version__

_load.load()

__all__ = ["__version__"]

"""Models of open_clip, transformers and sentence-transformers behind one face."""

from gapkern.models.loading import PRECISIONS, load
from gapkern.models.model import Model, batch, zero_shot_classifier

__all__ = ["PRECISIONS", "Model", "batch", "load", "zero_shot_classifier"]

"""Contrastive losses that never form the N x M logits: functions, and open_clip's classes on top of them."""

from gapkern.losses.functional import contrastive_loss, sigmoid_loss
from gapkern.losses.open_clip import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from gapkern.losses.patch import patch_open_clip

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "SigLipLoss",
    "contrastive_loss",
    "patch_open_clip",
    "sigmoid_loss",
]

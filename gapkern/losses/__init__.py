"""Contrastive losses that never form the N x M logits: functions, and open_clip's classes on top of them."""

from gapkern.losses.cached import cached
from gapkern.losses.functional import contrastive_loss, sigmoid_loss
from gapkern.losses.gist import gist_loss
from gapkern.losses.info_nce import info_nce_loss, ntxent_loss
from gapkern.losses.matryoshka import Matryoshka, uniformity_loss
from gapkern.losses.open_clip import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from gapkern.losses.patch import patch_open_clip
from gapkern.losses.supervised import mil_nce_loss, supcon_loss
from gapkern.losses.transformers import patch_transformers

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "Matryoshka",
    "SigLipLoss",
    "cached",
    "contrastive_loss",
    "gist_loss",
    "info_nce_loss",
    "mil_nce_loss",
    "ntxent_loss",
    "patch_open_clip",
    "patch_transformers",
    "sigmoid_loss",
    "supcon_loss",
    "uniformity_loss",
]

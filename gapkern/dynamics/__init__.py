"""How the modality gap comes about: gradient descent on the contrastive loss, and what is recorded on the way."""

from gapkern.dynamics.descent import descend, isotropic_gaussians, tight_clusters
from gapkern.dynamics.measures import Evaluation, evaluate, measure
from gapkern.dynamics.trajectory import Snapshot, Trajectory

__all__ = [
    "Evaluation",
    "Snapshot",
    "Trajectory",
    "descend",
    "evaluate",
    "isotropic_gaussians",
    "measure",
    "tight_clusters",
]

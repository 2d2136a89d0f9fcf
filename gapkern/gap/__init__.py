"""The modality gap: `gap_metrics` measures it, `MeanShift` and `Projection` close it, `BASELINES` compares others."""

from gapkern.gap.baselines import BASELINES
from gapkern.gap.estimator import NotFittedError
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.metrics import gap_metrics
from gapkern.gap.mixed import MixedShift, fuse
from gapkern.gap.projection import Projection
from gapkern.gap.structure import clustering_scores, fisher_scores, gap_structure, intrinsic_dimension

__all__ = [
    "BASELINES",
    "MeanShift",
    "MixedShift",
    "NotFittedError",
    "Projection",
    "clustering_scores",
    "fisher_scores",
    "fuse",
    "gap_metrics",
    "gap_structure",
    "intrinsic_dimension",
]

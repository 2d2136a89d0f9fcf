"""The modality gap: measured (`gap_metrics`), closed (`MeanShift`), and what else was tried (`BASELINES`)."""

from gapkern.gap.baselines import BASELINES
from gapkern.gap.estimator import NotFittedError
from gapkern.gap.meanshift import MeanShift
from gapkern.gap.metrics import gap_metrics

__all__ = ["BASELINES", "MeanShift", "NotFittedError", "gap_metrics"]

"""Robustness under perturbations (Chowers et al., CVPR 2026, Eq. 10): three estimators of one number, and sweeps."""

from gapkern.robustness.estimators import robustness
from gapkern.robustness.result import RobustnessResult
from gapkern.robustness.sweep import SweepResult, best_alpha, sweep

__all__ = ["RobustnessResult", "SweepResult", "best_alpha", "robustness", "sweep"]

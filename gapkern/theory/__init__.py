"""Does the paper's guarantee apply to these embeddings, and how tightly? Theorems 3.1 to 3.5 as functions."""

from gapkern.theory.assess import Verdict, assess
from gapkern.theory.certificates import Certificate, Certificates, certify
from gapkern.theory.gradients import Freeze, LeadingGradient, freeze, leading_gradient
from gapkern.theory.neighbours import (
    Orthogonality,
    Preservation,
    RobustnessCurve,
    orthogonality,
    preservation,
    robustness_curve,
)

__all__ = [
    "Certificate",
    "Certificates",
    "Freeze",
    "LeadingGradient",
    "Orthogonality",
    "Preservation",
    "RobustnessCurve",
    "Verdict",
    "assess",
    "certify",
    "freeze",
    "leading_gradient",
    "orthogonality",
    "preservation",
    "robustness_curve",
]

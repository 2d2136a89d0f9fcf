"""Zero-shot classification, retrieval, multiple choice, templates; with and without the shift, on one rank or more."""

from gapkern.datasets import TASKS
from gapkern.evaluation.encode import Encoder, from_model
from gapkern.evaluation.inputs import from_files
from gapkern.evaluation.mixed import MixedOutcome, OfModality, mixed_retrieval
from gapkern.evaluation.settings import Outcome, Settings
from gapkern.evaluation.tasks import classification, multiple_choice, retrieval, templates

__all__ = [
    "TASKS",
    "Encoder",
    "MixedOutcome",
    "OfModality",
    "Outcome",
    "Settings",
    "classification",
    "from_files",
    "from_model",
    "mixed_retrieval",
    "multiple_choice",
    "retrieval",
    "templates",
]

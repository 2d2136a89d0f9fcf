"""gapkern: fused contrastive losses and modality-gap tools for multi-modal embeddings."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from gapkern import _load
from gapkern._version import __version__

_load.load()

from gapkern.gap import MeanShift, Projection, gap_metrics  # noqa: E402
from gapkern.losses import (  # noqa: E402
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    Matryoshka,
    SigLipLoss,
    cached,
    contrastive_loss,
    gist_loss,
    info_nce_loss,
    mil_nce_loss,
    ntxent_loss,
    patch_open_clip,
    sigmoid_loss,
    supcon_loss,
    uniformity_loss,
)
from gapkern.memory import empty_cache  # noqa: E402
from gapkern.perturb import Gaussian, Quantize, Replace, Uniform  # noqa: E402
from gapkern.robustness import RobustnessResult, SweepResult, best_alpha, sweep  # noqa: E402

# The functions `perturb` and `robustness` stay in the modules of their names.
__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "Gaussian",
    "Matryoshka",
    "MeanShift",
    "Projection",
    "Quantize",
    "Replace",
    "RobustnessResult",
    "SigLipLoss",
    "SweepResult",
    "Uniform",
    "__version__",
    "best_alpha",
    "cached",
    "contrastive_loss",
    "empty_cache",
    "gap_metrics",
    "gist_loss",
    "info_nce_loss",
    "mil_nce_loss",
    "ntxent_loss",
    "patch_open_clip",
    "sigmoid_loss",
    "supcon_loss",
    "sweep",
    "uniformity_loss",
]

# Loaded when they are first named: some need packages of the extras, or take a second to import.
_SUBMODULES = frozenset(
    (
        "captions",
        "cli",
        "datasets",
        "dynamics",
        "embeddings",
        "evaluation",
        "experiments",
        "figures",
        "files",
        "layout",
        "models",
        "ops",
        "prompts",
        "ranks",
        "reference",
        "retrieval",
        "selfcheck",
        "testing",
        "theory",
    )
)


def __getattr__(name: str) -> _ModuleType:
    if name in _SUBMODULES:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'gapkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})

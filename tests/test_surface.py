"""The public surface: where each name lives, and that importing it stays light."""

import importlib
import json
import subprocess
import sys

import pytest

import gapkern
import gapkern.dynamics
import gapkern.theory
from tests import warm

NAMES = {
    "gapkern": [
        "ClipLoss",
        "CoCaLoss",
        "DistillClipLoss",
        "SigLipLoss",
        "contrastive_loss",
        "sigmoid_loss",
        "patch_open_clip",
        "MeanShift",
        "gap_metrics",
        "Gaussian",
        "Uniform",
        "Quantize",
        "Replace",
        "sweep",
        "best_alpha",
    ],
    "gapkern.losses": [
        "Matryoshka",
        "cached",
        "gist_loss",
        "info_nce_loss",
        "mil_nce_loss",
        "ntxent_loss",
        "supcon_loss",
        "uniformity_loss",
        "ClipLoss",
        "CoCaLoss",
        "DistillClipLoss",
        "SigLipLoss",
        "contrastive_loss",
        "sigmoid_loss",
        "patch_open_clip",
        "patch_transformers",
    ],
    "gapkern.dynamics": ["Trajectory", "descend", "evaluate", "isotropic_gaussians", "measure", "tight_clusters"],
    "gapkern.theory": [
        "assess",
        "certify",
        "freeze",
        "leading_gradient",
        "orthogonality",
        "preservation",
        "robustness_curve",
    ],
    "gapkern.embeddings": ["Embeddings", "RankLost", "embed", "manifest", "model_of", "verify", "write_folder"],
    "gapkern.models": ["Model", "batch", "load", "zero_shot_classifier"],
    "gapkern.gap": [
        "BASELINES",
        "MeanShift",
        "MixedShift",
        "Projection",
        "clustering_scores",
        "fisher_scores",
        "fuse",
        "gap_metrics",
        "gap_structure",
        "intrinsic_dimension",
    ],
    "gapkern.evaluation": ["mixed_retrieval"],
    "gapkern.perturb": ["Chain", "Gaussian", "Quantize", "Replace", "Uniform", "perturb"],
    "gapkern.robustness": ["RobustnessResult", "SweepResult", "best_alpha", "robustness", "sweep"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_are_said_to_be(module):
    place = importlib.import_module(module)
    for name in NAMES[module]:
        assert callable(getattr(place, name)) or isinstance(getattr(place, name), dict), name
        documented = getattr(place, name)
        assert isinstance(documented, dict) or documented.__doc__, name


def test_importing_gapkern_imports_none_of_its_extras_and_no_compiler():
    extras = ("open_clip", "matplotlib", "pandas", "faiss", "sklearn", "scipy", "rich", "torch._dynamo")
    code = f"import sys, gapkern; print([m for m in {extras} if m in sys.modules])"
    assert warm.run(code).stdout == "[]\n"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = gapkern.robustness.SweepResult([], gapkern.MeanShift())
    with pytest.raises(ImportError, match=r"pandas is needed here; run `pip install 'gapkern\[tables\]'`"):
        result.to_dataframe()


def test_every_operator_has_a_schema_and_a_check():
    import torch

    from gapkern import selfcheck

    operators = {
        "contrastive_lse",
        "contrastive_lse_backward",
        "contrastive_class_sums",
        "contrastive_class_sums_backward",
        "contrastive_chunk_lse",
        "contrastive_chunk_gradient",
        "contrastive_chunk_sigmoid",
        "sigmoid_loss",
        "contrastive_prefix_lse",
        "contrastive_prefix_lse_backward",
        "contrastive_masked_lse",
        "contrastive_masked_lse_backward",
        "contrastive_masked_sigmoid",
        "contrastive_masked_chunk_lse",
        "contrastive_masked_chunk_gradient",
        "contrastive_masked_chunk_sigmoid",
        "contrastive_self_lse",
        "contrastive_self_lse_backward",
        "meanshift_sum",
        "meanshift_gram",
        "meanshift_apply",
        "perturb_bits",
        "perturb_noise",
        "perturb_noisy_gallery",
        "perturb_quantize",
        "robustness_exact",
        "robustness_nearest",
    }
    for name in operators:
        assert getattr(torch.ops.gapkern, name).default._schema.name == f"gapkern::{name}"
    assert all(check.passed for check in selfcheck.checks())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "100"}, {"GOMP_SPINCOUNT": "100"}),
    ],
)
def test_the_command_has_its_threads_spin_less_unless_the_environment_says(given, found, monkeypatch, capsys):
    import gapkern_command

    for name in gapkern_command.SETTINGS:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["gapkern", "doctor", "--json"])
    assert gapkern_command.main() == 0
    assert json.loads(capsys.readouterr().out)["waiting"] == found


def test_the_command_decides_before_pytorch_is_loaded():
    code = "import sys, gapkern_command; print({'torch', 'numpy', 'gapkern'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "set()\n"

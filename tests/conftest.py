"""What all tests share: real embeddings, skips with a reason, thread settings."""

import importlib.util
import os
from pathlib import Path

# Read as OpenMP is loaded, here and in every process a test starts. Its threads otherwise spin where they wait for each
# other: beside another busy process that multiplies the time of each parallel region, twenty times in a training step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Processes that share the tests share the processors too, as do the processes that tests start. The matrices are
# small: more threads than that only wait for each other.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))),
)

# Asked for by cuBLAS where deterministic algorithms are (the fixture `poisoned`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

from tests.evaluated import files_of_all_tasks  # noqa: F401
from tests.reproduced import reproduced  # noqa: F401
from tests.sharing import pytest_xdist_make_scheduler  # noqa: F401
from tests.software_gpu import fixture
from tests.software_gpu.fixture import cuda_device, software_gpu, software_machine  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, so that what fails here fails elsewhere; HYPOTHESIS_PROFILE=search draws others.
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
    settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def real_embeddings(name: str) -> np.ndarray:
    """The published embeddings `features_<name>.npy` (name: clip, convirt, videoclip) as float32 (2, N, D).

    Looked for in the folder GAPKERN_TEST_DATA, else in ../shared/data beside the repository; the test is skipped
    where they are absent.
    """
    folder = Path(os.environ.get("GAPKERN_TEST_DATA", ROOT.parent / "shared" / "data"))
    path = folder / f"features_{name}.npy"
    if not path.exists():
        pytest.skip(f"no real embeddings: {path} is absent (set GAPKERN_TEST_DATA)")
    return np.load(path, allow_pickle=False)


@pytest.fixture(scope="session")
def real_data():
    """The function `real_embeddings`, for tests that would rather not import it."""
    return real_embeddings


@pytest.fixture(scope="session")
def trained_digits():
    """The digits under seed 0, and the model that the demo trains on them with its defaults; once for all tests."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    from gapkern import datasets
    from gapkern.experiments import digits

    data = datasets.scans(0)
    return data, digits.train(data)


@pytest.fixture
def poisoned():
    """New tensors and blocks hold NaN (integers their largest value or -1): what a kernel forgets to write is found."""
    import gapkern  # noqa: F401

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.ops.gapkern.fill_allocations(True)
    yield
    torch.ops.gapkern.fill_allocations(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    """The working folder is an empty one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def coded_models(monkeypatch, empty_folder):
    """Models whose embeddings say what they were made from, in an empty working folder: see `tests.coded`."""
    from gapkern import models
    from tests import coded

    monkeypatch.setattr(models, "load", coded.model)


@pytest.fixture
def run(capsys):
    """Runs a command line: its status, argparse's too, and what it printed to stdout and stderr."""
    from gapkern.cli import main

    def run(*line):
        try:
            status = main([str(part) for part in line])
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and saved as empty files: for tests of the numbers beside them."""
    figure = pytest.importorskip("matplotlib.figure").Figure

    def savefig(self, target, **options):
        if not hasattr(target, "write"):
            Path(target).write_bytes(b"")

    monkeypatch.setattr(figure, "savefig", savefig)


def _missing_hardware() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "no GPU is visible"}
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return {"sm90": f"needs a Hopper device (9.x), found {major}.{minor}"}
    return {}


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items):
    fixture.mark(items)
    reasons = _missing_hardware()
    for marker, module in (("open_clip", "open_clip"), ("faiss", "faiss")):
        if importlib.util.find_spec(module) is None:
            reasons[marker] = f"{module} is not installed"
    if not torch.distributed.is_available():
        reasons["distributed"] = "this PyTorch is built without torch.distributed"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

"""Every hand-written device kernel on the CPU: CUDA's threads as fibers (simt/simt.h), in both orders."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import native
from tests.simt import planting
from tests.simt.mistakes import PLANTED

CAPABILITIES = ["classes", "contrastive", "meanshift", "perturb", "robustness", "sm90", "sm90_masked"]


@pytest.fixture(scope="module")
def built():
    """The folder of the emulated kernels' programs, kept: what has not changed is not compiled again."""
    if sys.platform != "linux":
        pytest.skip("fibers by ucontext")
    return native.simt()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_in_both_orders_with_every_barrier_needed(built, capability):
    done = subprocess.run([built / capability], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 5
    assert all(line.startswith("passed") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_planted_mistake_is_caught(built, tmp_path, capability):
    """A test of the test: an index, a sign or a barrier changed in a copy of the kernels."""
    plant = planting.Planting(capability, tmp_path)
    (tmp_path / "right").mkdir()
    assert not plant.kernels_fail(tmp_path / "right")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        mistakes = PLANTED[capability]
        assert [line for line in pool.map(plant, range(len(mistakes)), mistakes) if line] == []

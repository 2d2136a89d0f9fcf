"""The CPU library for 64-bit Arm, cross-compiled and run under qemu: the operators' own tests on it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulated

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

# Small problems of every operator, dtype and range of exponents; `python -m tests.emulated` runs these files whole.
OPERATORS = ["tests/test_meanshift.py", "tests/test_perturb.py", "tests/test_robustness_ops.py"]
OPERATORS += ["-k", "not grid and not product_is_scipys and not instruction_set and not opcheck and not contract"]
LOSSES = ["tests/test_contrastive.py", "tests/test_masked_sigmoid.py"]
LOSSES += ["-k", "values_and_gradients or medium or sigmoid_loss_and_gradients or a_pair_alone or every_id"]


@pytest.fixture(scope="module", autouse=True)
def needed():
    if absent := emulated.missing():
        pytest.skip(absent)


@pytest.mark.parametrize(("isa", "tests"), [("neonbf16", LOSSES), ("neon", LOSSES), ("neon", OPERATORS)])
def test_the_operators_pass_their_tests_on_an_emulated_processor(isa, tests):
    command = [sys.executable, "-m", "tests.emulated", isa, "-m", "not slow", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(rf"emulated: (\d+) operators ran on {isa}", done.stdout)[1]) > 100
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


def test_bfmmla_is_in_one_instruction_set_alone():
    """The other must run where there is none: qemu would stop it, but only where it comes by."""
    folder = emulated.build(ROOT / "build" / "emulated")
    objdump = emulated.COMPILER.replace("g++", "objdump")
    found = {}
    for path in sorted((folder / "build").rglob("*_products_*.o")) + sorted(folder.rglob("kernels_products.cpp.o")):
        isa = re.search(r"kernels_products_(neon\w*)\.dir", str(path))[1]
        text = subprocess.run([objdump, "-d", path], capture_output=True, text=True, check=True).stdout
        found[isa] = ("bfmmla" in text, "fmla" in text)
    assert found == {"neon": (False, True), "neonbf16": (True, True)}

"""What the compiler made of the device kernels: no register spilled, no exponential too many, nothing left out."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import kernel_gates

ROOT = kernel_gates.ROOT
TABLE = json.loads(kernel_gates.TABLE.read_text())


@pytest.fixture(scope="module")
def found():
    """The built library's table."""
    if not kernel_gates.LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    for cache in ROOT.glob(f"build/cmake-{sys.implementation.cache_tag}/CMakeCache.txt"):
        asked = re.search(r"^GAPKERN_CUDA_ARCH_LIST:\w+=(.+)$", cache.read_text(), re.M)
        if asked:
            pytest.skip(f"built for TORCH_CUDA_ARCH_LIST={asked[1]}; the table is of the default architectures")
    try:
        measured = kernel_gates.measured()
    except FileNotFoundError as error:
        pytest.skip(f"no {error}")
    if measured["nvcc"] != TABLE["nvcc"]:
        pytest.skip(f"built by nvcc {measured['nvcc']}; the table is of nvcc {TABLE['nvcc']}")
    return measured


def test_every_kernel_is_as_the_table_has_it(found):
    hopper = bool(os.environ.get("CUTLASS_PATH")) or importlib.util.find_spec("cutlass_library") is not None
    assert kernel_gates.faults(found, kernel_gates.expected(TABLE, hopper)) == []


SOME = "contrastive::lse_tiles<float, true>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda of: of[SOME].update(stack=128), "stack: expected 0, found 128"),
        (lambda of: of[SOME].update(local_loads=3), "local_loads: expected 0, found 3"),
        (lambda of: of[SOME].update(registers=200), "registers: at most"),
        (lambda of: of[SOME].update(exponentials=32), "expected a multiple of 64 (elements a thread), found 32"),
        (lambda of: of[SOME].update(shared=232_449), "shared: at most 232448 bytes, found 232449"),
        (lambda of: of[SOME].update(branches=99), "branches: at most"),
        (lambda of: of[SOME].update(reconvergences=99), "reconvergences: at most"),
        (lambda of: of[SOME].update(instructions=10**5), "instructions: at most"),
        (lambda of: of[SOME].update(issue_slots=10**5), "issue_slots: at most"),
        (lambda of: of.pop(SOME), "in the table, not in the library"),
        (lambda of: of.update({"contrastive::new": of[SOME]}), "contrastive::new: not in the table"),
    ],
)
def test_a_regression_is_named(change, message):
    altered = copy.deepcopy(TABLE)
    change(altered["kernels"]["sm_90"])
    assert any(message in fault for fault in kernel_gates.faults(altered, TABLE))


def test_missing_architectures_and_ptx_are_named():
    altered = {**TABLE, "ptx": [], "kernels": {"sm_80": TABLE["kernels"]["sm_80"]}}
    wrong = kernel_gates.faults(altered, TABLE)
    assert "sm_90: no machine code" in wrong
    assert any("no PTX" in fault for fault in wrong)


def test_tensor_core_kernels_keep_their_instructions():
    kernel = {"registers": 168, "stack": 0, "shared": 0}
    table = {**TABLE, "kernels": {**TABLE["kernels"], "sm_90a": {"gemm": {**kernel, "hgmma": 8}}}}
    altered = {**table, "kernels": {**table["kernels"], "sm_90a": {"gemm": kernel}}}
    assert any("hgmma" in fault for fault in kernel_gates.faults(altered, table))


def test_a_real_spill_is_seen(found, tmp_path, monkeypatch):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    (tmp_path / "planted.cu").write_text(
        "namespace gapkern { __global__ void __launch_bounds__(1024) planted(float* x, int i) {\n"
        "  float kept[64];\n"
        "  for (int j = 0; j < 64; ++j) kept[j] = x[j * 1024 + threadIdx.x];\n"
        "  for (int j = 0; j < 64; ++j) x[threadIdx.x] += kept[(j + i) % 64] * exp2f(kept[j]);\n} }\n"
    )
    library = tmp_path / "libplanted.so"
    command = [nvcc, "-arch=sm_80", "-shared", "-Xcompiler=-fPIC", "-o", library, tmp_path / "planted.cu"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(kernel_gates, "LIBRARY", library)
    row = kernel_gates.measure()["kernels"]["sm_80"]["planted"]
    assert row["stack"] >= 256
    assert row["local_stores"] > 0
    clean = {**row, "stack": 0, "local_stores": 0}
    table = {"nvcc": "", "ptx": [], "kernels": {"sm_80": {"planted": clean}}}
    assert any("stack" in f for f in kernel_gates.faults({**table, "kernels": {"sm_80": {"planted": row}}}, table))


def test_the_library_loads_without_a_driver_and_the_doctor_says_so(found):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gapkern", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded  libgapkern_cuda: loaded; no CUDA device is visible" in done.stdout
    hopper = any("sm90::" in name for name in found["kernels"].get("sm_90a", {}))
    assert "CUDA kernels for every device (chunked)" + ", Hopper (sm90)" * hopper in done.stdout


def test_a_build_whose_tensor_cores_wait_fails(tmp_path, monkeypatch):
    source = (ROOT / "setup.py").read_text().partition("if int(setuptools")[0]
    setup: dict = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_of_gapkern"}
    exec(compile(source, "setup.py", "exec"), setup)
    object_file = tmp_path / "CMakeFiles" / "cuda.cu.o"
    object_file.parent.mkdir()
    object_file.write_text("")
    log = (
        f"[1/2] Building CUDA object {object_file.relative_to(tmp_path)}\n"
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    )
    with pytest.raises(SystemExit, match="C7510"):
        setup["check_tensor_cores"](log, Path(tmp_path))
    assert not object_file.exists(), "the next build would take it for good"
    setup["check_tensor_cores"]("ptxas info    : 0 bytes gmem\n", Path(tmp_path))

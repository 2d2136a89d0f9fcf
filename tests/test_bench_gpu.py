"""The GPU run's cases, callables and checks, on the CPU at small sizes; that it says where there is no GPU."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench import bench_gpu, harness
from tests.conftest import ROOT


@pytest.mark.parametrize("section", bench_gpu.SECTIONS)
def test_every_case_runs_and_is_checked(section, tmp_path):
    done = bench_gpu.run(section, "cpu", True, 60, tmp_path)
    assert [case["error"] for case in done if "error" in case] == []
    assert len(done) >= (0 if section == "memory" else 2)


def test_operators_are_all_of_them_and_those_of_the_cpu():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gapkern::")}
    on_cuda = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"gapkern::{n}", "CUDA")}
    assert on_cuda <= set(bench_gpu.operators("cpu"))
    bench_gpu.smoke("cpu")


def test_a_wrong_result_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_gpu, "nearest", lambda queries, gallery: torch.zeros(len(queries), dtype=torch.int64))
    first, second = bench_gpu.run("search", "cpu", True, 60, tmp_path)
    assert "AssertionError" in first["error"]
    assert "results" in second
    assert "AssertionError" in (tmp_path / "section-search.json").read_text()


def test_collected_with_each_contenders_floor(tmp_path):
    for section in ("ceilings", "contrastive", "rowwise"):
        bench_gpu.run(section, "cpu", True, 60, tmp_path)
    result = bench_gpu.collect(tmp_path)
    assert set(result["rates"]) == {"copy", "bfloat16", "float32"}
    ours = result["sections"]["contrastive"][0]["results"]
    keep, recompute = (ours[f"gapkern, {kind}"] for kind in ("keep", "recompute"))
    assert keep["floor"] / recompute["floor"] == pytest.approx(0.75)
    assert recompute["floor"] == pytest.approx(8 * 64 * 64 * 32 / result["rates"]["bfloat16"])
    assert len(list(bench_gpu.table(result))) > 10


def test_the_stopwatch_of_the_cpu_measures_the_call():
    slept = harness.stopwatch("cpu")(lambda: __import__("time").sleep(0.02))()
    assert 0.015 < slept < 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_without_a_gpu_one_line_and_status_2():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"bench/gpu.sh: no CUDA device is visible to PyTorch of {sys.executable}"]
    assert not done.stdout


def test_the_stages_fit_into_nine_minutes():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    limits = [int(n) for n in re.findall(r'stage [\w"$]+ (\d+) ', script)]
    sanitizers = len(re.findall(r"^sanitize \w+", script, re.M))
    assert sum(limits) + (sanitizers - 1) * 60 < 540


_BARE = """
import sys
from importlib.machinery import PathFinder
absent = {"pandas", "pyarrow", "open_clip", "faiss", "sklearn", "expecttest", "hypothesis", "scipy", "matplotlib"}
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda c, n, *rest: None if n.partition(".")[0] in absent else real(n, *rest))
import pytest
sys.exit(pytest.main(["tests", "-m", "cuda", "-q", "--collect-only", "-p", "no:cacheprovider"]))
"""


def test_the_cuda_tests_are_collected_without_optional_packages():
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _BARE], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for capability in ("contrastive", "meanshift", "perturb", "robustness", "losses"):
        assert f"tests/test_{capability}.py::" in done.stdout

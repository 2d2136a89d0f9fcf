"""The GPU run's cases, callables and checks, on the CPU at small sizes; that it says where there is no GPU."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench import bench_gpu, harness
from bench.gpu import checks, losses, operators, results, rivals, rowwise
from tests.conftest import ROOT


@pytest.mark.parametrize("section", bench_gpu.SECTIONS)
def test_every_case_runs_and_is_checked(section, tmp_path):
    done = bench_gpu.run(section, "cpu", True, 60, tmp_path)
    assert [case["error"] for case in done if "error" in case] == []
    assert len(done) >= (0 if section == "memory" else 1)


def test_operators_are_all_of_them_and_those_of_the_cpu():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gapkern::")}
    on_cuda = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"gapkern::{n}", "CUDA")}
    assert on_cuda <= set(operators.operators("cpu"))
    operators.smoke("cpu")


def test_a_wrong_result_is_recorded_and_the_rest_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(rowwise, "nearest", lambda queries, gallery: torch.zeros(len(queries), dtype=torch.int64))
    first, second = bench_gpu.run("search", "cpu", True, 60, tmp_path)
    assert "AssertionError" in first["error"]
    assert "results" in second
    assert "AssertionError" in (tmp_path / "section-search.json").read_text()


def test_a_contender_that_raises_is_recorded_and_the_others_are_timed(monkeypatch, tmp_path):
    class WithoutLosses:  # another version of the package
        pass

    def imported(name):
        if name == "inf_cl":
            raise ImportError("No module named 'inf_cl'")
        return WithoutLosses()

    monkeypatch.setattr(importlib, "import_module", imported)
    (case,) = list(bench_gpu.run("sigmoid", "cpu", True, 60, tmp_path))[:1]
    timed = case["results"]
    assert timed["open_clip"] == {
        "role": "baseline",
        "failed": "AttributeError: 'WithoutLosses' object has no attribute 'SigLipLoss'",
    }
    assert timed["gapkern"]["calls"] >= 3
    assert timed[checks.EAGER]["median"] > 0
    result = results.collect(tmp_path)
    assert any("open_clip" in line and "failed: AttributeError" in line for line in results.table(result))


FAILURES = [
    TypeError("got an unexpected keyword argument 'scale'"),
    ImportError("absent"),
    AttributeError("renamed"),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 2])
def test_failures_at_first_and_while_timed(error, after):
    calls = []

    def failing():
        calls.append(1)
        if len(calls) > after:
            raise error
        return 1

    def check(results):
        assert results["ours"] == results["other"]

    contenders = [harness.Contender("other", failing, "baseline"), harness.Contender("ours", lambda: 1)]
    case = harness.Case({}, contenders, check, "other")
    result = harness.time_case(case, seconds=0.01, most=4, guarded=True)
    assert result["results"]["other"] == {"role": "baseline", "failed": f"{type(error).__name__}: {error}"}
    assert result["results"]["ours"]["calls"] >= 3
    assert len(calls) == after + 1
    with pytest.raises(type(error)):
        harness.time_case(case, seconds=0.01, most=4)


def test_a_wrong_result_of_another_is_its_failure_and_of_ours_an_error():
    right, wrong = [torch.ones(3)], [torch.zeros(3)]
    assert "other" in checks.against_eager({checks.EAGER: right, "other": wrong, "gapkern": right}, 1e-3)
    with pytest.raises(AssertionError):
        checks.against_eager({checks.EAGER: right, "gapkern": wrong}, 1e-3)


def test_ours_failing_is_a_failure_of_the_run(monkeypatch, tmp_path):
    def nearest(queries, gallery):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(rowwise, "nearest", nearest)
    monkeypatch.setattr(sys, "argv", f"bench_gpu.py search --out {tmp_path} --device cpu --quick".split())
    assert bench_gpu.main() == 1
    first, second = json.loads((tmp_path / "section-search.json").read_text())
    assert first["results"]["gapkern"]["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "median" in second["results"]["gapkern, exact"]


def test_a_case_that_cannot_be_made_is_recorded(monkeypatch, tmp_path):
    def section(device, quick):
        yield harness.Case({"N": 1}, [harness.Contender("gapkern", lambda: 1)])
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB")

    monkeypatch.setitem(bench_gpu.SECTIONS, "search", section)
    done = bench_gpu.run("search", "cpu", True, 60, tmp_path)
    assert [list(case) for case in done] == [["N", "baseline", "traffic", "results"], ["error"]]
    assert json.loads((tmp_path / "section-search.json").read_text()) == done


def test_an_interrupted_write_leaves_the_last_whole_file(monkeypatch, tmp_path):
    written = []

    def section(device, quick):
        for n in range(3):
            yield harness.Case({"N": n}, [harness.Contender("gapkern", lambda: 1)])
            written.append(json.loads((tmp_path / "section-search.json").read_text()))
            assert [p.name for p in tmp_path.iterdir()] == ["section-search.json"]

    monkeypatch.setitem(bench_gpu.SECTIONS, "search", section)
    dumps = json.dumps

    def interrupted(value, **options):
        if len(value) == 3:
            raise KeyboardInterrupt
        return dumps(value, **options)

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.run("search", "cpu", True, 60, tmp_path)
    assert [len(cases) for cases in written] == [1, 2]
    assert [case["N"] for case in json.loads((tmp_path / "section-search.json").read_text())] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("everything", "invalid choice: 'everything'"),
        ("search --seconds soon", "--seconds: invalid float value"),
        ("collect", "--out: needed"),
        ("search --device tpu", "--device: expected cpu or cuda"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments.split()])
    with pytest.raises(SystemExit):
        bench_gpu.main()
    assert message in capsys.readouterr().err


def test_collected_with_each_contenders_floor(tmp_path):
    for section in ("ceilings", "contrastive", "rowwise", "ours", "rivals"):
        bench_gpu.run(section, "cpu", True, 60, tmp_path)
    result = results.collect(tmp_path)
    assert set(result["rates"]) == {"copy", "bfloat16", "float32", "float64"}
    ours = result["sections"]["contrastive"][0]["results"]
    keep, recompute = (ours[f"gapkern, {kind}"] for kind in ("keep", "recompute"))
    assert keep["floor"] / recompute["floor"] == pytest.approx(0.75)
    assert recompute["floor"] == pytest.approx(8 * 64 * 64 * 32 / result["rates"]["bfloat16"])
    assert len(list(results.table(result))) > 10
    softmax, sigmoid = result["sections"]["rivals"]
    assert sigmoid["results"]["gapkern"]["floor"] / softmax["results"]["gapkern, recompute"]["floor"] == pytest.approx(
        0.75
    )


@pytest.mark.parametrize(("section", "room"), [("ours", losses), ("rivals", rivals)], ids=["ours", "rivals"])
def test_a_wrong_gradient_of_a_large_batch_is_seen(monkeypatch, section, room, tmp_path):
    gradients = checks.gradients
    monkeypatch.setattr(room, "gradients", lambda *a: lambda: [v * 1.05 if v.dim() else v for v in gradients(*a)()])
    assert all("AssertionError" in case["error"] for case in bench_gpu.run(section, "cpu", True, 60, tmp_path))


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


def _stages():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    return re.findall(r"^(?:stage|measure|sanitize) (\w+)(?: (\d+))?", script, re.M), script


def test_what_is_wanted_most_comes_first_and_fits_beside_a_build_of_300_seconds():
    stages, script = _stages()
    names = [name for name, _ in stages]
    assert set(bench_gpu.SECTIONS) < set(names)
    assert names[:6] == ["smoke", "ours", "ceilings", "rivals", "contrastive", "sigmoid"]
    assert names[-3:] == ["tests", "memcheck", "racecheck"]
    (seconds,) = re.findall(r"GPU_SECONDS:-(\d+)", script)
    (build,) = re.findall(r"stage build (\d+) .*setup.py", script)
    assert int(seconds) < 600
    assert int(build) + sum(int(limit) for _, limit in stages[:4]) < int(seconds)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_whole_run_dry(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "WHEELS": str(tmp_path / "none")}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--dry", tmp_path]
    before = {path: path.read_bytes() for path in (ROOT / "bench" / "results").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stages, _ = _stages()
    written = [line.split("\t")[0] for line in (tmp_path / "stages.txt").read_text().splitlines()]
    assert set(written) == {name for name, _ in stages} | {"build"}
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["sections"]) == set(bench_gpu.SECTIONS) - {"memory"}  # that is of CUDA alone
    assert [c["error"] for cases in result["sections"].values() for c in cases if "error" in c] == []
    assert before == {path: path.read_bytes() for path in (ROOT / "bench" / "results").iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_when_the_time_is_over_the_rest_is_skipped_and_collected(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "GPU_SECONDS": "6"}
    command = ["bash", ROOT / "bench" / "gpu.sh", "--dry", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "racecheck: skipped" in done.stdout
    assert "tests\tskipped: the 6 s are over\t0 s" in (tmp_path / "stages.txt").read_text()
    assert (tmp_path / "gpu.json").exists()


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
    for name in ("contrastive_sm90", "losses", "meanshift", "perturb", "robustness", "software_gpu"):
        assert f"tests/test_{name}.py::" in done.stdout

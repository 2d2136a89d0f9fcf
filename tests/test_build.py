"""Building, installing and loading: that it works, what is compiled, and what is said when it does not."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not beside the tests", allow_module_level=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources without anything built."""
    copy = tmp_path / "gapkern"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "lib", ".*cache", "*.egg-info"),
    )
    return copy


def run(command, folder, **env):
    environment = {**os.environ, "GAPKERN_CUDA": "off", **env}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def build(folder, *arguments, **env):
    return run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", *arguments], folder, **env)


@pytest.fixture
def unoptimised(tmp_path):
    """The environment in which compilers are told -O0 last: a build of what is not run takes a quarter of the time."""
    launcher = tmp_path / "unoptimised"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
    launcher.chmod(0o755)
    return {"CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)}


@pytest.mark.slow
def test_the_sdist_builds_and_nothing_is_compiled_twice(checkout, unoptimised):
    made = run([sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist('dist')"], checkout)
    assert made.returncode == 0, made.stdout + made.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(checkout / "unpacked", **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (sources,) = (checkout / "unpacked").iterdir()
    assert (sources / "LICENSE").exists()
    assert (sources / "tests" / "test_build.py").exists()
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    made = run(wheel, sources, **unoptimised)
    assert made.returncode == 0, made.stdout + made.stderr

    commands = json.loads(next(sources.glob("build/cmake-*/compile_commands.json")).read_text())
    compiled = Counter((entry["file"], entry["command"].partition(" -o ")[0]) for entry in commands)
    assert set(compiled.values()) == {1}, "the same source with the same flags"
    files = Counter(Path(file).relative_to(sources).as_posix() for file, _ in compiled)
    # Known to the build, and left out of it: the tests' device.
    assert not [*sources.glob("build/cmake-*/tests/**/*.o")]
    files = Counter({name: count for name, count in files.items() if not name.startswith("tests/software_gpu/")})
    instruction_sets = {"x86_64": 4, "AMD64": 4, "aarch64": 2, "arm64": 2}.get(platform.machine(), 1)
    assert files == {
        path.relative_to(ROOT).as_posix(): instruction_sets if path.name.startswith("kernels") else 1
        for path in (ROOT / "csrc").rglob("*.cpp")
    }
    (wheel,) = (sources / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gapkern/lib/libgapkern_cpu.so", "gapkern/py.typed", "gapkern/reference/perturb.py"} <= names
    assert not any(n.startswith(("tests/", "csrc/")) for n in names)
    target = checkout / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    used = run([sys.executable, "-P", "-c", "import gapkern; print(gapkern.__file__)"], target, PYTHONPATH=str(target))
    assert used.stdout.startswith(str(target)), used.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CXX": "/absent/c++"}, "no C++ compiler found (looked for /absent/c++); install one"),
        ({"GAPKERN_CUDA": "maybe"}, "GAPKERN_CUDA must be auto, on or off, got 'maybe'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a positive integer, got 'many'"),
        ({"GAPKERN_CUDA": "on", "CUDACXX": "/absent/nvcc"}, "GAPKERN_CUDA=on, but CUDACXX names /absent/nvcc"),
    ],
)
def test_a_build_that_cannot_be_says_why_in_one_line(checkout, env, message):
    made = build(checkout, **env)
    assert made.returncode != 0
    last = made.stderr.strip().splitlines()[-1]
    assert last.startswith("gapkern: ")
    assert message in last
    assert "Traceback" not in made.stderr


def test_an_old_pytorch_is_named(checkout, tmp_path):
    old = tmp_path / "old" / "torch"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("")
    (old / "version.py").write_text("__version__ = '2.5.1'\n")
    made = build(checkout, PYTHONPATH=str(old.parent))
    assert made.returncode != 0
    assert "gapkern: needs PyTorch >= 2.11, found 2.5.1" in made.stderr.strip().splitlines()[-1]


def test_an_absent_pytorch_is_named(checkout):
    hidden = (
        "import importlib.util as u, runpy, sys; real = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest); "
        "sys.argv = ['setup.py', '--quiet', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    made = run([sys.executable, "-c", hidden], checkout)
    assert made.returncode != 0
    assert "PyTorch is not installed in the build environment; run `pip install torch`" in made.stderr


def test_importing_an_unbuilt_checkout_says_what_to_do(checkout):
    for command in ([sys.executable, "-c", "import gapkern"], [sys.executable, "-m", "gapkern", "doctor"]):
        used = run(command, checkout)
        assert used.returncode != 0
        last = used.stderr.strip().splitlines()[-1]
        assert "the native libraries are not built" in last
        assert "rebuild with `make build`" in last
    assert "Traceback" not in used.stderr


def test_a_stale_build_is_noticed(checkout):
    shutil.copytree(ROOT / "gapkern" / "lib", checkout / "gapkern" / "lib")
    fresh = run([sys.executable, "-c", "import gapkern"], checkout)
    assert fresh.returncode == 0, fresh.stderr
    with open(checkout / "csrc" / "facts.cpp", "a") as file:
        file.write("// changed\n")
    used = run([sys.executable, "-m", "gapkern", "doctor"], checkout)
    assert used.returncode != 0
    (line,) = used.stderr.strip().splitlines()
    assert "csrc/ has changed since the native libraries were built; rebuild with `make build`" in line


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("env", "installed"),
    [
        ({"CUDACXX": "/some/nvcc"}, True),
        ({"CUDACXX": "/some/nvcc", "GAPKERN_CUDA": "on"}, True),
        ({"CUDACXX": "/some/nvcc", "GAPKERN_CUDA": "off"}, False),
        ({"CUDACXX": "/some/nvcc", "CUTLASS_PATH": "/some/cutlass"}, False),
    ],
)
def test_make_installs_the_headers_for_hopper_where_cuda_is_compiled(env, installed):
    environment = {"PATH": os.environ["PATH"], "VENV": "absent", **env}
    done = subprocess.run(["make", "-n", "build"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    headers = [i for i, line in enumerate(lines) if "--no-deps nvidia-cutlass==" in line]
    assert len(headers) == installed
    (native,) = (i for i, line in enumerate(lines) if line.endswith("--no-build-isolation --no-deps -e ."))
    assert all(i < native for i in headers)


def test_the_headers_for_hopper_are_of_one_version_everywhere():
    texts = [(ROOT / name).read_text() for name in ("Makefile", "docs/gpu.md", "cmake/Sm90.cmake", "pyproject.toml")]
    assert all(len(set(re.findall(r"nvidia-cutlass==([\d.]+\d)", text))) == 1 for text in texts)
    assert len({v for text in texts for v in re.findall(r"nvidia-cutlass==([\d.]+\d)", text)}) == 1


def test_what_is_loaded_and_why_not():
    from gapkern import _load

    found = {library.name: library for library in _load.status()}
    assert found["libgapkern_cpu"].loaded
    assert found["libgapkern_cuda"].detail


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_cpu_library_does_not_need_cuda():
    needed = subprocess.run(["readelf", "-d", ROOT / "gapkern/lib/libgapkern_cpu.so"], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("readelf is not installed")
    assert "cuda" not in needed.stdout

"""What `make wheel` makes, installed where there is neither a compiler nor the sources."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(not (ROOT / "gapkern" / "lib").is_dir(), reason="the sources are not beside the tests"),
]

# One step of what `gapkern demo` trains with.
LOSS_STEP = """
import sys, torch, gapkern
assert "site-packages" in gapkern.__file__ and gapkern.__file__.startswith(sys.prefix), gapkern.__file__
torch.manual_seed(0)
images, texts = (torch.nn.functional.normalize(torch.randn(64, 32), dim=1).requires_grad_() for _ in range(2))
loss = gapkern.ClipLoss()(images, texts, torch.tensor(20.0))
loss.backward()
logits = 20 * images.detach().double() @ texts.detach().double().T
labels = torch.arange(64)
exact = sum(torch.nn.functional.cross_entropy(each, labels) for each in (logits, logits.T)) / 2
assert abs(float(loss) - float(exact)) < 1e-5 * float(exact), (float(loss), float(exact))
assert images.grad.norm() > 0 and texts.grad.norm() > 0
print(float(loss))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that `make wheel` fills, from the objects of this checkout. Its packages are installed already."""
    folder = tmp_path_factory.mktemp("dist")
    venv = Path(sys.prefix)
    known = [f"--assume-old={venv}/stamps/{name}" for name in ("build", "packages-wheel")]
    done = subprocess.run(
        ["make", *known, "wheel", f"VENV={venv}", f"DIST={folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def fresh(dist, tmp_path_factory):
    """Runs programs of an environment that has the wheel, and nothing but it on PATH; PyTorch is lent to it."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Paths in a .pth are searched, but their own .pth files, an editable install's, are not read.
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = dist.glob("*.whl")
    environment = {"PATH": str(folder / "bin"), "HOME": str(folder.parent), "OMP_NUM_THREADS": "2"}
    assert not any(shutil.which(name, path=environment["PATH"]) for name in ("cc", "c++", "g++", "clang++", "nvcc"))

    def run(name, *arguments):
        command = [folder / "bin" / name, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-index"]
    installed = subprocess.run([*pip, wheel], env=environment, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return run


def test_the_wheel_is_for_every_python_and_has_only_our_libraries(dist):
    (wheel,) = dist.glob("*.whl")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    if sys.platform == "linux":
        assert re.fullmatch(r"manylinux_2_\d+_\w+(\.manylinux\w+)*", platform)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "Requires-Python: >=3.10" in metadata
    libraries = {name for name in names if name.endswith((".so", ".dylib")) or ".so." in name}
    assert libraries == {f"gapkern/lib/{path.name}" for path in (ROOT / "gapkern" / "lib").iterdir()}
    kinds = (".py", ".css", ".js", ".typed")
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gapkern").rglob("*") if path.suffix in kinds}
    packed = {name for name in names if name.startswith("gapkern/") and not name.endswith("/")}
    assert packed - libraries == ours


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_no_library_needs_python_or_names_a_folder(dist, tmp_path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for library in (tmp_path / "gapkern" / "lib").iterdir():
        entries = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu.so" in entries
        assert "python" not in entries
        assert not re.search(r"R(UN)?PATH", entries)


def test_the_sdist_has_what_a_build_reads(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "CMakeLists.txt", "csrc/facts.cpp", "cmake/Simd.cmake", "gapkern/_version.py"} <= names


def test_an_installed_wheel_is_healthy_without_a_compiler(fresh):
    found = json.loads(fresh("gapkern", "doctor", "--json"))
    assert found["healthy"]
    assert {library["name"]: library["loaded"] for library in found["libraries"]}["libgapkern_cpu"]
    assert found["build"]["sources"]


def test_an_installed_wheel_takes_a_training_step(fresh):
    assert float(fresh("python", "-c", LOSS_STEP)) > 0


def test_an_installed_wheel_searches(fresh, tmp_path):
    gallery = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    np.save(tmp_path / "gallery.npy", gallery)
    np.save(tmp_path / "queries.npy", gallery[[7, 30]] + np.float32(1e-3))
    fresh("gapkern", "index", tmp_path / "gallery.npy", "--out", tmp_path / "index")
    found = tmp_path / "found.json"
    fresh("gapkern", "search", tmp_path / "index", tmp_path / "queries.npy", "--k", "3", "--out", found)
    assert [each[0] for each in json.loads(found.read_text())["ids"]] == [7, 30]

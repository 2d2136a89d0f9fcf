"""What the tests compile, kept in build/ and brought up to date: `python -m tests.native` does it ahead of them."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
DEVICES = ("software_gpu", "gapkern_cuda_software")  # tests/software_gpu alone, and with gapkern's CUDA objects


def tool(name: str) -> str | None:
    """A program beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def device(target: str) -> Path | None:
    """The library of one of DEVICES; None where this checkout has no build, or none of CUDA."""
    if not (BUILD / "CMakeCache.txt").exists():
        return None
    with open(BUILD / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in another process may ask as well
        done = subprocess.run([tool("cmake"), "--build", BUILD, "--target", target], capture_output=True, text=True)
    if done.returncode and "unknown target" in done.stdout + done.stderr:
        return None
    assert done.returncode == 0, done.stdout + done.stderr
    return next((BUILD / "tests" / "software_gpu").glob(f"lib{target}.so"), None)


def simt() -> Path:
    """The folder of the device kernels' programs, compiled as C++ (tests/simt)."""
    folder = ROOT / "build" / "simt"
    for step in (["-S", ROOT / "tests" / "simt", "-B", folder], ["--build", folder, "--parallel", "2"]):
        done = subprocess.run([tool("cmake"), *map(str, step)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


if __name__ == "__main__" and sys.platform == "linux":
    for each in DEVICES:
        device(each)
    simt()
